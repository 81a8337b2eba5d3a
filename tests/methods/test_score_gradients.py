"""Scores by gradients: the loss scale of float16, batches without labels, and several processes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffora_trainer.methods.base import ScoreMethod
from diffora_trainer.methods.registry import register_method, unregister_method
from helpers.searches import make_search, model_loss, warm
from helpers.threads import in_two_processes


OF_GRADIENTS = ("grad_norm", "snip", "adalora", "aletheia", "fisher")


@pytest.fixture
def fisher() -> Iterator[None]:
    @register_method("fisher")
    class Fisher(ScoreMethod):
        def score(self, context: Any) -> Tensor:
            return context.mean_over_batches(lambda gradient: gradient.square().sum())

    yield
    unregister_method("fisher")


@pytest.mark.parametrize("method", OF_GRADIENTS)
def test_a_loss_scale_that_is_too_high_is_lowered(method: str, fisher: None) -> None:
    model, batches = warm()
    losses = []

    def loss(model: nn.Module, batch: Any) -> Tensor:
        losses.append(batch)
        return model_loss(model, batch)

    expected = make_search(model, method, loss_fn=loss).score(batches)
    passes = len(losses)
    search = make_search(model, method, loss_fn=loss, loss_scale=lambda: 2.0**130)  # beyond float32, as 2**16 is
    torch.testing.assert_close(search.score(batches), expected, rtol=1e-5, atol=0.0)  # beyond float16
    assert 0 < len(losses) - 2 * passes < 10  # once, and not for each batch again

    # Where the gradients of another process overflow, this one makes its passes again too.
    answers = [0.5, 0.5]
    losses.clear()
    search = make_search(
        model, method, loss_fn=loss, loss_scale=lambda: 8.0, reduce=lambda x: x + (answers.pop() if answers else 0)
    )
    torch.testing.assert_close(search.score(batches), expected, rtol=1e-5, atol=0.0)
    assert len(losses) == passes + 2


@pytest.mark.parametrize("method", OF_GRADIENTS)
def test_batches_without_labels_do_not_count(method: str, fisher: None) -> None:
    model, batches = warm()
    dead = {**batches[0], "labels": torch.full_like(batches[0]["labels"], -100)}
    expected = make_search(model, method).score(batches)
    torch.testing.assert_close(make_search(model, method).score([dead, *batches, dead]), expected, rtol=1e-5, atol=0.0)
    with pytest.raises(ValueError, match="None of the losses of the 2 batches.*is finite.*labels"):
        make_search(model, method).score([dead, dead])

    own: list[Tensor] = []

    def mean(values: Tensor) -> Tensor:
        """Over this process, which has no such batch, and one that has two."""
        own.append(values)
        return (values + 2) / 2 if values.shape == (1,) else values + torch.arange(values.shape[-1])

    make_search(model, method, reduce=mean).score([dead, dead])
    assert [bool(values.any()) for values in own if values.ndim == 2] == [False]


def test_processes_with_different_numbers_of_labelled_batches_score_as_one() -> None:
    model, batches = warm()
    dead = {**batches[0], "labels": torch.full_like(batches[0]["labels"], -100)}

    def process(rank: int, reduce: Any) -> Tensor:
        twin = copy.deepcopy(model)
        return make_search(twin, "gradient_of_all", reduce=reduce).score([[batches[0], dead], batches[1:]][rank])

    @register_method("gradient_of_all")
    class GradientOfAll(ScoreMethod):
        """Linear in the gradient."""

        def score(self, context: Any) -> Tensor:
            return context.sum_over_weights(lambda weight, gradient: gradient.sum())

    try:
        expected = make_search(model, "gradient_of_all").score(batches)
        found = in_two_processes(process)
    finally:
        unregister_method("gradient_of_all")
    assert found[0].equal(found[1])
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-7)
