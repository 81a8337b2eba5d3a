"""A selection applied to a live model and its optimizer: fold, share, remove, and narrow the LoRA configuration."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from typing import Any

import torch
from peft import PeftModel
from peft.utils.constants import MIN_TARGET_MODULES_FOR_OPTIMIZATION
from torch import nn
from torch.optim import Optimizer

from ..compat import SCHEDULER_LISTS, inner_schedulers, shortened_targets
from ..core.selection import Selection, sanitize
from ..experimental.shortcuts.shortcuts import keep_shortcuts
from .backward import suspend_input_gradients
from .distributed import reshard, unregister_fsdp_parameters
from .grid import parameters_of, searched_modules


_CHECKED_MODULES = 1000


def apply_selection(
    model: Any,
    selection: Selection,
    optimizer: Optimizer | None = None,
    scheduler: Any = None,
    *,
    adapter_name: str | None = None,
) -> None:
    """
    Carry out a selection on a live PEFT model, which from then on is an ordinary LoRA model of the chosen modules.

    The selected modules keep their parameters, and these their moments in the optimizer; the others leave the model,
    the optimizer and the LoRA configuration. Modules that share a pair keep the parameters of the best-scored of them.
    Shortcuts that are not selected leave the model and the optimizer in the same way. A backward pass ends at the
    lowest module that is left, also with (non-reentrant) activation checkpointing.

    Args:
        model (`PeftModel`): the model that was searched. Its gates must be off (see [`ArchitectureSearch.finish`]).
        selection ([`Selection`]): what to keep.
        optimizer (`torch.optim.Optimizer`, *optional*): the live optimizer of the model's weights, or one that wraps
            it in an attribute `optimizer`.
        scheduler (*optional*): its learning rate scheduler, or one that wraps it.
        adapter_name (`str`, *optional*): the adapter; defaults to the active one.

    Raises:
        TypeError: if the model is not a `PeftModel`, or the selection not a [`Selection`].
        ValueError: if the modules of the model are not those of the selection.
    """
    if not isinstance(model, PeftModel) or not isinstance(selection, Selection):
        raise TypeError(
            f"Expected a `PeftModel` and a `Selection`, got {type(model).__name__} and {type(selection).__name__}. "
            "Please pass the model that was searched, and what its search found or `Selection.load(folder)` read."
        )
    adapter_name = str(adapter_name or model.active_adapters[0])
    if adapter_name not in model.peft_config:
        raise ValueError(
            f"You passed `adapter_name={adapter_name!r}`, but the model's adapters are {sorted(model.peft_config)}. "
            "Please pass one of them, or none for the active one."
        )
    reshard(model)
    layers: dict[str, Any] = dict(searched_modules(model, adapter_name))
    if set(layers) != set(selection.modules):
        missing, extra = set(selection.modules) - set(layers), set(layers) - set(selection.modules)
        raise ValueError(
            f"The selection was made for other modules: {len(missing)} of its modules have no LoRA in this model "
            f"({_some(missing)}), and {len(extra)} LoRA modules of the model are not in it ({_some(extra)}). Please "
            "pass the model that was searched, with all its LoRA modules."
        )
    factors = dict(zip(selection.modules, selection.factors, strict=True))
    leaders = [group[0] for group in selection.shared]
    with torch.no_grad():
        for name in [*selection.selected, *leaders]:
            parameters_of(layers[name], adapter_name)[1].mul_(factors[name])

    parameters_before = {p for layer in layers.values() for p in parameters_of(layer, adapter_name)}
    for group in selection.shared:
        leader = layers[group[0]]
        for name in group[1:]:
            layers[name].lora_A[adapter_name].weight = leader.lora_A[adapter_name].weight
            layers[name].lora_B[adapter_name].weight = leader.lora_B[adapter_name].weight
    shortcuts = set(selection.shortcuts)
    for name in selection.dropped:
        if name not in shortcuts:
            _remove(model, name, layers[name], adapter_name)
    if shortcuts:
        keep_shortcuts(model, selection.selected_shortcuts)
    kept = {p for name in selection.adapted for p in parameters_of(layers[name], adapter_name)}
    _narrow(model, adapter_name, selection.lora_modules)
    unregister_fsdp_parameters(model, parameters_before - kept)
    suspend_input_gradients(model)
    if optimizer is not None:
        remove_from_optimizer(optimizer, parameters_before - kept, scheduler)
        if selection.shared:
            _sort_parameters(optimizer, model)


def remove_from_optimizer(optimizer: Optimizer, parameters: Iterable[nn.Parameter], scheduler: Any = None) -> None:
    """
    Take parameters out of a live optimizer: out of its groups and its state. Groups that this empties go too, together
    with the scheduler's entries for them. A group that was empty before stays, as the optimizer of a plain run has it.

    Args:
        optimizer (`torch.optim.Optimizer`): the optimizer, or one that wraps it in an attribute `optimizer`.
        parameters (`Iterable[nn.Parameter]`): what to forget.
        scheduler (*optional*): the learning rate scheduler, or one that wraps it in an attribute `scheduler`.
    """
    optimizer = _innermost(optimizer)
    gone = set(parameters)
    keep = []
    for group in optimizer.param_groups:
        left = [parameter for parameter in group["params"] if parameter not in gone]
        keep.append(bool(left) or not group["params"])
        group["params"] = left
    for parameter in gone:
        optimizer.state.pop(parameter, None)
    _keep_groups(optimizer, keep, scheduler)


def remove_empty_groups(optimizer: Any, scheduler: Any = None) -> bool:
    """Take all groups without parameters out of an optimizer and its scheduler, and tell whether there were any."""
    optimizer = _innermost(optimizer)
    keep = [bool(group["params"]) for group in optimizer.param_groups]
    _keep_groups(optimizer, keep, scheduler)
    return not all(keep)


def _innermost(optimizer: Any) -> Any:
    while hasattr(optimizer, "optimizer"):  # accelerate's wrapper
        optimizer = optimizer.optimizer
    return optimizer


def _keep_groups(optimizer: Any, keep: list[bool], scheduler: Any) -> None:
    if not all(keep):
        optimizer.param_groups[:] = [g for g, stays in zip(optimizer.param_groups, keep, strict=True) if stays]
        if scheduler is not None:
            _forget_groups(scheduler, keep)


def _sort_parameters(optimizer: Optimizer, model: nn.Module) -> None:
    """
    Put the parameters of each group in the model's order. A shared one now comes up first with its group's first
    module, and an optimizer built anew on resume, whose saved state is matched by position, will find it there.
    """
    order = {parameter: index for index, parameter in enumerate(model.parameters())}
    for group in optimizer.param_groups:
        group["params"].sort(key=lambda parameter: order.get(parameter, len(order)))


def _forget_groups(scheduler: Any, filled: list[bool]) -> None:
    while hasattr(scheduler, "scheduler"):
        scheduler = scheduler.scheduler
    for name in SCHEDULER_LISTS:
        values = getattr(scheduler, name, None)
        if isinstance(values, list) and len(values) == len(filled):
            setattr(scheduler, name, [value for value, keep in zip(values, filled, strict=True) if keep])
    for inner in inner_schedulers(scheduler):
        _forget_groups(inner, filled)


def _remove(model: nn.Module, name: str, layer: Any, adapter_name: str) -> None:
    others = {*layer.lora_A, *layer.lora_embedding_A} - {adapter_name}
    if others:  # another adapter lives here too, such as DPO's frozen reference
        layer.set_adapter([])  # or PEFT would activate and unfreeze it in place of the deleted one
        layer.delete_adapter(adapter_name)
        return
    parent_name, _, child = f"base_model.model.{name}".rpartition(".")
    setattr(model.get_submodule(parent_name), child, layer.get_base_layer())


def own_config(model: Any, adapter_name: str) -> Any:
    """
    An adapter's configuration that may be written into: a copy, which the model holds from now on. The one that it
    held may be the user's, who wraps a second model with it, or another adapter's of this model as well (TRL's DPO
    gives one object to the adapter that is trained and to its reference).
    """
    config = model.peft_config[adapter_name] = copy.deepcopy(model.peft_config[adapter_name])
    return config


def _narrow(model: Any, adapter_name: str, names: tuple[str, ...]) -> None:
    """Make the adapter's configuration name exactly these modules, so that loading re-creates no other."""
    config = own_config(model, adapter_name)
    config.layers_to_transform = None  # what they restricted is spelled out in the names
    config.layers_pattern = None
    wanted = set(names)
    # What PEFT will match against when it loads the adapter: every module of the base model, by its plain name.
    base = model.get_base_model()
    every = {
        name.replace(".base_layer", "")
        for name, _ in base.named_modules()
        if name and not re.search(r"\.(lora_\w+|modules_to_save|original_module)(\.|$)", name)
    }
    config.target_modules = set(wanted)
    if not _matches(config, every, wanted):
        # A name may be a suffix of another one's (`layers.0.q` of `vision.layers.0.q`), and names are matched as
        # suffixes. A pattern is matched in full.
        config.target_modules = "|".join(re.escape(name) for name in sorted(wanted))
    if hasattr(model.base_model, "targeted_module_names"):
        model.base_model.targeted_module_names = sorted(wanted)


