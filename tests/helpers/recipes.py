"""What tests of recipes share: these are scripts, which import each other by the names of their files."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


def on_path(folder: Path) -> Any:
    """A fixture that lets all tests of a file import what is in a folder."""

    @pytest.fixture(scope="module", autouse=True)
    def importable() -> Iterator[None]:
        sys.path.insert(0, str(folder))
        yield
        sys.path.remove(str(folder))

    return importable
