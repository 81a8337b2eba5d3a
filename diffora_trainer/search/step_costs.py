"""The time and the memory of training steps of a model under gates, taken without a trace in its training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.freezing import frozen_view
from ..adapters.gates import pruned_view
from ..core.costs import StepCost
from ..core.rows import number_of_rows
from . import timing
from .losses import GatedModel
from .memory import peak_bytes


class StepMeter:
    """
    Measures training steps of a model.

    Args:
        gated ([`~diffora_trainer.search.losses.GatedModel`]): the model, its sites and its loss.
        freezes (`bool`): whether unselected sites stay, frozen.
    """

    def __init__(self, gated: GatedModel, freezes: bool) -> None:
        self._gated = gated
        self._sites = gated.adapters.sites
        self._freezes = freezes

    def times(self, batch: Any) -> StepCost:
        """
        Time training steps of different depths, in seconds: the mean over all processes.

        Args:
            batch: a batch of the size of a training batch. Where batches are split, its first part is measured.
        """
        part, share = self._first_part(batch)

        def seconds_of(kept: Sequence[int]) -> float:
            with self._view(kept):
                return self._time(part) / share

        return self._measure(seconds_of, timing.REPEATS, part)

    def memory(self, batch: Any) -> StepCost:
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

    def seconds_now(self, batch: Any) -> float:
        """Seconds of a training step (forward and backward pass) of the model as it is: the least of a few."""
        part, share = self._first_part(batch)
        return min(self._time(part) for _ in range(timing.REPEATS)) / share

    def bytes_now(self, batch: Any, kept: Sequence[int]) -> float:
        """Bytes of a training step of the model as it is, in which these modules are left: see [`memory`]."""
        return self._bytes(batch) + self._lora_states(kept)

    def _first_part(self, batch: Any) -> tuple[Any, float]:
        """What is measured of a batch, which may be too large for all modules, and what share of its rows that has."""
        part, rows = self._gated.split(batch)[0][0], number_of_rows(batch)
        return part, 1.0 if rows is None else (number_of_rows(part) or rows) / rows

    def _measure(self, cost_of: Callable[[Sequence[int]], float], repeats: int, batch: Any) -> StepCost:
        used = self._used(batch)
        grid = self._gated.grid
        cost = timing.measure_step_cost(cost_of, grid.row_of, grid.stacks, repeats, used)
        found = torch.tensor([cost.all_modules, cost.per_module, *cost.depth], dtype=torch.float32)
        flat = self._gated.runtime.reduce(found).tolist()
        return StepCost(flat[0], tuple(flat[2:]), flat[1])

    def _used(self, batch: Any) -> list[bool]:
        """
        Which modules take part in the loss of a batch, on any process, since all of them must measure the same. The
        pass comes before those that are timed: the first of a shape is slower.
        """
        everything = range(len(self._gated.grid))
        with self._view(everything), self._as_in_training():
            found = zip(self._weights(), self._pass(batch), strict=True)
            reached = {id(weight) for weight, gradient in found if gradient is not None}
        used = [float(any(id(weight) in reached for weight in site.parameters)) for site in self._sites]
        return (self._gated.runtime.reduce(torch.tensor(used, dtype=torch.float32)) > 0).tolist()

    def _lora_states(self, kept: Sequence[int]) -> int:
        """Bytes of the LoRA weights of some modules, with two moments each."""
        parameters = [parameter for index in kept for parameter in self._sites[index].parameters]
        return 3 * sum(parameter.numel() * parameter.element_size() for parameter in parameters)

    def _view(self, kept: Sequence[int]) -> AbstractContextManager[None]:
        """For a while, the model as it would be with only these modules selected."""
        view = frozen_view if self._freezes else pruned_view
        return view(self._gated.model, self._sites, kept)

    @contextmanager
    def _as_in_training(self) -> Iterator[None]:
        with self._gated.side_effect_free(training=True), self._gated.gates.override(None):
            yield

    def _time(self, batch: Any) -> float:
        with self._as_in_training():
            return timing.timed(lambda: self._pass(batch), self._gated.gates.device)

    def _bytes(self, batch: Any) -> int:
        with self._as_in_training():
            return peak_bytes(lambda: self._pass(batch))

    def _weights(self) -> list[nn.Parameter]:
        # With what is trained beside the LoRA, such as a head: the backward pass goes down to the lowest of all.
        return [parameter for parameter in self._gated.model.parameters() if parameter.requires_grad]

    def _pass(self, batch: Any) -> Sequence[Tensor | None]:
        """The gradients of all that is trained; `None` of what takes no part in the loss."""
        weights, loss = self._weights(), self._gated.loss(batch)
        if not loss.requires_grad:  # no part of it is trained: the step is a forward pass
            return [None] * len(weights)
        return torch.autograd.grad(loss, weights, allow_unused=True)
