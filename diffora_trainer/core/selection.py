"""The frozen result of a search, with its JSON form. No model in here."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .allocation import Allocation
from .components import check_components
from .drawn import draw_ranks, in_ranks, summarize
from .files import write_file
from .formats import with_lists
from .grid import LORA, Grid
from .selection_json import read_selection, selection_to_dict


SELECTION_NAME = "diffora_selection.json"
_NOT_OURS = "This is not a selection saved by diffora-trainer"
_PLEASE = f"Please pass the text of a `{SELECTION_NAME}` as a run saved it."


@dataclass(frozen=True)
class Selection:
    """
    The result of a search: the rank that each module keeps, and why.

    All tuples have one entry a module, in the order of the grid (row by row).

    Args:
        grid ([`~diffora_trainer.core.grid.Grid`]): the modules that were chosen among.
        ranks (`tuple[int, ...]`): rank that each adapter keeps; 0 where it is pruned.
        scores (`tuple[float, ...]`): what the choice was made by; higher is better.
        gates (`tuple[float, ...]`): value of each gate in the relaxed matrix when it was discretized.
        gains (`tuple[float, ...]`, *optional*): what decided between equal scores; higher is better. For the matrix
            that moves by Frank-Wolfe steps, whose entries often stand at exactly 0 or 1, it is the gradient of the
            held-out loss averaged over the steps, with its sign turned: how much a unit of the gate lowers the loss.
            Defaults to the scores.
        factors (`tuple[float, ...]`, *optional*): what pruning multiplies into each module's `lora_B`: the gate that
            its weights were trained for. Defaults to 1 for all.
        shared (`tuple[tuple[str, ...], ...]`): groups of module names that share one LoRA pair (see `weight_sharing`).
        step (`int`, *optional*): optimizer step after which the others were pruned.
        confidence (`float`, *optional*): agreement of the two halves of this search on the ranking of the modules, in
            [0, 1], as the rank correlation of two such searches of full length that it predicts: 1 if they rank alike,
            0 if unrelated, or if nothing was learned yet when the choice was made. The halves share
            weights and steps, so other seeds or data can agree less. `None` where it cannot be told: of a method that
            scores once, say.
        times (`dict[str, float]`, *optional*): seconds of a training step as they were measured and predicted (see
            `max_step_time`).
        memory (`dict[str, float]`, *optional*): bytes of a training step beside the model, likewise (see
            `max_step_memory`).
        config (`dict`): the options of the run, as JSON has them: with lists in place of tuples.
        versions (`dict`): versions of the libraries that made it.
        history (`tuple[Allocation, ...]`, *optional*): what was on before, one entry a reallocation.
        notes (`tuple[str, ...]`, *optional*): what makes the choice doubtful, in sentences: that nothing was learned
            of some modules, or that there was nothing to choose.
        frozen (`tuple[str, ...]`, *optional*): names of unselected modules that stay as they are and are trained no
            further (see `unselected`).
        components (`tuple[tuple[int, ...], ...]`, *optional*): for each module the indices of the components that it
            keeps, rising, where some keep others than their first ones (see [`kept_components`]).

    Raises:
        ValueError: if the lengths disagree, a number is not finite, a rank is larger than it was, or no LoRA module is
            kept.
    """

    grid: Grid
    ranks: tuple[int, ...]
    scores: tuple[float, ...]
    gates: tuple[float, ...]
    gains: tuple[float, ...] = ()
    factors: tuple[float, ...] = ()
    shared: tuple[tuple[str, ...], ...] = ()
    step: int | None = None
    confidence: float | None = None
    times: dict[str, float] = field(default_factory=dict)
    memory: dict[str, float] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    history: tuple[Allocation, ...] = ()
    notes: tuple[str, ...] = ()
    components: tuple[tuple[int, ...], ...] = ()
    frozen: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        count = len(self.grid)
        if not self.factors:
            object.__setattr__(self, "factors", (1.0,) * count)
        if not self.gains:
            object.__setattr__(self, "gains", self.scores)
        object.__setattr__(self, "config", with_lists(self.config))
        for name in ("ranks", "scores", "gates", "factors", "gains"):
            if len(getattr(self, name)) != count:
                raise ValueError(f"A selection of {count} modules has {len(getattr(self, name))} entries in `{name}`.")
        if any(len(entry.scores) != count or len(entry.on) != count for entry in self.history):
            raise ValueError(f"A selection of {count} modules has a history of another number of modules.")
        costs = (*self.times.values(), *self.memory.values())
        if not all(
            math.isfinite(number) for number in (*self.scores, *self.gates, *self.factors, *self.gains, *costs)
        ):
            raise ValueError("A selection holds a score, gate, factor, gain, time or memory that is not finite.")
        for site, rank in zip(self.grid.sites, self.ranks, strict=True):
            if type(rank) is not int or not 0 <= rank <= site.rank:
                raise ValueError(f"A selection leaves {site.name!r} the rank {rank!r} of {site.rank}.")
        check_components(self.components, self.grid, self.ranks)
        if self.confidence is not None and not 0 <= self.confidence <= 1:
            raise ValueError(f"A selection has the confidence {self.confidence}, which is not in [0, 1].")
        if not any(self.ranks):
            raise ValueError("A selection keeps no module at all, so there would be nothing to train.")
        if not any(site.kind == LORA for site, rank in zip(self.grid.sites, self.ranks, strict=True) if rank):
            raise ValueError("A selection keeps no LoRA module, so there would be no LoRA adapter to save.")
        members = [name for group in self.shared for name in group]
        if any(len(group) < 2 for group in self.shared) or len(set(members)) != len(members):
            raise ValueError("A selection shares a pair among fewer than two modules, or a module shares two pairs.")
        for member in members:
            if member not in self.grid.names or self.kept[self.grid.names.index(member)]:
                raise ValueError(f"A selection shares {member!r}, which is not one of its unselected modules.")
        for name in self.frozen:
            if name not in self.grid.names or name in self.adapted:
                raise ValueError(f"A selection freezes {name!r}, which is not one of its unselected modules.")

    @property
    def kept(self) -> tuple[bool, ...]:
        """Whether each module keeps an adapter of its own."""
        return tuple(rank > 0 for rank in self.ranks)

    @property
    def kept_components(self) -> tuple[tuple[int, ...], ...]:
        """For each module the indices of the components that it keeps."""
        return self.components or tuple(tuple(range(rank)) for rank in self.ranks)

    @property
    def in_ranks(self) -> bool:
        """Whether some module keeps a part of its rank."""
        return in_ranks(self.grid, self.ranks)

    @property
    def modules(self) -> tuple[str, ...]:
        """Name of each module in the base model."""
        return self.grid.names

    @property
    def rows(self) -> tuple[str, ...]:
        """Names of the rows of the grid."""
        return self.grid.rows

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns of the grid."""
        return self.grid.columns

    @property
    def positions(self) -> tuple[tuple[int, int], ...]:
        """Row and column of each module."""
        return self.grid.positions

    @property
    def parameters(self) -> tuple[int, ...]:
        """Trainable parameters of each module before the others are pruned."""
        return self.grid.parameters

    def of_kind(self, kind: str) -> tuple[str, ...]:
        """Names of the selected modules of a kind of site."""
        kept = zip(self.grid.sites, self.ranks, strict=True)
        return tuple(site.name for site, rank in kept if rank and site.kind == kind)

    @property
    def selected(self) -> tuple[str, ...]:
        """Names of the modules that keep a LoRA of their own."""
        return tuple(name for name, kept in zip(self.modules, self.kept, strict=True) if kept)

    @property
    def lora_modules(self) -> tuple[str, ...]:
        """Names of all modules with a LoRA after the others are pruned: [`present`] without other kinds of site."""
        lora = set(self.grid.of_kind(LORA))
        return tuple(name for name in self.present if name in lora)

    @property
    def adapted(self) -> tuple[str, ...]:
        """Names of all modules that are trained after the pruning: the selected ones and those that share a LoRA."""
        sharing = {name for group in self.shared for name in group}
        return tuple(n for n, kept in zip(self.modules, self.kept, strict=True) if kept or n in sharing)

    @property
    def present(self) -> tuple[str, ...]:
        """Names of all modules with an adapter after the pruning: those of [`adapted`], and those that are frozen."""
        left = {*self.adapted, *self.frozen}
        return tuple(name for name in self.modules if name in left)

    @property
    def fate(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Names of the modules that are trained on, and of those that are frozen; all others are gone."""
        return self.adapted, self.frozen

    @property
    def dropped(self) -> tuple[str, ...]:
        """Names of the modules whose LoRA is removed."""
        present = set(self.present)
        return tuple(name for name in self.modules if name not in present)

    @property
    def trainable_parameters(self) -> int:
        """LoRA parameters that are trained after the pruning; a shared pair counts once."""
        sites = self.grid.sites
        of_selected = sum(site.cost * rank for site, rank in zip(sites, self.ranks, strict=True))
        leaders = {group[0] for group in self.shared}
        return of_selected + sum(site.parameters for site in sites if site.name in leaders)

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
        """Name of the first row that is trained after the pruning. The backward pass need not go below it."""
        adapted = set(self.adapted)
        return self.grid.rows[min(site.row for site in self.grid.sites if site.name in adapted)]

    def unadapted(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Names of the rows, and of the columns, in which not one module has a LoRA after the pruning."""
        present = set(self.present)
        sites = [site for site in self.grid.sites if site.name in present]
        rows, columns = {site.row for site in sites}, {site.column for site in sites}
        return (
            tuple(name for index, name in enumerate(self.grid.rows) if index not in rows),
            tuple(name for index, name in enumerate(self.grid.columns) if index not in columns),
        )

    def matrix(self, values: Sequence[float | bool] | None = None) -> list[list[float | None]]:
        """Values of the modules (by default 1 for a kept one, else 0) as rows x columns; None where no module is."""
        return self.grid.table([float(value) for value in (self.kept if values is None else values)])

    def summary(self) -> str:
        """One line: how much was kept, and what it saves in parameters."""
        return summarize(self.grid, self.ranks, self.shared, self.frozen, self.trainable_parameters)

    def table(self, markdown: bool = False) -> str:
        """
        The matrix as a readable table, a line for each layer and a column for each kind of module.

        Args:
            markdown (`bool`, *optional*, defaults to `False`): as a Markdown table instead of plain text.
        """
        return draw_ranks(self.grid, self.ranks, self.shared, self.frozen, markdown)

    def to_json(self) -> str:
        """The selection as JSON text, a record for each module."""
        return json.dumps(selection_to_dict(self), indent=2, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Selection:
        """
        Read a selection back; the inverse of [`Selection.to_json`]. Files of earlier versions are read too.

        Args:
            text (`str`): what [`Selection.to_json`] gave.

        Raises:
            ValueError: if the text is not JSON, or not a selection of a known format.
        """
        try:
            selection = cls(**read_selection(json.loads(text)))
            selection.to_json()  # what could not be saved again is refused now
            return selection
        except KeyError as error:
            raise ValueError(f"{_NOT_OURS}: it has no {error}. {_PLEASE}") from error
        except (AttributeError, TypeError, ValueError, OverflowError, RecursionError) as error:
            raise ValueError(f"{_NOT_OURS}: {str(error).rstrip('.')}. {_PLEASE}") from error

    def save(self, folder: str | os.PathLike) -> Path:
        """
        Write `diffora_selection.json` into a folder, whole or not at all.

        Args:
            folder (`str` or `os.PathLike`): the folder. It is made if it does not exist.

        Returns:
            `Path`: the path of the file.
        """
        path = Path(folder) / SELECTION_NAME
        write_file(path, self.to_json().encode())
        return path

    @classmethod
    def load(cls, path: str | os.PathLike) -> Selection:
        """
        Read a selection from a file.

        Args:
            path (`str` or `os.PathLike`): the file, or the folder that holds `diffora_selection.json`.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it cannot be read as a selection.
        """
        path = Path(path)
        if path.is_dir():
            path = path / SELECTION_NAME
        if not path.exists():
            raise FileNotFoundError(
                f"There is no {path}. A run writes it when it saves after its pruning. Please pass its output folder, "
                "or a checkpoint from after the pruning."
            )
        try:
            return cls.from_json(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"Could not read {path}: {_NOT_OURS}, it is not text. {_PLEASE}") from error
        except ValueError as error:
            raise ValueError(f"Could not read {path}: {error}") from error
