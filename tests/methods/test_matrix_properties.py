"""What holds for every relaxation, tried with odd values."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffora_trainer.core.budget import Budget
from diffora_trainer.methods.base import GradientMethod
from diffora_trainer.methods.registry import get_method
from helpers.strategies import FINITE, assert_exact, budgets, vectors


RELAXATIONS = ("diffora", "sampled", "sigmoid", "softmax")


@pytest.mark.parametrize("relaxation", RELAXATIONS)
@settings(max_examples=60)
@given(data=st.data())
def test_a_relaxation_stays_within_bounds_and_goes_on_from_its_state(relaxation: str, data: st.DataObject) -> None:
    budget = data.draw(budgets())
    rate = data.draw(st.sampled_from([None, 1.0] + ([1000.0] if relaxation != "diffora" else [1e-6])))
    seed = data.draw(st.integers(0, 2**32 - 1))
    sizes = FINITE | st.floats(-1, 1, width=32)
    gradients = [vectors(data.draw, len(budget), sizes) for _ in range(data.draw(st.integers(0, 6)))]

    def make() -> GradientMethod:
        return get_method(relaxation)(budget, rate, seed)

    def look(matrix: GradientMethod) -> list[torch.Tensor]:
        gates = (matrix.values(), matrix.search_gates(), matrix.training_gates(), matrix.evaluation_gates())
        seen = [gate for gate in gates if gate is not None]
        assert all(torch.isfinite(gate).all() and gate.min() >= 0 and gate.max() <= 1 for gate in seen)
        assert 0 <= matrix.entropy() <= 1
        assert_exact(budget, matrix.discretize())
        return [*seen, matrix.discretize()]

    matrix, half = make(), len(gradients) // 2
    for gradient in gradients[:half]:
        matrix.step(gradient)
        look(matrix)
    resumed = make()
    resumed.load_state_dict(matrix.state_dict())
    for gradient in [None, *gradients[half:]]:
        if gradient is not None:
            matrix.step(gradient)
            resumed.step(gradient)
        assert all(a.equal(b) for a, b in zip(look(matrix), look(resumed), strict=True))


def test_a_softmax_of_rows_far_apart_is_finite() -> None:
    """One row is decided with logits so large that those of the other vanish beside them."""
    matrix = get_method("softmax")(Budget([0, 0, 1, 1], [1] * 4, ratio=0.5), 1000.0)
    matrix.step(torch.tensor([-1.0, 1.0, 0.0, 0.0]))
    assert matrix.values().tolist() == [1.0, 0.0, 0.5, 0.5]
