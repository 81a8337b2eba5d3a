"""The files of shortcuts, and what was saved last in a folder."""

from __future__ import annotations

import json
import os
from pathlib import Path

from ...core.files import ADAPTER_CONFIG_NAME


SHORTCUT_CONFIG_NAME = "shortcut_config.json"
SHORTCUT_TENSORS_NAME = "shortcuts.safetensors"
ADAPTER_FOLDER = "adapter"
"""Where the adapter lies beside shortcuts: one level down, so that nobody loads it without them."""


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
