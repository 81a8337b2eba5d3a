"""A selection applied to a live model and its optimizer: fold, share, remove, and narrow the LoRA configuration."""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from peft import PeftModel
from peft.utils.constants import MIN_TARGET_MODULES_FOR_OPTIMIZATION
from torch.optim import Optimizer

from ..compat.peft import shortened_targets
from ..core.selection import Selection
from ..core.text import some
from .backward import suspend_input_gradients
from .base import AdapterSite, find_sites, plain_name, prune_sites
from .distributed import reshard, unregister_fsdp_parameters
from .freezing import check_freezable
from .grid import only_active
from .optimizer import remove_from_optimizer, sort_parameters


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

    The selected modules keep their parameters, and these their moments in the optimizer, rescaled where a gate is
    multiplied into the weights; of those that keep a part of their rank this holds for the components that stay, and
    their scaling stays as it was. The others leave the model, the optimizer and the LoRA configuration. Modules that
    share a pair keep the parameters of the best-scored of them. What is not selected of other kinds of site leaves
    them in the same way. Modules that are frozen leave nothing but the optimizer. A backward pass ends at the lowest
    module that is trained, also with (non-reentrant) activation checkpointing.

    Args:
        model (`PeftModel`): the model that was searched. Its gates must be off (see [`ArchitectureSearch.finish`]).
        selection ([`Selection`]): what to keep.
        optimizer (`torch.optim.Optimizer`, *optional*): the live optimizer of the model's weights, or one that wraps
            it in an attribute `optimizer`.
        scheduler (*optional*): its learning rate scheduler, or one that wraps it.
        adapter_name (`str`, *optional*): the adapter; defaults to the active one, and has to be it.

    Raises:
        TypeError: if the model is not a `PeftModel`, or the selection not a [`Selection`].
        ValueError: if the modules of the model are not those of the selection, the adapter is not the only active
            one, or it is merged.
    """
    if not isinstance(model, PeftModel) or not isinstance(selection, Selection):
        raise TypeError(
            f"Expected a `PeftModel` and a `Selection`, got {type(model).__name__} and {type(selection).__name__}. "
            "Please pass the model that was searched, and what its search found or `Selection.load(folder)` read."
        )
    adapter_name = only_active(model, adapter_name)
    reshard(model)
    sites = find_sites(model, adapter_name)
    _check_sites(sites, selection)
    lora: dict[str, Any] = {name: sites[name] for name in selection.lora_modules}
    parameters = [name for name, site in lora.items() if site.of_parameter]
    _check_parameters(model, parameters)
    leaders = [group[0] for group in selection.shared]
    factors = dict(zip(selection.modules, selection.factors, strict=True))
    for name in [*selection.selected, *leaders]:
        sites[name].fold(factors[name])
    if optimizer is not None:
        for name in selection.selected:  # a shared pair will have the gradients of several modules
            sites[name].rescale_moments(optimizer)
    for info, kept in zip(selection.grid.sites, selection.kept_components, strict=True):
        if 0 < len(kept) < info.rank:
            sites[info.name].resize(kept, optimizer)

    before = {parameter for site in sites.values() for parameter in site.parameters}
    _share(sites, selection)
    prune_sites(model, [sites[name] for name in selection.dropped], adapter_name)
    for name in selection.frozen:
        sites[name].freeze()
    _narrow(model, adapter_name, [name for name in lora if name not in parameters])
    _narrow_parameters(model, adapter_name, parameters)
    for patterns in ("rank_pattern", "alpha_pattern"):
        if held := getattr(model.peft_config[adapter_name], patterns, None):
            setattr(model.peft_config[adapter_name], patterns, narrowed_patterns(held, lora))
    if selection.in_ranks:
        write_ranks(model, adapter_name, lora.values())
    gone = before - {parameter for name in selection.adapted for parameter in sites[name].parameters}
    _forget(model, selection, gone, optimizer, scheduler)


def restore_selection(model: Any, selection: Selection, optimizer: Any = None, scheduler: Any = None) -> None:
    """
    Bring a model to the module set of a checkpoint from after a pruning: [`apply_selection`], unless it was loaded
    from the saved adapter and has lost the others already. Such a model has a pair of its own for each module, also
    for those that share one, and is made to share it again.
    """
    if is_applied(model, selection):
        return
    sites = find_sites(model, model.active_adapters[0])
    if not selection.dropped or set(sites) != set(selection.present):
        apply_selection(model, selection, optimizer, scheduler)
        return
    reshard(model)
    before = {parameter for site in sites.values() for parameter in site.parameters}
    _share(sites, selection)
    gone = before - {parameter for site in sites.values() for parameter in site.parameters}
    _forget(model, selection, gone, optimizer, scheduler)


def _share(sites: Mapping[str, Any], selection: Selection) -> None:
    for group in selection.shared:
        for name in group[1:]:
            sites[name].share(sites[group[0]])


def _forget(model: Any, selection: Selection, gone: set[Any], optimizer: Any, scheduler: Any) -> None:
    """Let nothing hold parameters any more that have left a model."""
    unregister_fsdp_parameters(model, gone)
    suspend_input_gradients(model)
    if optimizer is not None:
        remove_from_optimizer(optimizer, gone, scheduler)
        if selection.shared:
            sort_parameters(optimizer, model)


def is_applied(model: Any, selection: Selection) -> bool:
    """
    Whether a model has lost modules or ranks, and has those left that a selection keeps, as one that was loaded from
    the saved adapter. Modules that share a pair, or are frozen, are not distinguished from others by that.
    """
    changes = selection.ranks != selection.grid.ranks and not (selection.shared or selection.frozen)
    return changes and is_described(model, selection)


def is_described(model: Any, selection: Selection) -> bool:
    """Whether a model has the modules that a selection leaves, those that it keeps at their ranks."""
    found = {name: site.rank for name, site in find_sites(model, model.active_adapters[0]).items()}
    kept = ((name, rank) for name, rank in zip(selection.modules, selection.ranks, strict=True) if rank)
    return set(found) == set(selection.present) and all(found[name] == rank for name, rank in kept)


def _check_sites(sites: Mapping[str, AdapterSite], selection: Selection) -> None:
    """Raise a `ValueError` if a selection cannot be carried out on these sites."""
    if set(sites) != set(selection.modules):
        missing, extra = set(selection.modules) - set(sites), set(sites) - set(selection.modules)
        raise ValueError(
            f"The selection was made for other modules: {len(missing)} of its modules have no LoRA in this model "
            f"({some(sorted(missing))}), and {len(extra)} LoRA modules of the model are not in it "
            f"({some(sorted(extra))}). Please pass the model that was searched, with all its LoRA modules."
        )
    if merged := [name for name, site in sites.items() if site.merged]:
        raise ValueError(
            f"The adapter is merged into {some(merged)}, and what is pruned would stay in the base weights. Please "
            "call `model.unmerge_adapter()` first."
        )
    partly = [info for info, rank in zip(selection.grid.sites, selection.ranks, strict=True) if 0 < rank < info.rank]
    if other := [info for info in partly if info.rank != sites[info.name].rank]:
        raise ValueError(
            f"The selection leaves {other[0].name!r} a part of the rank {other[0].rank}, but it has another one here: "
            f"{sites[other[0].name].rank}. Please pass the model that was searched, with the `r` that it had then."
        )
    for name in selection.dropped:
        sites[name].check_prunable()
    if selection.frozen:
        check_freezable(list(sites.values()))
    factors = dict(zip(selection.modules, selection.factors, strict=True))
    if fixed := [name for name in selection.selected if factors[name] != 1 and not sites[name].foldable]:
        raise ValueError(
            f"The selection multiplies gates into {some(fixed)}, whose adapter cannot hold one. Please make it with "
            "`method_options={'fold_gates': False}`."
        )
    if whole := [info.name for info in partly if not sites[info.name].resizable]:
        raise ValueError(
            f"The selection leaves {some(whole)} a lower rank, but only a LoRA of two linear layers can be given one, "
            "and not a sharded one. Please pass a selection that keeps them whole or prunes them."
        )


def write_ranks(model: Any, adapter_name: str, lora: Iterable[Any]) -> None:
    """
    Make an adapter's configuration, which may be written into, say the ranks of its LoRA sites: the most frequent one,
    and the others.
    """
    config = model.peft_config[adapter_name]
    found = {site.name: (site.rank, site.layer.lora_alpha[adapter_name]) for site in lora}
    (config.r, config.lora_alpha), _ = Counter(found.values()).most_common(1)[0]
    base = [name for name, _ in model.get_base_model().named_modules()]
    config.rank_pattern, config.alpha_pattern = {}, {}
    for name, (rank, alpha) in found.items():
        if (rank, alpha) != (config.r, config.lora_alpha):
            pattern = _pattern(name, base)
            config.rank_pattern[pattern], config.alpha_pattern[pattern] = rank, alpha
    if config.init_lora_weights == "orthogonal":  # PEFT makes none of an odd rank, also where weights are loaded after
        config.init_lora_weights = True


def _pattern(name: str, names: Iterable[str]) -> str:
    """
    A key of `rank_pattern` that PEFT finds in this module alone: the name, unless another one ends with it or it means
    something else as a regular expression, since PEFT looks for the key as one at the end of each name.
    """
    plain, tail = not re.search(r"[^\w.-]", name), name.rpartition(".")[2]
    found = [other for other in names if other.endswith(tail) and _has_key(name, other)] if plain else []
    return name if found == [name] else "^" + re.escape(name)


def _has_key(key: str, name: str) -> bool:
    """Whether PEFT takes what `rank_pattern` or `alpha_pattern` says under a key for a module of this name."""
    return key == name or re.match(rf"(.*\.)?({key})$", name) is not None


def narrowed_patterns(patterns: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Those entries of a `rank_pattern` or `alpha_pattern` that are of one of these modules: PEFT warns of others."""
    names = list(names)
    return {key: value for key, value in patterns.items() if any(_has_key(key, name) for name in names)}


