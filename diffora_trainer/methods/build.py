"""From a configuration to its method, budget and schedule: where options are checked that depend on the method."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..config import DiffoRAConfig
from ..core.budget import Budget
from ..core.grid import Grid
from ..core.schedule import Moments, Schedule
from ..core.units import find_units
from ..core.values import parse_mapping
from .base import SelectionMethod
from .context import ScoreFunction
from .options import ARCH_EVERY, MOST_ARCH_STEPS
from .registry import get_method, parse_options


def method_of(config: DiffoRAConfig) -> tuple[type[SelectionMethod], Any]:
    """
    The method of a configuration and its options.

    Raises:
        ValueError: if there is no such method, it does not have an option or cannot be combined with another one.
        TypeError: if an option is of the wrong type.
    """
    method = get_method(config.method)
    options = parse_options(method, config.method_options)
    if options.normalize_scores and not method.normalizable:
        raise ValueError(
            f"You passed `normalize_scores=True` with `method={config.method!r}`, which has no score that grows with "
            "the size of a module. Please leave it out, or use another method."
        )
    every = options.reallocate_every
    if every is not None and config.weight_sharing != "none":
        raise ValueError(
            f"You passed `reallocate_every={every}` with `weight_sharing={config.weight_sharing!r}`, which would "
            "switch the modules that are off on again when the others are pruned. Please set `weight_sharing='none'`."
        )
    if config.unselected == "freeze":
        _check_freezing(config, method, every)
    moments_of(config, method, options)
    return method, options


def _check_freezing(config: DiffoRAConfig, method: type[SelectionMethod], every: float | None) -> None:
    """Raise a `ValueError` if a method leaves modules that could not stay as they were trained."""
    reason = None
    if method.tells_ranks or method.trains_gates:
        reason = f"`method={config.method!r}` gives ranks, and what a module has above its rank cannot stay"
    elif not method.trains_open:
        reason = f"`method={config.method!r}` trains the weights under gates, which a module that stays would lose"
    elif every is not None:
        reason = f"`reallocate_every={every}` switches modules off before the choice"
    if reason is not None:
        raise ValueError(f"You passed `unselected='freeze'`, but {reason}. Please leave one of them out.")


def moments_of(config: DiffoRAConfig, method: type[SelectionMethod], options: Any) -> Moments:
    """When a run should do what, by its method and the options of that, which [`method_of`] gives."""
    if method.trains_gates:  # from the first step on, at each
        return Moments(config.discretize_at, 0.0, every=1.0)
    if not method.searches:
        return Moments(config.discretize_at, config.arch_warmup, every=options.reallocate_every, decides=False)
    # What fades out would come back as a shared pair, or stays.
    fades = method.trains_open and config.weight_sharing == "none" and config.unselected == "prune"
    return Moments(
        config.discretize_at,
        config.arch_warmup,
        config.fade_out if fades else 0.0,
        every=float(options.arch_every or ARCH_EVERY),
        most_updates=MOST_ARCH_STEPS if options.arch_every is None else None,
    )


def make_schedule(config: DiffoRAConfig, total_steps: int) -> Schedule:
    """
    The schedule of a run.

    Args:
        config ([`DiffoRAConfig`]): its options.
        total_steps (`int`): optimizer steps of the whole run.

    Raises:
        ValueError: if the run is too short, the pruning comes after its last step or not after the warm-up, or a
            `fade_out` in steps leaves none for the search.
    """
    return moments_of(config, *method_of(config)).resolve(total_steps)


def make_method(config: DiffoRAConfig, budget: Budget) -> SelectionMethod:
    """The method of a configuration, which chooses under a budget."""
    method, options = method_of(config)
    return method.create(budget, options, seed=config.arch_seed)


def unit_of(config: DiffoRAConfig) -> str:
    """What is kept or pruned together."""
    return get_method(config.method).unit if config.selection_unit == "module" else config.selection_unit


def scope_of(config: DiffoRAConfig) -> str:
    """
    In what modules compete, `"layer"` or `"model"`: `selection_scope`, but the model where a limit is one of it, and
    where whole layers are kept or compared.
    """
    limited = config.limits_step or config.max_trainable_parameters is not None
    whole = limited or unit_of(config) == "layer" or get_method(config.method).compares_layers
    return "model" if whole else config.selection_scope


def module_budget(
    config: DiffoRAConfig,
    grid: Grid,
    in_adapter: Sequence[bool],
    separate: Sequence[str] = (),
) -> Budget:
    """
    The budget of a configuration where whole modules of a grid are kept or pruned.

    Args:
        config ([`DiffoRAConfig`]): the options of the run.
        grid ([`~diffora_trainer.core.grid.Grid`]): the modules.
        in_adapter (`Sequence[bool]`): whether a plain PEFT adapter holds each of them. One that it holds is always
            kept, since a PEFT adapter without a module could not be loaded.
        separate (`Sequence[str]`, *optional*): kinds of site that are ranked apart from the others.
    """
    groups = parse_mapping("selection_groups", config.selection_groups)
    return Budget(
        grid.row_of,
        grid.parameters,
        ratio=config.ratio,
        scope=scope_of(config),
        cap=config.max_trainable_parameters,
        kinds=[kind in separate for kind in grid.kinds] if separate else None,
        required=list(in_adapter),
        units=find_units(grid, unit_of(config), groups),
    )


def check_score_function(config: DiffoRAConfig, function: ScoreFunction | None) -> None:
    """Raise if a user's own function and `method="custom"` are not passed together."""
    if function is not None and not callable(function):
        raise TypeError(
            f"`score_function` must be a function of the model and a list of batches, got {type(function).__name__}."
        )
    if (function is None) == get_method(config.method).takes_function:
        raise ValueError(
            "You passed `method='custom'` without a `score_function`. Please pass one beside the configuration: a "
            "function of the model and a list of batches that gives a dictionary from module names to scores."
            if function is None
            else f"You passed a `score_function` with `method={config.method!r}`, which would not call it. Please set "
            "`DiffoRAConfig(method='custom')`."
        )
