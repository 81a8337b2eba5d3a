"""Files written whole or not at all, and read with an error that names them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


ADAPTER_CONFIG_NAME = "adapter_config.json"
ADAPTER_NAME = "adapter_model.safetensors"
TRAINER_STATE_NAME = "trainer_state.json"  # what the Trainer writes last into a checkpoint


def adapters_inside(folder: str | os.PathLike) -> list[str]:
    """Names of the folders inside of one that hold an adapter: PEFT gives each that is not called "default" one."""
    return sorted(path.parent.name for path in Path(folder).glob(f"*/{ADAPTER_CONFIG_NAME}"))


def file_at(path: str | os.PathLike, name: str) -> Path:
    """
    The file to write by what a user calls it: a file, or a folder, which is there or whose path ends with a slash.

    Args:
        path (`str` or `os.PathLike`): as it was given: a `Path` has lost its last slash.
        name (`str`): what the file in a folder is called.
    """
    separators = tuple(separator for separator in (os.sep, os.altsep) if separator)
    folder = os.fspath(path).endswith(separators) or Path(path).is_dir()
    return Path(path) / name if folder else Path(path)


def write_file(path: Path, content: bytes) -> None:
    """Write a file under a temporary name and move it into place, so that nobody ever reads half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.unlink(missing_ok=True)  # a link that somebody put there would be followed
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def tensor_shapes(path: str | os.PathLike) -> dict[str, tuple[int, ...]]:
    """The shapes in a safetensors file, by name. Raises a `ValueError` if the file is not whole."""
    path = Path(path)
    with reraise_with_path(path), path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if not 0 < size <= path.stat().st_size - 8:
            raise ValueError("it is not whole")
        header = json.loads(file.read(size))
        header.pop("__metadata__", None)
        end = 8 + size + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if path.stat().st_size != end:
            raise ValueError(f"it has {path.stat().st_size} bytes instead of {end}")
        return {name: tuple(entry["shape"]) for name, entry in header.items()}


@contextmanager
def reraise_with_path(path: Path) -> Iterator[None]:
    """Whatever goes wrong with a file is a `ValueError` that names it."""
    try:
        yield
    except Exception as error:
        reason = f"there is no {error}" if isinstance(error, KeyError) else str(error).rstrip(".")
        raise ValueError(f"{str(path)!r} cannot be read: {reason}. Please resume from another checkpoint.") from error


def read_json(path: Path, strict: bool = True) -> dict[str, Any]:
    """
    The object in a file of JSON.

    Args:
        path (`Path`): the file.
        strict (`bool`, *optional*, defaults to `True`): whether `NaN` and `Infinity` are refused. A Trainer writes
            them into its state when it logs a loss that is not finite.

    Raises:
        ValueError: if it is not JSON, or not an object.
    """

    def refuse(name: str) -> None:
        raise ValueError(f"it holds {name}, which is not a number")

    value = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse if strict else None)
    if not isinstance(value, dict):
        raise ValueError("it is not a JSON object")
    return value