def _matches(config: Any, every: set[str], wanted: set[str]) -> bool:
    def found(targets: set[str]) -> set[str]:
        return {name for name in every if _finds(targets, name) and not _finds(config.exclude_modules, name)}

    if found(wanted) != wanted:
        return False
    # PEFT shortens long lists to suffixes before it matches them; the short list must find the same modules. It does
    # by construction, since it only takes suffixes that no other module has; but this is PEFT's affair, so it is
    # checked as long as that is quick: the time grows with the square of the number of modules.
    if not MIN_TARGET_MODULES_FOR_OPTIMIZATION <= len(wanted) <= _CHECKED_MODULES:
        return True
    return found(shortened_targets(wanted, every - wanted)) == wanted


def _finds(patterns: str | Iterable[str] | None, name: str) -> bool:
    """
    What PEFT does with `target_modules` and `exclude_modules`: a string is matched in full, the entries of a list as
    dotted suffixes. PEFT compares a name with one entry after the other; looking up the name's few suffixes keeps the
    cut of 10,000 modules from taking a minute.
    """
    if not patterns:
        return False
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    parts = name.split(".")
    entries = patterns if isinstance(patterns, (set, frozenset)) else set(patterns)
    return any(".".join(parts[start:]) in entries for start in range(len(parts)))


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(map(sanitize, names[:3])) + (", ..." if len(names) > 3 else "") if names else "none"
