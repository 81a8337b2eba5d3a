"""Dynamic reallocation: modules are switched off and on again while a run goes on. It works without any Trainer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..core.allocation import Allocation
from ..core.selection import Selection
from .search import ArchitectureSearch


class Reallocation:
    """
    Keeps only the best modules of a search on, and chooses anew when it is asked to (HeteroLoRA's dynamic form,
    https://huggingface.co/papers/2406.14956).

    A module that is off is not called: neither pass computes or stores anything for it. Its `.grad` is `None`, so
    PyTorch's optimizers pass it over, weight decay included: weights and moments stay bit for bit, and its step
    counter stands still until it is on again.

    [`SelectionRun`] calls it at the moments of `reallocate_every`.

    Args:
        search ([`ArchitectureSearch`]): a search with a method that scores.

    Attributes:
        on (`Tensor` of shape `(n,)` and dtype `torch.bool`): which modules are on; all of them at first.
        history (`list[Allocation]`): what was chosen so far.

    Raises:
        ValueError: if the method of the search does not score.
    """

    def __init__(self, search: ArchitectureSearch) -> None:
        if search.method.searches:
            raise ValueError(
                f"You passed a search with `method={search.config.method!r}`, which scores nothing that could be "
                "chosen anew. Please use a method that scores, such as `DiffoRAConfig(method='snip')`."
            )
        self.search = search
        self.on = torch.ones(len(search.grid), dtype=torch.bool)
        self.history: list[Allocation] = []

    def reallocate(self, batches: Sequence[Any], step: int) -> int:
        """
        Score all modules, with all of them on, and leave only the best ones on. Call it between two optimizer steps.
        The scoring itself leaves no trace; when it fails, what was on stays on.

        Args:
            batches (`Sequence`): the scoring batches, as the search's `loss_fn` takes them.
            step (`int`): present optimizer step, for the record.

        Returns:
            `int`: how many modules were switched on or off.

        Raises:
            ValueError: as [`ArchitectureSearch.score`], and on every process if they would not all choose the same.
        """
        with self.all_on():
            scores = self.search.score(batches)
            chosen = self.search.method.discretize()
            self.search.check_choice(chosen)
        changed = int((chosen != self.on).sum())
        self.switch(chosen)
        self.history.append(Allocation(step, tuple(scores.tolist()), tuple(chosen.tolist())))
        return changed

    def switch(self, on: Tensor) -> None:
        """
        Switch modules on and off.

        Args:
            on (`Tensor` of shape `(n,)` and dtype `torch.bool`): which are on from now on.
        """
        for site, after in zip(self.search.adapters.sites, on.tolist(), strict=True):
            site.enabled = after
            if not after:
                for weight in site.parameters:
                    weight.grad = None  # or the optimizer would step it
        self.on = on.clone()

    @contextmanager
    def all_on(self) -> Iterator[None]:
        """For a while, all modules are on."""
        before = self.on
        self.switch(torch.ones_like(before))
        try:
            yield
        finally:
            self.switch(before)

    def release(self) -> bool:
        """Switch all modules on for good; returns whether any was off."""
        off = not bool(self.on.all())
        self.switch(torch.ones_like(self.on))
        return off

    def finish(self, step: int | None = None) -> Selection:
        """
        Make the set in force final: all modules are on again, the gates are off, and the selection, which holds the
        history, says what to prune. To carry it out, pass it to [`apply_selection`].

        Args:
            step (`int`, *optional*): present optimizer step, for the record.

        Raises:
            ValueError: if nothing was chosen yet.
        """
        if not self.history:
            raise ValueError("No module was chosen yet. Please call `reallocate` before the pruning.")
        self.search.discretize(torch.tensor(self.history[-1].on))
        self.release()
        return replace(self.search.finish(step), history=tuple(self.history))

    def restore(self, history: Sequence[Allocation]) -> None:
        """
        Restore a history, and the modules that were on at its end. The scores that they were chosen by are the
        method's.
        """
        if any(len(entry.on) != len(self.on) or len(entry.scores) != len(self.on) for entry in history):
            raise ValueError(f"The history is not one of {len(self.on)} modules.")
        self.history = list(history)
        self.switch(torch.tensor(history[-1].on) if history else torch.ones_like(self.on))
