"""Gates of components that are trained with the weights, by the training loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .search import ArchitectureSearch


class TrainedGates:
    """
    The gates of a method that trains one for each component, as leaves of the graph of a training step. Their
    gradients add up over the batches of a step, as those of the weights do, and belong to no optimizer but the
    method's own.

    Args:
        search ([`ArchitectureSearch`]): a search whose method `trains_gates`.
        until (`int`): the step of the choice.

    Raises:
        ValueError: if the training steps run a compiled model.
    """

    def __init__(self, search: ArchitectureSearch, until: int) -> None:
        if search.runtime.compiled:
            raise ValueError(
                f"You passed `method={search.config.method!r}`, which trains gates that a model compiled by "
                "`torch.compile` does not see. Please train without `torch_compile`, or use another method."
            )
        self.search, self._until = search, until
        self._leaves: list[Tensor] = []
        self._scale = 1.0

    def renew(self) -> None:
        """Let the method's present gates act, without a gradient."""
        device = self.search.gates.device
        self._leaves = [gates.to(device).requires_grad_() for gates in self.search.method.component_gates()]
        self.search.gates.set_masks(self._leaves)

    def before_step(self) -> None:
        """Note by what the loss of the coming forward pass is multiplied."""
        self._scale = self.search.runtime.loss_scale()

    def step(self, optimizer: Any) -> None:
        """
        Move the gates by the gradients of the training step just made: the mean over all processes. A gradient that is
        not finite moves nothing, as it moves no weight where a loss is scaled.

        Args:
            optimizer (`torch.optim.Optimizer`): that of the weights, whose learning rate is the default.
        """
        found = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in self._leaves]
        gradient = self.search.runtime.reduce(torch.cat([part.float().cpu() for part in found])) / self._scale
        if torch.isfinite(gradient).all():
            method = self.search.method
            parts = gradient.split([len(leaf) for leaf in self._leaves])
            self.search.reached |= torch.tensor([bool(part.any()) for part in parts])
            method.gate_step(gradient, float(optimizer.param_groups[0]["lr"]))
            method.after_gate_step(self.search.adapters.sites, min(1.0, method.steps / self._until))
        else:
            self.search.skipped_steps += 1
        self.renew()
