"""How sure a choice is, against a direct computation."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from scipy.stats import spearmanr, t

from diffora_trainer import ArchitectureSearch, DiffoRAConfig
from diffora_trainer.search.confidence import Agreement, Comparison, Confidence, SplitHalf, paired
from helpers import trainers


FALLEN = Comparison(2.0, 1.0, 0.1)


def test_agreement_is_spearmans_correlation_of_odd_and_even_steps() -> None:
    generator = torch.Generator().manual_seed(0)
    gains = torch.randn(7, 12, generator=generator).round(decimals=1)  # with ties
    halves = SplitHalf.empty(12)
    assert halves.agreement() is None
    for step in gains:
        halves.add(step)
    expected = spearmanr(gains[::2].double().sum(0), gains[1::2].double().sum(0)).statistic
    assert halves.agreement() == (pytest.approx(expected), 11)
    for few in (SplitHalf.empty(2), SplitHalf.empty(12)):
        few.add(torch.arange(len(few.sums[0])))
        few.add(torch.zeros(len(few.sums[0])))  # nothing to rank
        assert few.agreement() is None


def test_only_modules_that_compete_are_compared() -> None:
    generator = torch.Generator().manual_seed(0)
    groups = torch.arange(12).repeat_interleave(3)
    beyond = []
    for _ in range(300):
        halves = SplitHalf.empty(36)
        for _ in range(6):
            halves.add(torch.randn(36, generator=generator) + 10.0 * groups)
        whole, within = halves.agreement(), halves.agreement(groups)
        assert whole is not None and whole.correlation > 0.8 and within is not None and within.freedom == 24
        beyond.append(Confidence(within, FALLEN).beyond_chance)
    assert 0.01 < sum(beyond) / len(beyond) < 0.1  # 5 in 100
    # Groups of two and of one: two rankings of two modules are alike or opposite, and one module has no ranking.
    halves = SplitHalf(torch.tensor([[1.0, 2.0, 9.0, 8.0, 5.0], [3.0, 4.0, 7.0, 8.0, 6.0]]), steps=2)
    assert halves.agreement(torch.tensor([0, 0, 1, 1, 2])) == (0.0, 2)


@pytest.mark.parametrize("options", [{}, {"selection_unit": "group"}, {"max_trainable_parameters": 4000}])
def test_a_search_compares_what_its_budget_lets_compete(options: dict) -> None:
    """Gains that differ by layer say nothing where each layer keeps its best, nor do those of size under a cap."""
    model = get_peft_model(trainers.causal_model(num_hidden_layers=6), trainers.lora())
    config = DiffoRAConfig(selection_granularity="module", **options)
    search = ArchitectureSearch(model, config, loss_fn=lambda model, batch: model(**batch).loss)
    generator = torch.Generator().manual_seed(0)
    rows, sizes = torch.tensor(search.grid.row_of), torch.tensor(search.grid.parameters)
    beyond, count = [], len(rows)
    for _ in range(100):
        search.halves = SplitHalf.empty(count)
        for _ in range(2):
            noise = torch.randn(count, generator=generator)
            search.halves.add(sizes * (1 + 0.01 * noise) if "max_trainable_parameters" in options else rows + noise)
        assert spearmanr(*search.halves.sums).statistic > 0.5
        beyond.append(search.confidence.beyond_chance)
    assert sum(beyond) <= 12  # 5 in 100
    for _ in range(2):
        search.halves.add(1000.0 * sizes * (torch.arange(count) % 7))
    assert search.confidence.beyond_chance


def test_noise_has_no_confidence_and_a_steady_ranking_has() -> None:
    generator = torch.Generator().manual_seed(0)
    beyond = []
    for _ in range(300):
        halves = SplitHalf.empty(36)
        for _ in range(6):
            halves.add(torch.randn(36, generator=generator))
        beyond.append(Confidence(halves.agreement(), FALLEN).beyond_chance)
    assert 0.01 < sum(beyond) / len(beyond) < 0.1  # 5 in 100
    for _ in range(6):
        halves.add(torch.arange(36.0))
    sure = Confidence(halves.agreement(), FALLEN)
    assert sure.beyond_chance and sure.doubt() is None and sure.value is not None and sure.value > 0.8
    assert Confidence(Agreement(0.5, 35), None).value == pytest.approx(2 / 3)  # Spearman and Brown


def test_what_was_not_learned_is_no_evidence() -> None:
    alike = Agreement(0.9, 35)
    unlearned = Confidence(alike, Comparison(2.0, 1.9, 0.1))
    assert unlearned.value == 0 and not unlearned.beyond_chance
    assert "not lowered the held-out loss beyond its noise (2 without it, 1.9 with it" in str(unlearned.doubt())
    plateau = Confidence(alike, FALLEN, Comparison(1.05, 1.0, 0.1))
    assert plateau.value == 0 and "on a plateau (1.05 after a third of the search, 1 at its end" in str(
        plateau.doubt()
    )
    assert Confidence(alike, FALLEN, Comparison(1.5, 1.0, 0.1)).beyond_chance
    assert "rank correlation 0.10" in str(Confidence(Agreement(0.1, 35), None).doubt())
    assert Confidence(None, None).value is None and Confidence(None, None).doubt() is None


@pytest.mark.parametrize("batches", range(2, 9))
def test_noise_of_few_batches_is_no_fall(batches: int) -> None:
    generator = torch.Generator().manual_seed(0)
    fallen = 0
    for _ in range(2000):
        found = paired(*torch.randn(2, batches, generator=generator))
        assert found is not None and found.batches == batches
        fallen += found.has_fallen
    assert fallen / 2000 == pytest.approx(0.05, abs=0.015)
    bound = float(t.ppf(0.95, batches - 1))
    assert Comparison(1.0 + 1.001 * bound, 1.0, 1.0, batches).has_fallen
    assert not Comparison(1.0 + 0.999 * bound, 1.0, 1.0, batches).has_fallen


def test_a_single_batch_only_speaks_against_a_fall() -> None:
    found = paired(torch.tensor([2.0, torch.nan]), torch.tensor([1.0, 1.0]))
    assert found == (2.0, 1.0, 0.0, 1) and found.has_fallen
    risen = Confidence(Agreement(0.9, 35), Comparison(1.0, 2.0, 0.0, batches=1))
    assert risen.value == 0 and "(1 without it, 2 with it, on a single batch)" in str(risen.doubt())
