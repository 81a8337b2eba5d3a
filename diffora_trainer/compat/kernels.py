"""What tells the fused training kernels of axolotl and unsloth, neither of which need be installed."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from types import MethodType
from typing import Any

from torch import nn


_TOOLS = {"axolotl": "axolotl", "unsloth": "unsloth", "unsloth_zoo": "unsloth"}


def fused_lora(model: nn.Module) -> tuple[str, str] | None:
    """
    The tool whose kernels compute a LoRA of a model, and the module in which they do; `None` if PEFT computes all of
    it. These kernels multiply by the weight of `lora_A` and never call it.

    They are functions of these packages with `lora` in their names, put in the place of a method of a single module
    (`apply_lora_qkv`, `apply_lora_o`, `apply_lora_mlp_swiglu` and others: axolotl 0.19, `kernels/lora.py`; unsloth
    2026.10, `kernels/fast_lora.py`), or of `forward` in one of PEFT's classes of layers (`fast_lora_forward`, and
    `unsloth_forward`, which unsloth writes into a file and compiles: `patch_lora_forwards` of unsloth_zoo 2026.10). It
    can go when they call `lora_A`, or say in a public way what they have replaced.
    """
    for name, module in model.named_modules():
        for function in _own_functions(module):
            origin = getattr(function, "__module__", None) or ""
            tool = _TOOLS.get(origin.partition(".")[0])
            if getattr(function, "__name__", "") == "unsloth_forward":
                return "unsloth", name
            if tool is not None and "lora" in getattr(function, "__qualname__", "").lower():
                return tool, name
    return None


def _own_functions(module: nn.Module) -> Iterator[Any]:
    """The function by which a module is called, and those that were put into it alone."""
    yield type(module).forward
    for value in vars(module).values():
        while isinstance(value, (partial, MethodType)):
            value = value.func if isinstance(value, partial) else value.__func__
        yield value
