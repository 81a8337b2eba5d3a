"""Where a shortcut can read and add in a model: its layers and their parts, found by structure."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ...adapters.base import plain_name
from ...core.text import sanitize


ATTRIBUTE = "diffora_shortcuts"
"""Name under which the shortcuts of a layer are registered on it."""


@dataclass(frozen=True)
class Parts:
    """
    Where a layer is entered and joined: its attention, the first and last module of its feed-forward, the norms that
    are its own children, and for BERT's kind the norms inside its output modules, which read the sums.
    """

    attention: nn.Module
    enters: nn.Module
    leaves: nn.Module
    norms: tuple[nn.Module, ...]
    sums: tuple[nn.Module, ...]
    width: int


def plan_layers(
    model: nn.Module, kinds: Sequence[str], names: Collection[str] | None = None
) -> list[tuple[str, nn.Module, Parts, tuple[str, ...]]]:
    """
    The layers with their names, their parts and the kinds that they get: all of `kinds`, or the named ones of them.
    """
    plan = []
    for stack, layers in _stacks(model):
        for index, layer in enumerate(layers):
            name = f"{stack}.{index}"
            possible = (kind for kind in kinds if index or kind != "shortcut2")
            given = tuple(kind for kind in possible if names is None or f"{name}.{kind}" in names)
            plan.append((name, layer, _parts(name, layer, "shortcut2" in kinds), given))
    if not any(given for *_, given in plan):
        raise ValueError(
            f"{type(model).__name__} has no place for shortcuts of the kinds {list(kinds)}: it has "
            f"{len(plan)} numbered layers with attention, and the first has no layer before it."
        )
    if unknown := sorted(set(names or ()) - {f"{name}.{kind}" for name, *_, given in plan for kind in given}):
        raise ValueError(
            f"{type(model).__name__} has no place for {len(unknown)} of the shortcuts that are named, such as "
            f"{sanitize(repr(unknown[0]))}. Please use the model that they were chosen in."
        )
    return plan


def _stacks(model: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
    """The outermost lists of layers that all hold attention."""
    done: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(name.startswith(f"{outer}.") for outer in done):
            continue
        if len(module) and all(any(_is(m, "Attention") for m in layer.modules()) for layer in module):
            done.append(name)
            yield plain_name(name), module


def _is(module: nn.Module, *words: str) -> bool:
    return any(word in type(module).__name__ for word in words)


def _parts(name: str, layer: nn.Module, crosses: bool) -> Parts:
    children = {key: child for key, child in layer.named_children() if key != ATTRIBUTE}
    attentions = [child for child in children.values() if _is(child, "Attention")]
    norms = tuple(child for child in children.values() if _is(child, "Norm"))
    ffns = [c for k, c in children.items() if k == "mlp" or _is(c, "MLP", "FeedForward", "FFN", "SparseMoe")]
    parts = None
    if len(attentions) == 1:
        if len(norms) == 2 and len(ffns) == 1:
            parts = Parts(attentions[0], ffns[0], ffns[0], norms, (), _width(norms[0]))
        elif len(norms) == 2 and not ffns and {"fc1", "fc2"} <= set(children):
            parts = Parts(attentions[0], children["fc1"], children["fc2"], norms, (), _width(norms[0]))
        elif len(norms) == 2 and not ffns and {"intermediate", "output"} <= set(children):
            # A ViT whose `output` makes the addition: what is added to the sum is added to what it sums.
            parts = Parts(attentions[0], children["intermediate"], children["output"], norms, (), _width(norms[0]))
        elif not norms and not ffns and {"intermediate", "output"} <= set(children):
            outputs = [dict(attentions[0].named_children()).get("output"), children["output"]]
            inner = [[] if o is None else [m for m in o.children() if _is(m, "Norm")] for o in outputs]
            if all(len(found) == 1 for found in inner):
                sums = (inner[0][0], inner[1][0])
                parts = Parts(attentions[0], children["intermediate"], children["output"], (), sums, _width(sums[0]))
    if parts is None or not parts.width:
        found = ", ".join(f"{key} ({type(child).__name__})" for key, child in children.items())
        raise ValueError(
            f"The structure of the layer {name!r} ({type(layer).__name__}) is not understood. Its children are "
            f"{found}. Shortcuts need one attention, one feed-forward (`mlp`, `fc1` and `fc2`, or `intermediate` and "
            "`output`) and one norm for each of the two; cross-attention and more norms are not supported."
        )
    if crosses and getattr(layer, "chunk_size_feed_forward", None):
        raise ValueError(
            f"The layer {name!r} computes its feed-forward in chunks (`chunk_size_feed_forward`), so `shortcut2` "
            "would read the last one only. Please set it to 0, or leave `shortcut2` out of `kinds`."
        )
    return parts


def _width(norm: nn.Module) -> int:
    shape: Any = getattr(norm, "normalized_shape", None) or getattr(getattr(norm, "weight", None), "shape", ())
    return int(shape[-1]) if len(shape) == 1 else 0
