"""Write what a run has chosen, and why, as one HTML page that opens without a network."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ..core.files import TRAINER_STATE_NAME, file_at
from ..core.selection import SELECTION_NAME, Selection
from ..hub.report import REPORT_NAME, is_log_of_choice, write_report
from .source import load_selection


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `diffora report`."""
    parser.add_argument("source", help="folder of an adapter, its diffora_selection.json, or its Hub id")
    parser.add_argument(
        "--output",
        metavar="FILE.html",
        help=f"where to write it, or a folder; by default {REPORT_NAME} in the source, or here if that is on the Hub",
    )


def run(words: argparse.Namespace) -> None:
    """
    Write it.

    Raises:
        ValueError: if there is no selection, the Trainer's state cannot be read, or a report that has the losses would
            be replaced by one without them.
    """
    selection = load_selection(words.source)
    local = Path(words.source)
    folder = (local if local.is_dir() else local.parent) if local.exists() else None
    state = _hub_state(words.source) if folder is None else _local_state(folder, selection)
    path = file_at(words.output or folder or Path(), REPORT_NAME)
    if not state and not words.output and path.exists():
        raise ValueError(
            f"{str(path)!r} is there already, and without a {TRAINER_STATE_NAME} of its run beside the adapter or in "
            "a checkpoint the new one would have no losses. Please name another file with `--output`."
        )
    title = words.source if folder is None else folder.resolve().name
    write_report(path, selection, state.get("log_history", ()), state.get("max_steps"), title)
    print(f"Written: {path}" + ("" if state else f" (without losses: there is no {TRAINER_STATE_NAME} of the run)"))


def _local_state(folder: Path, selection: Selection) -> dict[str, Any]:
    """The Trainer's state in a folder, or in the newest of its checkpoints that holds the same selection."""
    checkpoints = [path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    checkpoints.sort(key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    for place in (folder, *checkpoints):
        if not (place / TRAINER_STATE_NAME).is_file():
            continue
        if place != folder and not ((place / SELECTION_NAME).is_file() and Selection.load(place) == selection):
            continue  # from before the pruning, or of another run
        state = _read_state(place / TRAINER_STATE_NAME)
        if is_log_of_choice(state["log_history"]):
            return state
    return {}


def _hub_state(source: str) -> dict[str, Any]:
    """The Trainer's state in a repository: of a run that was pushed with its checkpoints."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    for name in (TRAINER_STATE_NAME, f"last-checkpoint/{TRAINER_STATE_NAME}"):
        try:
            state = _read_state(Path(hf_hub_download(source, name)))
        except EntryNotFoundError:
            continue
        if is_log_of_choice(state["log_history"]):
            return state
    return {}


def _read_state(path: Path) -> dict[str, Any]:
    try:
        state = json.loads(path.read_text(encoding="utf-8"))  # a loss in it may be NaN
        log, steps = state["log_history"], state.get("max_steps")
        if not isinstance(log, list) or not all(isinstance(entry, dict) for entry in log):
            raise ValueError("its `log_history` is not a list of objects")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        what = f"there is no {error}" if isinstance(error, KeyError) else str(error).rstrip(".")
        raise ValueError(
            f"{str(path)!r} is not the state of a Trainer: {what}. Please remove it, and the report is written "
            "without losses."
        ) from error
    return {"log_history": log, "max_steps": steps if type(steps) is int and steps > 0 else None}
