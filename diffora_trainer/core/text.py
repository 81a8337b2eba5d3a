"""Names from anywhere, as they can be shown."""

from __future__ import annotations

import re
from collections.abc import Sequence


MAX_SHOWN = 80
CONFIDENCE = "agreement of the two halves of this search: 1 alike, 0 unrelated"
"""What the confidence of a selection is, as the log, the report, the model card and `diffora show` say it."""


def sanitize(name: str, markdown: bool = False, limit: int | None = MAX_SHOWN) -> str:
    """
    A name as it can be shown: on one line, without control characters, and not too long.

    Args:
        name (`str`): any text.
        markdown (`bool`, *optional*, defaults to `False`): for a Markdown table, in which nothing of it is markup.
        limit (`int`, *optional*, defaults to `80`): how many characters of it are shown; `None` shows all.
    """
    text = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in name)
    if limit is not None and len(text) > limit:
        text = f"{text[: limit // 2]}…{text[-limit // 2 :]}"
    return re.sub(r"[^\w .…-]", lambda found: f"&#{ord(found[0])};", text) if markdown else text


def some(names: Sequence[str]) -> str:
    """The first few of some names, for a message."""
    shown = ", ".join(map(sanitize, names[:3]))
    return f"{shown}, ..." if len(names) > 3 else shown or "none"


def short_names(names: Sequence[str]) -> list[str]:
    """The shortest dotted suffixes that still tell the names apart, for headings."""
    short = []
    for name in names:
        parts = name.split(".")
        suffixes = [".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1)]
        short.append(
            next(
                (s for s in suffixes if sum(other == s or other.endswith("." + s) for other in names) == 1),
                name,
            )
        )
    return short


def row_labels(rows: Sequence[str]) -> tuple[str, list[str]]:
    """
    What the numbered layers of a grid are the elements of, and a short label for each row: `"model.layers"`, and
    `["0", "1", ..., "other"]`. Where they are of more than one list (encoder and decoder), nothing, and their names.
    """
    owners = {row.rpartition(".")[0] for row in rows if row.rpartition(".")[2].isdigit()}
    if len(owners) != 1:
        return "", list(rows)
    (owner,) = owners
    return owner, [row.removeprefix(f"{owner}.") for row in rows]


def draw_table(heads: Sequence[str], lines: Sequence[Sequence[str]], markdown: bool = False) -> str:
    """
    A table as text: of plain text the first column is left-justified, and the others are centred.

    Args:
        heads (`Sequence[str]`): the headings.
        lines (`Sequence[Sequence[str]]`): the cells of each line.
        markdown (`bool`, *optional*, defaults to `False`): as a Markdown table.
    """
    if markdown:
        rule = ["---", *[":-:"] * (len(heads) - 1)]
        return "\n".join("| " + " | ".join(line) + " |" for line in [heads, rule, *lines])
    widths = [max(len(line[index]) for line in [heads, *lines]) for index in range(len(heads))]
    text = [heads[0].ljust(widths[0]) + "  " + "  ".join(heads[1:])]
    for line in lines:
        marks = (mark.center(width) for mark, width in zip(line[1:], widths[1:], strict=True))
        text.append((line[0].ljust(widths[0]) + "  " + "  ".join(marks)).rstrip())
    return "\n".join(text)
