"""Adapted layers whose weight is another module's too."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .base import plain_name


def tied_layers(model: nn.Module, left_out: Collection[nn.Module] = ()) -> dict[nn.Module, tuple[str, str]]:
    """
    The adapted layers whose base weight is also that of another module, as in the shared blocks of Zamba2. What
    changes the weight for one of them changes it for both.

    Args:
        model (`nn.Module`): a model with an adapter.
        left_out (`Collection[nn.Module]`, *optional*): layers that are not looked at.

    Returns:
        `dict`: for each such layer its name and that of the other module.
    """
    owners: dict[int, list[nn.Module]] = {}
    names: dict[nn.Module, str] = {}
    for name, module in model.named_modules():
        names[module] = plain_name(name).removesuffix(".base_layer")
        if (weight := _weight(module)) is not None:
            owners.setdefault(id(weight), []).append(module)
    found: dict[nn.Module, tuple[str, str]] = {}
    for layer, name in names.items():
        base: Any = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else None
        if base is None or layer in left_out:
            continue
        if others := [owner for owner in owners.get(id(_weight(base)), ()) if owner is not base]:
            found[layer] = name, names[others[0]]
    return found


def _weight(module: nn.Module) -> nn.Parameter | None:
    return dict(module.named_parameters(recurse=False)).get("weight")
