"""Looking at a choice, committing to it and ending a search: `select`, `discretize`, `fade_out` and `finish`."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from diffora_trainer import ArchitectureSearch, DiffoRAConfig, SelectionRun, apply_selection
from diffora_trainer.core.budget import Budget
from diffora_trainer.methods.deprecated import DifferentialAdaptationMatrix
from diffora_trainer.search.runtime import Runtime
from helpers.checks import assert_same
from helpers.options import make_config
from helpers.searches import make_search, make_steps, model_loss, pairs, warm


@torch.no_grad()
def logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    return model.eval()(**batch).logits


def trained_gates(method: str, ratio: float = 0.5) -> tuple[Any, list[dict[str, Tensor]], ArchitectureSearch]:
    """A search whose method has trained gates for a few steps."""
    model, batches = warm()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    config = make_config(
        method=method, method_options={"gate_learning_rate": 0.1}, discretize_at=9, selection_ratio=ratio
    )
    run = SelectionRun(model, optimizer, config, model_loss, batches, total_steps=12)
    make_steps(run, model, batches, optimizer, 5)
    return model, batches, run.search


def scored(method: str, **options: Any) -> tuple[Any, list[dict[str, Tensor]], ArchitectureSearch]:
    model, batches = warm()
    search = make_search(model, method, selection_ratio=0.5, **options)
    search.score(batches)
    return model, batches, search


@pytest.mark.parametrize(("method", "ratio"), [("sora", 0.5), ("sora", 1.0), ("beamlora", 1.0)])
def test_gates_become_weights_also_after_a_choice_made_before(method: str, ratio: float) -> None:
    found = []
    for first in (False, True):
        model, batches, search = trained_gates(method, ratio)
        before = logits(model, batches[0])
        with search.gates.masked([None] * len(search.grid)):
            assert not torch.allclose(before, logits(model, batches[0]), atol=1e-3)
        if first:
            search.discretize()
            assert logits(model, batches[0]).equal(before)
        found.append(search.finish(5))
        torch.testing.assert_close(logits(model, batches[0]), before, atol=2e-5, rtol=1e-4)
    assert found[0] == found[1]


def test_eva_starts_along_its_directions_also_after_a_choice_made_before() -> None:
    starts = []
    for first in (False, True):
        model, batches = warm()
        with torch.no_grad():
            for _, b in pairs(model):
                b.zero_()
        before = [a.detach().clone() for a, _ in pairs(model)]
        search = make_search(model, "eva", discretize_at=0)
        search.score(batches)
        if first:
            search.discretize()
            assert all(a.equal(old) for (a, _), old in zip(pairs(model), before, strict=True))
        search.finish()
        starts.append({str(index): a.detach() for index, (a, _) in enumerate(pairs(model))})
        assert not any(a.equal(old) for (a, _), old in zip(pairs(model), before, strict=True))
    assert_same(starts[0], starts[1])


@pytest.mark.parametrize("method", ["snip", "adalora", "eva"])
def test_a_choice_is_looked_at_made_and_carried_out(method: str) -> None:
    """`select` and `finish` tell the same, whether or not the choice was made before, and nothing changes it then."""
    _, batches, search = scored(method)
    looked = search.select()
    assert search.kept is None and search.select() == looked
    kept = search.discretize()
    assert kept.tolist() == list(looked.kept) and search.gates.attached and search.select() == looked
    search.score([batches[1]])
    again = search.finish()
    assert (again.ranks, again.components) == (looked.ranks, looked.components) and not search.gates.attached
    _, _, other = scored(method)
    assert other.finish() == looked and other.kept is not None and other.kept.equal(kept)


def test_a_choice_of_before_has_to_be_that_of_a_method_that_gives_ranks() -> None:
    _, _, search = scored("adalora")
    expected = search.select()
    assert search.discretize(torch.tensor(expected.kept)).tolist() == list(expected.kept)
    assert search.finish() == expected
    _, _, search = scored("adalora")
    with pytest.raises(ValueError, match=r"method='adalora'`, which says itself .* restore them first"):
        search.discretize(~torch.tensor(expected.kept))
    assert search.kept is None


@pytest.mark.parametrize("method", ["snip", "adalora", "sora"])
def test_what_has_faded_out_makes_no_difference_when_it_goes(method: str) -> None:
    model, batches, search = trained_gates(method) if method == "sora" else scored(method)
    before = logits(model, batches[0])
    search.discretize()
    search.fade_out(0.0)
    torch.testing.assert_close(logits(model, batches[0]), before)
    search.fade_out(1.0)
    faded = logits(model, batches[0])
    assert not torch.allclose(faded, before, atol=1e-3)
    selection = search.finish()
    apply_selection(model, selection)
    torch.testing.assert_close(logits(model, batches[0]), faded, atol=2e-5, rtol=1e-4)


def test_a_search_that_has_ended_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model, batches = warm()
    search = make_search(model, "diffora")
    search.step(batches[0])
    calls: list[int] = []
    search.method.before_pruning = lambda sites: calls.append(len(sites))  # type: ignore[method-assign]
    with caplog.at_level(logging.WARNING):
        selection = search.finish(1)
    assert selection.notes and len(caplog.records) == len(selection.notes) and calls == [len(search.grid)]
    caplog.clear()
    with pytest.raises(ValueError, match=r"`finish` a second time.*the first call returned"):
        search.finish(1)
    assert not caplog.records and len(calls) == 1
    for call in (search.draw_gates, lambda: search.fade_out(0.5), lambda: search.step(batches[0])):
        with pytest.raises(ValueError, match=r"not on the model.*after `finish\(\)`"):
            call()


def test_gates_are_set_once_they_are_on_the_model() -> None:
    model, batches = warm()
    search = ArchitectureSearch(model, DiffoRAConfig(), loss_fn=model_loss)
    with pytest.raises(ValueError, match=r"not on the model.*call its `begin\(\)` first"):
        search.draw_gates()
    search.discretize()
    with pytest.raises(ValueError, match=r"not on the model.*call its `begin\(\)` first"):
        search.fade_out(0.5)


def test_names_of_before_say_what_to_use_now() -> None:
    model, batches = warm()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    config = make_config(method="random", search_only=True, discretize_at=2)
    run = SelectionRun(model, optimizer, config, model_loss, batches, total_steps=4)
    make_steps(run, model, batches, optimizer, 1)
    for expected in (False, True):
        with pytest.warns(FutureWarning, match=r"`SelectionRun\.finished`.*version 0\.3.*`should_stop`") as caught:
            assert run.finished is run.should_stop is expected
        assert [one.filename for one in caught] == [__file__]
        make_steps(run, model, batches, optimizer, 1)
    model, batches = warm()
    match = r"`ArchitectureSearch\(loss_scale=\.\.\.\)`.*0\.3.*`runtime=Runtime\(loss_scale=\.\.\.\)`"
    with pytest.warns(FutureWarning, match=match) as caught:
        search = ArchitectureSearch(model, loss_fn=model_loss, runtime=Runtime(compiled=True), loss_scale=lambda: 8.0)
    assert [one.filename for one in caught] == [__file__]
    assert search.runtime.loss_scale() == 8.0 and search.runtime.compiled


def test_the_class_of_before_says_what_it_cannot_make() -> None:
    budget = Budget([0, 0], [4, 4], ratio=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(DifferentialAdaptationMatrix.create("budget", budget).values()) == 2
    with pytest.raises(ValueError, match=r"'snip' scores the modules.*`get_method\('snip'\)\(budget\)`"):
        DifferentialAdaptationMatrix.create("snip", budget)
    with pytest.raises(TypeError, match="`budget` must be a `Budget`, got int"):
        DifferentialAdaptationMatrix.create("budget", 3)
