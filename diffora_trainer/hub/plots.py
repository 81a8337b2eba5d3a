"""The Differential Adaptation Matrix as a picture."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.files import file_at, write_file
from ..core.grid import Grid
from ..core.selection import Selection
from ..core.text import row_labels, sanitize, short_names
from ..logging import get_logger
from ..methods.facts import method_facts


if TYPE_CHECKING:
    import numpy as np


logger = get_logger(__name__)

PICTURE_NAME = "dam.png"
NO_MATPLOTLIB = "is drawn without Matplotlib: `pip install diffora-trainer[plots]`."
_MAX_INCHES, _MAX_LABELS, _MAX_LABEL = 60.0, 150, 40
_DPI = 200
# Read at half of its pixels, as web pages show it on screens of high density, text is then 10 to 13 pixels high.
_TITLE, _TEXT = 8.0, 7.0
_CELL_WIDTH = 0.36
_FRAME, _SHARED = "#e8590c", "#868e96"


@dataclass(frozen=True)
class Picture:
    """
    A matrix to draw.

    Args:
        grid ([`~diffora_trainer.core.grid.Grid`]): the modules.
        values (`tuple[float, ...]`): what the shades show, an entry a module.
        label (`str`): what these values are, and their unit.
        title (`tuple[str, str]`): what the picture is, and what is to be seen in it.
        scale (`dict`): how values become shades, as `imshow` takes it.
        ranks (`tuple[int, ...]`, *optional*): the rank that each module keeps, by which it is framed.
        numbered (`bool`, *optional*, defaults to `False`): write these ranks instead of the frames.
        sharing (`frozenset[str]`, *optional*): modules that share a pair, framed in grey.
    """

    grid: Grid
    values: tuple[float, ...]
    label: str
    title: tuple[str, str]
    scale: dict[str, Any]
    ranks: tuple[int, ...] = ()
    numbered: bool = False
    sharing: frozenset[str] = frozenset()

    @classmethod
    def of(cls, selection: Selection) -> Picture:
        """The picture of a selection: its gates, its scores, or how often each module was on."""
        method = method_facts(selection.config)
        values, scale, label = selection.gates, GATES, "gate when chosen (0: closed, 1: open)"
        if selection.history:
            values, label = selection.frequency, "share of the choices that switched it on"
        elif not method.searches:
            values, scale, label = selection.scores, score_scale(selection.scores), f"score ({method.name})"
        fate = "kept in training" if selection.frozen else "kept"
        kept = f"{len(selection.selected)} of {len(selection.modules)} modules {fate}"
        return cls(
            grid=selection.grid,
            values=values,
            label=label,
            title=(
                "Differential Adaptation Matrix" if method.searches else f"Modules by {method.name}",
                f"{kept} ({'numbers: their ranks' if selection.in_ranks else 'framed'})",
            ),
            scale=scale,
            ranks=selection.ranks,
            numbered=selection.in_ranks,
            sharing=frozenset(name for group in selection.shared for name in group),
        )

    def png(self) -> bytes:
        """The picture as a PNG file. Raises an `ImportError` without Matplotlib."""
        buffer = io.BytesIO()
        _figure(self).savefig(buffer, format="png", dpi=_DPI)
        return buffer.getvalue()

    def pixels(self) -> np.ndarray:
        """The picture as an array of shape `(height, width, 3)` and dtype `uint8`, as trackers take it."""
        import numpy as np

        figure = _figure(self)
        figure.set_dpi(_DPI)
        figure.canvas.draw()
        return np.ascontiguousarray(np.asarray(figure.canvas.buffer_rgba())[..., :3])


GATES: dict[str, Any] = {"vmin": 0.0, "vmax": 1.0}


def score_scale(scores: Sequence[float]) -> dict[str, Any]:
    """How scores become shades: their logarithms, where they are positive and far apart."""
    return {"norm": "log"} if 0 < 100 * min(scores) < max(scores) else {}


def plot_selection(selection: Selection, path: str | os.PathLike) -> Path:
    """
    Draw the matrix at the pruning: a row for each layer, a column for each kind of module, the value of each gate as a
    shade, and a frame around what was kept, or its rank where ranks were given. For a method that scores, the scores
    are drawn; if it chose more than once, how often each module was on. Text is legible where the picture is shown at
    half of its pixels.
    Needs Matplotlib (`pip install diffora-trainer[plots]`).

    Args:
        selection ([`Selection`]): what to draw.
        path (`str` or `os.PathLike`): the PNG file to write, or a folder to write `dam.png` into: one that is there,
            or a name that ends with a slash.

    Raises:
        ImportError: if Matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(f"No picture {NO_MATPLOTLIB}") from error
    path = file_at(path, PICTURE_NAME)
    write_file(path, _drawn(selection.to_json()))
    return path


