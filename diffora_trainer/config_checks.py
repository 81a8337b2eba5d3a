"""The rules of the options of a run: what each may be, what they may be together, and what follows from them."""

from __future__ import annotations

from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from .core.costs import STEP_LIMITS
from .core.schedule import check_moment
from .core.values import check_integer, check_number


SELECTION_SCOPES = ("layer", "model")
SELECTION_GRANULARITIES = ("auto", "rank", "component", "module")
SELECTION_UNITS = ("module", "group", "layer")
PREFIX_CACHES = ("none", "memory", "disk")
UNSELECTED = ("prune", "freeze")
WEIGHT_SHARING = ("none", "layer", "model")

_CHOICES = {
    "selection_scope": SELECTION_SCOPES,
    "selection_granularity": SELECTION_GRANULARITIES,
    "selection_unit": SELECTION_UNITS,
    "prefix_cache": PREFIX_CACHES,
    "unselected": UNSELECTED,
    "weight_sharing": WEIGHT_SHARING,
}
_NUMBERS = ("discretize_at", "arch_warmup", "fade_out", "arch_split", "prefix_cache_gib")
_OPTIONAL_NUMBERS = ("selection_ratio", *STEP_LIMITS.values())
_OPTIONAL_INTEGERS = ("max_trainable_parameters", "arch_batch_size", "search_micro_batches")


class Derived:
    """What follows from the options of a [`DiffoRAConfig`]."""

    max_trainable_parameters: int | None
    selection_ratio: float | None

    @property
    def step_limits(self) -> dict[str, float]:
        """The limits of a step that are set, by what they limit: `"time"`, `"memory"`."""
        limits = {what: getattr(self, name) for what, name in STEP_LIMITS.items()}
        return {what: limit for what, limit in limits.items() if limit is not None}

    @property
    def limits_step(self) -> bool:
        """Whether the time or the memory of a step is limited."""
        return bool(self.step_limits)

    @property
    def ratio(self) -> float:
        """The share of the modules that may be kept: `selection_ratio`, or what it defaults to."""
        if self.selection_ratio is not None:
            return self.selection_ratio
        return 1.0 if self.limits_step or self.max_trainable_parameters is not None else 0.5


def check_config(config: Any) -> None:
    """
    Check the options of a [`DiffoRAConfig`], and make floats of whole numbers where floats belong.

    Raises:
        ValueError: if a value is out of its range, or two of them contradict each other.
        TypeError: if a value is of the wrong type.
    """
    _check_types(config)
    _check_budget(config)
    _check_units(config)
    _check_search_only(config)
    _check_freezing(config)
    _check_base_model_id(config.base_model_id)
    if not 0 < config.arch_split < 1:
        raise ValueError(
            f"You passed `arch_split={config.arch_split}`, but it is a part of the training set and must be in "
            "(0, 1). To use a data set of your own, pass `arch_dataset=` to the trainer."
        )
    for name in ("arch_batch_size", "search_micro_batches"):
        if getattr(config, name) is not None and getattr(config, name) < 1:
            raise ValueError(f"You passed `{name}={getattr(config, name)}`; it must be 1 or more.")
    if not config.prefix_cache_gib > 0:
        raise ValueError(f"You passed `prefix_cache_gib={config.prefix_cache_gib}`; it must be positive.")
    if not 0 <= config.arch_seed < 2**32:
        raise ValueError(f"You passed `arch_seed={config.arch_seed}`; it must be 0 or more, and below 2**32.")
    for name in ("discretize_at", "arch_warmup", "fade_out"):
        check_moment(name, getattr(config, name), minimum_open=False)
    if config.extra_sites and config.weight_sharing != "none":
        raise ValueError(
            f"You passed `extra_sites` with {sorted(config.extra_sites)} together with "
            f"`weight_sharing={config.weight_sharing!r}`. What is saved beside them shares no matrices. Please set "
            "`weight_sharing='none'`."
        )


def _check_types(config: Any) -> None:
    config.arch_seed = check_integer("arch_seed", config.arch_seed)
    for name in (*_NUMBERS, *_OPTIONAL_NUMBERS):
        if name in _NUMBERS or getattr(config, name) is not None:
            setattr(config, name, check_number(name, getattr(config, name)))
    for name in _OPTIONAL_INTEGERS:
        if getattr(config, name) is not None:
            setattr(config, name, check_integer(name, getattr(config, name)))
    for name, choices in _CHOICES.items():
        value = getattr(config, name)
        if not isinstance(value, str) or value not in choices:
            raise ValueError(f"You passed `{name}={value!r}`; it must be one of {list(choices)}.")
    for name in ("log_gates_by_kind", "decide_early", "search_only"):
        if not isinstance(getattr(config, name), bool):
            raise TypeError(f"`{name}` must be a bool, got {getattr(config, name)!r}.")


