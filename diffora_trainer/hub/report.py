"""The report of a run: one page that opens without a network, made of the selection and the Trainer's log alone."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from ..config import DiffoRAConfig
from ..core.files import file_at, write_file
from ..core.selection import Selection
from ..core.text import row_labels, sanitize, short_names
from ..methods.build import scope_of, unit_of
from ..methods.facts import MethodFacts, method_facts
from . import charts
from .redact import Private


REPORT_NAME = "diffora_report.html"
_TEMPLATES = Path(__file__).parent / "templates"
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
# What may leave out a module that is ranked above one that is kept.
_LIMITS = ("max_step_time", "max_step_memory", "max_trainable_parameters")


@dataclass(frozen=True)
class Measure:
    """
    What the grid shows of each module.

    Args:
        key (`str`): its letter in the page.
        name (`str`): what it is.
        note (`str`): how it is shown.
        texts (`list[str]`): the value of each module, in units of `unit`.
        shades (`list[float]`): how dark each module is, in [0, 1].
        unit (`str`): what the values are multiples of; nothing if they are what they are.
    """

    key: str
    name: str
    note: str
    texts: list[str]
    shades: list[float]
    unit: str = ""


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
    steps = max_steps or charts.last_step(log_history)
    run = charts.phases(selection, log_history, max_steps)
    lines, skipped, undrawn = charts.losses(log_history, selection.step)
    measures = _measures(selection, method)
    page = _template().render(
        selection=selection,
        method=method,
        title=sanitize(title) if title else "",
        facts=_facts(selection, log_history, steps),
        notes=[sanitize(note, limit=None) for note in selection.notes],
        measures=measures,
        owner=sanitize(row_labels(selection.rows)[0]),
        columns=[(sanitize(short), sanitize(name)) for short, name in _named(selection.columns)],
        rows=_grid_rows(selection, measures),
        phases=[(phase, _of_phase(lines, phase)) for phase in run],
        chart=charts.chart(lines, run) if lines else None,
        skipped=skipped,
        undrawn=undrawn,
        costs=_costs(selection),
        outcomes=_outcomes(selection, method),
        versions={sanitize(str(name)): sanitize(str(version)) for name, version in selection.versions.items()},
        by_gain=selection.gains != selection.scores,
        options={
            sanitize(name): sanitize(_option(value))
            for name, value in method.options.items()
            if value not in (None, {}) and (name != "arch_warmup" or method.searches or selection.history)
        },
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


def _option(value: Any) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{name} = {_option(entry)}" for name, entry in value.items() if entry not in (None, {}))
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _facts(selection: Selection, log: Sequence[Mapping[str, Any]], steps: int | None) -> list[tuple[str, str, str]]:
    """What is said first: a name, a value, and what it means."""
    before, after = sum(selection.parameters), selection.trainable_parameters
    facts = [("Modules kept", f"{len(selection.selected)} of {len(selection.modules)}", "")]
    if selection.frozen:
        facts = [("Modules in training", facts[0][1], f"{len(selection.frozen)} others are frozen")]
    facts.append(("LoRA parameters", f"{after:,}", f"{after / before:.1%} of {before:,}"))
    if selection.step is not None:
        facts.append(("Chosen after step", f"{selection.step:,}", "" if steps is None else f"of {steps:,}"))
    meaning = "1: another search would rank the modules alike; 0: as chance would"
    if selection.confidence is not None:
        facts.append(("Confidence", f"{selection.confidence:.2f}", meaning))
    pruned = charts.last(log, "diffora/held_out_loss_after_cut")
    if pruned is not None:
        fading = charts.last(log, "diffora/held_out_loss_before_closing")
        start = charts.last(log, "diffora/held_out_loss_before_cut") if fading is None else fading
        when = "just before the pruning" if fading is None else "before gates faded out"
        facts.append(("Held-out loss after", f"{pruned:.4f}", "" if start is None else f"{start:.4f} {when}"))
    seconds = charts.last(log, "train_runtime")
    if seconds is not None:
        facts.append(("Training took", f"{seconds:,.0f} s", "since it was last started or resumed"))
    return facts


def _measures(selection: Selection, method: MethodFacts) -> list[Measure]:
    """What there is to show of each module, the most telling first."""
    gates = ("gate", "The gate when the modules were chosen: 0 is closed, 1 is open.", selection.gates)
    gain = "The averaged gain: by how much a unit of the gate lowers the held-out loss"
    found: list[tuple[str, str, Sequence[float]]] = []
    if selection.history:
        found.append(("share", "The share of the choices that switched the module on.", selection.frequency))
    if method.searches:
        found += [("gain", gain, selection.gains)] if selection.gains != selection.scores else []
        found.append(gates)
    else:
        found.append(("score", f"The score by {method.name}", selection.scores))
    measures = []
    for key, (name, note, values) in zip("abc", found, strict=False):
        if name in ("gate", "share"):
            shown = Measure(key, name, note, [f"{value:.2f}" for value in values], [_part(v) for v in values])
        else:
            texts, unit = _scaled(values)
            order = sorted(range(len(values)), key=lambda index: values[index])
            shades = [0.0] * len(values)
            for place, index in enumerate(order):
                shades[index] = _part(place / max(1, len(values) - 1))
            note += f"{f', in units of {unit}' if unit else ''}. The shade is the place among all modules."
            shown = Measure(key, name, note, texts, shades, unit)
        measures.append(shown)
    return measures


def _part(value: float) -> float:
    return round(min(1.0, max(0.0, value)), 2)


def _scaled(values: Sequence[float]) -> tuple[list[str], str]:
    """Numbers with three digits in a common power of ten, and that power."""
    largest = max(map(abs, values))
    power = 0 if largest == 0 else max(-300, 3 * math.floor(math.log10(largest) / 3))
    power = power if power not in (-3, 0) or largest < 0.1 else 0
    scaled = [value / 10.0**power for value in values]
    digits = 2 - min(2, max(0, math.floor(math.log10(max(map(abs, scaled))) if largest else 0)))
    digits += 1 if largest and max(map(abs, scaled)) < 1 else 0
    texts = [f"{value:.{digits}f}" for value in scaled]
    zero = f"{0:.{digits}f}"
    unit = "10" + str(power).translate(_RAISED) if power else ""
    return [zero if text == f"-{zero}" else text for text in texts], unit


def _grid_rows(selection: Selection, measures: Sequence[Measure]) -> list[tuple[str, list[dict[str, Any] | None]]]:
    sharing = {name for group in selection.shared for name in group}
    places = {name: place for place, name in enumerate(selection.ranking(), start=1)}
    cells = []
    for index, (name, rank) in enumerate(zip(selection.modules, selection.ranks, strict=True)):
        mark = str(rank) if rank and selection.in_ranks else "✓" if rank else "s" if name in sharing else ""
        cells.append(
            {
                "mark": mark,
                "kept": bool(rank),
                "shared": name in sharing,
                "tip": f"{sanitize(name)}, place {places[name]}",
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
            for key in ("predicted", "after_cut"):
                value = costs.get(key)
                part = f" ({value / whole:.2f})" if value is not None and whole else ""
                row.append("–" if value is None else show(value) + part)
            rows.append(row)
    return rows


def _outcomes(selection: Selection, method: MethodFacts) -> list[list[str]]:
    """
    What became of modules and why, the best first: of those that are removed, or of all where ranks were given. Place,
    name, gain or score, gate, parameters before, what became of it.
    """
    ranking = selection.ranking()
    index_of = {name: index for index, name in enumerate(selection.modules)}
    leaders = {name: group[0] for group in selection.shared for name in group}
    reasons = _reasons(selection, method)
    rows = []
    for place, name in enumerate(ranking, start=1):
        index = index_of[name]
        rank, site = selection.ranks[index], selection.grid.sites[index]
        if rank and not selection.in_ranks:
            continue
        why = f"rank {rank} of {site.rank}" if rank else reasons[index]
        if name in leaders:
            why = f"shares the pair of {sanitize(leaders[name])}: {why}"
        gain = selection.gains[index]
        gate = f"{selection.gates[index]:.2f}" if method.searches else "–"
        rows.append([str(place), sanitize(name), f"{gain:.3g}", gate, f"{site.parameters:,}", why])
    return rows


def _reasons(selection: Selection, method: MethodFacts) -> list[str]:
    """Of each module, its place among those it competes with, and how many of these are kept."""
    try:
        config = DiffoRAConfig.from_dict({"method": "diffora", **selection.config})
        in_layer, unit = scope_of(config) == "layer", unit_of(config)
        limits = [f"`{name}`" for name in _LIMITS if getattr(config, name) is not None]
    except (TypeError, ValueError):  # of another version
        in_layer, unit, limits = False, "module", []
    if unit != "module":
        limits.append(f"`selection_unit={unit}`")
    if selection.components:
        limits.append("the choice of single components")
    mixed = len(set(selection.grid.kinds)) > 1
    places = {name: place for place, name in enumerate(selection.ranking())}
    groups: dict[tuple[int, str], list[int]] = {}
    for index, site in enumerate(selection.grid.sites):
        groups.setdefault((site.row if in_layer else 0, site.kind), []).append(index)
    reasons = [""] * len(selection.modules)
    where = ("in its layer" if in_layer else "in the model") + (" and of its kind" if mixed else "")
    for members in groups.values():
        members.sort(key=lambda index: places[selection.modules[index]])
        kept = [place for place, index in enumerate(members) if selection.kept[index]]
        for place, index in enumerate(members):
            behind = sum(other > place for other in kept)
            text = f"place {place + 1} of {len(members)} {where}, {len(kept)} kept"
            if behind:
                text += f", {behind} of them ranked lower: " + (
                    f"also bound by {' and '.join(limits)}" if limits else "the choice was bound by more than ranks"
                )
            reasons[index] = text if method.informed else f"at random; {text}"
    return reasons
