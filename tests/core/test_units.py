"""What is kept or pruned together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel

from diffora_trainer import DiffoRAConfig
from diffora_trainer.core.budget import Budget
from diffora_trainer.core.costs import Ceiling
from diffora_trainer.core.grid import LORA, Grid
from diffora_trainer.core.units import find_units
from diffora_trainer.methods.build import scope_of
from helpers.trainers import causal_model, make_trainer


LLAMA = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
LLAMA += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
BERT = ["attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"]
BERT += ["intermediate.dense", "output.dense"]


def grid(kinds: list[str], *others: str, layers: int = 2) -> Grid:
    names = [f"model.layers.{layer}.{kind}" for layer in range(layers) for kind in kinds]
    return Grid.arrange([(name, 8, 10, LORA) for name in [*names, *others]])


def units(found: Grid, unit: str, groups: Any = None) -> list[list[str]]:
    numbers = find_units(found, unit, groups)
    return [
        [n for n, number in zip(found.names, numbers, strict=True) if number == one] for one in range(max(numbers) + 1)
    ]


def test_what_is_computed_as_one_is_a_group() -> None:
    sizes = {tuple(len(unit) for unit in units(grid(LLAMA), "group"))}
    assert sizes == {(3, 1, 2, 1, 3, 1, 2, 1)}
    assert units(grid(LLAMA), "group")[0] == [f"model.layers.0.{name}" for name in LLAMA[:3]]
    assert [len(unit) for unit in units(grid(BERT, "pooler.dense"), "group")] == [3, 1, 1, 1] * 2 + [1]
    # Two attentions of one layer are two groups, and so are the experts of a mixture.
    two = [f"layer.{attention}.{name}" for attention in ("First", "Second") for name in ("q", "k", "v", "o")]
    assert [len(unit) for unit in units(grid(two, layers=1), "group")] == [3, 1, 3, 1]
    experts = [f"mlp.experts.{n}.{name}" for n in range(2) for name in ("gate_proj", "up_proj", "down_proj")]
    assert sorted(len(unit) for unit in units(grid(experts, layers=1), "group")) == [1, 1, 2, 2]


@pytest.mark.parametrize(
    ("parent", "query", "others"),
    [
        ("encoder_attn.", "q_proj", ["k_proj", "v_proj"]),
        ("layer.1.EncDecAttention.", "q", ["k", "v"]),
        ("crossattention.self.", "query", ["key", "value"]),
    ],
)
def test_the_query_of_a_cross_attention_reads_other_states(parent: str, query: str, others: list[str]) -> None:
    found = units(grid([f"{parent}{name}" for name in (query, *others)], layers=1), "group")
    assert found == [[f"model.layers.0.{parent}{query}"], [f"model.layers.0.{parent}{name}" for name in others]]
    own = {"attention": [query, *others]}
    assert [len(unit) for unit in units(grid([f"{parent}{name}" for name in (query, *others)]), "group", own)] == [
        3,
        3,
    ]


def test_groups_of_one_s_own_and_layers() -> None:
    own = {"attention": ["q_proj", "k_proj", "v_proj", "o_proj"], "mlp": ["mlp.gate_proj", "mlp.down_proj"]}
    assert [len(unit) for unit in units(grid(LLAMA), "group", own)] == [4, 2, 1] * 2
    assert [len(unit) for unit in units(grid(LLAMA, "lm_head"), "layer")] == [7, 7, 1]
    assert [len(unit) for unit in units(grid(LLAMA), "module")] == [1] * 14
    across = {"all": ["self_attn.o_proj", "mlp.down_proj"]}  # of one layer
    assert [len(unit) for unit in units(grid(LLAMA), "group", across)] == [1, 1, 1, 2, 1, 1] * 2
    with pytest.raises(ValueError, match="'selection_groups' with q_projs|`selection_groups` with q_projs.*down_proj"):
        find_units(grid(LLAMA), "group", {"attention": ["q_projs"]})
    with pytest.raises(ValueError, match="layers.0.self_attn.q_proj' belongs to 'a' and to 'b'"):
        find_units(grid(LLAMA), "group", {"a": ["q_proj"], "b": ["self_attn.q_proj"]})


def test_a_unit_is_kept_or_pruned_as_one_by_its_mean() -> None:
    rows, unit = [0] * 4 + [1] * 4, [0, 0, 0, 1, 2, 2, 2, 3]
    scores = torch.tensor([9.0, 0, 0, 4, 6, 6, 6, 1])
    budget = Budget(rows, [10] * 8, ratio=0.5, scope="model", units=unit)
    assert budget.discretize(scores).tolist() == [False] * 3 + [True] * 1 + [True] * 3 + [False]  # 6, 4, and 3 no more
    capped = Budget(rows, [10] * 8, cap=39, units=unit)
    assert capped.discretize(scores).nonzero().flatten().tolist() == [4, 5, 6]
    assert capped.linear_oracle(scores).nonzero().flatten().tolist() == [4, 5, 6]
    by_layer = Budget(rows, [10] * 8, ratio=0.25, units=unit)  # one of four: a group of three does not fit
    assert by_layer.discretize(scores).nonzero().flatten().tolist() == [3, 7]
    whole = Budget(rows, [10] * 8, ratio=0.25, units=[0] * 4 + [1] * 4)  # each layer is one unit, and keeps one
    assert whole.discretize(scores).all()
    capped.limit([Ceiling(frozenset([0, 1]), 2)])
    assert capped.discretize(scores).nonzero().flatten().tolist() == [3, 7]
    # Of two ways to stay under a limit one has no room for a whole unit, and is not taken though nothing has a gain.
    layers = Budget(rows, [10] * 8, scope="model", units=[0] * 4 + [1] * 4)
    layers.limit([Ceiling(frozenset([0, 1]), 2), Ceiling(frozenset([1]), 4)])
    for worth in (None, torch.zeros(8)):
        assert layers.discretize(torch.zeros(8), worth=worth).nonzero().flatten().tolist() == [4, 5, 6, 7]
    with pytest.raises(ValueError, match="smallest unit of LoRA modules has 30 parameters"):
        Budget([0] * 3, [10] * 3, cap=20, units=[0] * 3)


def test_a_ratio_beside_a_cap_leaves_room_for_a_unit() -> None:
    rows, layers = [0] * 4 + [1] * 4, [0] * 4 + [1] * 4
    scores = torch.tensor([1.0] * 4 + [2.0] * 4)
    budget = Budget(rows, [10] * 8, ratio=0.25, cap=40, units=layers)  # two modules of eight, and a layer has four
    assert budget.discretize(scores).tolist() == [False] * 4 + [True] * 4
    groups = Budget(rows, [10] * 8, ratio=0.05, cap=40, units=[0, 0, 0, 1, 1, 2, 2, 2])
    assert groups.discretize(scores).nonzero().flatten().tolist() == [3, 4]
    required = Budget(rows, [10] * 8, ratio=0.05, cap=40, required=[i < 3 for i in range(8)], units=[0] * 3 + [1] * 5)
    assert required.discretize(scores).nonzero().flatten().tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="smallest has 4 modules.*room for 3.*`max_step_memory`"):
        budget.limit([Ceiling(frozenset([0, 1]), 3)])


@pytest.mark.parametrize(
    "options",
    [{"selection_unit": "group"}, {"selection_unit": "layer"}, {"selection_unit": "group", "method": "snip"}],
)
def test_a_run_keeps_whole_units(tmp_path, options: dict[str, Any]) -> None:
    trainer = make_trainer(tmp_path, "sft", model=causal_model(), search=options)
    trainer.train()
    selection = trainer.selection
    numbers = find_units(selection.grid, options["selection_unit"])
    fates = {}
    for number, kept in zip(numbers, selection.kept, strict=True):
        fates.setdefault(number, set()).add(kept)
    assert all(len(fate) == 1 for fate in fates.values()) and {True} in fates.values() and {False} in fates.values()
    trainer.save_model()
    loaded = PeftModel.from_pretrained(causal_model(), tmp_path)
    assert {n.split(".lora_A")[0] for n, _ in loaded.named_parameters() if "lora_A" in n} == {
        f"base_model.model.{name}" for name in selection.selected
    }


def test_units_are_checked_when_a_run_is_built(tmp_path) -> None:
    with pytest.raises(ValueError, match="selection_groups.*qq_proj"):
        make_trainer(tmp_path, "sft", search={"selection_unit": "group", "selection_groups": {"a": ["qq_proj"]}})
    assert scope_of(DiffoRAConfig(selection_unit="layer")) == "model"
