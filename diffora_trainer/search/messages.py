"""What a run says of itself in the log, as text. When it says so is in `callbacks`."""

from __future__ import annotations

from torch import Tensor

from ..config import DiffoRAConfig
from ..core.selection import Selection
from .search import ArchitectureSearch
from .timing import StepTimes


NO_LABELS = (
    "Nothing in these rows is trained on: every label is -100. With `assistant_only_loss=True`, please check that the "
    "chat template marks the assistant's tokens (`{% generation %}`) and that the rows have an assistant's turn; with "
    "`completion_only_loss=True`, that the completions are not empty; and that truncation (`max_length`) does not cut "
    "off what is to be learned."
)


def plan(config: DiffoRAConfig, total_steps: int, data: str) -> str:
    """What will happen when in a run of so many steps, and on what `data` the search does it."""
    (warmup, cut), decision = config.schedule(total_steps), config.decision(total_steps)
    if moments := config.reallocations(total_steps):
        return (
            f"All modules train until step {warmup} of {total_steps}. Then they are scored ({config.method}) every "
            f"{moments.step} steps, {len(moments)} times, the best ones are on in between, and those that are on at "
            f"step {cut} are kept."
        )
    if config.method != "diffora":
        begin = f"All modules train until step {cut} of {total_steps}, are then scored"
        return (
            f"{begin if cut else 'All modules are scored now'} ({config.method}), and the selected ones go on alone."
        )
    return (
        f"Warm-up until step {warmup}, search ({config.relaxation}, {data}) until step {decision}"
        + (f", the others closed until step {cut}" if decision < cut else "")
        + f" of {total_steps}, then the selected modules alone."
    )


def times(measured: StepTimes, search: ArchitectureSearch) -> str:
    """What the measured step times leave to choose from."""
    allowed = search.matrix.budget.allowed.tolist()
    rows = [row for row, yes in zip(search.grid.row_of, allowed, strict=True) if yes]
    return (
        f"A step takes {measured.all_modules:.3g} s with all modules and {min(measured.depth):.3g} s with one near "
        f"the end. The search considers {len(rows)} of {len(allowed)} modules, those from "
        f"{search.grid.rows[min(rows)]} on."
    )


def scores(method: str, found: Tensor, batches: int) -> str:
    """What the modules were scored by, and the range of the scores."""
    reads = "" if method in ("synflow", "constant") else f" on {batches} batches"
    return (
        f"{len(found)} modules are scored by {method}{reads}, from {float(found.min()):.3g} to "
        f"{float(found.max()):.3g}."
    )


def cut(selection: Selection, losses: tuple[float, float] | None, before_closing: float | None) -> list[str]:
    """
    What was kept, and what that did to the held-out loss and the time of a step. Where gates were closed before the
    cut, the loss just before it is that of the chosen modules already, so what it is compared with is the loss from
    before the closing. Without `losses`, just before the cut and after it, nothing is said of them.
    """
    lines = [f"Step {selection.step}: {selection.summary()}.\n{selection.table()}"]
    if losses is not None:
        before, after = losses
        start, when = (
            (before, "just before the cut") if before_closing is None else (before_closing, "before the closing")
        )
        lines.append(f"Held-out loss {start:.4f} {when}, {after:.4f} after the cut.")
    if seconds := selection.times:
        lines.append(
            f"Lowest layer with a LoRA: {selection.lowest_row}. A training step is "
            f"{seconds['all_modules'] / seconds['predicted']:.2f} times as fast as with all modules by prediction, "
            f"{seconds['before_cut'] / seconds['after_cut']:.2f} times measured; "
            f"{seconds['spread_over_all_layers'] / seconds['predicted']:.2f} times as fast as with equally many "
            "modules spread over all layers by prediction."
        )
    return lines


def unadapted(selection: Selection) -> list[str]:
    """A warning of layers and of kinds in which nothing was kept."""
    rows, columns = selection.unadapted()
    lines = []
    if rows:
        lines.append(f"No module was kept in {len(rows)} layer(s): {', '.join(rows)}.")
    if columns:
        lines.append(f"No module was kept of {len(columns)} kind(s): {', '.join(columns)}.")
    return lines
