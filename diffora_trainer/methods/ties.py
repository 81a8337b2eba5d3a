"""Scores that are all equal, so that they tell no module from another."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor


if TYPE_CHECKING:
    from .base import ScoreMethod


NOT_TRAINED = (
    "While `lora_B` is still 0, as before the first step or as long as the learning rate is 0, most scores are 0. "
    "Please score later (`discretize_at`, or `arch_warmup` with `reallocate_every`), load an adapter that was trained "
    "before"
)
TOO_FEW_ROWS = "Please score on more batches (`score_batches`)"


def check_ties(method: ScoreMethod, scores: Tensor, tie_breaker: Tensor) -> None:
    """
    Raise a `ValueError` if all scores tie, nothing else decides between them, and the budget does not keep everything.

    Args:
        method ([`~diffora_trainer.methods.base.ScoreMethod`]): whose they are.
        scores (`Tensor` of shape `(m,)`): finite.
        tie_breaker (`Tensor` of shape `(m,)`): what decides between equal ones.
    """
    apart = bool((scores != scores[0]).any() or (tie_breaker != tie_breaker[0]).any())
    if len(scores) == 1 or apart or method.advice_on_ties is None or method.keeps_all(scores):
        return
    raise ValueError(
        f"All {len(scores)} {'components' if method.tells_ranks else 'modules'} have the score {float(scores[0]):g}, "
        f"so there is nothing to choose by. {method.advice_on_ties}, or use another `method`; 'random' is a random "
        "choice."
    )
