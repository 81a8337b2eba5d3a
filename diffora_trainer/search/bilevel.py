"""The upper level of the search: gradients of the held-out loss with respect to the gates."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.gates import Gates


_NO_GATE = (
    "The loss does not depend on any gate, so nothing can be learned about the modules. Please let `loss_fn` run "
    "the model that it is given, without `torch.no_grad` and not only in its backward pass; of a trainer, that is its "
    "`compute_loss`, or `compute_architecture_loss` where an architecture step needs another loss."
)

SECOND_ORDER_IN_HALF = (
    "You passed `arch_order=2` to a run in half precision. What it adds to the gradient of the gates is a small "
    "difference of gradients, which at usual learning rates bfloat16 and float16 leave little but rounding of. Please "
    "load the model in float32 and train it without `bf16` and `fp16`, or leave `arch_order=2` out."
)


def in_half_precision(model: nn.Module) -> bool:
    """Whether some weights of a model are floating-point numbers of 16 bits or fewer."""
    return any(p.is_floating_point() and p.dtype.itemsize < 4 for p in model.parameters())


@dataclass(frozen=True)
class ArchitectureGradient:
    """
    Takes gradients with respect to the gates of a model. It leaves weights and every `.grad` as they were; random
    streams and the model's mode are the caller's affair.

    Args:
        model (`PeftModel`): the model.
        gates ([`~diffora_trainer.adapters.gates.Gates`]): the gates, attached to it.
        loss (`Callable`): gives the scalar loss of a batch.
        loss_scale (`Callable`): gives the factor of the loss while its gradient is taken, in float16.
        split (`Callable`): gives the parts of a batch whose gradients are taken one after the other, with what the
            loss of each is multiplied with.
    """

    model: nn.Module
    gates: Gates
    loss: Callable[[Any], Tensor]
    loss_scale: Callable[[], float]
    split: Callable[[Any], Sequence[tuple[Any, float]]]

    def first_order(self, batch: Any, values: Tensor) -> tuple[Tensor, Tensor]:
        """
        The gradient at the present weights.

        Args:
            batch: a held-out batch.
            values (`Tensor` of shape `(n,)`): the gates at which it is taken.

        Returns:
            `tuple[Tensor, Tensor]`: the loss, and its gradient of shape `(n,)`.

        Raises:
            ValueError: if the loss does not depend on any gate.
        """
        loss, (gradient,) = self._gradients(batch, values, [])
        return loss, gradient

    def second_order(
        self, batch: Any, train_batch: Any, learning_rate: float, values: Tensor
    ) -> tuple[Tensor, Tensor]:
        """
        The gradient after one training step, by finite differences: the unrolled step of DARTS
        (https://huggingface.co/papers/1806.09055, eqs. 7 and 8). The weights are put back.

        Args:
            batch: a held-out batch.
            train_batch: the training batch of the step that is looked ahead.
            learning_rate (`float`): its learning rate.
            values (`Tensor` of shape `(n,)`): the gates at which the gradient is taken.

        Returns:
            `tuple[Tensor, Tensor]`: the loss after that step, and the gradient of shape `(n,)`.
        """
        weights = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        backup = [weight.detach().clone() for weight in weights]

        def place(directions: Sequence[Tensor], length: float) -> None:
            with torch.no_grad():
                for weight, start, direction in zip(weights, backup, directions, strict=True):
                    weight.copy_(start).add_(direction, alpha=length)

        try:
            _, (_, *descent) = self._gradients(train_batch, values, weights)
            place(descent, -learning_rate)
            loss, (gradient, *ahead) = self._gradients(batch, values, weights)
            zero = torch.zeros((), dtype=torch.float32, device=loss.device)
            norm = float(torch.sqrt(sum((g.float().square().sum() for g in ahead), zero)))
            if norm == 0 or not math.isfinite(norm):  # nothing to correct, or a step that will be skipped
                return loss, gradient
            epsilon = 0.01 / norm
            place(ahead, epsilon)
            _, (above,) = self._gradients(train_batch, values, [])
            place(ahead, -epsilon)
            _, (below,) = self._gradients(train_batch, values, [])
        finally:
            with torch.no_grad():
                for weight, start in zip(weights, backup, strict=True):
                    weight.copy_(start)
        return loss, gradient - learning_rate * (above - below) / (2 * epsilon)

    def _gradients(self, batch: Any, values: Tensor, weights: list[nn.Parameter]) -> tuple[Tensor, list[Tensor]]:
        """Loss of a batch at some gates, and its gradients with respect to the gates and the weights."""
        losses: list[Tensor] = []
        gradients: list[Tensor] = []
        for part, weight in self.split(batch):
            loss, found = self._gradients_of_part(part, weight, values, weights)
            losses.append(loss)
            gradients = [sum_ + new for sum_, new in zip(gradients, found, strict=True)] if gradients else found
        return torch.stack(losses).sum(), gradients

    def _gradients_of_part(
        self, batch: Any, factor: float, values: Tensor, weights: list[nn.Parameter]
    ) -> tuple[Tensor, list[Tensor]]:
        leaf = values.clone().to(self.gates.device).requires_grad_()
        with self.gates.override(leaf):
            loss = self.loss(batch)
            if not loss.requires_grad:
                raise ValueError(_NO_GATE)
            loss = loss if factor == 1.0 else loss * factor
            scale = self.loss_scale()
            # `torch.autograd.grad` leaves every `.grad` alone, and computes nothing that only the weights need.
            found = torch.autograd.grad(loss * scale, [leaf, *weights], allow_unused=True)
        if found[0] is None:
            raise ValueError(_NO_GATE)
        gradients = [
            torch.zeros_like(x) if g is None else g / scale for g, x in zip(found, [leaf, *weights], strict=True)
        ]
        return loss.detach().reshape(()), gradients
