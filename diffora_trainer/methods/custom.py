"""Scores of a user's own function."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .base import ScoreMethod
from .context import ScoreContext
from .registry import register_method


@register_method("custom")
class Custom(ScoreMethod):
    """
    Scores of the function that the trainer or the run was given as `score_function`: `score_function(model, batches)`
    gives a number for each module, by its name in the base model or in the PEFT model. It may call `backward`:
    gradients and values of the trainable weights are put back as they were, whether it returns or fails. The frozen
    weights are its own responsibility.

    A method of your own that is used more than once is better registered: see
    [`~diffora_trainer.methods.registry.register_method`].
    """

    described = "a function of the run's own"
    takes_function = True
    shardable = False

    def score(self, context: ScoreContext) -> Tensor:
        names = context.grid.names
        assert context.score_function is not None
        with _trainable_weights_kept(context.model):
            found = context.score_function(context.model, context.batches)
        if not isinstance(found, Mapping):
            raise TypeError(
                f"`score_function` returned {type(found).__name__}, but a score for each module is needed. Please "
                f"return a dictionary by the names of the modules, such as {{{names[0]!r}: 1.0, ...}}."
            )
        try:
            scores = {str(name): float(score) for name, score in found.items()}
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"`score_function` returned a score that is not a number: {error}.") from error
        missing, extra = [n for n in names if n not in scores], sorted(set(scores) - set(names))
        if missing or extra:
            raise ValueError(
                f"`score_function` gave no score to {len(missing)} of {len(names)} modules {missing[:3]}, and "
                f"{len(extra)} to names that are not modules of this search {extra[:3]}. Please return one for each, "
                "by its full name."
            )
        return torch.tensor([scores[name] for name in names], dtype=torch.float64)


@contextmanager
def _trainable_weights_kept(model: nn.Module) -> Iterator[None]:
    """Let a function accumulate gradients and move weights, and put both back as they were."""
    kept = [(p, p.detach().clone(), p.grad) for p in model.parameters() if p.requires_grad]
    try:
        for parameter, _, _ in kept:
            parameter.grad = None
        yield
    finally:
        with torch.no_grad():
            for parameter, value, gradient in kept:
                parameter.copy_(value)
                parameter.grad = gradient
                parameter.requires_grad_(True)
