"""
Compiled models, which do not notice what is done to them: PyTorch looks at hooks once, when it traces a model.

A run can train what `torch.compile` made of a model, since it knows when the model changes and has the graphs dropped
then. It is given the model itself, and its own passes (architecture steps, losses around the choice, measurements) are
not compiled. Somebody else's compiled model is refused.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from ..compat.torch import is_compiled


def check_not_compiled(model: nn.Module) -> None:
    """
    Raise a `ValueError` if a model or a part of it is compiled. What was traced before hooks were attached or gates
    set silently runs on without them: PyTorch does not look for hooks again.
    """
    for name, module in model.named_modules():
        if is_compiled(module):
            where = f"its part {name!r}" if name else "the model"
            raise ValueError(
                f"You passed a compiled model ({where} went through `torch.compile`), which would not notice the "
                "gates of the search. Please pass the model as it was before, and let the trainer compile it "
                "(`torch_compile=True` in its arguments), or compile the finished one: `model.compile()` after the "
                "training."
            )


def not_compiled(compiled: bool) -> AbstractContextManager[None]:
    """Run models that are compiled as they were before, for a while; nothing where none is."""
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


def drop_graphs() -> None:
    """Have all compiled models of this process traced anew at their next call: hooks or modules came or went."""
    torch.compiler.reset()
