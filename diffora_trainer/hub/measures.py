"""What a report shows of each module, and what a choice was made by: the measure that decided comes first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..config import DiffoRAConfig
from ..core.costs import STEP_LIMITS
from ..core.selection import Selection
from ..methods.build import scope_of, unit_of
from ..methods.facts import MethodFacts


_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Measure:
    """
    What the grid shows of each module.

    Args:
        key (`str`): its letter in the page.
        name (`str`): what it is.
        note (`str`): how it is shown.
        values (`Sequence[float]`): the value of each module.
        texts (`list[str]`): the same as it is shown, in units of `unit`.
        shades (`list[float]`): how dark each module is, in [0, 1].
        unit (`str`): what the texts are multiples of; nothing if they are what they are.
    """

    key: str
    name: str
    note: str
    values: Sequence[float]
    texts: list[str]
    shades: list[float]
    unit: str = ""

    def listed(self, index: int) -> str:
        """The value of a module on its own line of a list."""
        return f"{self.values[index]:.3f}" if self.name in ("gate", "share") else f"{self.values[index]:.3g}"


@dataclass(frozen=True)
class Rules:
    """
    Within what a choice was made.

    Args:
        in_layer (`bool`): whether modules competed within their layer, and not in the whole model.
        unit (`str`): what was kept or pruned together.
        limits (`tuple[str, ...]`): names of the limits that were set beside a ratio.
    """

    in_layer: bool = False
    unit: str = "module"
    limits: tuple[str, ...] = ()

    @classmethod
    def of(cls, selection: Selection) -> Rules:
        """Those of a selection; without any if its options are of another version."""
        try:
            config = DiffoRAConfig.from_dict({"method": "diffora", **selection.config})
            limits = (*STEP_LIMITS.values(), "max_trainable_parameters")
            found = tuple(name for name in limits if getattr(config, name) is not None)
            return cls(scope_of(config) == "layer", unit_of(config), found)
        except (TypeError, ValueError):
            return cls()


def decider(selection: Selection, method: MethodFacts) -> str:
    """What the choice was made by: the gates of a matrix, or scores, also where gates are only made from them."""
    return "gate" if method.searches and selection.scores == selection.gates else "score"


def measures_of(selection: Selection, method: MethodFacts) -> list[Measure]:
    """What there is to show of each module: what decided, then what decided between equal ones, then the rest."""
    gates = ("gate", "The gate when the modules were chosen: 0 is closed, 1 is open.", selection.gates)
    gain = "The averaged gain: by how much a unit of the gate lowers the held-out loss"
    found: list[tuple[str, str, Sequence[float]]] = []
    if decider(selection, method) == "gate":
        found.append(gates)
    else:
        made = ", from which the gates are made" if method.searches else ""
        found.append(("score", f"The score by {method.name}{made}", selection.scores))
    if method.searches:
        found += [("gain", gain, selection.gains)] if selection.gains != selection.scores else []
        found += [gates] if found[0] != gates else []
    if selection.history:
        found.append(("share", "The share of the choices that switched the module on.", selection.frequency))
    return [_measure(key, *entry) for key, entry in zip("abcd", found, strict=False)]


def chosen_by(selection: Selection, method: MethodFacts) -> str:
    """By what the modules were chosen, in one sentence."""
    if not method.informed:
        return "Modules were chosen at random; the score is the number that was drawn for each."
    what, rules = decider(selection, method), Rules.of(selection)
    if selection.in_ranks and (method.gives_ranks or method.options.get("selection_granularity") == "component"):
        together = "gates and the sum of their gains" if what == "gate" else "scores"
        shown = f"the mean of their {together}" if what == "gate" else f"their {together} taken together"
        new = " and new ones were added by gain, unless a note above says otherwise" if what == "gate" else ""
        return f"Components were chosen by {what}s of their own{new}; each module shows {shown}."
    ties = ""
    if selection.gains != selection.scores and method.searches:
        ties = f"; the gain only decides between equal {what}s"
        if set(rules.limits) & set(STEP_LIMITS.values()):
            ties += ", and between sets of modules that begin at different layers"
    if selection.in_ranks:
        return (
            f"Ranks were given by {what}: modules of low {what}s give up ranks to those of high ones, unless a note "
            f"above says that none moved{ties}."
        )
    where = "within each layer" if rules.in_layer else "in the whole model"
    by = f"the highest {what}s" if rules.unit == "module" else f"the highest mean {what} of a {rules.unit}"
    within = f", within {' and '.join(f'`{name}`' for name in rules.limits)}" if rules.limits else ""
    if selection.history:
        within += ", and chosen anew several times, each time by the scores of that moment"
    return f"Modules were chosen {where} by {by}{within}{ties}."


def _measure(key: str, name: str, note: str, values: Sequence[float]) -> Measure:
    if name in ("gate", "share"):
        return Measure(key, name, note, values, [f"{value:.2f}" for value in values], [_part(v) for v in values])
    texts, unit = _scaled(values)
    order = sorted(range(len(values)), key=lambda index: values[index])
    shades = [0.0] * len(values)
    for position, index in enumerate(order):
        shades[index] = _part(position / max(1, len(values) - 1))
    note += f"{f', in units of {unit}' if unit else ''}. The shade follows the order of the {name}s of all modules."
    return Measure(key, name, note, values, texts, shades, unit)


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
