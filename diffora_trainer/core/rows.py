"""The rows of a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor


def number_of_rows(batch: Any) -> int | None:
    """How many rows a batch has; `None` if it is not a dictionary of tensors with equally many."""
    if not isinstance(batch, Mapping):
        return None
    sizes = {value.shape[0] for value in batch.values() if isinstance(value, Tensor) and value.dim()}
    return sizes.pop() if len(sizes) == 1 else None


def why_without_rows(batch: Any) -> str:
    """Why [`number_of_rows`] gives `None` for a batch, as a part of a sentence."""
    if isinstance(batch, Mapping) and "cu_seq_lens_q" in batch:
        return (
            "the rows of a batch are packed into one, without padding (it holds `cu_seq_lens_q`), as by "
            "`padding_free=True` and TRL's `packing=True`, unless that has `packing_strategy='wrapped'`"
        )
    given = f"a {type(batch).__name__}"
    if isinstance(batch, Mapping):
        shapes = {name: tuple(value.shape) for name, value in batch.items() if isinstance(value, Tensor)}
        given = f"one of the shapes {shapes}"
    return f"a batch is not a dictionary of tensors with equally many rows, but {given}"


def take_rows(batch: Mapping[str, Any], wanted: range | Sequence[int]) -> dict[str, Any]:
    """
    Some rows of a batch. What is neither a tensor nor a list of its rows is left as it is.

    Args:
        batch (`Mapping`): tensors with equally many rows.
        wanted (`range` or `Sequence[int]`): which; those of a range need no memory of their own.
    """
    rows = number_of_rows(batch)

    def take(value: Any) -> Any:
        if isinstance(value, Tensor) and value.dim():
            return value[wanted.start : wanted.stop] if isinstance(wanted, range) else value[list(wanted)]
        if isinstance(value, (list, tuple)) and len(value) == rows:
            return [value[index] for index in wanted]
        return value

    return {name: take(value) for name, value in batch.items()}
