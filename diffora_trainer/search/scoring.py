"""Scores of all modules of a search by its method, without a trace in the training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.base import plain_name
from ..compat.transformers import checkpoints
from ..core.grid import Grid
from ..methods.base import ScoreMethod
from ..methods.context import ScoreContext, ScoreFunction, Site
from .base import SearchBase


def score_sites(search: SearchBase, batches: list[Any], function: ScoreFunction | None) -> Tensor:
    """See [`ArchitectureSearch.score`]."""
    method, grid = search.method, search.grid
    if not isinstance(method, ScoreMethod):
        raise ValueError(
            f"You called `score` with `method={search.config.method!r}`, which learns from architecture steps. Please "
            "call `step`, or choose another `method`."
        )
    if not batches:
        raise ValueError("There is no batch to score the modules on. Please pass at least one.")
    with _scoring(search, batches, function) as context, _calls(context.sites) as called:
        found = method.score(context)
    scores, ties = found if isinstance(found, tuple) else (found, torch.zeros_like(found))
    _check_shape(method, scores, ties)
    scores, ties = search.runtime.reduce(torch.stack([scores, ties]))
    if method.options.normalize_scores:  # of a method with a score for each module
        sizes = torch.tensor(grid.parameters, dtype=torch.float64)
        scores, ties = scores / sizes, ties / sizes
    _check_finite(method, grid, scores + ties, (search.runtime.loss_scale(), context.loss_scale))
    if len(set(grid.kinds)) > 1 and not method.comparable and not search.ranks_kinds_apart:
        scores = scale_free(grid, scores)
    method.set_scores(scores, ties)
    if method.gradient_score:  # exactly 0 means that none has arrived
        search.reached |= method.scores() != 0
    elif method.takes_function or not method.reads_data:
        search.reached |= True
    else:
        search.reached |= search.runtime.reduce(called) > 0
    return method.scores()


def try_out(search: SearchBase, batch: Any) -> None:
    """Raise a `ValueError` before the first step if the method of a search cannot score its model."""
    if batch is None:  # of a trainer that makes its completions in a training step
        return
    with _scoring(search, [batch], None) as context:
        search.method.try_out(context)


@contextmanager
def _scoring(search: SearchBase, batches: list[Any], function: ScoreFunction | None) -> Iterator[ScoreContext]:
    """What a method is given, in a model that is left as it was."""
    context = ScoreContext(
        model=search.model,
        base_model=search.base_model,
        grid=search.grid,
        sites=search.adapters.sites,
        batches=batches,
        loss=search.loss,
        gated=search.gates.override,
        masked=search.gates.masked,
        reduce=search.runtime.reduce,
        loss_scale=search.runtime.loss_scale(),
        draw=search.method.steps,
        score_function=None if function is None else _by_plain_name(function),
    )
    with search.side_effect_free(training=False), search.gates.override(None):
        for module in search.model.modules():
            if checkpoints(module):
                module.training = True  # it checkpoints in no other mode; its parts stay in evaluation
        yield context


@contextmanager
def _calls(sites: Sequence[Site]) -> Iterator[Tensor]:
    """Which adapters are called meanwhile: a vector, `(n,)`, that is 1 for these in the end, and 0 for others."""
    called = torch.zeros(len(sites), dtype=torch.float32)

    def note(index: int, *_: Any) -> None:
        called[index] = 1.0

    handles = [site.gated.register_forward_pre_hook(partial(note, index)) for index, site in enumerate(sites)]
    try:
        yield called
    finally:
        for handle in handles:
            handle.remove()


def scale_free(grid: Grid, scores: Tensor) -> Tensor:
    """
    Scores of several kinds of site that can be compared: each divided by the mean magnitude of its kind. A gradient or
    a weight of one kind of adapter is of another size than one of another kind for reasons that say nothing of its
    use: one may read the residual stream, for example, which no norm has scaled.

    Args:
        grid ([`~diffora_trainer.core.grid.Grid`]): the modules.
        scores (`Tensor` of shape `(n,)`): finite.

    Returns:
        `Tensor` of shape `(n,)`. A kind whose scores are all 0 stays at 0.
    """
    found = scores.clone()
    for kind in dict.fromkeys(grid.kinds):
        own = torch.tensor([other == kind for other in grid.kinds])
        if (mean := scores[own].abs().mean()) > 0:
            found[own] = scores[own] / mean
    return found


def _by_plain_name(function: ScoreFunction) -> ScoreFunction:
    """A user's function, whose names may be those of the PEFT model."""

    def score(model: nn.Module, batches: list[Any]) -> Mapping[str, Any]:
        found = function(model, batches)
        return {plain_name(str(n)): v for n, v in found.items()} if isinstance(found, Mapping) else found

    return score


def _check_shape(method: ScoreMethod, *scores: Tensor) -> None:
    for one in scores:
        if not isinstance(one, Tensor) or one.shape != (method.num_scores,):
            found = tuple(one.shape) if isinstance(one, Tensor) else type(one).__name__
            raise ValueError(
                f"`score` of {type(method).__name__} returned {found}, but a tensor of {method.num_scores} numbers is "
                f"needed, one a {'component' if method.tells_ranks else 'module'} in the order of `context.grid`."
            )


def _check_finite(method: ScoreMethod, grid: Grid, scores: Tensor, scale: tuple[float, float]) -> None:
    bad = [grid.names[index] for index in method.owner[~torch.isfinite(scores)].unique().tolist()]
    if bad:
        before, lowered = scale
        of_scale, of_synflow = "", ""
        if lowered < before:
            of_scale = f", though the loss scale of float16 was lowered from {before:g} to {lowered:g}"
        if method.name == "synflow":
            of_synflow = (
                " 'synflow' makes all weights positive, so that what they multiply adds up: load the model in float32 "
                "or bfloat16, or use another method."
            )
        raise ValueError(
            f"The scores of {len(bad)} of {len(grid)} modules by `method={method.name!r}` are not finite, that of "
            f"{bad[0]!r} among them{of_scale}. Please look for the cause of the NaN or infinity.{of_synflow}"
        )
