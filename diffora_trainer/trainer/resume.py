"""Whether a checkpoint belongs to the model and the search that are resumed with it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..adapters.base import extra_kinds, find_sites, site_kind
from ..adapters.chain import grow_to_checkpoint, rounds_in_checkpoint
from ..adapters.grid import describe_base
from ..adapters.pruning import narrowed_patterns
from ..core.files import ADAPTER_CONFIG_NAME, ADAPTER_NAME, tensor_shapes
from ..core.grid import LORA
from ..core.state import RunState, check_same, short
from .checkpoint import STATE_NAME


# What a checkpoint's weights were trained under, and is not read from it again.
_OTHER_OPTIONS = ("lora_dropout", "use_rslora", "use_dora", "init_lora_weights")
"""Those that a pruning of ranks leaves as they are."""
_PATTERNS = ("rank_pattern", "alpha_pattern")
_LORA_OPTIONS = ("r", "lora_alpha", "alpha", *_PATTERNS, *_OTHER_OPTIONS)


def check_base_model(folder: str, state: RunState, model: Any) -> None:
    """Raise a `ValueError` if a checkpoint was made for another base model."""
    if state.base_model != (present := describe_base(model)):
        raise ValueError(
            f"The checkpoint {folder!r} was made for another base model (saved: {state.base_model}, now: "
            f"{present}). Please resume with the model of the run."
        )


def grow_to_saved(folder: str, state: RunState, model: Any, adapted: Sequence[str]) -> None:
    """
    Give an adapter that is trained in rounds the rank that it has in a checkpoint. One whose modules end with ranks
    of their own grows when its weights are loaded.

    Args:
        folder (`str`): the checkpoint.
        state ([`~diffora_trainer.core.state.RunState`]): its state.
        model (`PeftModel`): the model.
        adapted (`Sequence[str]`): the modules that are trained in the checkpoint, by the state.
    """
    if state.selection is None or not state.selection.in_ranks:
        grow_to_checkpoint(_adapter_folder(folder, model, adapted), model)


def check_model(folder: str, state: RunState, model: Any, modules: Sequence[str], adapted: Sequence[str]) -> None:
    """
    Raise a `ValueError` if the weights in a checkpoint of this base model are not those of its adapter.

    Args:
        folder (`str`): the checkpoint.
        state ([`~diffora_trainer.core.state.RunState`]): its state.
        model (`PeftModel`): the model, with the modules of the checkpoint or with those from before its pruning.
        modules (`Sequence[str]`): the modules from before the pruning, by the state.
        adapted (`Sequence[str]`): the modules that are trained in the checkpoint, by the state.
    """
    adapter_name, selection = model.active_adapters[0], state.selection
    sites = find_sites(model, adapter_name)
    if set(sites) not in (set(modules), set(adapted)):
        raise ValueError(
            f"The checkpoint {folder!r} was made for other LoRA modules ({short(list(modules))}) than this model has "
            f"({short(list(sites))}). Please resume with the model, `target_modules` and `extra_sites` of the run."
        )
    for kind in extra_kinds():
        if own := [sites[name] for name in adapted if sites[name].kind == kind.name]:
            kind.check_fits(folder, model, own)
    path = _adapter_folder(folder, model, adapted) / ADAPTER_NAME
    lora: list[Any] = [sites[name] for name in adapted if site_kind(sites[name].kind).in_adapter]
    ranks = {site.name: site.rank for site in lora}
    options = json.loads(path.with_name(ADAPTER_CONFIG_NAME).read_text(encoding="utf-8"))
    config = model.peft_config[adapter_name]
    compared: tuple[str, ...] = _LORA_OPTIONS
    if selection is not None and selection.in_ranks:
        left = dict(zip(selection.modules, selection.ranks, strict=True))
        rounds = rounds_in_checkpoint(path.parent, model, left)  # what it lacks grows when they are loaded
        after = {name: rounds * left[name] for name in ranks}
        if ranks not in ({name: left[name] for name in ranks}, after):  # the model is not pruned yet
            before = dict(zip(selection.modules, selection.grid.ranks, strict=True))
            check_same(folder, {"the ranks of the LoRA": ({name: before[name] for name in ranks}, ranks)})
            scaling = {round(site.layer.scaling[adapter_name], 9) for site in lora}
            check_same(folder, {"the scaling of the LoRA": (_scalings(options), scaling)})
        if ranks != after:
            ranks, compared = after, _OTHER_OPTIONS
    shapes = {name: shape for site in lora for name, shape in site.saved_shapes(ranks[site.name], adapted).items()}
    _check_tensors(path, shapes)

    def narrowed(name: str, value: Any) -> Any:  # the pruning has left the patterns of its modules alone
        if name == "init_lora_weights" and value == "orthogonal":  # as `write_ranks` says, which changes no weight
            return True
        return narrowed_patterns(value or {}, adapted) if name in _PATTERNS else value

    found = {name: (options.get(name), getattr(config, name, None)) for name in compared}
    check_same(
        folder, {f"`{n}` of the LoRA": (narrowed(n, saved), narrowed(n, now)) for n, (saved, now) in found.items()}
    )


def _adapter_folder(folder: str, model: Any, adapted: Sequence[str]) -> Path:
    """Where in a checkpoint the adapter is: where PEFT puts it, or what is saved beside it, if any of that is left."""
    adapter_name = str(model.active_adapters[0])
    sites = find_sites(model, adapter_name)
    inner = "" if adapter_name == "default" else adapter_name
    left = {sites[name].kind for name in adapted if name in sites}
    for kind in extra_kinds():
        if kind.name in left:
            inner = kind.adapter_folder
    return Path(folder, inner)


def _scalings(options: dict[str, Any]) -> set[float]:
    """The factors with which a saved adapter is added to its base model."""
    usual, ranks, alphas = options["lora_alpha"], options["rank_pattern"] or {}, options["alpha_pattern"] or {}
    pairs = [(usual, options["r"]), *((alphas.get(name, usual), rank) for name, rank in ranks.items())]
    return {round(alpha / (math.sqrt(rank) if options.get("use_rslora") else rank), 9) for alpha, rank in pairs}


def _check_tensors(path: Path, expected: dict[str, tuple[int, ...]]) -> None:
    """Raise a `ValueError` if the LoRA weights in a file have not these names and shapes."""
    marks = site_kind(LORA).parameter_marks
    saved = {name: shape for name, shape in tensor_shapes(path).items() if any(mark in name for mark in marks)}
    if saved != expected:
        differing = sorted(n for n in {*saved, *expected} if saved.get(n) != expected.get(n))
        raise ValueError(
            f"{str(path)!r} does not fit {STATE_NAME} beside it and this model in {len(differing)} tensors, such as "
            f"{differing[0]!r} (saved: {saved.get(differing[0])}, needed: {expected.get(differing[0])}). Please "
            "resume with the model and the LoRA configuration of the run, or from another checkpoint."
        )
