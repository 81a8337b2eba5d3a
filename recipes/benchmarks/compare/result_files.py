"""Files of results: one record a line, added at once, that survive a kill; and what tells trainings apart."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from tasks import TaskConfig


Record = dict[str, Any]


def fingerprint(config: TaskConfig, **others: Any) -> str:
    """By what results can be compared: a change of the model, the data, the training or `others` gives another one."""
    settings = {**dataclasses.asdict(config), "task": None, **others}
    for name in ("dtype", "dropout"):  # results from before there were these options stay what they are
        if settings[name] is None:
            del settings[name]
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:12]


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
