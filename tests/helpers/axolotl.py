"""What of axolotl a plugin touches, for where axolotl is not installed."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType
from typing import Any

import pytest


class Cfg(dict):
    """`axolotl.utils.dict.DictDefault` (0.19.0): a dictionary with attributes; what is not there is `None`."""

    def __getattr__(self, name: str) -> Any:
        return self.get(name)

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value


def plugin_module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """
    `diffora_trainer.integrations.axolotl`, beside the real axolotl where it is installed. Elsewhere beside a stand-in
    for `axolotl.integrations.base`, of which a plugin derives from `BasePlugin` alone (0.19.0: a class whose
    constructor takes nothing, and whose hooks do nothing).
    """
    if importlib.util.find_spec("axolotl") is None:
        for name in ("axolotl", "axolotl.integrations", "axolotl.integrations.base"):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        sys.modules["axolotl.integrations.base"].BasePlugin = type("BasePlugin", (), {})  # type: ignore[attr-defined]
        monkeypatch.delitem(sys.modules, "diffora_trainer.integrations.axolotl", raising=False)
    return importlib.import_module("diffora_trainer.integrations.axolotl")
