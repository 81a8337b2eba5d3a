"""What a selection keeps, as text: one line, and the matrix as a table."""

from __future__ import annotations

from collections.abc import Sequence

from .grid import LORA, Grid
from .text import draw_table, sanitize, short_names


def summarize(
    grid: Grid, ranks: Sequence[int], shared: Sequence[Sequence[str]], frozen: Sequence[str], parameters: int
) -> str:
    """
    One line: how much is kept, and what it saves in parameters.

    Args:
        grid ([`~diffora_trainer.core.grid.Grid`]): the modules.
        ranks (`Sequence[int]` of length `n`): the rank that each keeps.
        shared (`Sequence[Sequence[str]]`): names of modules that share a pair.
        frozen (`Sequence[str]`): names of modules that stay without being trained.
        parameters (`int`): what is left to train.
    """
    before = sum(grid.parameters)
    pairs = f", {sum(map(len, shared))} share {len(shared)} pair(s)" if shared else ""
    kinds = [LORA, *(kind for kind in dict.fromkeys(grid.kinds) if kind != LORA)]
    counts = []
    for kind in kinds:
        kept = sum(rank > 0 for rank, site in zip(ranks, grid.sites, strict=True) if site.kind == kind)
        counts.append(f"{kept} of {len(grid.of_kind(kind))} {'LoRA modules' if kind == LORA else kind}")
    all_lora = "LoRA " if len(counts) == 1 else ""
    left = sorted({rank for rank in ranks if rank})
    of_rank = f", of rank {' to '.join(map(str, dict.fromkeys((left[0], left[-1]))))}" if in_ranks(grid, ranks) else ""
    size = f"{parameters:,} of {before:,} {all_lora}parameters"
    stay = f" in training, {len(frozen)} others are frozen" if frozen else ""
    return f"kept {' and '.join(counts)}{of_rank}{pairs}{stay}: {size} ({parameters / before:.1%})"


def draw_ranks(
    grid: Grid,
    ranks: Sequence[int],
    shared: Sequence[Sequence[str]],
    frozen: Sequence[str],
    markdown: bool = False,
) -> str:
    """
    The matrix as a readable table, a line for each layer and a column for each kind of module.

    Args:
        grid ([`~diffora_trainer.core.grid.Grid`]): the modules.
        ranks (`Sequence[int]` of length `n`): the rank that each keeps.
        shared (`Sequence[Sequence[str]]`): names of modules that share a pair.
        frozen (`Sequence[str]`): names of modules that stay without being trained.
        markdown (`bool`, *optional*, defaults to `False`): as a Markdown table instead of plain text.
    """
    keep, share, freeze, drop, absent = ("✅", "🔗", "❄️", "·", "") if markdown else ("x", "s", "f", ".", " ")
    of_others = dict.fromkeys((name for group in shared for name in group), share) | dict.fromkeys(frozen, freeze)
    partly = in_ranks(grid, ranks)
    marks = [
        (str(rank) if partly else keep) if rank else of_others.get(name, drop)
        for name, rank in zip(grid.names, ranks, strict=True)
    ]
    heads = ["layer", *(sanitize(name, markdown) for name in short_names(grid.columns))]
    cells = grid.table(marks, empty=absent)
    lines = [[sanitize(row, markdown), *line] for row, line in zip(grid.rows, cells, strict=True)]
    text = draw_table(heads, lines, markdown)
    if markdown:
        return text
    if frozen:
        return f"{text}\n{keep} kept in training   {freeze} frozen"
    legend = ["number: rank that is kept" if partly else f"{keep} kept", f"{drop} removed"]
    legend += [f"{share} shares a pair"] if shared else []
    return f"{text}\n{'   '.join(legend)}"


def in_ranks(grid: Grid, ranks: Sequence[int]) -> bool:
    """Whether some module keeps a part of its rank."""
    return any(0 < rank < site.rank for rank, site in zip(ranks, grid.sites, strict=True))
