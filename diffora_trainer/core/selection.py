"""The frozen result of a search, with its JSON form. No model in here."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .files import write_file


SELECTION_NAME = "diffora_selection.json"
_FORMAT = 1

_NOT_OURS = "This is not a selection saved by diffora-trainer"
_PLEASE = f"Please pass the text of a `{SELECTION_NAME}` as a run saved it."

# A selection may come from anywhere. What is shown of it must not be too large to draw up.
_MAX_CELLS, _MAX_NAME, _MAX_SHOWN = 10_000_000, 1_000, 80


@dataclass(frozen=True)
class Allocation:
    """
    Which modules were on from some step until the next reallocation, and by which scores (see `reallocate_every`).

    Args:
        step (`int`): the optimizer step after which they were chosen.
        scores (`tuple[float, ...]`): the score of each module, in the order of the grid.
        on (`tuple[bool, ...]`): whether it was on.
    """

    step: int
    scores: tuple[float, ...]
    on: tuple[bool, ...]

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> Allocation:
        """The inverse of `dataclasses.asdict`, also after a way through JSON."""
        scores, on = tuple(map(float, _list(record["scores"]))), tuple(_list(record["on"]))
        if not all(map(math.isfinite, scores)) or not all(isinstance(bit, bool) for bit in on) or not any(on):
            raise ValueError("an allocation needs finite scores, and at least one module that is on")
        return cls(_whole(record["step"]), scores, on)


@dataclass(frozen=True)
class Selection:
    """
    The result of a search: which LoRA modules were kept, and why.

    All tuples named after modules have one entry a module, in the order of the grid (row by row).

    Args:
        rows (`tuple[str, ...]`): names of the rows, one a transformer layer.
        columns (`tuple[str, ...]`): names of the columns, one a kind of module.
        modules (`tuple[str, ...]`): full module names in the base model.
        positions (`tuple[tuple[int, int], ...]`): row and column of each module.
        parameters (`tuple[int, ...]`): trainable LoRA parameters of each module.
        scores (`tuple[float, ...]`): what the choice was made by; higher is better.
        gates (`tuple[float, ...]`): value of each gate in the relaxed matrix when it was cut.
        kept (`tuple[bool, ...]`): whether the module keeps a LoRA of its own.
        gains (`tuple[float, ...]`, *optional*): what decided between equal scores; higher is better. Of the matrix
            that moves by Frank-Wolfe steps, whose entries often stand at exactly 0 or 1, it is the gradient of the
            held-out loss averaged over the steps, with its sign turned: how much a unit of the gate lowers the loss.
            Defaults to the scores.
        factors (`tuple[float, ...]`, *optional*): what the cut multiplies into each module's `lora_B`: the gate that
            its weights were trained for. Defaults to 1 for all.
        shared (`tuple[tuple[str, ...], ...]`): groups of module names that share one LoRA pair (see `weight_sharing`).
        step (`int`, *optional*): optimizer step of the cut.
        times (`dict[str, float]`, *optional*): seconds of a training step as they were measured and predicted (see
            `cost="time"`).
        config (`dict`): the options of the run.
        versions (`dict`): versions of the libraries that made it.
        history (`tuple[Allocation, ...]`, *optional*): what was on before the cut, one entry a reallocation.
        shortcuts (`tuple[str, ...]`, *optional*): those of the modules that are shortcuts and not LoRA modules (see
            [`~diffora_trainer.add_shortcuts`]). At least one LoRA module is kept.
        notes (`tuple[str, ...]`, *optional*): what makes the choice doubtful, in sentences: that nothing was learned
            of some modules, or that there was nothing to choose.

    Raises:
        ValueError: if the lengths disagree, a number is not finite, a position is outside the grid or taken twice, or
            a name or the grid is too large for any model.
    """

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    modules: tuple[str, ...]
    positions: tuple[tuple[int, int], ...]
    parameters: tuple[int, ...]
    scores: tuple[float, ...]
    gates: tuple[float, ...]
    kept: tuple[bool, ...]
    factors: tuple[float, ...] = ()
    shared: tuple[tuple[str, ...], ...] = ()
    step: int | None = None
    times: dict[str, float] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    history: tuple[Allocation, ...] = ()
    shortcuts: tuple[str, ...] = ()
    gains: tuple[float, ...] = ()
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        count = len(self.modules)
        if not self.factors:
            object.__setattr__(self, "factors", (1.0,) * count)
        if not self.gains:
            object.__setattr__(self, "gains", self.scores)
        for name in ("positions", "parameters", "scores", "gates", "factors", "kept", "gains"):
            if len(getattr(self, name)) != count:
                raise ValueError(f"A selection of {count} modules has {len(getattr(self, name))} entries in `{name}`.")
        if any(len(entry.scores) != count or len(entry.on) != count for entry in self.history):
            raise ValueError(f"A selection of {count} modules has a history of another number of modules.")
        if len(set(self.modules)) != count:
            raise ValueError("A selection names a module twice.")
        if not all(
            math.isfinite(number)
            for number in (*self.scores, *self.gates, *self.factors, *self.gains, *self.times.values())
        ):
            raise ValueError("A selection holds a score, gate, factor, gain or time that is not finite.")
        if any(count < 1 for count in self.parameters):
            raise ValueError("A selection has a module without parameters; each must have at least one.")
        if len(self.rows) * len(self.columns) > _MAX_CELLS:
            raise ValueError(
                f"A selection has a grid of {len(self.rows)} x {len(self.columns)}, larger than that of any model."
            )
        if any(len(name) > _MAX_NAME for name in (*self.rows, *self.columns, *self.modules)):
            raise ValueError(f"A selection has a name of more than {_MAX_NAME} characters, as no model has.")
        for row, column in self.positions:
            if not (0 <= row < len(self.rows) and 0 <= column < len(self.columns)):
                raise ValueError(f"A selection places a module at ({row}, {column}), outside its grid.")
        if len(set(self.positions)) != count:
            raise ValueError("A selection places two modules in one cell of its grid.")
        if not all(isinstance(kept, bool) for kept in self.kept):
            raise ValueError("A selection's entries in `kept` must be true or false.")
        if not any(self.kept):
            raise ValueError("A selection keeps no module at all, so there would be nothing to train.")
        if len(set(self.shortcuts)) != len(self.shortcuts) or not set(self.shortcuts) <= set(self.modules):
            raise ValueError("A selection names a shortcut that is not one of its modules, or one of them twice.")
        if not set(self.selected) - set(self.shortcuts):
            raise ValueError("A selection keeps shortcuts alone, so there would be no LoRA adapter to save.")
        members = [name for group in self.shared for name in group]
        if any(len(group) < 2 for group in self.shared) or len(set(members)) != len(members):
            raise ValueError("A selection shares a pair among fewer than two modules, or a module shares two pairs.")
        for member in members:
            if member not in self.modules or self.kept[self.modules.index(member)]:
                raise ValueError(f"A selection shares {member!r}, which is not one of its unselected modules.")

    @property
    def selected(self) -> tuple[str, ...]:
        """Names of the modules that keep a LoRA of their own."""
        return tuple(name for name, kept in zip(self.modules, self.kept, strict=True) if kept)

    @property
    def selected_shortcuts(self) -> tuple[str, ...]:
        """Names of the shortcuts that are kept."""
        shortcuts = set(self.shortcuts)
        return tuple(name for name in self.selected if name in shortcuts)

    @property
    def lora_modules(self) -> tuple[str, ...]:
        """Names of all modules with a LoRA after the cut: [`adapted`] without the shortcuts."""
        shortcuts = set(self.shortcuts)
        return tuple(name for name in self.adapted if name not in shortcuts)

    @property
    def adapted(self) -> tuple[str, ...]:
        """Names of all modules that are trained after the cut: the selected ones and those that share a LoRA."""
        sharing = {name for group in self.shared for name in group}
        return tuple(n for n, kept in zip(self.modules, self.kept, strict=True) if kept or n in sharing)

    @property
    def dropped(self) -> tuple[str, ...]:
        """Names of the modules whose LoRA is removed."""
        adapted = set(self.adapted)
        return tuple(name for name in self.modules if name not in adapted)

    @property
    def trainable_parameters(self) -> int:
        """LoRA parameters that are trained after the cut; a shared pair counts once."""
        size = dict(zip(self.modules, self.parameters, strict=True))
        return sum(size[name] for name in self.selected) + sum(size[group[0]] for group in self.shared)

    def ranking(self) -> tuple[str, ...]:
        """
        Names of all modules from the best to the worst, by what the choice was made by: the scores, and the gains
        between equal ones. What was kept are the first of each group that competes: of each layer, or of the model
        (see `selection_scope`).
        """
        order = sorted(range(len(self.modules)), key=lambda index: (-self.scores[index], -self.gains[index], index))
        return tuple(self.modules[index] for index in order)

    @property
    def frequency(self) -> tuple[float, ...]:
        """For each module the share of the reallocations that switched it on; nothing without a history."""
        times = (sum(entry.on[index] for entry in self.history) for index in range(len(self.modules)))
        return tuple(count / len(self.history) for count in times) if self.history else ()

    @property
    def lowest_row(self) -> str:
        """Name of the first row with a LoRA after the cut. The backward pass need not go below it."""
        adapted = set(self.adapted)
        places = zip(self.modules, self.positions, strict=True)
        return self.rows[min(position[0] for name, position in places if name in adapted)]

    def unadapted(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Names of the rows, and of the columns, in which not one module has a LoRA after the cut."""
        adapted = set(self.adapted)
        places = [p for name, p in zip(self.modules, self.positions, strict=True) if name in adapted]
        rows, columns = {row for row, _ in places}, {column for _, column in places}
        return (
            tuple(name for index, name in enumerate(self.rows) if index not in rows),
            tuple(name for index, name in enumerate(self.columns) if index not in columns),
        )

    def matrix(self, values: Sequence[float | bool] | None = None) -> list[list[float | None]]:
        """Values of the modules (by default 1 for a kept one, else 0) as rows x columns; None where no module is."""
        table: list[list[float | None]] = [[None] * len(self.columns) for _ in self.rows]
        for (row, column), value in zip(self.positions, self.kept if values is None else values, strict=True):
            table[row][column] = float(value)
        return table

    def summary(self) -> str:
        """One line: how much was kept, and what it saves in parameters."""
        before = sum(self.parameters)
        after = self.trainable_parameters
        shared = f", {sum(map(len, self.shared))} share {len(self.shared)} pair(s)" if self.shared else ""
        if not self.shortcuts:
            what, kind = f"{len(self.selected)} of {len(self.modules)} LoRA modules", "LoRA "
        else:
            lora, kind = len(self.selected) - len(self.selected_shortcuts), ""
            what = f"{lora} of {len(self.modules) - len(self.shortcuts)} LoRA modules"
            what += f" and {len(self.selected_shortcuts)} of {len(self.shortcuts)} shortcuts"
        return f"kept {what}{shared}: {after:,} of {before:,} {kind}parameters ({after / before:.1%})"

    def table(self, markdown: bool = False) -> str:
        """
        The matrix as a readable table, a line for each layer and a column for each kind of module.

        Args:
            markdown (`bool`, *optional*, defaults to `False`): as a Markdown table instead of plain text.
        """
        sharing = {name for group in self.shared for name in group}
        keep, share, drop, absent = ("✅", "🔗", "·", "") if markdown else ("x", "s", ".", " ")
        cells = [[absent] * len(self.columns) for _ in self.rows]
        for name, (row, column), kept in zip(self.modules, self.positions, self.kept, strict=True):
            cells[row][column] = keep if kept else share if name in sharing else drop
        heads = ["layer", *(sanitize(name, markdown) for name in short_names(self.columns))]
        lines = [[sanitize(row, markdown), *line] for row, line in zip(self.rows, cells, strict=True)]
        if markdown:
            rule = ["---", *[":-:"] * len(self.columns)]
            return "\n".join("| " + " | ".join(line) + " |" for line in [heads, rule, *lines])
        widths = [max(len(line[index]) for line in [heads, *lines]) for index in range(len(heads))]
        text = [heads[0].ljust(widths[0]) + "  " + "  ".join(heads[1:])]
        for line in lines:
            marks = (mark.center(width) for mark, width in zip(line[1:], widths[1:], strict=True))
            text.append((line[0].ljust(widths[0]) + "  " + "  ".join(marks)).rstrip())
        legend = f"{keep} kept   {drop} removed" + (f"   {share} shares a pair" if sharing else "")
        return "\n".join([*text, legend])

    def to_json(self) -> str:
        """The selection as JSON text, a record for each module."""
        records = [
            {
                "name": name,
                "row": row,
                "column": column,
                "parameters": parameters,
                "score": score,
                "gain": gain,
                "gate": gate,
                "factor": factor,
                "kept": kept,
            }
            for name, (row, column), parameters, score, gain, gate, factor, kept in zip(
                self.modules,
                self.positions,
                self.parameters,
                self.scores,
                self.gains,
                self.gates,
                self.factors,
                self.kept,
                strict=True,
            )
        ]
        return json.dumps(
            {
                "format": _FORMAT,
                "rows": self.rows,
                "columns": self.columns,
                "modules": records,
                "selected": self.selected,
                "shortcuts": self.shortcuts,
                "shared": self.shared,
                "step": self.step,
                "times": self.times,
                "config": self.config,
                "versions": self.versions,
                "history": [asdict(entry) for entry in self.history],
                "frequency": self.frequency,
                "notes": self.notes,
            },
            indent=2,
            allow_nan=False,
        )

    @classmethod
    def from_json(cls, text: str) -> Selection:
        """
        Read a selection back; the inverse of [`Selection.to_json`].

        Raises:
            ValueError: if the text is not JSON, or not a selection of a known format.
        """
        try:
            data = json.loads(text)
            if not isinstance(data, dict) or data.get("format") != _FORMAT:
                raise ValueError(f"its `format` is not {_FORMAT}")
            records = _list(data["modules"])
            selection = cls(
                rows=tuple(map(_text, _list(data["rows"]))),
                columns=tuple(map(_text, _list(data["columns"]))),
                modules=tuple(_text(record["name"]) for record in records),
                positions=tuple((_whole(record["row"]), _whole(record["column"])) for record in records),
                parameters=tuple(_whole(record["parameters"]) for record in records),
                scores=tuple(float(record["score"]) for record in records),
                gates=tuple(float(record["gate"]) for record in records),
                # As written before the gains were kept: the scores alone.
                gains=tuple(float(record.get("gain", record["score"])) for record in records),
                factors=tuple(float(record["factor"]) for record in records),
                kept=tuple(record["kept"] for record in records),
                history=tuple(map(Allocation.from_dict, _list(data.get("history", [])))),
                shared=tuple(tuple(map(_text, _list(group))) for group in _list(data["shared"])),
                step=None if data["step"] is None else _whole(data["step"]),
                times={name: float(seconds) for name, seconds in data.get("times", {}).items()},
                config=_object(data["config"]),
                versions=_object(data["versions"]),
                shortcuts=tuple(map(_text, _list(data.get("shortcuts", [])))),
                notes=tuple(map(_text, _list(data.get("notes", [])))),
            )
            selection.to_json()  # what could not be saved again is refused now
            return selection
        except KeyError as error:
            raise ValueError(f"{_NOT_OURS}: it has no {error}. {_PLEASE}") from error
        except (AttributeError, TypeError, ValueError, OverflowError, RecursionError) as error:
            raise ValueError(f"{_NOT_OURS}: {str(error).rstrip('.')}. {_PLEASE}") from error

    def save(self, folder: str | os.PathLike) -> Path:
        """Write `diffora_selection.json` into a folder, whole or not at all, and return its path."""
        path = Path(folder) / SELECTION_NAME
        write_file(path, self.to_json().encode())
        return path

    @classmethod
    def load(cls, path: str | os.PathLike) -> Selection:
        """Read a selection from its file, or from the folder that holds `diffora_selection.json`."""
        path = Path(path)
        if path.is_dir():
            path = path / SELECTION_NAME
        if not path.exists():
            raise FileNotFoundError(
                f"There is no {path}. A run writes it when it saves after its cut. Please pass its output folder, or "
                "a checkpoint from after the cut."
            )
        try:
            return cls.from_json(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"Could not read {path}: {_NOT_OURS}, it is no text. {_PLEASE}") from error
        except ValueError as error:
            raise ValueError(f"Could not read {path}: {error}") from error


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


def sanitize(name: str, markdown: bool = False, limit: int | None = _MAX_SHOWN) -> str:
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


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"{sanitize(repr(value))} should be a list")
    return value


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"{sanitize(repr(value))} should be an object")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{sanitize(repr(value))} should be a text")
    return value


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{sanitize(repr(value))} should be a whole number")
    return value
