"""Files of results: one record a line, added at once, that survive a kill; and what tells trainings apart."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tasks import Task, TaskConfig


Record = dict[str, Any]


def fingerprint(config: TaskConfig, **others: Any) -> str:
    """By what results can be compared: a change of the model, the data, the training or `others` gives another one."""
    settings = {**dataclasses.asdict(config), "task": None, **others}
    for name in ("dtype", "dropout"):  # results from before there were these options stay what they are
        if settings[name] is None:
            del settings[name]
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:12]


def stamp(path: Path, mark: str, task: Task) -> Record:
    """
    What each new record of a file begins with: its fingerprint, and what it is trained on.

    Args:
        path (`Path`): the file.
        mark (`str`): the fingerprint of the settings.
        task ([`Task`]): with its data loaded.

    Raises:
        ValueError: if the file has records of these settings on other data, or of another precision or device.
    """
    now = task.trained_on()
    for record in read_results(path):
        then = record.get("trained_on", now)  # results from before this was written are taken as they are
        if record["fingerprint"] == mark and then != now:
            changed = [
                f"{name} ({then.get(name)} then, {now[name]} now)" for name in now if then.get(name) != now[name]
            ]
            raise ValueError(
                f"{path} holds results of the same settings, but what they were trained on has changed since: "
                f"{', '.join(changed)}. Old and new ones cannot be compared. Please pass another `output_dir`."
            )
    return {"fingerprint": mark, "trained_on": now}


def comparable(records: Iterable[Record]) -> dict[str, list[Record]]:
    """
    Records that can stand in one table, in their order: of one fingerprint and trained on the same. Those that do not
    say on what stand with the others of their fingerprint, if these are all of a kind.
    """
    records = list(records)

    def kind_of(record: Record) -> str:
        return " ".join(record.get("trained_on", {}).values())

    kinds: dict[str, set[str]] = {}
    for record in records:
        kinds.setdefault(record["fingerprint"], set()).add(kind_of(record))
    found: dict[str, list[Record]] = {}
    for record in records:
        mark = record["fingerprint"]
        name = f"{mark} {kind_of(record)}".strip() if len(kinds[mark] - {""}) > 1 else mark
        found.setdefault(name, []).append(record)
    return found


def as_loss(value: float) -> float:
    """A loss to compare by: that of a run that diverged is infinite."""
    return value if math.isfinite(value) else math.inf


def read_results(path: Path) -> list[Record]:
    """The records of a file; a last line that was cut off by a kill is left out."""
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def end_last_line(path: Path) -> None:
    """The line that a kill cut off must not swallow the next one."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if text and not text.endswith("\n"):
        path.write_text(text + "\n", encoding="utf-8")


def append(path: Path, record: Record) -> None:
    """Add one line, and see it to the disk."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
        file.flush()
        os.fsync(file.fileno())
