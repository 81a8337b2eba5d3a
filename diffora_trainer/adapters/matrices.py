"""What an adapter is made of: its parameters, and the two matrices whose rows and columns are its components."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils.hooks import RemovableHandle

from ..compat.torch import convolved
from .moments import rescale_moments


class Adapter(ABC):
    """
    An adapter of one module.

    Args:
        name (`str`): name of the module in the base model.
        rank (`int`): rank of the adapter; 1 if its parameters do not belong to units of rank alone (see [`cost`]).
    """

    _folded: tuple[tuple[nn.Parameter, Tensor], ...] = ()

    def __init__(self, name: str, rank: int) -> None:
        self.name = name
        self.rank = rank

    @property
    @abstractmethod
    def parameters(self) -> list[nn.Parameter]:
        """The adapter's parameters; that of the up-projection, which starts at 0, comes last."""

    @property
    @abstractmethod
    def gated(self) -> nn.Module:
        """
        The module whose output a gate multiplies. What follows it has to be linear and without a bias, so that the
        adapter's whole contribution is scaled.
        """

    @property
    def cost(self) -> int:
        """Trainable parameters of each unit of rank."""
        return sum(parameter.numel() for parameter in self.parameters) // self.rank

    @property
    def matrices(self) -> tuple[nn.Parameter, nn.Parameter] | None:
        """
        The two trained matrices whose product is the adapter, `(r, ...)` and `(..., r, ...)`: a component is a row of
        the first one with a column of the second one. `None` if it is not made of such components. By default those
        that are all of its parameters, and have a row and a column for each unit of rank.
        """
        if len(found := self.parameters) != 2 or min(matrix.ndim for matrix in found) < 2:
            return None
        down, up = found
        return (down, up) if down.shape[0] == up.shape[1] == self.rank else None

    @property
    def reads_vectors(self) -> bool:
        """Whether the first of its [`matrices`] multiplies vectors, which [`watch_inputs`] gives."""
        return self.matrices is not None

    @property
    def down(self) -> nn.Module:
        """The module that has the first of its [`matrices`]."""
        return self.gated

    def watch_inputs(self, read: Callable[[Tensor], None]) -> RemovableHandle:
        """
        Until the handle is removed, have a function called with the vectors that the first of its [`matrices`]
        multiplies, `(..., size)`. Those of a convolution are the patches under its kernel.
        """

        def before(_: nn.Module, args: Any) -> None:
            read(_vectors(self.down, args[0].detach()))

        return self.gated.register_forward_pre_hook(before)

    def fold(self, factor: float) -> None:
        """
        Multiply a gate into the weights for good. A kind that has another way of it does so by [`multiply`], or says
        with [`note_folded`] what it has done.
        """
        if factor != 1.0:
            self.multiply(self.parameters[-1], factor)

    def multiply(self, weight: nn.Parameter, factors: Tensor | float) -> None:
        """
        Multiply gates, of a shape that broadcasts, into a weight that was trained under them, and note it for
        [`rescale_moments`].
        """
        with torch.no_grad():
            weight.mul_(factors.to(weight.device) if isinstance(factors, Tensor) else factors)
        self.note_folded(weight, factors)

    def note_folded(self, weight: nn.Parameter, factors: Tensor | float) -> None:
        """Note that a gradient of a weight is `1 / factors` times what it was, since gates are folded."""
        # Of their own, since a method may set its gates to 1 now.
        self._folded = (*self._folded, (weight, torch.as_tensor(factors).detach().clone()))

    def rescale_moments(self, optimizer: Any) -> None:
        """
        Let what an optimizer holds of the weights fit the gradients that they have since gates were folded (see
        [`~diffora_trainer.adapters.moments.rescale_moments`]). Each gate counts once.

        Args:
            optimizer (`torch.optim.Optimizer`): the live optimizer of the weights, or one that wraps it.
        """
        for weight, factors in self._folded:
            rescale_moments(weight, factors, optimizer)
        self._folded = ()


def _vectors(module: nn.Module, inputs: Tensor) -> Tensor:
    """What a linear layer, or a convolution, multiplies by the rows of its weight."""
    if not isinstance(module, _ConvNd):
        return inputs
    # A convolution by the identity gives each number of a patch in a channel of its own.
    size = module.weight[0].numel()
    identity = torch.eye(size, device=inputs.device, dtype=inputs.dtype).view(size, *module.weight.shape[1:])
    return convolved(module, inputs, identity).movedim(1, -1)
