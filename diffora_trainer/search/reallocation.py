"""Dynamic reallocation: modules are switched off and on again while a run goes on. It works without any Trainer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.grid import parameters_of, searched_modules
from ..core.selection import Allocation, Selection
from ..experimental.shortcuts.shortcuts import Shortcut
from .search import ArchitectureSearch


class Reallocation:
    """
    Keeps only the best modules of a search on, and chooses anew when it is asked to (HeteroLoRA's dynamic form,
    https://huggingface.co/papers/2406.14956).

    A module that is off is not called: neither pass computes or stores anything for it. Its `.grad` is `None`, so
    PyTorch's optimizers pass it over, weight decay included: weights and moments stay bit for bit, and its step
    counter stands still until it is on again.

    ```python
    search = ArchitectureSearch(model, DiffoRAConfig(method="snip"), loss_fn=lambda model, batch: model(**batch).loss)
    search.begin()
    reallocation = Reallocation(search)
    for step, batch in enumerate(train_batches, start=1):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step < cut and step % 20 == 0:
            reallocation.reallocate(held_out_batches, step)
        if step == cut:
            apply_selection(model, reallocation.finish(step), optimizer, scheduler)
    ```

    Args:
        search ([`ArchitectureSearch`]): a search with a method that scores.

    Attributes:
        on (`Tensor` of shape `(n,)` and dtype `torch.bool`): which modules are on; all of them at first.
        history (`list[Allocation]`): what was chosen so far.

    Raises:
        ValueError: if the search is one with `method="diffora"`.
    """

    def __init__(self, search: ArchitectureSearch) -> None:
        if search.config.method == "diffora":
            raise ValueError(
                "You passed a search with `method='diffora'`, which scores nothing that could be chosen anew. Please "
                "use a method that scores, such as `DiffoRAConfig(method='snip')`."
            )
        self.search = search
        grid = search.grid
        layers: dict[str, Any] = dict(searched_modules(search.model, grid.adapter_name))
        self._layers = [layers[name] for name in grid.names]
        self._weights: list[list[nn.Parameter]] = [parameters_of(layer, grid.adapter_name) for layer in self._layers]
        self.on = torch.ones(len(grid), dtype=torch.bool)
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
            chosen = self.search.matrix.choose()
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
        for layer, weights, before, after in zip(
            self._layers, self._weights, self.on.tolist(), on.tolist(), strict=True
        ):
            if isinstance(layer, Shortcut):
                layer.enabled = after
            elif before and not after:
                # Not PEFT's own switches: they work on all adapters of a layer, and every `disable_adapter` of the
                # model, by which TRL's trainers take the base model for a reference, turns them on again.
                layer.forward = partial(
                    _passed_by, layer, self.search.grid.adapter_name, layer.__dict__.get("forward")
                )
            elif after and not before:
                _put_back(layer)
            for weight in weights:
                weight.requires_grad_(after)
                if not after:
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
        """Switch all modules on for good; gives whether any was off."""
        off = not bool(self.on.all())
        self.switch(torch.ones_like(self.on))
        return off

    def finish(self, step: int | None = None) -> Selection:
        """
        Make the set in force final: all modules are on again, the gates are off, and the selection, which holds the
        history, says what to cut. To carry it out, pass it to [`apply_selection`].

        Args:
            step (`int`, *optional*): present optimizer step, for the record.

        Raises:
            ValueError: if nothing was chosen yet.
        """
        if not self.history:
            raise ValueError("No module was chosen yet. Please call `reallocate` before the cut.")
        self.search.decide(torch.tensor(self.history[-1].on))
        self.release()
        return replace(self.search.finish(step), history=tuple(self.history))

    def state_list(self) -> list[dict[str, Any]]:
        """The history as JSON values, from which [`load_state_list`] restores all."""
        return [asdict(entry) for entry in self.history]

    def load_state_list(self, records: Iterable[dict[str, Any]]) -> None:
        """
        Restore the history, and the modules that were on at its end. The scores that they were chosen by are the
        matrix's (see [`DifferentialAdaptationMatrix.load_state_dict`]).
        """
        history = [Allocation.from_dict(record) for record in records]
        if any(len(entry.on) != len(self.on) or len(entry.scores) != len(self.on) for entry in history):
            raise ValueError(f"The history is not one of {len(self.on)} modules.")
        self.history = history
        self.switch(torch.tensor(history[-1].on) if history else torch.ones_like(self.on))


def _passed_by(layer: Any, adapter_name: str, replaced: Any, *args: Any, **kwargs: Any) -> Any:
    """The forward pass of a layer whose LoRA is off. With another adapter active (DPO's reference) it is the usual."""
    if list(layer.active_adapters) == [adapter_name]:
        return layer.base_layer(*args, **kwargs)
    return replaced(*args, **kwargs) if replaced is not None else type(layer).forward(layer, *args, **kwargs)


def _put_back(layer: Any) -> None:
    replaced = layer.__dict__.pop("forward").args[2]
    if replaced is not None:  # the forward of a hook of accelerate
        layer.forward = replaced
