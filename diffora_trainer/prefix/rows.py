"""What a row of a batch is known by: all that it holds, but for its padding."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.rows import number_of_rows


KEY = "diffora_rows"
"""Under which a batch brings along what its rows are known by."""


@dataclass(frozen=True)
class Row:
    """
    A row of a batch.

    Args:
        key (`bytes`): what it is known by, in whatever batch it comes.
        start, stop (`int`): which of the positions of this batch are not padding; 0 and 0 if all of them belong to the
            row, as in a model that does not read tokens.
    """

    key: bytes
    start: int = 0
    stop: int = 0


def rows_of(batch: Any) -> list[Row] | None:
    """
    What the rows of a batch are known by; `None` if it is not a dictionary of tensors with equally many rows.

    Everything in a row counts, labels too, and the tokens' distance from the start of the row, which absolute
    positions depend on. So rows of one key have the same inputs.
    """
    count = number_of_rows(batch)
    if count is None:
        return None
    host = {name: value.detach().cpu() if isinstance(value, Tensor) else value for name, value in batch.items()}
    tokens, mask = host.get("input_ids"), host.get("attention_mask")
    length = tokens.shape[1] if isinstance(tokens, Tensor) and tokens.dim() == 2 else None
    return [_row(host, index, count, _span(mask, index, length)) for index in range(count)]


def _span(mask: Any, index: int, length: int | None) -> tuple[int, int]:
    """Where the positions begin and end that are not padding."""
    if length is None:
        return 0, 0
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[1] != length:
        return 0, length
    seen = torch.nonzero(mask[index]).flatten()
    start, stop = (int(seen[0]), int(seen[-1]) + 1) if len(seen) else (0, length)
    return (start, stop) if len(seen) == stop - start else (0, length)  # a mask with gaps counts as a part of the row


def _row(batch: Mapping[str, Any], index: int, count: int, span: tuple[int, int]) -> Row:
    start, stop = span
    digest = hashlib.blake2b(repr((start, stop - start)).encode(), digest_size=16)
    tokens = batch.get("input_ids")
    for name in sorted(batch):
        value = batch[name]
        if isinstance(value, Tensor) and value.dim():
            part = value[index]
            # What has a value for each token differs from the rest by its length.
            if stop and isinstance(tokens, Tensor) and value.shape[:2] == tokens.shape:
                part = part[start:stop]
            content: Any = part.contiguous().flatten().view(torch.uint8).numpy().tobytes()
            digest.update(repr((name, value.dtype, tuple(part.shape))).encode())
        else:
            one = value[index] if isinstance(value, (list, tuple)) and len(value) == count else value
            content = repr((name, one)).encode()
        digest.update(content)
    return Row(digest.digest(), start, stop)


class KeyedCollator:
    """
    A collator whose batches bring along what their rows are known by, so that nothing has to be fetched back from a
    GPU for it. Its other attributes are those of the collator, which a trainer may read.

    Args:
        collate (`Callable`): makes a batch of examples.
    """

    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self.collate = collate

    def __call__(self, examples: Any) -> Any:
        """The batch, and its rows under [`KEY`]."""
        batch = self.collate(examples)
        if isinstance(batch, Mapping) and (rows := rows_of(batch)) is not None:
            batch[KEY] = [(row.key, row.start, row.stop) for row in rows]  # type: ignore[index]
        return batch

    def __getattr__(self, name: str) -> Any:
        # Not before it has one, as while it is copied or unpickled, nor what copying and pickling themselves ask for.
        if name == "collate" or (name.startswith("__") and name.endswith("__")):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.collate, name)


def take_rows_along(batch: Any) -> list[Row] | None:
    """The rows that a batch of a [`KeyedCollator`] brings along, taken out of it; otherwise `None`."""
    if not isinstance(batch, Mapping) or KEY not in batch:
        return None
    return [Row(*row) for row in batch.pop(KEY)]  # type: ignore[attr-defined]
