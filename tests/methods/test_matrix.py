"""The relaxations of the matrix: what each finds under noise, and that its state is complete."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from diffora_trainer import DiffoRAConfig
from diffora_trainer.core.budget import Budget
from diffora_trainer.core.grid import Grid, SiteInfo
from diffora_trainer.methods.base import GradientMethod
from diffora_trainer.methods.build import make_method
from diffora_trainer.methods.frank_wolfe import FrankWolfe
from diffora_trainer.methods.registry import get_method, method_names
from diffora_trainer.methods.sampled import Sampled
from helpers.searches import gain_relaxation


RELAXATIONS = ("diffora", "sampled", "sigmoid", "softmax")


ROWS = [row for row in range(6) for _ in range(6)]
SIZES = [10 + 10 * (index % 3) for index in range(36)]
BUDGETS = {
    "layer": Budget(ROWS, SIZES, ratio=1 / 3),
    "model": Budget(ROWS, SIZES, ratio=1 / 3, scope="model"),
    "cap": Budget(ROWS, SIZES, cap=sum(SIZES) // 3),
}


def planted(seed: int = 0) -> Tensor:
    """Two useful modules in each row, of different use; the others do a little harm or good."""
    generator = torch.Generator().manual_seed(seed)
    gains = 0.05 * torch.randn(36, generator=generator)
    for row in range(6):
        useful = 6 * row + torch.randperm(6, generator=generator)[:2]
        gains[useful] = 0.7 + 0.6 * torch.rand(2, generator=generator)
    return gains


def learn(matrix: GradientMethod, gains: Tensor, steps: int = 40, noise: float = 1.5) -> Iterator[None]:
    """Steps on gradients with noise; each useful module's is drowned in it in any single step."""
    generator = torch.Generator().manual_seed(7)
    for _ in range(steps):
        gates = matrix.search_gates()
        assert gates.shape == gains.shape and gates.min() >= 0 and gates.max() <= 1
        matrix.step(-(gains + noise * torch.randn(len(gains), generator=generator)))
        yield


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
@pytest.mark.parametrize("relaxation", RELAXATIONS)
def test_planted_modules_are_found(relaxation: str, budget: str) -> None:
    found = chance = 0.0
    for seed in range(3):
        rule, gains = BUDGETS[budget], planted(seed)
        matrix = get_method(relaxation)(rule)
        assert matrix.values().shape == (36,) and matrix.values().dtype == torch.float32
        for _ in learn(matrix, gains):
            pass
        best = float(torch.dot(rule.linear_oracle(gains), gains))
        found += float(torch.dot(matrix.discretize().float(), gains)) / best / 3
        generator = torch.Generator().manual_seed(seed)
        for _ in range(20):
            lot = rule.discretize(torch.randn(36, generator=generator)).float()
            chance += float(torch.dot(lot, gains)) / best / 60
    assert chance < 0.4
    assert found > 0.8, found


def test_budget_matrix_stays_in_the_polytope_and_decides() -> None:
    for budget in BUDGETS.values():
        matrix = FrankWolfe(budget)
        before = matrix.entropy()
        for _ in learn(matrix, planted(), noise=1.0):
            values = matrix.values()
            assert values.min() >= 0 and values.max() <= 1
            spent = torch.zeros_like(budget.targets).index_add_(0, budget.group, values.double() * budget.weights)
            assert (spent <= budget.targets * (1 + 1e-5)).all()
        assert matrix.entropy() < 0.8 * before
        # Gates only leave the budget's share if it is worth something: with losses alone all of them fall to zero.
        empty = FrankWolfe(budget)
        for _ in learn(empty, torch.full((36,), -5.0), noise=0.0):
            pass
        assert empty.values().max() < 0.01


def test_first_frank_wolfe_step() -> None:
    budget = Budget([0, 0, 0, 0], [5] * 4, ratio=0.5)
    matrix = FrankWolfe(budget)
    matrix.step(torch.tensor([-4.0, 1.0, -3.0, -2.0]))
    # From 0.5 by 2/3 of the way to the corner (1, 0, 1, 0).
    assert matrix.values().tolist() == pytest.approx([5 / 6, 1 / 6, 5 / 6, 1 / 6])
    longer = FrankWolfe(budget, learning_rate=1.0)
    longer.step(torch.tensor([-4.0, 1.0, -3.0, -2.0]))
    assert longer.values().tolist() == [1.0, 0.0, 1.0, 0.0]
    # Ties at 0 and 1 are decided by the gain, not by the order of the modules.
    last = FrankWolfe(Budget([0] * 4, [5] * 4, ratio=0.75), learning_rate=1.0)
    last.step(torch.tensor([1.0, 0.5, -3.0, -2.0]))
    assert last.values().tolist() == [0.0, 0.0, 1.0, 1.0]
    assert last.discretize().tolist() == [False, True, True, True]


