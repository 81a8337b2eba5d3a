"""Options of a configuration by their names of before, which are read until version 0.3."""

from __future__ import annotations

from typing import Any


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

_REMEDIES = {
    "relaxation": "`relaxation` is `method` (and 'budget' is 'diffora')",
    "cost": "instead of `cost` set `max_step_time`",
    "arch_closing": "`arch_closing` is `fade_out`",
    "shortcuts": "`shortcuts` are `extra_sites={'shortcuts': {'kinds': [...]}}`",
    "shortcut_ranking": "`shortcut_ranking` is `extra_sites={'shortcuts': {'ranking': ...}}`",
    **{name: f"`{name}` is `method_options={{{name!r}: ...}}`" for name in _OF_A_METHOD},
}


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
    old = {name: getattr(config, name) for name in OLD_NAMES if getattr(config, name) is not None}
    remedies = [_REMEDIES[name] for name in old]
    for name in old:
        setattr(config, name, None)
    if config.method == "constant":
        config.method = "random"
        remedies.append("`method='constant'` is `method='random'`")
    if "relaxation" in old and config.method == "diffora":
        config.method = "diffora" if old["relaxation"] == "budget" else old["relaxation"]
    if "arch_closing" in old:
        config.fade_out = old["arch_closing"]
    if "cost" in old:
        config.max_step_time = _step_time(old["cost"], config.max_step_time)
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
