"""A selection as JSON values, and out of JSON that may come from anywhere."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from .allocation import Allocation
from .formats import (
    as_list,
    as_object,
    as_text,
    as_whole,
    read_components,
    read_costs,
    read_rank,
    read_site,
    site_record,
    upgrade_selection,
)
from .grid import Grid


_PLAIN, _COMPONENTS, _FROZEN = 2, 3, 4
"""The formats: that of a selection of modules and ranks, and those that know of single components, and of modules that
stay without being trained. What needs nothing more is written in an earlier one, which earlier versions read."""


def selection_to_dict(selection: Any) -> dict[str, Any]:
    """A [`~diffora_trainer.core.selection.Selection`] as JSON values, a record for each module."""
    numbers = {
        "score": selection.scores,
        "gain": selection.gains,
        "gate": selection.gates,
        "factor": selection.factors,
    }
    records = [
        site_record(site, {name: values[index] for name, values in numbers.items()}, rank)
        for index, (site, rank) in enumerate(zip(selection.grid.sites, selection.ranks, strict=True))
    ]
    for record, kept in zip(records, selection.components, strict=False):
        record["components"] = list(kept)
    return {
        "format": _FROZEN if selection.frozen else _COMPONENTS if selection.components else _PLAIN,
        "rows": selection.grid.rows,
        "columns": selection.grid.columns,
        "modules": records,
        "selected": selection.selected,
        "shared": selection.shared,
        **({"frozen": selection.frozen} if selection.frozen else {}),
        "step": selection.step,
        "confidence": selection.confidence,
        "times": selection.times,
        "memory": selection.memory,
        "config": selection.config,
        "versions": selection.versions,
        "history": [asdict(entry) for entry in selection.history],
        "frequency": selection.frequency,
        "notes": selection.notes,
    }


def read_selection(data: Any) -> dict[str, Any]:
    """
    The arguments of a [`~diffora_trainer.core.selection.Selection`] out of what [`selection_to_dict`] gave, now or in
    an earlier version.

    Raises:
        AttributeError, KeyError, OverflowError, TypeError, ValueError: if it is not that.
    """
    if isinstance(data, dict) and data.get("format") == 1:
        data = upgrade_selection(data)
    if not isinstance(data, dict) or data.get("format") not in (_PLAIN, _COMPONENTS, _FROZEN):
        raise ValueError(f"its `format` is not {_PLAIN}, {_COMPONENTS} or {_FROZEN}")
    records = as_list(data["modules"])
    in_components = data["format"] == _COMPONENTS or any("components" in record for record in records)
    return {
        "grid": Grid(
            rows=tuple(map(as_text, as_list(data["rows"]))),
            columns=tuple(map(as_text, as_list(data["columns"]))),
            sites=tuple(map(read_site, records)),
        ),
        "ranks": tuple(map(read_rank, records)),
        "scores": tuple(float(record["score"]) for record in records),
        "gates": tuple(float(record["gate"]) for record in records),
        "gains": tuple(float(record["gain"]) for record in records),
        "factors": tuple(float(record["factor"]) for record in records),
        "history": tuple(map(Allocation.from_dict, as_list(data["history"]))),
        "shared": tuple(tuple(map(as_text, as_list(group))) for group in as_list(data["shared"])),
        "frozen": tuple(map(as_text, as_list(data["frozen"]))) if data["format"] == _FROZEN else (),
        "step": None if data["step"] is None else as_whole(data["step"]),
        "confidence": None if data.get("confidence") is None else float(data["confidence"]),
        "times": read_costs(data["times"]),
        "memory": read_costs(data.get("memory", {})),
        "config": as_object(data["config"]),
        "versions": as_object(data["versions"]),
        "notes": tuple(map(as_text, as_list(data["notes"]))),
        "components": tuple(map(read_components, records)) if in_components else (),
    }
