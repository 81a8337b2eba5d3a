"""A model under gates: its loss and the time of its steps, taken without a trace in its training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.compiled import not_compiled
from ..adapters.freezing import frozen_view
from ..adapters.gates import Gates, pruned_view
from ..adapters.grid import AdapterGrid
from ..core.agreement import check_agreement, fingerprint
from ..core.costs import StepCost
from ..core.isolation import side_effect_free
from ..core.rows import number_of_rows
from . import timing
from .batches import own_copy
from .confidence import paired
from .memory import peak_bytes
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
        freezes (`bool`, *optional*, defaults to `False`): whether unselected sites stay, frozen.
    """

    def __init__(
        self,
        model: nn.Module,
        adapters: AdapterGrid,
        loss_fn: LossFunction,
        runtime: Runtime,
        freezes: bool = False,
    ) -> None:
        self.model = model
        self.adapters = adapters
        self.grid = adapters.grid
        self.gates = Gates(adapters.sites, compiled=runtime.compiled)
        self.runtime = runtime
        self.freezes = freezes
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

    def step_times(self, batch: Any) -> StepCost:
        """
        Time training steps of different depths, in seconds: the mean over all processes.

        Args:
            batch: a batch of the size of a training batch. Where batches are split, its first part is measured.
        """
        part, share = self._first_part(batch)
        return self._measure(lambda kept: self._seconds(part, kept) / share, timing.REPEATS, part)

    def step_memory(self, batch: Any) -> StepCost:
        """
        Count the memory of training steps of different depths, in bytes: what a step makes at its peak, and the LoRA
        weights with two moments each; the mean over all processes.

        Args:
            batch: a batch of the size of a training batch. Where batches are split, its first part is measured.
        """
        part, share = self._first_part(batch)

        def bytes_of(kept: Sequence[int]) -> float:
            with self._view(kept):
                return self._bytes(part) / share + self._lora_states(kept)

        return self._measure(bytes_of, 1, part)

    def step_seconds(self, batch: Any) -> float:
        """Seconds of a training step (forward and backward pass) of the model as it is: the least of a few."""
        part, share = self._first_part(batch)
        return min(self._time(part) for _ in range(timing.REPEATS)) / share

    def step_bytes(self, batch: Any, kept: Sequence[int]) -> float:
        """Bytes of a training step of the model as it is, in which these modules are left: see [`step_memory`]."""
        return self._bytes(batch) + self._lora_states(kept)

    def _first_part(self, batch: Any) -> tuple[Any, float]:
        """What is measured of a batch, which may be too large for all modules, and what share of its rows that has."""
        part, rows = self.split(batch)[0][0], number_of_rows(batch)
        return part, 1.0 if rows is None else (number_of_rows(part) or rows) / rows

    def _measure(self, cost_of: Callable[[Sequence[int]], float], repeats: int, batch: Any) -> StepCost:
        used = self._used(batch)
        cost = timing.measure_step_cost(cost_of, self.grid.row_of, self.grid.stacks, repeats, used)
        found = torch.tensor([cost.all_modules, cost.per_module, *cost.depth], dtype=torch.float32)
        flat = self.runtime.reduce(found).tolist()
        return StepCost(flat[0], tuple(flat[2:]), flat[1])

    def _used(self, batch: Any) -> list[bool]:
        """
        Which modules take part in the loss of a batch, on any process, since all of them must measure the same. The
        pass comes before those that are timed: the first of a shape is slower.
        """
        everything = range(len(self.grid))
        with self._view(everything), self.side_effect_free(training=True), self.gates.override(None):
            found = zip(self._weights(), self._pass(batch), strict=True)
            reached = {id(weight) for weight, gradient in found if gradient is not None}
        used = [float(any(id(weight) in reached for weight in site.parameters)) for site in self.adapters.sites]
        return (self.runtime.reduce(torch.tensor(used, dtype=torch.float32)) > 0).tolist()

    def _lora_states(self, kept: Sequence[int]) -> int:
        """Bytes of the LoRA weights of some modules, with two moments each."""
        parameters = [parameter for index in kept for parameter in self.adapters.sites[index].parameters]
        return 3 * sum(parameter.numel() * parameter.element_size() for parameter in parameters)

    def _seconds(self, batch: Any, kept: Sequence[int]) -> float:
        with self._view(kept):
            return self._time(batch)

    def _view(self, kept: Sequence[int]) -> AbstractContextManager[None]:
        """For a while, the model as it would be with only these modules selected."""
        view = frozen_view if self.freezes else pruned_view
        return view(self.model, self.adapters.sites, kept)

    def _time(self, batch: Any) -> float:
        with self.side_effect_free(training=True), self.gates.override(None):
            return timing.timed(lambda: self._pass(batch), self.gates.device)

    def _bytes(self, batch: Any) -> int:
        with self.side_effect_free(training=True), self.gates.override(None):
            return peak_bytes(lambda: self._pass(batch))

    def _weights(self) -> list[nn.Parameter]:
        # With what is trained beside the LoRA, such as a head: the backward pass goes down to the lowest of all.
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def _pass(self, batch: Any) -> Sequence[Tensor | None]:
        """The gradients of all that is trained; `None` of what takes no part in the loss."""
        weights, loss = self._weights(), self.loss(batch)
        if not loss.requires_grad:  # no part of it is trained: the step is a forward pass
            return [None] * len(weights)
        return torch.autograd.grad(loss, weights, allow_unused=True)
