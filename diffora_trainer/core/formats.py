"""Values for JSON, and out of JSON that may come from anywhere; and what earlier versions wrote, in today's form."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

from .grid import LORA, SiteInfo
from .text import sanitize


T = TypeVar("T")


def _reader(kind: type[T], words: str) -> Callable[[Any], T]:
    def read(value: Any) -> T:
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise TypeError(f"{sanitize(repr(value))} should be {words}")
        return value

    return read


# Readers: each returns a value of its type as it is, and raises a `TypeError` for any other. A bool is not a number.
as_list: Callable[[Any], list[Any]] = _reader(list, "a list")
as_object: Callable[[Any], dict[str, Any]] = _reader(dict, "an object")
as_text = _reader(str, "a string")
as_flag = _reader(bool, "true or false")
as_whole = _reader(int, "a whole number")


def as_count(value: Any) -> int:
    """A whole number that can be one of steps, rows or processes, or a `TypeError` or `ValueError`."""
    if not 0 <= as_whole(value) < 2**40:
        raise ValueError(f"{sanitize(repr(value))} should be 0 or more, and less than 2**40")
    return value


def as_number(value: Any) -> float:
    """A finite number that is not a bool, or a `TypeError`; an `OverflowError` for one that is no float."""
    if type(value) not in (int, float) or not math.isfinite(value):
        raise TypeError(f"{sanitize(repr(value))} should be a finite number")
    return float(value)


def tuple_of(read: Callable[[Any], T], *lengths: int) -> Callable[[Any], tuple[T, ...]]:
    """A reader of lists, or the tuples that they were before JSON, by that of an entry; with the lengths allowed."""

    def read_all(value: Any) -> tuple[T, ...]:
        entries = tuple(map(read, value if isinstance(value, tuple) else as_list(value)))
        if lengths and len(entries) not in lengths:
            raise ValueError(f"it has {len(entries)} entries instead of {' or '.join(map(str, lengths))}")
        return entries

    return read_all


def maybe(read: Callable[[Any], T]) -> Callable[[Any], T | None]:
    """A reader that leaves `None` as it is, and reads anything else by `read`."""
    return lambda value: None if value is None else read(value)


def with_lists(value: Any) -> Any:
    """A value of an option with lists in place of tuples, as it comes back out of JSON."""
    if isinstance(value, dict):
        return {name: with_lists(entry) for name, entry in value.items()}
    return [with_lists(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def site_record(site: SiteInfo, numbers: dict[str, float], rank: int) -> dict[str, Any]:
    """The record of a module in a selection: where it stands, what was found out of it, and the rank that it keeps."""
    return {
        "name": site.name,
        "kind": site.kind,
        "row": site.row,
        "column": site.column,
        "rank": site.rank,
        "parameters": site.parameters,
        **numbers,
        "kept": rank > 0,
        "kept_rank": rank,
    }


def read_site(record: dict[str, Any]) -> SiteInfo:
    """A module out of its record in a selection."""
    rank, parameters = as_whole(record["rank"]), as_whole(record["parameters"])
    if rank < 1 or parameters < rank or parameters % rank:
        raise ValueError(f"a module of rank {rank} cannot have {parameters} parameters")
    return SiteInfo(
        as_text(record["name"]),
        as_whole(record["row"]),
        as_whole(record["column"]),
        rank,
        parameters // rank,
        as_text(record["kind"]),
    )


def read_rank(record: dict[str, Any]) -> int:
    """The rank that a module keeps, out of its record in a selection."""
    rank = as_whole(record["kept_rank"])
    if record["kept"] is not (rank > 0):
        raise ValueError(f"a module of the rank {rank} cannot be kept: {sanitize(repr(record['kept']))}")
    return rank


def read_components(record: dict[str, Any]) -> tuple[int, ...]:
    """Which components a module keeps, out of its record in a selection."""
    return tuple(map(as_whole, as_list(record["components"])))


def read_costs(costs: Any) -> dict[str, float]:
    """What a step costs, by name, out of a selection. Some names had another word until version 0.2."""
    old = {"before_cut": "before_pruning", "after_cut": "after_pruning"}
    return {old.get(name, name): float(cost) for name, cost in as_object(costs).items()}


def upgrade_selection(data: dict[str, Any]) -> dict[str, Any]:
    """
    A selection as format 1 had it, in the form of format 2. It knew neither ranks, so an adapter has the rank 1 and
    its parameters are what that costs, nor kinds, but named those modules that are shortcuts.
    """
    shortcuts = set(map(as_text, as_list(data.get("shortcuts", []))))
    records = [dict(record) for record in as_list(data["modules"])]
    if unknown := shortcuts - {record["name"] for record in records}:
        raise ValueError(f"it names a shortcut {sanitize(min(unknown))!r} that is not one of its modules")
    for record in records:
        record.update(rank=1, kept_rank=int(as_flag(record["kept"])), gain=record.get("gain", record["score"]))
        record["kind"] = "shortcuts" if record["name"] in shortcuts else LORA
    return {"history": [], "times": {}, "notes": [], **data, "format": 2, "modules": records}


def _state_from_2(data: dict[str, Any]) -> dict[str, Any]:
    """Format 2 knew one other kind of site, and not always which gates a gradient had reached."""
    renamed = {"decision": "discretize", "cut": "prune", "decided": "kept", "began_cut": "began_pruned"}
    upgraded = {renamed.get(name, name): value for name, value in data.items() if name != "shortcuts"}
    upgraded["extra_kinds"] = ["shortcuts"] if data.get("shortcuts", False) is True else []
    return {"history": [], "reached": None, "effect": None, **upgraded}


def _state_from_3(data: dict[str, Any]) -> dict[str, Any]:
    """Format 3 knew no ranks, no halves of a search and no error of its effect."""
    upgraded = {**data, "ranks": [], "halves": [], "half_steps": 0, "early_losses": [], "progress": None}
    if isinstance(data.get("effect"), (list, tuple)):
        upgraded["effect"] = [*data["effect"], 0.0]
    return upgraded


def _state_from_4(data: dict[str, Any]) -> dict[str, Any]:
    """In format 4 `max_step_time` was a part of another time, and `selection_ratio` not read beside a cap."""
    if data.get("selection") is not None:
        return data
    config = dict(as_object(data.get("config")))
    if config.get("max_step_time") is not None:
        raise ValueError(
            "it was made when `max_step_time` was a part of the time of a step with equally many modules spread "
            "over all layers; today it is one of a step with all modules, so the run cannot be continued as it "
            "began. Please start it anew"
        )
    if config.get("max_trainable_parameters") is not None:
        config["selection_ratio"] = None
    kept = {name: value for name, value in data.items() if name != "times"}
    return {**kept, "config": config, "costs": None}


_STATE_UPGRADES: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {
    2: _state_from_2,
    3: _state_from_3,
    4: _state_from_4,
    5: lambda data: {**data, "components": []},  # the matrix had an entry for each module alone
    6: lambda data: {**data, "processes": None},
    7: lambda data: {**data, "batch_rows": None, "given_back": None, "reallocate_every": None},
}
"""By its format, what brings the state of a run to the next one."""


def upgrade_state(data: dict[str, Any]) -> dict[str, Any]:
    """
    The state of a run of any earlier format in the present one. Of an unknown format it is returned as it is.

    Raises:
        ValueError: for a run that is not pruned yet, whose choice was limited by what `max_step_time` meant then.
    """
    while data.get("format") in tuple(_STATE_UPGRADES):
        data = {**_STATE_UPGRADES[data["format"]](data), "format": data["format"] + 1}
    return data
