"""Ranks under a budget of parameters."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from diffora_trainer.core.components import Components
from diffora_trainer.core.ranks import RankBudget


@st.composite
def budgets(draw: st.DrawFn) -> RankBudget:
    count = draw(st.integers(1, 12))
    groups = [0, *draw(st.lists(st.integers(0, 2), min_size=count - 1, max_size=count - 1))]
    present = sorted(set(groups))
    costs = draw(st.lists(st.integers(1, 50), min_size=count, max_size=count))
    ranks = draw(st.lists(st.integers(1, 16), min_size=count, max_size=count))
    limits = draw(st.lists(st.integers(1, 3000), min_size=len(present), max_size=len(present)))
    return RankBudget(tuple(map(present.index, groups)), tuple(costs), tuple(ranks), tuple(limits))


@given(budgets(), st.randoms(use_true_random=False))
def test_growth_uses_the_budget_up_and_never_more(budget: RankBudget, random: object) -> None:
    start = budget.start()
    assert all(1 <= rank <= most for rank, most in zip(start, budget.ranks, strict=True))
    if not budget.fits(start):
        return
    order = budget.spread()
    assert sorted(order) == list(range(len(start)))
    random.shuffle(order)  # type: ignore[attr-defined]
    favoured, others = order[: len(order) // 2], order[len(order) // 2 :]
    found = budget.shift(favoured, others)
    for ranks in (start, found):
        assert budget.fits(ranks)
        for index, rank in enumerate(ranks):
            assert 1 <= rank <= budget.ranks[index]
            more = [*ranks[:index], rank + 1, *ranks[index + 1 :]]
            assert rank == budget.ranks[index] or not budget.fits(more)
    assert all(found[index] >= start[index] for index in favoured)
    assert all(2 * found[index] >= start[index] for index in others)


@given(budgets(), st.integers(0, 1000))
def test_components_are_taken_in_their_order_as_long_as_they_fit(budget: RankBudget, seed: int) -> None:
    owner = [module for module, rank in enumerate(budget.ranks) for _ in range(rank)]
    order = torch.randperm(len(owner), generator=torch.Generator().manual_seed(seed)).tolist()
    begun, wanted = [0] * len(budget.ranks), order[: len(order) // 2]
    first = budget.take(begun, owner, wanted)
    ranks = [sum(owner[index] == module for index in first) for module in range(len(begun))]
    assert budget.fits(ranks) and first == [index for index in wanted if index in set(first)]
    for index in set(wanted) - set(first):
        assert not budget.fits([rank + (module == owner[index]) for module, rank in enumerate(ranks)])
    # Where it is left off, it goes on.
    assert first + budget.take(ranks, owner, order[len(wanted) :]) == budget.take(begun, owner, order)


def test_a_component_that_fits_is_taken_after_one_that_did_not() -> None:
    budget = RankBudget((0, 0, 1), (10, 30, 10), (2, 2, 2), (45, 10))
    assert budget.take([0, 0, 0], [0, 0, 1, 1, 2, 2], [3, 2, 0, 5, 4, 1]) == [3, 0, 5]
    assert budget.take([1, 0, 1], [0, 0, 1, 1, 2, 2], [3, 2, 0, 5, 4, 1]) == [3]


def test_start_is_all_linear_at_the_rank_that_fits_and_the_favoured_get_half_of_the_others() -> None:
    budget = RankBudget((0,) * 6, (10,) * 6, (8,) * 6, (250,))  # room for rank 4.17
    assert budget.start() == (5, 4, 4, 4, 4, 4)
    assert budget.shift([3, 1, 2], [0, 4, 5]) == (3, 6, 6, 6, 2, 2)
    layers = RankBudget((0, 0, 1, 1), (10, 30, 10, 10), (8,) * 4, (160, 20))
    assert layers.start() == (4, 4, 1, 1)
    assert layers.shift([1, 2], [0, 3]) == (4, 4, 1, 1)  # nobody could take 20 parameters of the first
    assert layers.shift([0, 2], [1, 3]) == (8, 2, 1, 1)
    assert not RankBudget((0, 0), (10, 30), (8, 8), (39,)).fits((1, 1))


def test_what_is_left_over_goes_to_modules_far_apart() -> None:
    for count, more in ((4, 2), (6, 3), (7, 2), (12, 4)):
        start = RankBudget((0,) * count, (10,) * count, (8,) * count, (40 * count + 10 * more,)).start()
        larger = [index for index, rank in enumerate(start) if rank == 5]
        assert len(larger) == more and set(start) == {4, 5}
        assert all(after - before > 1 for before, after in zip(larger, larger[1:], strict=False))


def test_the_best_components_are_those_of_the_highest_score() -> None:
    """What breaks ties decides between equal scores alone."""
    components = Components((2, 3), (4, 4))
    scores = torch.tensor([1.0, 2.0, 3.0, 1.0, 2.0])
    assert components.best([1, 2], scores, -scores).tolist() == [False, True, True, False, True]
    assert components.best([1, 2], torch.ones(5), -scores).tolist() == [True, False, False, True, True]
    assert components.best([1, 2], torch.ones(5)).tolist() == [True, False, True, True, False]
