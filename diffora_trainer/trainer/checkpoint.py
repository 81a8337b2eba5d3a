"""What lies beside a Trainer checkpoint: the state of the search, as JSON and safetensors. And which one is whole."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as serialize_tensors
from torch import Tensor

from ..core.files import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_FOLDER,
    ADAPTER_NAME,
    SHORTCUT_CONFIG_NAME,
    SHORTCUT_TENSORS_NAME,
    read_json,
    write_file,
)
from ..core.files import reraise_with_path as reraise_with_path
from ..core.files import tensor_shapes as tensor_shapes


STATE_NAME = "diffora_state.json"
TENSORS_NAME = "diffora_state.safetensors"
TRAINER_STATE_NAME = "trainer_state.json"  # what the Trainer writes last into a checkpoint
WARMUP, SEARCH, SELECTED = "warm-up", "search", "selected"

_FORMAT = 2
_OTHER = "Please resume from another checkpoint."
# `torch.save` names neither a full disk nor the file.
_WRITE_ERRORS = ("inline_container", "PytorchStreamWriter")


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
    with reraise_with_path(path):
        state = read_json(path)
        state.setdefault("shortcuts", False)  # as written before a search could choose among them
        if state.get("phase") in (WARMUP, SEARCH):
            state.setdefault("history", [])  # as written before there were reallocations
            state.setdefault("reached", None)  # as written before these two were kept
            state.setdefault("effect", None)
        _check_state(state)
    with reraise_with_path(tensor_path):
        blob = tensor_path.read_bytes()
        if len(blob) != state["tensor_bytes"]:
            raise ValueError(f"it has {len(blob)} bytes instead of {state['tensor_bytes']}")
        tensors = load_tensors(blob)
    return state, tensors


def check_checkpoint(folder: str | os.PathLike) -> None:
    """
    Raise a `ValueError`, which names the file, if a run cannot be resumed from a checkpoint because it is not whole:
    its saving or its deletion was interrupted, or a file was damaged. Only the ends of large files are read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"There is no checkpoint folder {str(folder)!r}.")
    path = folder / TRAINER_STATE_NAME
    if not path.is_file():
        raise ValueError(
            f"The checkpoint {str(folder)!r} holds no {TRAINER_STATE_NAME}, which is written last: its saving was "
            f"interrupted. {_OTHER}"
        )
    with reraise_with_path(path):
        step = read_json(path)["global_step"]
    state, _ = load_state(folder)
    if state["step"] != step:
        raise ValueError(
            f"The checkpoint {str(folder)!r} is a mixture: {STATE_NAME} is from step {state['step']}, and "
            f"{TRAINER_STATE_NAME} from step {step}. {_OTHER}"
        )
    adapters = [*folder.glob(ADAPTER_NAME), *folder.glob(f"*/{ADAPTER_NAME}")]  # a named adapter has its own folder
    for path in adapters or [folder / ADAPTER_NAME]:
        tensor_shapes(path)
        with reraise_with_path(path.with_name(ADAPTER_CONFIG_NAME)):
            read_json(path.with_name(ADAPTER_CONFIG_NAME))
    if state["shortcuts"]:
        with reraise_with_path(folder / SHORTCUT_CONFIG_NAME):
            read_json(folder / SHORTCUT_CONFIG_NAME)
        tensor_shapes(folder / SHORTCUT_TENSORS_NAME)
    elif (folder / SHORTCUT_CONFIG_NAME).is_file():  # the Trainer would read the adapter that was saved with them
        raise ValueError(
            f"The checkpoint {str(folder)!r} is a mixture: its model has no shortcuts, so {SHORTCUT_CONFIG_NAME} is "
            f"left of an earlier one, as uploads to the Hub remove nothing. Please delete it, {SHORTCUT_TENSORS_NAME} "
            f"and {ADAPTER_FOLDER}/ there."
        )
    randomness = [*folder.glob("rng_state*.pth")] or [folder / "rng_state.pth"]
    # FSDP2 writes its own files, with the adapter once more.
    sharded = [folder / name for name in ("optimizer.bin", "pytorch_model_fsdp.bin")]
    optimizer = sharded if any(path.is_file() for path in sharded) else [folder / "optimizer.pt"]
    for path in [*optimizer, folder / "scheduler.pt", *randomness]:
        with reraise_with_path(path):
            if not path.is_file() or not zipfile.is_zipfile(path):  # its directory comes last
                raise ValueError("it is not whole" if path.is_file() else "it is missing")