def test_newer_gains_weigh_more() -> None:
    """They are averaged with weights that rise linearly with the step."""
    gradients = torch.tensor([[-4.0, 1.0, -3.0, -2.0], [3.0, -2.0, -1.0, -2.0], [-6.0, -2.0, 2.0, 0.0]])
    matrix = FrankWolfe(Budget([0, 0, 0, 0], [5] * 4, ratio=0.5))
    for gradient in gradients:
        matrix.step(gradient)
    expected = -(gradients[0] + 2 * gradients[1] + 3 * gradients[2]) / 6
    torch.testing.assert_close(matrix.tie_breaker(), expected)
    torch.testing.assert_close(matrix.worth(), expected)
    # From 0.5 to the corners (1, 0, 1, 0), (0, 0, 1, 1) and (1, 1, 0, 0), by 2/3, 1/2 and 2/5 of the way.
    assert matrix.values().tolist() == pytest.approx([0.65, 0.45, 0.55, 0.35])


def test_softmax_is_zero_sum() -> None:
    matrix = get_method("softmax")(Budget([0, 0, 0, 0, 1, 1], [5] * 6, ratio=0.5))
    before = matrix.values()
    for _ in range(10):  # only module 1 wants more
        matrix.step(torch.tensor([0.0, -1.0, 0.0, 0.0, 0.0, 0.0]))
    values = matrix.values()
    assert values[1] > before[1] + 0.05
    assert (values[[0, 2, 3]] < before[[0, 2, 3]]).all() and values[4:].equal(before[4:])
    assert float(values[:4].sum()) == pytest.approx(2.0) and float(values[4:].sum()) == pytest.approx(1.0)


def test_sampled_gates_are_at_the_target_and_share_one_noise_scale() -> None:
    for name, budget in BUDGETS.items():
        matrix = Sampled(budget, seed=3)
        for _ in range(5):
            gates = matrix.search_gates()
            assert set(gates.tolist()) <= {0.0, 1.0}
            if name != "cap":
                assert float(gates.sum()) == 12
        assert not matrix.search_gates().equal(matrix.search_gates())
        for _ in learn(matrix, planted(), steps=5):
            pass
        gates = matrix.evaluation_gates()  # of the kind that the weights train under
        assert gates.equal(matrix.discretize().float()) and not gates.equal(matrix.values())
        plain, scaled = Sampled(budget), Sampled(budget)
        generator = torch.Generator().manual_seed(0)
        for _ in range(20):
            gradient = torch.randn(36, generator=generator) - planted()
            plain.step(gradient)
            scaled.step(1000 * gradient)
        assert torch.allclose(plain.scores(), scaled.scores(), rtol=1e-4, atol=1e-5)
        assert plain.scores().abs().max() > 0.5
        # One common scale: a noisy useless entry must not be blown up to the size of the others.
        lopsided = Sampled(budget)
        for _ in range(5):
            lopsided.step(torch.tensor([-1.0, *[1e-4 * (-1) ** i for i in range(35)]]))
        assert lopsided.scores()[1:].abs().max() < 1e-3 * lopsided.scores()[0]


def test_sets_are_drawn_with_the_probabilities_of_gumbel_top_k() -> None:
    """Of one module a row these are the softmax of the logits."""
    logits = torch.tensor([1.5, 0.5, 0.0, -1.0])
    matrix = Sampled(Budget([row for row in range(1000) for _ in range(4)], [5] * 4000, ratio=0.25))
    matrix.load_state_dict({**matrix.state_dict(), "logits": logits.repeat(1000)})
    drawn = torch.stack([matrix.training_gates().view(1000, 4) for _ in range(4)])
    assert (drawn.sum(-1) == 1).all()
    torch.testing.assert_close(drawn.mean((0, 1)), logits.softmax(0), atol=0.03, rtol=0.0)


