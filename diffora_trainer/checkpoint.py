"""What lies beside a Trainer checkpoint: the state of the search, as JSON and safetensors."""

from __future__ import annotations

import json
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
    except Exception as error:
        raise ValueError(
            f"The search state in {os.fspath(folder)!r} ({STATE_NAME}, {TENSORS_NAME}) cannot be read: {error}. "
            "Please resume from another checkpoint."
        ) from error
    return state, tensors