def find_checkpoint(wanted: str | os.PathLike | bool, folder: str | os.PathLike) -> tuple[str, dict[str, str]]:
    """
    The checkpoint that a run is resumed from. Nothing is deleted.

    Args:
        wanted (`str`, `os.PathLike` or `bool`): a checkpoint, or `True` for the newest whole one.
        folder (`str` or `os.PathLike`): where checkpoints are looked for if it is `True`.

    Returns:
        `tuple[str, dict[str, str]]`: its path, and what is wrong with each newer one, by its name.

    Raises:
        ValueError: if the checkpoint is not whole, or there is none.
    """
    if wanted is not True:
        assert not isinstance(wanted, bool)
        try:
            check_checkpoint(wanted)
        except ValueError as error:
            best, _ = newest_checkpoint(Path(os.path.abspath(wanted)).parent)
            raise ValueError(
                str(error) + ("" if best is None else f" The newest whole one beside it is {best!r}.")
            ) from error
        return os.fspath(wanted), {}
    found, passed = newest_checkpoint(folder)
    if found is None:
        reasons = "".join(f"\n{name}: {reason}" for name, reason in passed.items())
        raise ValueError(
            f"You passed `resume_from_checkpoint=True`, but no valid checkpoint was found in the output directory "
            f"{os.fspath(folder)!r}. Please pass the path of one, or leave it out to start a new run.{reasons}"
        )
    return found, passed


def newest_checkpoint(folder: str | os.PathLike) -> tuple[str | None, dict[str, str]]:
    """
    The whole checkpoint with the highest step, or `None`, and what is wrong with each one above it, by its name.

    Args:
        folder (`str` or `os.PathLike`): an output directory; it need not exist.
    """
    steps = {path: re.fullmatch(r"checkpoint-(\d+)", path.name) for path in Path(folder).glob("checkpoint-*")}
    numbered = sorted(((int(match[1]), path) for path, match in steps.items() if match), reverse=True)
    passed = {}
    for _, path in numbered:
        try:
            check_checkpoint(path)
        except ValueError as error:
            passed[path.name] = str(error)
        else:
            return str(path), passed
    return None, passed


@contextmanager
def atomic_checkpoint(folder: str | os.PathLike, writes: bool) -> Iterator[None]:
    """
    While the Trainer writes a checkpoint. If an earlier one stands in its place, it first loses the file that makes it
    look whole: a mixture of the two cannot pass for a checkpoint.

    Args:
        folder (`str` or `os.PathLike`): the checkpoint.
        writes (`bool`): whether this process writes what all share.

    Raises:
        OSError: if the disk did not take a file.
    """
    last = Path(folder) / TRAINER_STATE_NAME
    if writes:
        last.unlink(missing_ok=True)
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        full = not isinstance(error, RuntimeError) or any(sign in str(error) for sign in _WRITE_ERRORS)
        if not full or _is_json(last):  # not the disk, or not the writing but what comes after it
            raise
        free = shutil.disk_usage(next(path for path in last.parents if path.is_dir())).free
        raise OSError(
            f"The checkpoint {os.fspath(folder)!r} could not be written, so the run stops: {error}. There are "
            f"{free:,} bytes free on its disk. The checkpoints before it are untouched. Please make room (see "
            "`save_total_limit`) and go on with `resume_from_checkpoint=True`, which passes this one over."
        ) from error