def own_config(model: Any, adapter_name: str) -> Any:
    """
    An adapter's configuration that may be written into: a copy, which the model holds from now on. The one that it
    held may be the user's, who wraps a second model with it, or another adapter's of this model as well (TRL's DPO
    gives one object to the adapter that is trained and to its reference).
    """
    config = model.peft_config[adapter_name] = copy.deepcopy(model.peft_config[adapter_name])
    return config


def _narrow(model: Any, adapter_name: str, names: Iterable[str]) -> None:
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


def _check_parameters(model: Any, names: list[str]) -> None:
    """Raise a `ValueError` if no configuration can name these parameters that have a LoRA alone."""
    # PEFT finds a parameter whose name ends with one of these, after a dot.
    every = [
        plain_name(name).replace(".base_layer", "").replace(".parametrizations", "")
        for name, _ in model.named_parameters()
    ]
    if others := [name for name in every if name not in names and name.endswith(tuple(f".{own}" for own in names))]:
        raise ValueError(
            f"The parameter {others[0]!r} ends with the name of one that is kept, and PEFT would adapt it too when "
            "the adapter is loaded. Please leave these parameters out of `target_parameters`."
        )


def _narrow_parameters(model: Any, adapter_name: str, names: list[str]) -> None:
    """The same of the parameters that have a LoRA."""
    config = model.peft_config[adapter_name]
    if not getattr(config, "target_parameters", None) and not names:
        return
    config.target_parameters = sorted(names) or None
    if hasattr(model.base_model, "targeted_parameter_names"):
        model.base_model.targeted_parameter_names = sorted(names)


