"""What a checkpoint holds of a run, validated once. Files of earlier versions are read."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from .allocation import Allocation
from .costs import StepCosts
from .formats import as_count, as_flag, as_number, as_object, as_text, maybe, tuple_of, upgrade_state
from .schedule import Schedule
from .selection import Selection


WARMUP, SEARCH, FADE_OUT, SELECTED = "warm-up", "search", "fade-out", "selected"
"""The phases of a run."""

_FORMAT = 8
_MOST_SHOWN = 30
"""Differences that a message names: more than there are options, and fewer than a model may have modules."""


@dataclass(frozen=True)
class RunState:
    """
    The state of a run after an optimizer step. Once the others are pruned, the selection is all there is to know of
    the search.

    Args:
        step (`int`): the optimizer step.
        config (`dict`): options of the run.
        base_model (`dict`): what base models are told apart by.
        extra_kinds (`tuple[str, ...]`, *optional*): kinds of site in the model that a plain PEFT adapter does not
        hold.
        began_pruned (`bool`, *optional*, defaults to `False`): whether the run began with a model that was pruned
            before, so that it has held no rows out.
        selection ([`~diffora_trainer.core.selection.Selection`], *optional*): what was chosen, once the others are
            pruned.
        given_back (`tuple[int, int]`, *optional*): how many training rows a pruned run of a trainer has held out, and
            the step at whose end they went back to training; not known of old checkpoints.
        modules (`tuple[str, ...]`, *optional*): names of the modules that are searched.
        warmup (`int`, *optional*): the last step of the warm-up.
        discretize (`int`, *optional*): the step of the decision.
        prune (`int`, *optional*): the step of the pruning.
        held_out_position (`int`, *optional*): how many held-out batches were read.
        held_out_rows (`int`, *optional*): how many rows are held out.
        skipped_steps (`int`, *optional*): architecture steps whose loss was not finite.
        kept (`tuple[bool, ...]`, *optional*): what stays, once that is decided.
        losses (`tuple[float, ...]`, *optional*): held-out losses since the last log.
        reached (`tuple[bool, ...]`, *optional*): which gates ever had a gradient; not known of old checkpoints.
        effect (`tuple[float, ...]`, *optional*): held-out loss without the modules and with all of them, the standard
            error of the difference, and the number of batches; old checkpoints have no such number.
        ranks (`tuple[int, ...]`, *optional*): how many components of each adapter take part; nothing where all do.
        halves (`tuple[tuple[float, ...], tuple[float, ...]]`, *optional*): gains of the odd and the even steps of the
            search, summed; nothing before the first one.
        half_steps (`int`, *optional*): how many steps those are.
        early_losses (`tuple[float or None, ...]`, *optional*): held-out losses after a third of the search; `None` for
            one that was not finite.
        progress (`tuple[float, ...]`, *optional*): held-out loss there and at the choice, and what `effect` has.
        costs ([`~diffora_trainer.core.costs.StepCosts`], *optional*): what steps cost, where that is limited.
        history (`tuple[Allocation, ...]`, *optional*): what was on before.
        components (`tuple[int, ...]`, *optional*): how many components of each module the matrix has an entry for, of
            which `kept`, `reached` and `halves` have one too; nothing where it has one for each module.
        processes (`int`, *optional*): how many processes the run had; not known of old checkpoints.
        batch_rows (`int`, *optional*): rows of a held-out batch on each process; not known of old checkpoints and
            in a loop of one's own.
        reallocate_every (`int`, *optional*): steps between two choices of the modules that are on, where a method
            makes them; not known of old checkpoints.

    Raises:
        ValueError: if this cannot be the state of a run.
    """

    step: int
    config: dict[str, Any]
    base_model: dict[str, Any]
    extra_kinds: tuple[str, ...] = ()
    began_pruned: bool = False
    selection: Selection | None = None
    given_back: tuple[int, int] | None = None
    modules: tuple[str, ...] = ()
    warmup: int = 0
    discretize: int = 0
    prune: int = 0
    held_out_position: int = 0
    held_out_rows: int = 0
    skipped_steps: int = 0
    kept: tuple[bool, ...] | None = None
    losses: tuple[float, ...] = ()
    reached: tuple[bool, ...] | None = None
    effect: tuple[float, ...] | None = None
    ranks: tuple[int, ...] = ()
    halves: tuple[tuple[float, ...], ...] = ()
    half_steps: int = 0
    early_losses: tuple[float | None, ...] = ()
    progress: tuple[float, ...] | None = None
    costs: StepCosts | None = None
    history: tuple[Allocation, ...] = ()
    components: tuple[int, ...] = ()
    processes: int | None = None
    batch_rows: int | None = None
    reallocate_every: int | None = None

    def __post_init__(self) -> None:
        if self.selection is not None:
            return
        count, moments = len(self.modules), (self.warmup, self.discretize, self.prune)
        if list(moments) != sorted(moments) or self.step >= self.prune:
            raise ValueError(f"step {self.step} and the steps {', '.join(map(str, moments))} disagree")
        if not count:
            raise ValueError("it searches among no `modules`")
        if (self.kept is not None) != (self.step >= self.discretize):
            raise ValueError(f"at step {self.step} its `kept` cannot be {repr(self.kept)[:100]}")
        if len(self.halves) not in (0, 2):
            raise ValueError(f"its `halves` are two, and not {len(self.halves)}")
        vectors: list[tuple[str, Sequence[Any] | None]] = [("kept", self.kept), ("reached", self.reached)]
        vectors += [("halves", half) for half in self.halves]
        entries = (sum(self.components), "components") if self.components else (count, "modules")
        of_modules = [("ranks", self.ranks or None), ("components", self.components or None)]
        for named, (needed, units) in ((vectors, entries), (of_modules, (count, "modules"))):
            for name, value in named:
                if value is not None and len(value) != needed:
                    raise ValueError(f"its `{name}` has {len(value)} entries for {needed} {units}")
        if any(len(entry.on) != count or len(entry.scores) != count for entry in self.history):
            raise ValueError(f"its `history` is not one of {count} modules")
        if any(not self.warmup <= entry.step <= self.step for entry in self.history):
            raise ValueError(f"at step {self.step} its `history` cannot be one of {[e.step for e in self.history]}")
        if self.costs is not None and self.step < self.warmup:
            raise ValueError(f"in phase {self.phase!r} its `costs` cannot be {repr(self.costs)[:100]}")

    @property
    def phase(self) -> str:
        """The phase of the run."""
        if self.selection is not None:
            return SELECTED
        if self.step < self.warmup:
            return WARMUP
        return SEARCH if self.kept is None else FADE_OUT

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        values["selection"] = None if self.selection is None else self.selection.to_json()
        values["costs"] = None if self.costs is None else asdict(self.costs)
        values["history"] = [asdict(entry) for entry in self.history]
        if self.selection is not None:
            values = {name: values[name] for name in _ALWAYS}
        return {"format": _FORMAT, "phase": self.phase, **values}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> RunState:
        """
        The inverse of [`to_dict`], also after a way through JSON; what earlier versions wrote is read too.

        Raises:
            ValueError: if this is not the state of a run.
        """
        data = upgrade_state(data)
        if data.get("format") != _FORMAT:
            raise ValueError(f"its `format` is not {_FORMAT}")
        values: dict[str, Any] = {}
        for name in [entry.name for entry in fields(cls)] if data.get("selection") is None else _ALWAYS:
            if name not in data:
                raise ValueError(f"it has no `{name}`")
            try:
                values[name] = _READERS[name](data[name])
            except (KeyError, OverflowError, TypeError, ValueError) as error:
                reason = f"there is no {error}" if isinstance(error, KeyError) else str(error).rstrip(".")
                raise ValueError(f"its `{name}` is wrong: {reason}") from error
        state = cls(**values)
        if data.get("phase") not in (state.phase, SEARCH if state.phase == FADE_OUT else state.phase):
            raise ValueError(f"at step {state.step} its `phase` cannot be {repr(data.get('phase'))[:100]}")
        return state

    def check_schedule(self, schedule: Schedule) -> dict[str, tuple[Any, Any]]:
        """
        What has to be equal in a run that is resumed: saved and present, by what it is. Architecture steps may come
        at another interval: the matrix goes on from what was learned.
        """
        pairs = {
            "the end of the warm-up": (self.warmup, schedule.warmup),
            "the step of the pruning": (self.prune, schedule.prune),
            "the step of the choice": (self.discretize, schedule.discretize),
        }
        if self.reallocate_every is not None:
            pairs["the steps between two choices (`reallocate_every`)"] = self.reallocate_every, schedule.updates.step
        return pairs


def check_same(source: str, values: dict[str, tuple[Any, Any]], hint: str = "") -> None:
    """
    Raise a `ValueError` if something in a checkpoint differs from the run that is resumed with it.

    Args:
        source (`str`): the checkpoint.
        values (`dict[str, tuple]`): what is saved and what is present, by what it is. Of two dictionaries the message
            names the entries that differ.
        hint (`str`, *optional*): what else the message says, at its end.
    """
    for name, (saved, present) in values.items():
        if saved != present:
            raise ValueError(
                f"The checkpoint {source!r} does not fit this run: {name} differ(s) ({_differences(saved, present)}). "
                f"Please resume with the model, data and options that the run was started with{hint}."
            )


def check_same_options(source: str, saved: dict[str, Any], present: dict[str, Any]) -> None:
    """
    Raise a `ValueError` that names each option that differs, if a run is resumed with other ones.

    Args:
        source (`str`): the checkpoint.
        saved (`dict`): the options by their names, as the checkpoint has them.
        present (`dict`): those of the run that is resumed.
    """
    saved, present = dict(saved), dict(present)
    if saved["method"] != present["method"]:  # each has options of its own, which follow from that
        common = set(saved["method_options"]) & set(present["method_options"])
        for options in (saved, present):
            options["method_options"] = {name: options["method_options"][name] for name in sorted(common)}
    if saved != present:
        raise ValueError(
            f"The checkpoint {source!r} does not fit this run: options that the search depends on differ "
            f"({_differences(saved, present)}). Please pass the saved values to go on with that search, or begin a "
            "new run without the checkpoint to search with the present ones."
        )


def _differences(saved: Any, present: Any, name: str = "") -> str:
    """In what two values differ, for a message: entry by entry where both are dictionaries."""
    if isinstance(saved, dict) and isinstance(present, dict):
        differing = []
        for key in sorted({*saved, *present}, key=str):
            pair = saved.get(key, _ABSENT), present.get(key, _ABSENT)
            if pair[0] != pair[1]:
                differing.append(_differences(*pair, f"{name}[{key!r}]" if name else str(key)))
        more = len(differing) - _MOST_SHOWN
        return "; ".join(differing[:_MOST_SHOWN]) + (f"; and {more} more" if more > 0 else "")
    first, second = _window(repr(saved), repr(present))
    return f"`{name}` saved: {first}, now: {second}" if name else f"saved: {first}, now: {second}"


def _window(*texts: str) -> list[str]:
    """Texts cut to 100 characters: if they are longer, those around the first place in which they differ."""
    start = max(0, len(os.path.commonprefix(texts)) - 40) if max(map(len, texts)) > 100 else 0
    cut = [text[start:] if len(text) - start <= 100 else text[start : start + 97] + "..." for text in texts]
    return ["..." + text if start else text for text in cut]


class _Absent:
    def __repr__(self) -> str:
        return "nothing"


_ABSENT = _Absent()


def short(value: Any) -> str:
    """A value for a message, cut to 200 characters."""
    text = repr(value)
    return text if len(text) <= 200 else text[:197] + "..."


def _read_allocation(record: Any) -> Allocation:
    """An entry of the history. Here its scores must be numbers; in a selection text is read as a number, too."""
    tuple_of(as_number)(as_object(record)["scores"])
    return Allocation.from_dict(record)


def _read_early_losses(value: Any) -> tuple[float | None, ...]:
    losses = tuple_of(maybe(as_number))(value)
    if losses and not any(loss is not None for loss in losses):
        raise ValueError("it has no number")
    return losses


_ALWAYS: Sequence[str] = ("step", "config", "base_model", "extra_kinds", "began_pruned", "selection", "given_back")
_COUNTS = (
    "step",
    "warmup",
    "discretize",
    "prune",
    "held_out_position",
    "held_out_rows",
    "skipped_steps",
    "half_steps",
)
_READERS: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(_COUNTS, as_count),
    "config": as_object,
    "base_model": as_object,
    "extra_kinds": tuple_of(as_text),
    "began_pruned": as_flag,
    "selection": maybe(lambda text: Selection.from_json(as_text(text))),
    "given_back": maybe(tuple_of(as_count, 2)),
    "modules": tuple_of(as_text),
    "kept": maybe(tuple_of(as_flag)),
    "losses": tuple_of(as_number),
    "reached": maybe(tuple_of(as_flag)),
    "effect": maybe(tuple_of(as_number, 3, 4)),
    "progress": maybe(tuple_of(as_number, 3, 4)),
    "early_losses": _read_early_losses,
    "ranks": tuple_of(as_count),
    "halves": tuple_of(tuple_of(as_number), 0, 2),
    "costs": maybe(StepCosts.from_dict),
    "history": tuple_of(_read_allocation),
    "components": tuple_of(as_count),
    "processes": maybe(as_count),
    "batch_rows": maybe(as_count),
    "reallocate_every": maybe(as_count),
}
