"""What comes out of a search: the selection, and the numbers to log."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from ..adapters.chain import in_chain
from ..adapters.freezing import check_freezable
from ..adapters.grid import AdapterGrid
from ..config import DiffoRAConfig
from ..core.costs import StepCost, StepCosts
from ..core.selection import Selection
from ..core.text import short_names
from ..methods.base import SelectionMethod
from .base import SearchBase, choice_of
from .diagnosis import TRAINED_BEFORE, Evidence, doubts


_MAX_LOGGED_KINDS = 16


def make_selection(search: SearchBase, step: int | None) -> Selection:
    """See [`ArchitectureSearch.select`]."""
    method, grid, config = search.method, search.grid, search.config
    chosen, ranks = choice_of(search)
    kept, confidence = [rank > 0 for rank in ranks], search.confidence
    # A selected module goes on under the gate that its weights were trained for; an unselected one may become the
    # start of a shared pair, and then acts on modules that it was not trained for: its small relaxed gate fits.
    relaxed, scores = search.mean_of_modules(method.values()), search.mean_of_modules(method.scores())
    trained = method.evaluation_gates()
    selected = torch.ones(len(kept), dtype=torch.float32)
    if trained is not None and method.options.fold_gates:
        selected = trained
    factors = torch.where(torch.tensor(kept), selected, relaxed)
    ties = method.tie_breaker()
    # The gradient of a gate of the module is the sum of those of its components.
    gains = None if ties is None else search.sum_of_modules(ties)
    reached = search.mean_of_modules(search.reached.float()) > 0
    evenly = search.rank_plan is not None and search.rank_plan.even is not None
    what = "modules" if search.components is None else "components"
    kept_parameters = [site.cost * rank for site, rank in zip(grid.sites, ranks, strict=True)]
    evidence = Evidence(reached, search.skipped_steps, confidence, evenly, what, kept_parameters)
    rows = [row for row, keep in zip(grid.row_of, kept, strict=True) if keep]
    costs = StepCosts() if search.costs is None else search.costs
    notes = doubts(method, grid.names, evidence, search.nothing_to_choose)
    return Selection(
        grid=grid,
        ranks=ranks,
        confidence=confidence.value,
        scores=tuple(scores.tolist()),
        gates=tuple(relaxed.tolist()),
        gains=tuple((scores if gains is None else gains).tolist()),
        factors=tuple(factors.tolist()),
        frozen=tuple(name for name, keep in zip(grid.names, kept, strict=True) if search.freezes and not keep),
        shared=_shared_groups(search.adapters, config.weight_sharing, kept, scores),
        step=step,
        times=_predicted(costs.time, rows),
        memory=_predicted(costs.memory, rows),
        config={**config.to_dict(), "method_options": asdict(method.options)},
        versions=library_versions(),
        notes=(*notes, TRAINED_BEFORE) if search.trained_before else notes,
        components=search.kept_components(chosen, ranks),
    )


def search_metrics(search: SearchBase) -> dict[str, float]:
    """See [`ArchitectureSearch.metrics`]."""
    method, grid = search.method, search.grid
    report = {}
    if method.searches:
        values, what = method.values(), "gate"
        report["diffora/entropy"] = method.entropy()
    elif method.steps:
        values, what = method.scores(), "score"
    else:
        return {}
    report[f"diffora/{what}_min"] = float(values.min())
    report[f"diffora/{what}_mean"] = float(values.mean())
    report[f"diffora/{what}_max"] = float(values.max())
    if search.config.log_gates_by_kind and len(grid.columns) <= _MAX_LOGGED_KINDS:
        cells = grid.table(search.mean_of_modules(values.float()).tolist(), empty=float("nan"))
        table = torch.tensor(cells, dtype=torch.float32)
        for column, value in zip(short_names(grid.columns), table.nanmean(dim=0).tolist(), strict=True):
            report[f"diffora/{what}/{column}"] = value
    if search.pending_losses:
        report["diffora/arch_loss"] = sum(search.pending_losses) / len(search.pending_losses)
        search.pending_losses.clear()
    if search.skipped_steps:
        report["diffora/skipped_steps"] = float(search.skipped_steps)
    return report


def check_sharing(adapters: AdapterGrid, config: DiffoRAConfig) -> None:
    """Raise a `ValueError` if modules are to share their matrices beside sites that cannot."""
    extra = dict.fromkeys(
        kind for kind, plain in zip(adapters.grid.kinds, adapters.in_adapter, strict=True) if not plain
    )
    if extra and config.weight_sharing != "none":
        raise ValueError(
            f"You passed `weight_sharing={config.weight_sharing!r}` for a model with {' and '.join(extra)}. What is "
            "saved beside them shares no matrices. Please set `weight_sharing='none'`, or take them out of the model."
        )


def check_adapters(adapters: AdapterGrid, config: DiffoRAConfig, method: SelectionMethod) -> None:
    """Raise a `ValueError` if an option asks of adapters what they cannot do."""
    check_sharing(adapters, config)
    if config.unselected == "freeze":
        check_freezable(adapters.sites)
    alone = [site.name for site in adapters.sites if not site.shareable]
    if alone and config.weight_sharing != "none":
        raise ValueError(
            f"You passed `weight_sharing={config.weight_sharing!r}`, but the adapter of {alone[0]!r} rests on the "
            "weight of its own module (DoRA, PiSSA, OLoRA), so another one cannot share it. Please set "
            "`weight_sharing='none'`, or use plain LoRA."
        )
    if config.weight_sharing != "none" and any(map(in_chain, adapters.sites)):
        raise ValueError(
            f"You passed `weight_sharing={config.weight_sharing!r}` with `ChainedLoRA`, whose rounds widen the "
            "matrices of each module for itself. Please set `weight_sharing='none'`, or train without the chain."
        )
    fixed = [site.name for site in adapters.sites if not site.foldable]
    if fixed and method.trains_gates:
        raise ValueError(
            f"You passed `method={method.name!r}`, which trains gates and multiplies them into the weights at the "
            f"choice, but the adapter of {fixed[0]!r} starts as a part of the base weight, and what it does under a "
            "gate needs twice its rank. Please use plain LoRA (`init_lora_weights=True`), or a method that trains "
            "none, such as 'adalora'."
        )
    if fixed and method.evaluation_gates() is not None and method.options.fold_gates:
        raise ValueError(
            f"You passed `method={method.name!r}`, which trains the weights under gates and multiplies them in at the "
            f"pruning, but the adapter of {fixed[0]!r} starts as a part of the base weight, and what it does under a "
            "gate needs twice its rank. Please set `method_options={'fold_gates': False}`, or use plain LoRA or the "
            "default method."
        )


def _shared_groups(
    adapters: AdapterGrid, scope: str, kept: Sequence[bool], scores: Tensor
) -> tuple[tuple[str, ...], ...]:
    """Groups of unselected modules with equal shapes; the best-scored of each group comes first."""
    if scope == "none":
        return ()
    groups: dict[tuple[Any, ...], list[tuple[float, int]]] = {}
    for index, (site, row) in enumerate(zip(adapters.sites, adapters.grid.row_of, strict=True)):
        if not kept[index]:
            key = (row if scope == "layer" else None, *site.shape)
            groups.setdefault(key, []).append((-float(scores[index]), index))
    names = adapters.grid.names
    return tuple(tuple(names[index] for _, index in sorted(group)) for group in groups.values() if len(group) > 1)


def _predicted(cost: StepCost | None, rows: Sequence[int]) -> dict[str, float]:
    return {} if cost is None else {"all_modules": cost.all_modules, "predicted": cost.predict(rows)}


def library_versions() -> dict[str, str]:
    """Versions of the libraries that shape a result."""
    names = ("diffora-trainer", "torch", "transformers", "peft", "trl", "accelerate")
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
