"""What lies beside a Trainer checkpoint: the state of the search, as JSON and safetensors."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from safetensors.torch import load as load_tensors
from safetensors.torch import save as serialize_tensors
from torch import Tensor

from .files import write_file


STATE_NAME = "diffora_state.json"
TENSORS_NAME = "diffora_state.safetensors"
_FORMAT = 1
_COUNTS = ("warmup", "cut", "decision", "held_out_position", "held_out_rows", "skipped_steps")


def save_state(folder: str | os.PathLike, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """
    Write the state of a search into a checkpoint folder. The JSON file, which is written last, holds the size of the
    other, so that a pair from an interrupted save is recognised.

    Args:
        folder (`str` or `os.PathLike`): the checkpoint.
        state (`dict`): JSON values.
        tensors (`dict[str, Tensor]`): the matrix.
    """
    blob = serialize_tensors({name: tensor.contiguous() for name, tensor in tensors.items()})
    write_file(Path(folder) / TENSORS_NAME, blob)
    record = {"format": _FORMAT, "tensor_bytes": len(blob), **state}
    write_file(Path(folder) / STATE_NAME, json.dumps(record, indent=2, allow_nan=False).encode())


def load_state(folder: str | os.PathLike) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """
    Read what [`save_state`] wrote.

    Raises:
        ValueError: if the checkpoint has no such state, or it is damaged. The search is never restarted in silence.
    """
    path, tensor_path = Path(folder) / STATE_NAME, Path(folder) / TENSORS_NAME
    if not path.is_file():
        raise ValueError(
            f"The checkpoint {os.fspath(folder)!r} holds no {STATE_NAME}, so it was not made by a DiffoRA trainer, or "
            "with `save_only_model=True`. The search cannot go on from it; please start a new run, or resume from "
            "another checkpoint."
        )
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(state, dict) or state.get("format") != _FORMAT:
            raise ValueError(f"its `format` is not {_FORMAT}")
        blob = tensor_path.read_bytes()
        if len(blob) != state["tensor_bytes"]:
            raise ValueError(f"{TENSORS_NAME} has {len(blob)} bytes instead of {state['tensor_bytes']}")
        tensors = load_tensors(blob)
        _check_types(state)
    except Exception as error:
        raise ValueError(
            f"The search state in {os.fspath(folder)!r} ({STATE_NAME}, {TENSORS_NAME}) cannot be read: "
            f"{type(error).__name__}: {error}. Please resume from another checkpoint."
        ) from error
    return state, tensors


def _check_types(state: dict[str, Any]) -> None:
    """Raise if a state does not hold what the search reads of it: the file may come from anywhere."""
    if not isinstance(state["config"], dict):
        raise TypeError("`config` should be a dictionary")
    if not isinstance(state["selection"], (str, type(None))) or (
        state["phase"] == "selected" and not state["selection"]
    ):
        raise TypeError("`selection` should be a text")
    if state["phase"] == "selected":
        return
    for name in _COUNTS:
        if type(state[name]) is not int or not 0 <= state[name] < 2**40:
            raise TypeError(f"`{name}` should be a count")
    modules, decided, times = state["modules"], state["decided"], state.get("times")
    if not isinstance(modules, list) or not all(isinstance(name, str) for name in modules):
        raise TypeError("`modules` should be a list of names")
    if decided is not None and [type(kept) for kept in decided] != [bool] * len(modules):
        raise TypeError("`decided` should say of each module whether it is kept")
    if not all(math.isfinite(loss) for loss in state["losses"]):
        raise ValueError("`losses` should be finite numbers")
    if times is not None and not all(
        math.isfinite(seconds) for seconds in (times["all_modules"], times["per_module"], *times["depth"])
    ):
        raise ValueError("`times` should be finite numbers")