def test_logits_are_learned_by_adam_as_in_darts() -> None:
    matrix = get_method("sigmoid")(Budget([0, 0, 0], [5] * 3, ratio=0.5))
    logits = torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.05, betas=(0.5, 0.999))
    for gradient in ([1.0, -2.0, 0.5], [-3.0, -1.0, 0.0], [0.5, 4.0, -1.0]):
        matrix.step(torch.tensor(gradient))
        optimizer.zero_grad()
        torch.sigmoid(logits).backward(torch.tensor(gradient))
        optimizer.step()
    torch.testing.assert_close(matrix.values(), torch.sigmoid(logits.detach()), atol=1e-6, rtol=0.0)


@pytest.mark.parametrize("relaxation", RELAXATIONS)
def test_state_goes_on_bit_for_bit(relaxation: str) -> None:
    budget, gains = BUDGETS["layer"], planted()
    generator = torch.Generator().manual_seed(0)
    gradients = [-gains + torch.randn(36, generator=generator) for _ in range(12)]

    def go_on(matrix: GradientMethod) -> list[Tensor]:
        trace = []
        for gradient in gradients[6:]:
            training = matrix.training_gates()
            trace += [torch.ones(36) if training is None else training, matrix.search_gates()]
            matrix.step(gradient)
            trace += [matrix.values(), matrix.scores(), matrix.discretize()]
        return trace

    original = get_method(relaxation)(budget, seed=1)
    for gradient in gradients[:6]:
        original.training_gates()
        original.step(gradient)
    state = original.state_dict()
    expected = go_on(original)  # must not change the state that was taken
    resumed = get_method(relaxation)(budget, seed=99)
    resumed.load_state_dict(state)
    assert resumed.steps == 6
    assert all(a.equal(b) for a, b in zip(go_on(resumed), expected, strict=True))


def test_foreign_states_are_refused() -> None:
    budget = BUDGETS["layer"]
    matrix = FrankWolfe(budget)
    with pytest.raises(ValueError, match="'logits'.*'diffora' needs.*another method"):
        matrix.load_state_dict(Sampled(budget).state_dict())
    with pytest.raises(ValueError, match=r"\(2,\) numbers.*\(36,\).*another model"):
        matrix.load_state_dict(FrankWolfe(Budget([0, 0], [1, 1])).state_dict())
    assert matrix.values().equal(FrankWolfe(budget).values())
    with pytest.raises(ValueError, match="method='hard'.*'diffora'.*'sampled'"):
        get_method("hard")


def test_a_new_relaxation_is_one_subclass() -> None:
    with gain_relaxation() as kind:
        matrix = get_method("gain")(BUDGETS["model"])
        assert isinstance(matrix, kind)
        gains = planted()
        for _ in learn(matrix, gains, noise=0.1):
            pass
        assert matrix.discretize().equal(gains > 0.5)
        again = get_method("gain")(BUDGETS["model"])
        again.load_state_dict(matrix.state_dict())
        assert again.values().equal(matrix.values()) and again.steps == 40
    assert "gain" not in method_names()


@pytest.mark.parametrize("relaxation", [*RELAXATIONS, "gain"])
def test_the_step_size_is_that_of_the_options(relaxation: str) -> None:
    config = DiffoRAConfig(method=relaxation, method_options={"arch_learning_rate": 0.25}, arch_seed=0)
    with gain_relaxation():
        found, expected = make_method(config, BUDGETS["cap"]), get_method(relaxation)(BUDGETS["cap"], 0.25)
        own = get_method(relaxation)(BUDGETS["cap"])
    for matrix in (found, expected, own):
        for _ in learn(matrix, planted(), steps=3):
            pass
    assert found.values().equal(expected.values()) and not found.values().equal(own.values())


def test_entropy_and_the_view_as_a_matrix() -> None:
    matrix = FrankWolfe(Budget([0, 0, 1, 1], [1] * 4, ratio=0.5), learning_rate=1.0)
    assert matrix.entropy() == pytest.approx(1.0)
    matrix.step(torch.tensor([-1.0, 1.0, 1.0, -1.0]))
    assert matrix.entropy() == pytest.approx(0.0, abs=1e-6)
    places = [("a", 0, 0), ("b", 0, 2), ("c", 1, 0), ("d", 1, 1)]
    grid = Grid(("0", "1"), ("x", "y", "z"), tuple(SiteInfo(*place, rank=1, cost=1) for place in places))
    assert grid.table(matrix.values().tolist()) == [[1.0, None, 0.0], [0.0, 1.0, None]]