def _is_json(path: Path) -> bool:
    try:
        return bool(read_json(path))
    except (OSError, ValueError):
        return False


def _whole(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**40


def _number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _all(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(check, value))


def _is(*kinds: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, kinds)


def _allocation(value: Any) -> bool:
    if not isinstance(value, dict) or not _whole(value.get("step")) or not _all(_number)(value.get("scores")):
        return False
    return _all(_is(bool))(value.get("on")) and any(value["on"]) and len(value["on"]) == len(value["scores"])


def _times(value: Any) -> bool:
    if value is None:
        return True
    single = isinstance(value, dict) and all(_number(value.get(name)) for name in ("all_modules", "per_module"))
    return single and _all(_number)(value.get("depth")) and bool(value["depth"])


_FIELDS = {
    "tensor_bytes": _whole,
    "phase": lambda value: value in (WARMUP, SEARCH, SELECTED),
    "step": _whole,
    "config": _is(dict),
    "began_cut": _is(bool),
    "base_model": _is(dict),
    "shortcuts": _is(bool),
}
_FIELDS_SELECTED = {"selection": _is(str)}
_FIELDS_SEARCHING = {
    "warmup": _whole,
    "decision": _whole,
    "cut": _whole,
    "modules": _all(_is(str)),
    "held_out_position": _whole,
    "held_out_rows": _whole,
    "skipped_steps": _whole,
    "decided": lambda value: value is None or _all(_is(bool))(value),
    "losses": _all(_number),
    "effect": lambda value: value is None or _all(_number)(value) and len(value) == 2,
    "reached": lambda value: value is None or _all(_is(bool))(value),
    "times": _times,
    "history": _all(_allocation),
}


def _check_state(state: dict[str, Any]) -> None:
    """Raise a `ValueError` if a state cannot be that of a run."""
    if state.get("format") != _FORMAT:
        raise ValueError(f"its `format` is not {_FORMAT}")
    for fields in (_FIELDS, _FIELDS_SELECTED if state.get("phase") == SELECTED else _FIELDS_SEARCHING):
        for name, check in fields.items():
            if name not in state:
                raise ValueError(f"it has no `{name}`")
            if not check(state[name]):
                raise ValueError(f"its `{name}` cannot be {repr(state[name])[:100]}")
    if state["phase"] == SELECTED:
        return
    step, warmup, decision, cut = (state[name] for name in ("step", "warmup", "decision", "cut"))
    if not warmup <= decision <= cut or step >= cut or (state["phase"] == WARMUP) != (step < warmup):
        raise ValueError(f"step {step}, phase {state['phase']!r} and the steps {warmup}, {decision}, {cut} disagree")
    if (state["decided"] is not None) != (step >= decision):
        raise ValueError(f"at step {step} its `decided` cannot be {repr(state['decided'])[:100]}")
    if state["decided"] is not None and len(state["decided"]) != len(state["modules"]):
        raise ValueError(f"its `decided` has {len(state['decided'])} entries for {len(state['modules'])} modules")
    if state["reached"] is not None and len(state["reached"]) != len(state["modules"]):
        raise ValueError(f"its `reached` has {len(state['reached'])} entries for {len(state['modules'])} modules")
    if (state["times"] is not None) != (state["phase"] == SEARCH and state["config"].get("cost") == "time"):
        raise ValueError(f"in phase {state['phase']!r} its `times` cannot be {repr(state['times'])[:100]}")
    allocated = [entry["step"] for entry in state["history"]]
    reallocates = state["phase"] == SEARCH and state["config"].get("reallocate_every") is not None
    if bool(allocated) != reallocates or any(not warmup <= at <= step for at in allocated):
        raise ValueError(f"at step {step} its `history` cannot be one of the steps {allocated}")
    if any(len(entry["on"]) != len(state["modules"]) for entry in state["history"]):
        raise ValueError(f"its `history` is not one of {len(state['modules'])} modules")
