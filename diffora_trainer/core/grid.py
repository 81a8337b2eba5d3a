"""The grid of a search: layers x kinds of module, as plain data. No model in here."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any


OTHER_ROW = "other"
"""The row of the modules outside the numbered layers."""
LORA = "lora"
"""The kind of site that a plain PEFT adapter holds."""

# A grid may come from a file. What is shown of it must not be too large to draw up.
_MAX_CELLS, _MAX_NAME = 10_000_000, 1_000


@dataclass(frozen=True)
class SiteInfo:
    """
    A place that has an adapter.

    Args:
        name (`str`): full name of the module in the base model.
        row (`int`): its row of the grid.
        column (`int`): its column of the grid.
        rank (`int`): rank of its adapter before anything is pruned. A file from before ranks were kept says 1, and
            the cost of the whole adapter.
        cost (`int`): trainable parameters of each unit of rank.
        kind (`str`, *optional*, defaults to `"lora"`): what kind of site it is (see
            [`~diffora_trainer.adapters.base.SiteKind`]).
    """

    name: str
    row: int
    column: int
    rank: int
    cost: int
    kind: str = LORA

    @property
    def parameters(self) -> int:
        """Trainable parameters of the whole adapter."""
        return self.rank * self.cost


@dataclass(frozen=True)
class Grid:
    """
    Where the adapters of a model stand: a row for each numbered layer, a column for each kind of module.

    Args:
        rows (`tuple[str, ...]`): names of the rows; sites without a layer number stand in a row of their own.
        columns (`tuple[str, ...]`): names of the columns: what follows the layer number.
        sites (`tuple[SiteInfo, ...]`): the sites, row by row.

    Raises:
        ValueError: if a site is outside the grid or shares its cell or its name with another one, has no parameters,
            or a name or the grid is too large for any model.
    """

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    sites: tuple[SiteInfo, ...]

    def __post_init__(self) -> None:
        if len(set(self.names)) != len(self):
            raise ValueError("A grid names a module twice.")
        if len(self.rows) * len(self.columns) > _MAX_CELLS:
            raise ValueError(f"A grid of {len(self.rows)} x {len(self.columns)} is larger than that of any model.")
        if any(len(name) > _MAX_NAME for name in (*self.rows, *self.columns, *self.names)):
            raise ValueError(f"A grid has a name of more than {_MAX_NAME} characters, as no model has.")
        for site in self.sites:
            if not (0 <= site.row < len(self.rows) and 0 <= site.column < len(self.columns)):
                raise ValueError(f"A site stands at ({site.row}, {site.column}), outside its grid.")
            if site.rank < 1 or site.cost < 1:
                raise ValueError("A grid has a module without parameters; each must have at least one.")
        if len(set(self.positions)) != len(self):
            raise ValueError("Two modules stand in one cell of a grid.")

    def __len__(self) -> int:
        return len(self.sites)

    @classmethod
    def arrange(cls, sites: Sequence[tuple[str, int, int, str]]) -> Grid:
        """
        Arrange sites by their names.

        Args:
            sites (`Sequence[tuple]`): name, rank, cost of a unit of rank and kind of each site, in the model's order.
        """
        places = [_place(name) for name, *_ in sites]
        # Rows and columns in the order of the model, but the modules outside the numbered layers come last.
        rows = list(dict.fromkeys(row for row, _ in places if row != OTHER_ROW))
        if any(row == OTHER_ROW for row, _ in places):
            rows.append(OTHER_ROW)
        inside = [column for row, column in places if row != OTHER_ROW]
        columns = list(dict.fromkeys([*inside, *(column for _, column in places)]))
        row_index = {name: index for index, name in enumerate(rows)}
        column_index = {name: index for index, name in enumerate(columns)}
        ordered = sorted(
            (
                SiteInfo(name, row_index[row], column_index[column], rank, cost, kind)
                for (name, rank, cost, kind), (row, column) in zip(sites, places, strict=True)
            ),
            key=lambda site: (site.row, site.column, site.name),
        )
        return cls(tuple(rows), tuple(columns), tuple(ordered))

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Full name of each site in the base model."""
        return tuple(site.name for site in self.sites)

    @cached_property
    def positions(self) -> tuple[tuple[int, int], ...]:
        """Row and column of each site."""
        return tuple((site.row, site.column) for site in self.sites)

    @property
    def stacks(self) -> tuple[str | None, ...]:
        """
        For each row the name of the stack of layers that it belongs to, such as `model.layers.` or `decoder.block.`;
        `None` for that of modules outside the numbered layers.
        """
        return tuple(None if row == OTHER_ROW else row.rstrip("0123456789") for row in self.rows)

    @property
    def row_of(self) -> tuple[int, ...]:
        """Row of each site."""
        return tuple(site.row for site in self.sites)

    @property
    def ranks(self) -> tuple[int, ...]:
        """Rank of each site's adapter before anything is pruned."""
        return tuple(site.rank for site in self.sites)

    @property
    def parameters(self) -> tuple[int, ...]:
        """Trainable parameters of each site's adapter."""
        return tuple(site.parameters for site in self.sites)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kind of each site."""
        return tuple(site.kind for site in self.sites)

    def of_kind(self, kind: str) -> tuple[str, ...]:
        """Names of the sites of a kind."""
        return tuple(site.name for site in self.sites if site.kind == kind)

    def table(self, values: Sequence[Any], empty: Any = None) -> list[list[Any]]:
        """One value a site as rows x columns, and `empty` where no site is."""
        table = [[empty] * len(self.columns) for _ in self.rows]
        for (row, column), value in zip(self.positions, values, strict=True):
            table[row][column] = value
        return table

    def describe(self) -> str:
        """One line for the log: the grid and what it covers."""
        layers = sum(row != OTHER_ROW for row in self.rows)
        cells = len(self.rows) * len(self.columns)
        outside = sum(self.rows[site.row] == OTHER_ROW for site in self.sites)
        kinds = list(dict.fromkeys([LORA, *self.kinds]))
        text = " and ".join(f"{len(self.of_kind(kind))} {'LoRA modules' if kind == LORA else kind}" for kind in kinds)
        text += f" in {layers} layers x {len(self.columns)} kinds"
        if outside:
            text += f", {outside} of them outside the numbered layers"
        kind = "" if len(kinds) > 1 else "LoRA "
        return f"{text} ({len(self) / cells:.0%} of the grid), {sum(self.parameters):,} {kind}parameters"


def _place(name: str) -> tuple[str, str]:
    # The first number is the layer's: in T5 and in mixtures of experts further ones follow it, and those belong to the
    # kind. A name that *ends* with its first number is itself an element of a list (`classifier.0`), not in a layer.
    match = re.match(r"(?P<row>(?:.*?\.)?\d+)\.(?P<column>.+)", name, re.DOTALL)
    return (match["row"], match["column"]) if match else (OTHER_ROW, name)