def plot_to(selection: Selection, folder: Path) -> Path | None:
    """Draw into a folder if Matplotlib is there; a missing picture must not stop a run from being saved."""
    try:
        return plot_selection(selection, folder / PICTURE_NAME)
    except ImportError:
        logger.warning(f"No {PICTURE_NAME} {NO_MATPLOTLIB}")
        return None


# Every checkpoint after the pruning has the same picture, which takes a third of a second.
@lru_cache(maxsize=4)
def _drawn(text: str) -> bytes:
    """The PNG of a selection, given as JSON."""
    return Picture.of(Selection.from_json(text)).png()


def _figure(picture: Picture) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    grid = picture.grid
    rows, columns = len(grid.rows), len(grid.columns)
    prefix, sides = row_labels(grid.rows)
    # A name is not a formula, whatever it holds.
    heads, sides = ([sanitize(name)[-_MAX_LABEL:] for name in names] for names in (short_names(grid.columns), sides))
    row_height = min(0.17, max(0.1, 8.5 / rows))
    margin = 0.055 * max(map(len, sides)) + 0.55
    width, height = margin + _CELL_WIDTH * max(columns, 7), 1.75 + row_height * max(rows, 6)
    figure = Figure(figsize=(min(width, _MAX_INCHES), min(height, _MAX_INCHES)), layout="constrained")
    FigureCanvasAgg(figure)  # no pyplot: its global state is the user's
    axes = figure.add_subplot()
    values = [[float("nan") if v is None else v for v in line] for line in grid.table(picture.values)]
    image = axes.imshow(values, cmap="Blues", aspect="auto", **picture.scale)
    _mark(axes, picture, image.norm)
    text: dict[str, Any] = {"fontsize": _TEXT, "parse_math": False}
    # Each row is labelled where its label has room, else each fifth, tenth and so on.
    fitting = next(n for n in (1, 2, 5, 10, 20, 50, 100, rows) if n * row_height >= 0.125 or n >= rows)
    every, skip = math.ceil(columns / _MAX_LABELS), max(fitting, math.ceil(rows / _MAX_LABELS))
    axes.set_xticks(range(0, columns, every), heads[::every], rotation=45, ha="right", rotation_mode="anchor", **text)
    axes.set_yticks(range(0, rows, skip), sides[::skip], **text)
    axes.tick_params(length=2, pad=2)
    for spine in axes.spines.values():
        spine.set_visible(False)
    label = axes.set_ylabel(f"layer ({sanitize(prefix)[-_MAX_LABEL:]})" if prefix else "layer", **text)
    head, under = picture.title
    figure.suptitle(f"{head}\n{under}", fontsize=_TITLE, x=0.02, ha="left", parse_math=False)
    bar = figure.colorbar(image, ax=axes, location="bottom", fraction=0.04, aspect=30, pad=0.01)
    bar.set_label(picture.label, **text)
    bar.ax.tick_params(labelsize=_TEXT, length=2, pad=2)
    bar.outline.set_visible(False)
    if len(label.get_text()) * 0.065 > row_height * max(rows, 6):  # beside few rows it may run through the title
        figure.draw_without_rendering()
        room = axes.get_window_extent().height / label.get_window_extent().height
        label.set_text(_shortened(sanitize(prefix), int(room * len(label.get_text()))))
    return figure


def _shortened(prefix: str, room: int) -> str:
    """The label of the layers in so many characters, with what of their names' common part has room."""
    parts = prefix.split(".")
    tails = [".".join(parts[start:]) for start in range(1, len(parts))]
    labels = [f"layer ({prefix})", *(f"layer (…{tail})" for tail in tails)]
    return next((label for label in labels if len(label) <= min(room, _MAX_LABEL + 8)), "layer")


def _mark(axes: Any, picture: Picture, shade: Any) -> None:
    """Frames around what is kept, or its ranks, in white on a dark shade."""
    from matplotlib.patches import Rectangle

    grid = picture.grid
    ranks = picture.ranks or (0,) * len(grid)
    for site, value, rank in zip(grid.sites, picture.values, ranks, strict=True):
        if rank and picture.numbered:
            color = "white" if float(shade(value)) > 0.6 else "black"
            style = {"ha": "center", "va": "center_baseline", "fontsize": _TEXT - 0.5, "weight": "bold"}
            axes.text(site.column, site.row, str(rank), color=color, **style)
        elif rank or site.name in picture.sharing:
            color = _FRAME if rank else _SHARED
            corner = (site.column - 0.44, site.row - 0.42)
            axes.add_patch(Rectangle(corner, 0.88, 0.84, fill=False, edgecolor=color, linewidth=1.1))
