"""Whether the saved state of a method can be taken over."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def check_saved(state: Mapping[str, Tensor], needed: Mapping[str, Tensor], method: str) -> None:
    """
    Raise a `ValueError` if a saved state belongs to another method or model, or is damaged.

    Args:
        state (`Mapping[str, Tensor]`): what was saved.
        needed (`Mapping[str, Tensor]`): the present state of what is to take it over.
        method (`str`): the name of its method.
    """
    if set(state) != set(needed):
        raise ValueError(
            f"The saved matrix has the entries {sorted(state)}, but method {method!r} needs {sorted(needed)}. It was "
            "made with another method."
        )
    for name, tensor in needed.items():
        if state[name].shape != tensor.shape or state[name].dtype != tensor.dtype:
            raise ValueError(
                f"The saved matrix has {tuple(state[name].shape)} numbers of {state[name].dtype} in {name!r}, this "
                f"model needs {tuple(tensor.shape)} of {tensor.dtype}. It was made for another model or other target "
                "modules, or is damaged."
            )
        if not torch.isfinite(state[name]).all() or name == "steps" and state[name] < 0:
            raise ValueError(f"The saved matrix has an impossible number in {name!r}. It is damaged.")