def _matches(config: Any, every: set[str], wanted: set[str]) -> bool:
    excluded = getattr(config, "exclude_modules", None)

    def found(targets: set[str]) -> set[str]:
        return {name for name in every if finds(targets, name) and not finds(excluded, name)}

    if found(wanted) != wanted:
        return False
    # PEFT shortens long lists to suffixes before it matches them; the short list must find the same modules. It does
    # by construction, since it only takes suffixes that no other module has; but this is PEFT's affair, so it is
    # checked as long as that is quick: the time grows with the square of the number of modules.
    if not MIN_TARGET_MODULES_FOR_OPTIMIZATION <= len(wanted) <= _CHECKED_MODULES:
        return True
    return found(shortened_targets(wanted, every - wanted)) == wanted


def finds(patterns: str | Iterable[str] | None, name: str) -> bool:
    """
    What PEFT does with `target_modules` and `exclude_modules`: a string is matched in full, the entries of a list as
    dotted suffixes. PEFT compares a name with one entry after the other; looking up the name's few suffixes keeps the
    pruning of 10,000 modules from taking a minute.
    """
    if not patterns:
        return False
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    parts = name.split(".")
    entries = patterns if isinstance(patterns, (set, frozenset)) else set(patterns)
    return any(".".join(parts[start:]) in entries for start in range(len(parts)))
