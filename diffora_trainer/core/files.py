"""Writing files whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path


SHORTCUT_CONFIG_NAME = "shortcut_config.json"
SHORTCUT_TENSORS_NAME = "shortcuts.safetensors"
ADAPTER_FOLDER = "adapter"
"""Where the adapter lies beside shortcuts: one level down, so that nobody loads it without them."""
ADAPTER_CONFIG_NAME = "adapter_config.json"
ADAPTER_NAME = "adapter_model.safetensors"


def holds_plain_adapter(folder: str | os.PathLike) -> bool:
    """Whether what was saved last in a folder is an adapter that PEFT loads."""
    try:
        config = json.loads(Path(folder, ADAPTER_CONFIG_NAME).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(config, dict) and config.get("peft_type") == "LORA"


def holds_shortcuts(folder: str | os.PathLike) -> bool:
    """
    Whether what was saved last in a folder has shortcuts. Those of an earlier save may lie beside a plain adapter:
    uploads to the Hub remove nothing there.
    """
    return Path(folder, SHORTCUT_CONFIG_NAME).is_file() and not holds_plain_adapter(folder)


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
