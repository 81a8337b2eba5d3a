"""The Differential Adaptation Matrix as a picture."""

from __future__ import annotations

import math
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..core.files import write_file
from ..core.selection import Selection
from ..core.text import sanitize, short_names
from ..logging import get_logger
from ..methods.facts import method_facts


logger = get_logger(__name__)

PICTURE_NAME = "dam.png"
_MAX_INCHES, _MAX_LABELS, _MAX_LABEL = 60.0, 150, 40


def plot_selection(selection: Selection, path: str | os.PathLike) -> Path:
    """
    Draw the matrix at the pruning: a row for each layer, a column for each kind of module, the value of each gate as a
    shade, and a frame around what was kept, or its rank where ranks were given. Of a method that scores, the scores
    are drawn; if it chose more than once, how often each module was on.
    Needs Matplotlib (`pip install diffora-trainer[plots]`).

    Args:
        selection ([`Selection`]): what to draw.
        path (`str` or `os.PathLike`): the PNG file to write.

    Raises:
        ImportError: if Matplotlib is not installed.
    """
    import matplotlib  # noqa: F401, what is missing is said now

    path = Path(path)
    write_file(path, _drawn(selection.to_json()))
    return path


def plot_to(selection: Selection, folder: Path) -> Path | None:
    """Draw into a folder if Matplotlib is there; a missing picture must not stop a run from being saved."""
    try:
        return plot_selection(selection, folder / PICTURE_NAME)
    except ImportError:
        logger.warning(f"No {PICTURE_NAME} is drawn without Matplotlib: `pip install diffora-trainer[plots]`.")
        return None


# Every checkpoint after the pruning has the same picture, which takes a third of a second.
@lru_cache(maxsize=4)
def _drawn(text: str) -> bytes:
    """The PNG of a selection, given as JSON."""
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    selection = Selection.from_json(text)
    rows, columns = len(selection.rows), len(selection.columns)
    method = method_facts(selection.config)
    scale: dict[str, Any]
    shown, scale, label = selection.gates, {"vmin": 0.0, "vmax": 1.0}, "gate at the pruning"
    if selection.history:
        shown, label = selection.frequency, "share of choices"
    elif not method.searches:
        shown, scale, label = selection.scores, {}, "score"
        if 0 < 100 * min(shown) < max(shown):
            scale = {"norm": "log"}
    values = [[float("nan") if v is None else v for v in line] for line in selection.matrix(shown)]
    width, height = 2.2 + 0.55 * max(columns, 4), 1.6 + 0.32 * max(rows, 3)
    figure = Figure(figsize=(min(width, _MAX_INCHES), min(height, _MAX_INCHES)), layout="constrained")
    FigureCanvasAgg(figure)  # no pyplot: its global state is the user's
    axes = figure.add_subplot()
    image = axes.imshow(values, cmap="Blues", aspect="auto", **scale)
    sharing = {name for group in selection.shared for name in group}
    for name, (row, column), rank in zip(selection.modules, selection.positions, selection.ranks, strict=True):
        if rank and selection.in_ranks:
            box = {"boxstyle": "round,pad=0.2", "facecolor": "white", "edgecolor": "none", "alpha": 0.85}
            axes.text(column, row, str(rank), ha="center", va="center", fontsize=8, color="#d9480f", bbox=box)
        elif rank or name in sharing:
            color = "#d9480f" if rank else "#868e96"
            axes.add_patch(
                Rectangle((column - 0.44, row - 0.44), 0.88, 0.88, fill=False, edgecolor=color, linewidth=1.8)
            )
    # A name is no formula, whatever it holds.
    heads, sides = (
        [sanitize(name)[-_MAX_LABEL:] for name in names] for names in (short_names(selection.columns), selection.rows)
    )
    every, skip = math.ceil(columns / _MAX_LABELS), math.ceil(rows / _MAX_LABELS)
    style: dict[str, Any] = {"fontsize": 8, "parse_math": False}
    axes.set_xticks(range(0, columns, every), heads[::every], rotation=40, ha="right", **style)
    axes.set_yticks(range(0, rows, skip), sides[::skip], **style)
    axes.set_title(
        f"{'DAM' if method.searches else method.name}: {len(selection.selected)} of "
        f"{len(selection.modules)} modules kept ({'numbers: their ranks' if selection.in_ranks else 'framed'})",
        fontsize=9,
        loc="left",
        parse_math=False,
    )
    figure.colorbar(image, ax=axes, label=label, shrink=0.8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()