def _check_budget(config: Any) -> None:
    if config.selection_ratio is not None and not 0 < config.selection_ratio <= 1:
        raise ValueError(
            f"You passed `selection_ratio={config.selection_ratio}`, but it is the share of modules to keep and "
            "must be in (0, 1]. Use 0.5 to keep half of the modules."
        )
    if config.max_trainable_parameters is not None:
        if config.max_trainable_parameters <= 0:
            raise ValueError(
                f"You passed `max_trainable_parameters={config.max_trainable_parameters}`; it must be positive."
            )
        if config.weight_sharing != "none":
            raise ValueError(
                f"You passed `max_trainable_parameters` together with `weight_sharing={config.weight_sharing!r}`. "
                "The shared pairs are trainable too, so the cap would not hold. Please use `selection_ratio`, or "
                "set `weight_sharing='none'`."
            )
    for what, limit in config.step_limits.items():
        name = STEP_LIMITS[what]
        if not 0 < limit <= 1:
            raise ValueError(
                f"You passed `{name}={limit}`, but it is a part of the {what} of a step and must be in (0, 1]."
            )
        if config.weight_sharing != "none":
            raise ValueError(
                f"You passed `{name}={limit}` together with `weight_sharing={config.weight_sharing!r}`. Modules that "
                "share a pair are trained in all layers, so no step would be cheaper. Please set "
                "`weight_sharing='none'`."
            )


def _check_units(config: Any) -> None:
    groups = config.selection_groups
    for name, group in groups.items():
        if not isinstance(group, (list, tuple)) or not group or not all(isinstance(end, str) and end for end in group):
            raise TypeError(
                f"You passed `selection_groups` with {name!r}: {group!r}; a group is a list of names of modules, such "
                "as ['q_proj', 'k_proj', 'v_proj']."
            )
    if groups and config.selection_unit != "group":
        raise ValueError(
            f"You passed `selection_groups` with `selection_unit={config.selection_unit!r}`, which has no groups. "
            "Please set `selection_unit='group'`."
        )
    if config.selection_unit != "module" and config.weight_sharing != "none":
        raise ValueError(
            f"You passed `selection_unit={config.selection_unit!r}` together with "
            f"`weight_sharing={config.weight_sharing!r}`, which gives unselected modules of a unit a pair that others "
            "of it do not have. Please set one of them to its default."
        )


def _check_search_only(config: Any) -> None:
    """What is of no use in a run that ends at the choice, or cannot be handed over to another one."""
    refused = {
        "weight_sharing": ("none", "no `LoraConfig` has modules that share a pair"),
        "extra_sites": ({}, "a `LoraConfig` names nothing but LoRA modules"),
        "prefix_cache": ("none", "it is of use after the choice alone"),
    }
    if config.search_only:
        _refuse_together(config, "search_only", refused)


def _check_freezing(config: Any) -> None:
    """What cannot be had of modules that stay."""
    refused = {
        "weight_sharing": ("none", "modules that share a pair are trained"),
        "extra_sites": ({}, "only LoRA modules are frozen"),
        "search_only": (False, "a second run begins without what the first one has trained"),
    }
    if config.unselected == "freeze":
        _refuse_together(config, "unselected", refused)


def _refuse_together(config: Any, option: str, refused: dict[str, tuple[Any, str]]) -> None:
    """Raise a `ValueError` if others are set beside an option: for each, its value when it is not set, and why."""
    for name, (without, why) in refused.items():
        value = getattr(config, name)
        if value != without:
            raise ValueError(
                f"You passed `{option}={getattr(config, option)!r}` together with `{name}={value!r}`: {why}. Please "
                "leave one of them out."
            )


def _check_base_model_id(name: Any) -> None:
    if name is None:
        return
    if not isinstance(name, str):
        raise TypeError(f"`base_model_id` must be a string such as 'org/name', got {name!r}.")
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(
            f"You passed `base_model_id={name!r}`, which cannot be a model on the Hub. It is "
            "published with the adapter; please pass a name such as 'org/name', or leave it out."
        ) from error
