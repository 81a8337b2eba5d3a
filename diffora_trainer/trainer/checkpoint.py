"""What lies beside a Trainer checkpoint: the state of the search, as JSON and safetensors. And which one is whole."""

from __future__ import annotations

import json
import os
import re
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as serialize_tensors
from torch import Tensor

from ..adapters.base import extra_kinds, site_kind
from ..core.files import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_NAME,
    TRAINER_STATE_NAME,
    read_json,
    reraise_with_path,
    tensor_shapes,
    write_file,
)
from ..core.formats import as_whole
from ..core.state import RunState


STATE_NAME = "diffora_state.json"
TENSORS_NAME = "diffora_state.safetensors"

_OTHER = "Please resume from another checkpoint."
# `torch.save` names neither a full disk nor the file.
_WRITE_ERRORS = ("inline_container", "PytorchStreamWriter")


def save_state(folder: str | os.PathLike, state: RunState, tensors: dict[str, Tensor]) -> None:
    """
    Write the state of a run into a checkpoint folder. The JSON file, which is written last, holds the size of the
    other, so that a pair from an interrupted save is recognised.

    Args:
        folder (`str` or `os.PathLike`): the checkpoint.
        state ([`~diffora_trainer.core.state.RunState`]): the state.
        tensors (`dict[str, Tensor]`): those of the method.
    """
    blob = serialize_tensors({name: tensor.contiguous() for name, tensor in tensors.items()})
    write_file(Path(folder) / TENSORS_NAME, blob)
    record = {"tensor_bytes": len(blob), **state.to_dict()}
    write_file(Path(folder) / STATE_NAME, json.dumps(record, indent=2, allow_nan=False).encode())


def load_state(folder: str | os.PathLike) -> tuple[RunState, dict[str, Tensor]]:
    """
    Read what [`save_state`] wrote, now or in an earlier version.

    Raises:
        ValueError: if the checkpoint has no such state, or it is damaged. The search is never silently restarted.
    """
    path, tensor_path = Path(folder) / STATE_NAME, Path(folder) / TENSORS_NAME
    if not path.is_file():
        raise ValueError(
            f"The checkpoint {os.fspath(folder)!r} holds no {STATE_NAME}, so it was not made by a DiffoRA trainer, or "
            "with `save_only_model=True`. The search cannot resume from it; please start a new run, or resume from "
            "another checkpoint."
        )
    with reraise_with_path(path):
        record = read_json(path)
        state = RunState.from_dict(record)
        size = as_whole(record["tensor_bytes"])
    with reraise_with_path(tensor_path):
        blob = tensor_path.read_bytes()
        if len(blob) != size:
            raise ValueError(f"it has {len(blob)} bytes instead of {size}")
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
        step = read_json(path, strict=False)["global_step"]
    state, _ = load_state(folder)
    if state.step != step:
        raise ValueError(
            f"The checkpoint {str(folder)!r} is a mixture: {STATE_NAME} is from step {state.step}, and "
            f"{TRAINER_STATE_NAME} from step {step}. {_OTHER}"
        )
    adapters = [*folder.glob(ADAPTER_NAME), *folder.glob(f"*/{ADAPTER_NAME}")]  # a named adapter has its own folder
    for path in adapters or [folder / ADAPTER_NAME]:
        tensor_shapes(path)
        with reraise_with_path(path.with_name(ADAPTER_CONFIG_NAME)):
            read_json(path.with_name(ADAPTER_CONFIG_NAME))
    for name in state.extra_kinds:
        site_kind(name)  # registered now, if it was not
    for kind in extra_kinds():
        kind.check_whole(folder, kind.name in state.extra_kinds)
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
    look whole, and the state of its search, which `save_only_model` does not write anew: a mixture of the two cannot
    pass for a checkpoint.

    Args:
        folder (`str` or `os.PathLike`): the checkpoint.
        writes (`bool`): whether this process writes what all share.

    Raises:
        OSError: if the disk did not take a file.
    """
    last = Path(folder) / TRAINER_STATE_NAME
    if writes:
        last.unlink(missing_ok=True)
        last.with_name(STATE_NAME).unlink(missing_ok=True)
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
            "`save_total_limit`) and resume with `resume_from_checkpoint=True`, which skips this one."
        ) from error


def _is_json(path: Path) -> bool:
    try:
        return bool(read_json(path, strict=False))
    except (OSError, ValueError):
        return False
