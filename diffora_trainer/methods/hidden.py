"""What a method may look at inside of a model: the states between layers, and what its adapters read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..core.grid import OTHER_ROW, Grid
from ..core.ranks import RankBudget
from .base import ScoreMethod
from .context import ScoreContext, Site, matrices_of, same_adapters_check, wide
from .masks import TokenMasks
from .options import ScoreOptions
from .tokens import layers_that_look_ahead, stacks_of


POSITIONS = ("auto", "first", "last", "mean")
"""Which state stands for a row: that of its first or last token, or the mean of all; `"auto"` takes the first where
tokens see those after them, and the last elsewhere."""


_CONSTANT = 1e-10
"""Part of the squared size of states below which their variance is rounding."""


def is_constant(states: Tensor) -> bool:
    """Whether states, `(n, size)`, are all the same one."""
    centered = states - states.mean(dim=0)
    return float(centered.square().sum()) <= _CONSTANT * float(states.square().sum())


@dataclass(frozen=True)
class StateOptions(ScoreOptions):
    """
    Options of a method that looks at the states between layers.

    Args:
        position (`str`, *optional*, defaults to `"auto"`): one of [`POSITIONS`].
    """

    position: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.position not in POSITIONS:
            raise ValueError(f"You passed `position={self.position!r}`; it must be one of {list(POSITIONS)}.")


class StateMethod(ScoreMethod):
    """A method that looks at the states between layers, [`states`], by [`StateOptions`]."""

    def prepare(self, grid: Grid, ranks: RankBudget | None) -> None:
        super().prepare(grid, ranks)
        check_layers(grid)

    def states(self, context: ScoreContext) -> list[tuple[Tensor, Tensor]]:
        """See [`layer_states`]."""
        return layer_states(context, self.options.position)

    def try_out(self, context: ScoreContext) -> None:
        self.states(context)

    def num_passes(self, batches: int, grid: Grid, sites: Sequence[Site]) -> tuple[int, int]:
        count = passes_for_states(batches, grid, self.options.position)
        return count, count


def check_layers(grid: Grid) -> None:
    """Raise a `ValueError` if no row is a layer of the model."""
    if not numbered_rows(grid):
        raise ValueError(
            "No LoRA module stands in a numbered layer, so there are no layers to compare. Please use a method that "
            "looks at modules, such as 'snip'."
        )


def numbered_rows(grid: Grid) -> list[int]:
    """The rows that are layers of the model."""
    return [index for index, name in enumerate(grid.rows) if name != OTHER_ROW]


def of_modules(grid: Grid, layers: Tensor, outside: float) -> Tensor:
    """
    A number for each module, `(n,)`: that of its layer.

    Args:
        grid ([`~diffora_trainer.core.grid.Grid`]): the modules.
        layers (`Tensor`): a number for each of [`numbered_rows`].
        outside (`float`): the number of modules outside the numbered layers.
    """
    values = dict(zip(numbered_rows(grid), layers.tolist(), strict=True))
    return torch.tensor([values.get(row, outside) for row in grid.row_of], dtype=torch.float64)


def passes_for_states(batches: int, grid: Grid, position: str) -> int:
    """How many passes [`layer_states`] makes over so many batches."""
    layers = [grid.rows[row] for row in numbered_rows(grid)]
    return batches + (1 + len(stacks_of(layers)) if position == "auto" else 0)


def layer_states(context: ScoreContext, position: str) -> list[tuple[Tensor, Tensor]]:
    """
    The states that go into each numbered layer and those that come out, `(rows, size)` in float64 on the CPU: one for
    each row of the scoring batches, or each document of a row that holds several. Passes without the active adapter,
    as DPO makes for its reference, are left out: they would give each row a second state beside its own.

    Args:
        context ([`~diffora_trainer.methods.context.ScoreContext`]): the model and the batches.
        position (`str`): one of [`POSITIONS`].

    Raises:
        ValueError: if the model has no numbered layers, or one of them hands on no states of shape
            `(batch, tokens, size)`.
    """
    check_layers(context.grid)
    names = [context.grid.rows[row] for row in numbered_rows(context.grid)]
    masks, auto = TokenMasks(context), [""] * len(names)
    found: list[tuple[list[Tensor], list[Tensor]]] = [([], []) for _ in names]
    same_adapters = same_adapters_check(context.model)

    def note(module: nn.Module, index: int, place: int, value: Any) -> None:
        if not same_adapters():
            return
        if not isinstance(value, Tensor) or value.ndim != 3:
            what = f"{tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"The layer {names[index]!r} {'reads' if place == 0 else 'returns'} {what} and not states of shape "
                "(batch, tokens, size). Please use a method that looks at modules, such as 'snip'."
            )
        where = auto[index] if position == "auto" else position
        found[index][place].append(_pooled(*masks.documents(module, value.detach()), where))

    handles: list[Any] = [masks]
    try:
        if position == "auto":
            ahead = layers_that_look_ahead(context, masks, names)
            auto = ["first" if name in ahead else "last" for name in names]
        for index, name in enumerate(names):
            layer = context.base_model.get_submodule(name)

            def before(module: nn.Module, args: Any, kwargs: Any, index: int = index) -> None:
                note(module, index, 0, args[0] if args else kwargs.get("hidden_states"))

            def after(module: nn.Module, args: Any, output: Any, index: int = index) -> None:
                note(module, index, 1, output[0] if isinstance(output, tuple) else output)

            handles += [layer.register_forward_pre_hook(before, with_kwargs=True), layer.register_forward_hook(after)]
        with torch.no_grad():
            for masks.batch in context.batches:
                context.loss(masks.batch)
    finally:
        for handle in handles:
            handle.remove()
    if silent := [name for name, states in zip(names, found, strict=True) if not states[1]]:
        raise ValueError(
            f"The layer {silent[0]!r} was not called as a whole, so there are no states of it. Please use a method "
            "that looks at modules, such as 'snip'."
        )
    return [(torch.cat(into), torch.cat(out)) for into, out in found]


@contextmanager
def inputs_of_adapters(context: ScoreContext, read: Callable[[int, Tensor], None]) -> Iterator[Callable[[Any], None]]:
    """
    See what adapters read. The context gives a function that runs the model on a batch without gradients.

    Args:
        context ([`~diffora_trainer.methods.context.ScoreContext`]): the model and its sites.
        read (`Callable`): called with the index of a site and the vectors that its `lora_A` multiplies, `(tokens,
            size)`, without those of padding. What is the same for all rows, as a table of relative positions that the
            adapter multiplies too, counts once a call: there are adapters that read nothing else.
    """
    masks = TokenMasks(context)

    def note(index: int, inputs: Tensor) -> None:
        mask = masks.of(context.sites[index].gated, inputs)
        read(index, (inputs if mask is None else inputs[mask].unsqueeze(0)).flatten(0, -2))

    handles = [site.watch_inputs(partial(note, index)) for index, site in enumerate(context.sites)]

    def run(batch: Any) -> None:
        masks.batch = batch
        with torch.no_grad():
            context.loss(batch)

    try:
        yield run
    finally:
        for handle in [masks, *handles]:
            handle.remove()


def input_squares(context: ScoreContext) -> list[Tensor]:
    """
    For each site the sum of squares of each input of its adapter, over all tokens of the scoring batches (of several
    processes the mean of theirs): float64, on the CPU.
    """
    sums: dict[int, Tensor] = {}

    def read(index: int, inputs: Tensor) -> None:
        squares = wide(inputs).square().sum(dim=0)
        sums[index] = sums[index] + squares if index in sums else squares

    with inputs_of_adapters(context, read) as run:
        for batch in context.batches:
            run(batch)
    # Those of a module that was never called, such as an expert without a token.
    sizes = [matrices_of(site)[0][0].numel() for site in context.sites]
    found = [
        sums[index].cpu().float() if index in sums else torch.zeros(size, dtype=torch.float32)
        for index, size in enumerate(sizes)
    ]
    return [part.double() for part in context.reduce(torch.cat(found)).split([len(part) for part in found])]


def _pooled(states: Tensor, mask: Tensor | None, position: str) -> Tensor:
    mask = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device) if mask is None else mask
    steps = torch.arange(1, states.shape[1] + 1, device=states.device)
    rows = torch.arange(len(states), device=states.device)
    if position == "mean":
        weights = mask.float() / mask.sum(dim=1, keepdim=True).clamp(min=1)
        pooled = (wide(states) * wide(weights).unsqueeze(-1)).sum(dim=1)
    elif position == "last":
        pooled = states[rows, (mask * steps).argmax(dim=1)]
    else:
        pooled = states[rows, mask.int().argmax(dim=1)]
    return pooled.cpu().double()


def mean_of_layers(layers: Tensor) -> float:
    """What stands for modules outside the numbered layers, where only the mean is neither first nor last."""
    return float(layers.mean()) if len(layers) else 1.0


def reduced(context: ScoreContext, values: Sequence[float]) -> Tensor:
    """Numbers averaged over all processes."""
    return context.reduce(torch.tensor(values, dtype=torch.float32)).double()
