"""What a method may look at inside of a model: the states between layers, and what its adapters read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..core.grid import OTHER_ROW, Grid
from .context import ScoreContext, wide


POSITIONS = ("auto", "first", "last", "mean")
"""Which state stands for a row: that of its first or last token, or the mean of all; `"auto"` takes the first where
tokens see those behind them, and the last elsewhere."""


def check_position(position: str) -> None:
    """Raise a `ValueError` if a position is none of [`POSITIONS`]."""
    if position not in POSITIONS:
        raise ValueError(f"You passed `position={position!r}`; it must be one of {list(POSITIONS)}.")


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


def layer_states(context: ScoreContext, position: str) -> list[tuple[Tensor, Tensor]]:
    """
    The states that go into each numbered layer and those that come out, `(rows, size)` in float64 on the CPU: one for
    each row of the scoring batches.

    Args:
        context ([`~diffora_trainer.methods.context.ScoreContext`]): the model and the batches.
        position (`str`): one of [`POSITIONS`].

    Raises:
        ValueError: if the model has no numbered layers, or one of them hands on no states of shape
            `(batch, tokens, size)`.
    """
    names = [context.grid.rows[row] for row in numbered_rows(context.grid)]
    if not names:
        raise ValueError(
            "No LoRA module stands in a numbered layer, so there are no layers to compare. Please use a method that "
            "looks at modules, such as 'snip'."
        )
    if position == "auto":
        causal = any(getattr(module, "is_causal", None) is True for module in context.base_model.modules())
        position = "last" if causal else "first"
    found: list[tuple[list[Tensor], list[Tensor]]] = [([], []) for _ in names]
    batch: Any = None

    def note(index: int, place: int, value: Any) -> None:
        if not isinstance(value, Tensor) or value.ndim != 3:
            what = f"{tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"The layer {names[index]!r} {'reads' if place == 0 else 'returns'} {what} and not states of shape "
                "(batch, tokens, size). Please use a method that looks at modules, such as 'snip'."
            )
        found[index][place].append(_pooled(value.detach(), token_mask(context, batch, value), position))

    handles = []
    for index, name in enumerate(names):
        layer = context.base_model.get_submodule(name)

        def before(_: nn.Module, args: Any, kwargs: Any, index: int = index) -> None:
            note(index, 0, args[0] if args else kwargs.get("hidden_states"))

        def after(_: nn.Module, args: Any, output: Any, index: int = index) -> None:
            note(index, 1, output[0] if isinstance(output, tuple) else output)

        handles += [layer.register_forward_pre_hook(before, with_kwargs=True), layer.register_forward_hook(after)]
    try:
        with torch.no_grad():
            for batch in context.batches:
                context.loss(batch)
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
        read (`Callable`): called with the index of a site and the inputs of its `lora_A`, `(tokens, size)`, without
            those of padding.
    """
    batch: Any = None

    def hook(index: int) -> Callable[[nn.Module, Any], None]:
        def before(module: nn.Module, args: Any) -> None:
            inputs = args[0].detach()
            if context.sites[index].parameters[0].ndim == 4:  # of a convolution
                inputs = inputs.movedim(1, -1)
            mask = token_mask(context, batch, inputs)
            read(index, inputs.flatten(0, -2) if mask is None else inputs[mask])

        return before

    handles = [site.gated.register_forward_pre_hook(hook(index)) for index, site in enumerate(context.sites)]

    def run(one: Any) -> None:
        nonlocal batch
        batch = one
        with torch.no_grad():
            context.loss(one)

    try:
        yield run
    finally:
        for handle in handles:
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
    sizes = [site.parameters[0].shape[1] for site in context.sites]
    found = [sums[index].cpu().float() if index in sums else torch.zeros(size) for index, size in enumerate(sizes)]
    return [part.double() for part in context.reduce(torch.cat(found)).split([len(part) for part in found])]


def token_mask(context: ScoreContext, batch: Any, states: Tensor) -> Tensor | None:
    """Which tokens are no padding, `(batch, tokens)`, or `None` if all count or it is not known."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if getattr(context.base_model.config, "is_encoder_decoder", False):
        return None  # whose tokens these are is not known
    if not isinstance(mask, Tensor) or states.ndim < 3 or mask.shape != states.shape[:2]:
        return None
    return mask.bool().to(states.device)


def _pooled(states: Tensor, mask: Tensor | None, position: str) -> Tensor:
    mask = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device) if mask is None else mask
    steps = torch.arange(1, states.shape[1] + 1, device=states.device)
    rows = torch.arange(len(states), device=states.device)
    if position == "mean":
        weights = mask / mask.sum(dim=1, keepdim=True).clamp(min=1)
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
