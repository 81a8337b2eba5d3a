"""Writing files whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path


SHORTCUT_CONFIG_NAME = "shortcut_config.json"
SHORTCUT_TENSORS_NAME = "shortcuts.safetensors"
ADAPTER_FOLDER = "adapter"
"""Where the adapter lies beside shortcuts: one level down, so that nobody loads it without them."""


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
