"""Every tree of modules is a grid."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn

from diffora_trainer import Selection
from diffora_trainer.adapters.grid import AdapterGrid
from helpers.strategies import assert_usable


class Node(nn.Module):
    """A module with children of these names; a leaf is a linear layer of this width."""

    def __init__(self, children: dict[str, Any]) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, nn.Linear(2, child) if isinstance(child, int) else Node(child))


PARTS = st.sampled_from(
    ["0", "1", "12", "layers", "q", "layer0", "other", "{{x}}", "a|b", "ü", "é\n", "../x".replace(".", "")]
)


TREES = st.recursive(
    st.integers(1, 3), lambda inner: st.dictionaries(PARTS, inner, min_size=1, max_size=3), max_leaves=10
).filter(lambda tree: isinstance(tree, dict))


@settings(max_examples=40)
@given(TREES)
def test_every_tree_of_modules_is_a_grid(tree: dict[str, Any]) -> None:
    model = Node(tree)
    linear = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=list(linear)))
    grid = AdapterGrid.from_model(wrapped).grid
    assert sorted(grid.names) == sorted(linear) and len(grid) == len(set(grid.positions)) == len(linear)
    assert list(grid.positions) == sorted(grid.positions)
    for name, (row, column), size in zip(grid.names, grid.positions, grid.parameters, strict=True):
        # The cell says where the module is.
        assert name in (f"{grid.rows[row]}.{grid.columns[column]}", grid.columns[column])
        assert size == 2 * (2 + linear[name].out_features)
    assert {row for row, _ in grid.positions} == set(range(len(grid.rows)))
    assert {column for _, column in grid.positions} == set(range(len(grid.columns)))
    assert AdapterGrid.from_model(wrapped).grid == grid and grid.describe()
    selection = Selection(grid, grid.ranks, (0.0,) * len(grid), (1.0,) * len(grid))
    assert_usable(selection)
