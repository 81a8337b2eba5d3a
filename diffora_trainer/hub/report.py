"""The report of a run: one page that opens without a network, made of the selection and the Trainer's log alone."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from ..core.files import file_at, write_file
from ..core.selection import Selection
from ..core.text import CONFIDENCE, row_labels, sanitize, short_names
from ..methods.facts import MethodFacts, method_facts, option_texts
from . import charts
from .measures import Measure, Rules, chosen_by, decider, measures_of
from .redact import Private


REPORT_NAME = "diffora_report.html"
_TEMPLATES = Path(__file__).parent / "templates"


def write_report(
    path: str | os.PathLike,
    selection: Selection,
    log_history: Sequence[Mapping[str, Any]] = (),
    max_steps: int | None = None,
    title: str | None = None,
) -> Path:
    """
    Write what a run has chosen, and why, as one HTML page: the grid with its gates and gains, the losses with the
    phases of the run, time and memory where they were measured, and each module that was removed. The page needs
    nothing beside it, runs no script and asks for nothing on the network.

    Args:
        path (`str` or `os.PathLike`): the file, or a folder to write `diffora_report.html` into: one that is there, or
            a name that ends with a slash.
        selection ([`Selection`]): what was chosen.
        log_history (`Sequence[Mapping]`, *optional*): the Trainer's log (`trainer.state.log_history`). Without it the
            page has no losses; so too if it is not that of the run that chose.
        max_steps (`int`, *optional*): optimizer steps of the run (`trainer.state.max_steps`). Without it the last step
            in the log is taken.
        title (`str`, *optional*): what the page is about, such as the adapter's name.

    Returns:
        `Path`: the file.
    """
    path = file_at(path, REPORT_NAME)
    write_file(path, render_report(selection, log_history, max_steps, title).encode(errors="replace"))
    return path


def is_log_of_choice(log_history: Sequence[Mapping[str, Any]]) -> bool:
    """
    Whether a log is that of the run that chose: it says so at the pruning. A training that goes on with the chosen
    modules has a log of its own.
    """
    return any("diffora/selected_modules" in entry for entry in log_history)


def render_report(
    selection: Selection,
    log_history: Sequence[Mapping[str, Any]] = (),
    max_steps: int | None = None,
    title: str | None = None,
) -> str:
    """The page that [`write_report`] writes. Tokens of the Hub that stand in a name or an option are left out."""
    method = method_facts(selection.config)
    if not is_log_of_choice(log_history):
        log_history, max_steps = (), None
    log_history = charts.with_new_names(log_history)
    steps = max_steps or charts.last_step(log_history)
    run = charts.phases(selection, log_history, max_steps)
    lines, skipped, undrawn = charts.losses(log_history, selection.step)
    measures = measures_of(selection, method)
    page = _template().render(
        selection=selection,
        method=method,
        title=sanitize(title) if title else "",
        facts=_facts(selection, log_history, steps),
        notes=[sanitize(note, limit=None) for note in selection.notes],
        measures=measures,
        chosen_by=chosen_by(selection, method),
        owner=sanitize(row_labels(selection.rows)[0]),
        columns=[(sanitize(short), sanitize(name)) for short, name in _named(selection.columns)],
        rows=_grid_rows(selection, measures),
        phases=[(phase, _of_phase(lines, phase)) for phase in run],
        chart=charts.chart(lines, run) if lines else None,
        skipped=skipped,
        undrawn=undrawn,
        costs=_costs(selection),
        outcomes=_outcomes(selection, method, measures),
        decider=decider(selection, method),
        versions={sanitize(str(name)): sanitize(str(version)) for name, version in selection.versions.items()},
        options={sanitize(name): sanitize(text) for name, text in option_texts(method, selection).items()},
    )
    return Private((), ()).without(page, in_html=True)


@lru_cache(maxsize=1)
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        undefined=StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(REPORT_NAME)


def _named(columns: Sequence[str]) -> list[tuple[str, str]]:
    return list(zip(short_names(columns), columns, strict=True))


def _facts(selection: Selection, log: Sequence[Mapping[str, Any]], steps: int | None) -> list[tuple[str, str, str]]:
    """What is said first: a name, a value, and what it means."""
    before, after = sum(selection.parameters), selection.trainable_parameters
    facts = [("Modules kept", f"{len(selection.selected)} of {len(selection.modules)}", "")]
    if selection.frozen:
        facts = [("Modules in training", facts[0][1], f"{len(selection.frozen)} others are frozen")]
    facts.append(("LoRA parameters", f"{after:,}", f"{after / before:.1%} of {before:,}"))
    if selection.step is not None:
        facts.append(("Chosen after step", f"{selection.step:,}", "" if steps is None else f"of {steps:,}"))
    if selection.confidence is not None:
        facts.append(("Confidence", f"{selection.confidence:.2f}", CONFIDENCE))
    pruned = charts.last(log, "diffora/held_out_loss_after_pruning")
    if pruned is not None:
        fading = charts.last(log, "diffora/held_out_loss_before_fade_out")
        start = charts.last(log, "diffora/held_out_loss_before_pruning") if fading is None else fading
        when = "just before pruning" if fading is None else "before the fade-out"
        facts.append(("Held-out loss after", f"{pruned:.4f}", "" if start is None else f"{start:.4f} {when}"))
    seconds = charts.last(log, "train_runtime")
    if seconds is not None:
        facts.append(("Training took", f"{seconds:,.0f} s", "since it was last started or resumed"))
    return facts


def _grid_rows(selection: Selection, measures: Sequence[Measure]) -> list[tuple[str, list[dict[str, Any] | None]]]:
    sharing = {name for group in selection.shared for name in group}
    positions = {name: position for position, name in enumerate(selection.ranking(), start=1)}
    total, by = len(selection.modules), measures[0].name
    cells = []
    for index, (name, rank) in enumerate(zip(selection.modules, selection.ranks, strict=True)):
        mark = str(rank) if rank and selection.in_ranks else "✓" if rank else "s" if name in sharing else ""
        cells.append(
            {
                "mark": mark,
                "kept": bool(rank),
                "shared": name in sharing,
                "tip": f"{sanitize(name)}: position {positions[name]} of {total} by {by}",
                "values": [(measure.key, measure.texts[index], measure.shades[index]) for measure in measures],
            }
        )
    _, labels = row_labels(selection.rows)
    return list(zip(map(sanitize, labels), selection.grid.table(cells), strict=True))


def _of_phase(lines: Sequence[charts.Line], phase: charts.Phase) -> list[str]:
    """The mean of the training loss that was logged in a phase, and of the loss of architecture steps."""
    means = []
    for style in ("train", "arch"):
        found = [v for line in lines if line.style == style for s, v in line.points if phase.begin < s <= phase.end]
        means.append(f"{sum(found) / len(found):.4f}" if found else "–")
    return means


def _costs(selection: Selection) -> list[list[str]]:
    """Time and memory of a step: with all modules, predicted, measured; and the last two as parts of the first."""
    rows = []
    for name, costs, show in (
        ("time of a step", selection.times, lambda seconds: f"{seconds:.4g} s"),
        ("memory of a step, beside the model", selection.memory, lambda count: f"{count / 2**20:,.4g} MiB"),
    ):
        if "all_modules" in costs:
            whole = costs["all_modules"]
            row = [name, show(whole)]
            for key in ("predicted", "after_pruning"):
                value = costs.get(key)
                part = f" ({value / whole:.2f})" if value is not None and whole else ""
                row.append("–" if value is None else show(value) + part)
            rows.append(row)
    return rows


def _outcomes(selection: Selection, method: MethodFacts, measures: Sequence[Measure]) -> list[list[str]]:
    """
    What became of modules and why, in the order of what decided: of those that are removed, or of all where ranks were
    given. Position, name, each measure, parameters before, what became of it.
    """
    index_of = {name: index for index, name in enumerate(selection.modules)}
    leaders = {name: group[0] for group in selection.shared for name in group}
    reasons = _reasons(selection, method)
    rows = []
    for position, name in enumerate(selection.ranking(), start=1):
        index = index_of[name]
        rank, site = selection.ranks[index], selection.grid.sites[index]
        if rank and not selection.in_ranks:
            continue
        why = f"rank {rank} of {site.rank}" if rank else reasons[index]
        if name in leaders:
            why = f"shares the pair of {sanitize(leaders[name])}: {why}"
        values = [measure.listed(index) for measure in measures]
        rows.append([str(position), sanitize(name), *values, f"{site.parameters:,}", why])
    return rows


def _reasons(selection: Selection, method: MethodFacts) -> list[str]:
    """For each module, its position among those it competes with, and how many of these are kept."""
    rules = Rules.of(selection)
    limits = [f"`{name}`" for name in rules.limits]
    if rules.unit != "module":
        limits.append(f"`selection_unit={rules.unit}`")
    if selection.components:
        limits.append("the choice of single components")
    mixed = len(set(selection.grid.kinds)) > 1
    positions = {name: position for position, name in enumerate(selection.ranking())}
    groups: dict[tuple[int, str], list[int]] = {}
    for index, site in enumerate(selection.grid.sites):
        groups.setdefault((site.row if rules.in_layer else 0, site.kind), []).append(index)
    reasons = [""] * len(selection.modules)
    where = ("in its layer" if rules.in_layer else "in the model") + (" and of its kind" if mixed else "")
    for members in groups.values():
        members.sort(key=lambda index: positions[selection.modules[index]])
        kept = [position for position, index in enumerate(members) if selection.kept[index]]
        for position, index in enumerate(members):
            behind = sum(other > position for other in kept)
            text = f"position {position + 1} of {len(members)} {where}, {len(kept)} kept"
            if behind:
                text += f", {behind} of them further down the list: " + (
                    f"also bound by {' and '.join(limits)}" if limits else "the choice was bound by more than this"
                )
            reasons[index] = text if method.informed else f"at random; {text}"
    return reasons
