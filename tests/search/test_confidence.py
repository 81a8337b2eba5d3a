"""How sure a choice is, against a direct computation."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import spearmanr

from diffora_trainer.search.confidence import Confidence, SplitHalf


def test_agreement_is_spearmans_correlation_of_odd_and_even_steps() -> None:
    generator = torch.Generator().manual_seed(0)
    gains = torch.randn(7, 12, generator=generator).round(decimals=1)  # with ties
    halves = SplitHalf.empty(12)
    assert halves.correlation() is None
    for step in gains:
        halves.add(step)
    expected = spearmanr(gains[::2].double().sum(0), gains[1::2].double().sum(0)).statistic
    assert halves.correlation() == pytest.approx(expected)
    for few in (SplitHalf.empty(2), SplitHalf.empty(12)):
        few.add(torch.arange(len(few.sums[0])))
        few.add(torch.zeros(len(few.sums[0])))  # nothing to rank
        assert few.correlation() is None


def test_noise_has_no_confidence_and_a_steady_ranking_has() -> None:
    generator = torch.Generator().manual_seed(0)
    beyond = []
    for _ in range(300):
        halves = SplitHalf.empty(36)
        for _ in range(6):
            halves.add(torch.randn(36, generator=generator))
        beyond.append(Confidence(halves.correlation(), 36, (2.0, 1.0, 0.1)).beyond_chance)
    assert 0.01 < sum(beyond) / len(beyond) < 0.1  # 5 in 100
    for _ in range(6):
        halves.add(torch.arange(36.0))
    sure = Confidence(halves.correlation(), 36, (2.0, 1.0, 0.1))
    assert sure.beyond_chance and sure.doubt() is None and sure.value is not None and sure.value > 0.8
    assert Confidence(0.5, 36, None).value == pytest.approx(2 / 3)  # Spearman and Brown


def test_what_was_not_learned_is_no_evidence() -> None:
    unlearned = Confidence(0.9, 36, (2.0, 1.9, 0.1))
    assert unlearned.value == 0 and not unlearned.beyond_chance
    assert "not lowered the held-out loss beyond its noise (2 without it, 1.9 with it" in str(unlearned.doubt())
    plateau = Confidence(0.9, 36, (2.0, 1.0, 0.1), (1.05, 1.0, 0.1))
    assert plateau.value == 0 and "on a plateau (1.05 after a third of the search, 1 at its end" in str(
        plateau.doubt()
    )
    assert Confidence(0.9, 36, (2.0, 1.0, 0.1), (1.5, 1.0, 0.1)).beyond_chance
    assert "rank correlation 0.10" in str(Confidence(0.1, 36, None).doubt())
    assert Confidence(None, 36, None).value is None and Confidence(None, 36, None).doubt() is None
