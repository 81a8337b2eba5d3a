"""Models that would not notice what is done to them."""

from __future__ import annotations

from torch import nn

from ..compat import is_compiled


def check_not_compiled(model: nn.Module) -> None:
    """
    Raise a `ValueError` if a model or a part of it is compiled. What was traced before hooks were attached or gates
    set runs on without them, in silence: PyTorch does not look for hooks again.
    """
    for name, module in model.named_modules():
        if is_compiled(module):
            where = f"its part {name!r}" if name else "the model"
            raise ValueError(
                f"You passed a compiled model ({where} went through `torch.compile`), which would not notice the "
                "gates of the search. Please search with the model as it was before, and compile the finished one: "
                "`model.compile()` after the training."
            )
