"""A model under gates and its losses, taken without a trace in its training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.compiled import not_compiled
from ..adapters.gates import Gates
from ..adapters.grid import AdapterGrid
from ..core.agreement import check_agreement, fingerprint
from ..core.isolation import side_effect_free
from .batches import own_copy
from .confidence import paired
from .micro_batches import MicroBatches
from .runtime import Runtime


LossFunction = Callable[[nn.Module, Any], Tensor]


def finite_mean(losses: Tensor) -> float:
    """The mean of those losses that are finite; NaN if none is."""
    return float(losses[losses.isfinite()].mean())


def paired_means(before: Tensor, after: Tensor) -> tuple[float, float]:
    """The means of two losses of the same batches, `(k,)` each, over those in which both are finite, if there are."""
    found = paired(before, after)
    return (finite_mean(before), finite_mean(after)) if found is None else (found.before, found.after)


class GatedModel:
    """
    A model whose sites are behind gates.

    Args:
        model (`PeftModel`): the model.
        adapters ([`~diffora_trainer.adapters.grid.AdapterGrid`]): its sites.
        loss_fn (`Callable`): `loss_fn(model, batch)` gives the scalar loss of a batch.
        runtime ([`~diffora_trainer.search.runtime.Runtime`]): several processes and a loss scaler.
    """

    def __init__(self, model: nn.Module, adapters: AdapterGrid, loss_fn: LossFunction, runtime: Runtime) -> None:
        self.model = model
        self.adapters = adapters
        self.grid = adapters.grid
        self.gates = Gates(adapters.sites, compiled=runtime.compiled)
        self.runtime = runtime
        self.micro_batches = MicroBatches(1)
        self._loss_fn = loss_fn
        self._checkpointing = False

    def loss(self, batch: Any) -> Tensor:
        """The loss of a batch, or a `TypeError` if it is not one number."""
        loss = self._loss_fn(self.model, own_copy(batch))
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise TypeError(
                f"The loss function returned {found}, but one number is needed. Please return a tensor of one "
                "element, such as `model(**batch).loss`."
            )
        return loss

    def split(self, batch: Any) -> list[tuple[Any, float]]:
        """The micro-batches of a held-out batch, and what the loss of each is multiplied with."""

        def loss_of(part: Any) -> float:
            with self.side_effect_free(training=False), torch.no_grad():
                return float(self.loss(part))

        return self.micro_batches.split(batch, loss_of)

    @contextmanager
    def side_effect_free(self, training: bool | None = None) -> Iterator[None]:
        """
        Run the model without a trace, and not compiled: by default in evaluation mode, unless it checkpoints
        activations.
        """
        training = self._checkpointing if training is None else training
        with not_compiled(self.runtime.compiled), side_effect_free(self.model, self.gates.device, training):
            yield

    def check_agreement(self, record: str) -> None:
        """
        Make sure that all processes hold the same record of what they search, before they wait for each other.

        Args:
            record (`str`): what must be equal.

        Raises:
            ValueError: on every process, if any two differ.
        """
        what = "what to search: modules, options, schedule, or the number of held-out rows or batches"
        remedy = (
            "Please start all of them with the same script, arguments and data, and give each as many held-out "
            "batches as the others."
        )
        check_agreement(fingerprint(record), self.runtime.reduce, what, remedy)

    def check_choice(self, kept: Tensor, ranks: Sequence[Any] = ()) -> None:
        """Raise a `ValueError` on every process if they would not keep the same, bools, and the same ranks."""
        remedy = "Please make sure that all of them read the same data and files."
        bits = torch.cat([kept, fingerprint(repr(tuple(ranks)))])
        check_agreement(bits, self.runtime.reduce, "which modules to keep", remedy)

    def training_gates(self) -> Tensor | None:
        """The gates under which the weights train next, `(n,)`, or `None` if all are open."""
        return None

    def held_out_loss(self, batches: Iterable[Any], relaxed: bool = False) -> float:
        """
        Mean loss over batches, in evaluation mode and without gradients; it leaves no trace in the training. Those
        whose loss is not finite, as without any label, are left out; NaN, if there are no others.

        Args:
            batches (`Iterable`): as `loss_fn` takes them.
            relaxed (`bool`, *optional*, defaults to `False`): under the gates that the weights are trained with, drawn
                anew for each batch, instead of those of evaluation.
        """
        return finite_mean(self.held_out_losses(batches, relaxed))

    def held_out_losses(self, batches: Iterable[Any], relaxed: bool = False) -> Tensor:
        """The loss of each batch, `(k,)`: see [`held_out_loss`]."""
        losses = []
        with self.side_effect_free(training=False), torch.no_grad():
            for batch in batches:
                with self.gates.override(self.training_gates()) if relaxed else nullcontext():
                    losses.append(self.loss(batch).detach().float().cpu().reshape(1))
        return self.runtime.reduce(torch.cat(losses))
