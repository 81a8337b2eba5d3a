"""Options of a configuration by their names of before, which are read until version 0.3."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

from .core.schedule import Schedule


# Those that belong to a method alone now, and whether it is one that searches.
_OF_A_METHOD = {
    "arch_every": True,
    "arch_learning_rate": True,
    "arch_order": True,
    "fold_gates": True,
    "score_batches": False,
    "normalize_scores": False,
    "reallocate_every": False,
}
_SCORES = ("grad_norm", "snip", "synflow", "alpha_test", "random", "custom")
_DEFAULT_STEP_TIME = 0.7
"""What `cost="time"` meant alone."""

OLD_NAMES = ("relaxation", "cost", "arch_closing", *_OF_A_METHOD, "shortcuts", "shortcut_ranking")
"""Fields of a configuration that are left empty."""

REMEDIES = {
    "relaxation": "`relaxation` is `method` (and 'budget' is 'diffora')",
    "cost": "instead of `cost` set `max_step_time`",
    "arch_closing": "`arch_closing` is `fade_out`",
    "shortcuts": "`shortcuts` are `extra_sites={'shortcuts': {'kinds': [...]}}`",
    "shortcut_ranking": "`shortcut_ranking` is `extra_sites={'shortcuts': {'ranking': ...}}`",
    **{name: f"`{name}` is `method_options={{{name!r}: ...}}`" for name in _OF_A_METHOD},
}


class _ReadInt(int):
    """A value that was read by a name of before, and so was not passed by it when a configuration is copied."""


class _ReadFloat(float):
    """The same of a float."""


class Renamed:
    """
    An option under its name of before. What is passed is kept until [`take_over_old_names`] has read it; what is read
    afterwards is the option by its present name, if it is a number: that is what training loops have read.

    Args:
        name (`str`): the name of before.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, config: Any, owner: type) -> Any:
        if config is None:
            return self
        passed = vars(config).get("_passed", {})
        if self._name in passed:
            return passed[self._name]
        value = config.fade_out if self._name == "arch_closing" else config.method_options.get(self._name)
        value = _READ_DEFAULTS.get(self._name) if value is None else value
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return None
        return _ReadInt(value) if isinstance(value, int) else _ReadFloat(value)

    def __set__(self, config: Any, value: Any) -> None:
        passed = vars(config).setdefault("_passed", {})
        if value is None or value is self or isinstance(value, (_ReadInt, _ReadFloat)):
            passed.pop(self._name, None)
        else:
            passed[self._name] = value

    def __repr__(self) -> str:
        return "None"


_READ_DEFAULTS = {"arch_every": 4, "arch_order": 1, "score_batches": 32}


def take_over_old_names(config: Any) -> list[str]:
    """
    Put what a configuration was given by a name of before where it belongs now.

    Args:
        config ([`DiffoRAConfig`]): the configuration, whose dictionaries are read already.

    Returns:
        `list[str]`: what to write instead, for each name.

    Raises:
        ValueError: if a value is none that there was.
    """
    old = vars(config).pop("_passed", {})
    remedies = [REMEDIES[name] for name in OLD_NAMES if name in old]
    if config.method == "constant":
        config.method = "random"
        remedies.append("`method='constant'` is `method='random'`")
    if "relaxation" in old and config.method == "diffora":
        config.method = "diffora" if old["relaxation"] == "budget" else old["relaxation"]
    if "arch_closing" in old:
        config.fade_out = old["arch_closing"]
    if "cost" in old:
        config.max_step_time = _step_time(old["cost"], config.max_step_time)
        timed = config.max_step_time is not None
        if timed and config.selection_ratio is None and config.max_trainable_parameters is None:
            config.selection_ratio = 0.5  # as it was without a cap
    # A method was given the options of others, and did not read them.
    searches = config.method not in _SCORES
    of_method = {name: old[name] for name, of in _OF_A_METHOD.items() if name in old and of == searches}
    config.method_options = {**of_method, **config.method_options}
    shortcuts = dict(config.extra_sites.get("shortcuts") or {})
    if "shortcuts" in old:
        shortcuts["kinds"] = old["shortcuts"]
    if shortcuts and old.get("shortcut_ranking", "combined") != "combined":
        shortcuts["ranking"] = old["shortcut_ranking"]
    if shortcuts:
        config.extra_sites = {**config.extra_sites, "shortcuts": shortcuts}
    return remedies


def _step_time(cost: Any, limit: float | None) -> float | None:
    if cost not in ("parameters", "time"):
        raise ValueError(f"You passed `cost={cost!r}`; it must be one of ['parameters', 'time'].")
    if cost == "parameters":
        return None
    return _DEFAULT_STEP_TIME if limit is None else limit


def old_schedule(config: Any, total_steps: int, name: str) -> Schedule:
    """The schedule of a run for a method of [`DiffoRAConfig`] that will be removed in version 0.3."""
    warnings.warn(
        f"`DiffoRAConfig.{name}` is deprecated and will be removed in version 0.3. Please use `SelectionRun` for a "
        "training loop of your own, or `diffora_trainer.methods.build.make_schedule(config, total_steps)`.",
        FutureWarning,
        stacklevel=3,
    )
    # `methods.build` imports `config`, so this import has to be late.
    build = importlib.import_module(f"{__name__.partition('.')[0]}.methods.build")
    return build.make_schedule(config, total_steps)


class OldMoments:
    """What a [`DiffoRAConfig`] could be asked for before schedules were made of it and its method together."""

    def schedule(self, total_steps: int) -> tuple[int, int]:
        """Deprecated: `warmup` and `prune` of `make_schedule(config, total_steps)`."""
        found = old_schedule(self, total_steps, "schedule")
        return found.warmup, found.prune

    def decision(self, total_steps: int) -> int:
        """Deprecated: `make_schedule(config, total_steps).discretize`."""
        return old_schedule(self, total_steps, "decision").discretize
