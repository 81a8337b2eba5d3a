"""A selection applied to a live model, its optimizer and its scheduler."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.optim import lr_scheduler
from transformers import get_cosine_schedule_with_warmup, get_wsd_schedule, optimization

from diffora_trainer.adapters.grid import AdapterGrid
from diffora_trainer.adapters.optimizer import remove_from_optimizer, sort_parameters
from diffora_trainer.adapters.pruning import apply_selection
from diffora_trainer.core.selection import Selection
from helpers.adapted import adapted_names, logits, lora_layers, random_selection, randomize
from helpers.models import llama
from helpers.tiny_model import TinyModel


def make(**options: Any) -> tuple[TinyModel, Any, Selection]:
    tiny = llama()
    torch.manual_seed(1)
    config = LoraConfig(**{"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options})
    model = get_peft_model(tiny.model, config).eval()
    randomize(model)
    return tiny, model, random_selection(AdapterGrid.from_model(model).grid)


def lora(model: nn.Module, name: str) -> tuple[nn.Parameter, nn.Parameter]:
    layer: Any = model.get_submodule(f"base_model.model.{name}")
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


def test_another_models_selection_is_refused() -> None:
    _, model, selection = make()
    _, attention, _ = make(target_modules=["q_proj", "v_proj"])
    before = {name: value.clone() for name, value in attention.state_dict().items()}
    with pytest.raises(ValueError, match=r"10 of its modules have no LoRA.*down_proj.* 0 LoRA modules.*\(none\)"):
        apply_selection(attention, selection)
    assert all(before[name].equal(value) for name, value in attention.state_dict().items())
    apply_selection(model, selection)
    with pytest.raises(ValueError, match="7 of its modules have no LoRA"):  # a second time
        apply_selection(model, selection)


def test_a_merged_adapter_is_not_pruned() -> None:
    _, model, selection = make()
    model.merge_adapter()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="merged into model.layers.0.*unmerge_adapter"):
        apply_selection(model, selection)
    assert all(before[name].equal(value) for name, value in model.state_dict().items())


def test_survivors_keep_weights_and_moments_and_go_on_training() -> None:
    for fold in (True, False):
        tiny, model, selection = make()
        if not fold:
            selection = dataclasses.replace(selection, factors=())
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
        model(**tiny.batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        pairs = {name: lora(model, name) for name in selection.modules}
        values = {name: [p.detach().clone() for p in pair] for name, pair in pairs.items()}
        moments = {p: optimizer.state[p]["exp_avg"].clone() for pair in pairs.values() for p in pair}
        dropped = [p for name in selection.dropped for p in pairs[name]]
        base = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" not in n}

        apply_selection(model, selection, optimizer)
        factors = dict(zip(selection.modules, selection.factors, strict=True))
        for name in selection.selected:
            a, b = lora(model, name)
            assert a is pairs[name][0] and b is pairs[name][1]
            assert a.equal(values[name][0]) and b.equal(values[name][1] * factors[name])
            assert (factors[name] != 1.0) == fold
            assert optimizer.state[a]["exp_avg"].equal(moments[a])
        survivors = {p for name in selection.selected for p in pairs[name]}
        assert set(optimizer.param_groups[0]["params"]) == survivors == set(optimizer.state)
        assert survivors == {p for p in model.parameters() if p.requires_grad}
        assert not survivors & set(dropped)

        model(**tiny.batch).loss.backward()
        old = [p.detach().clone() for p in dropped]
        before = {p: p.detach().clone() for p in survivors}
        optimizer.step()
        assert all(not p.equal(before[p]) and optimizer.state[p]["step"] == 2 for p in survivors)
        assert all(p.equal(value) and p.grad is None for p, value in zip(dropped, old, strict=True))
        after = {n.replace(".base_layer", ""): p for n, p in model.named_parameters() if "lora_" not in n}
        assert all(after[n.replace(".base_layer", "")].equal(value) for n, value in base.items())


def test_a_part_of_the_rank_is_kept_of_the_model_that_was_searched_alone() -> None:
    _, model, selection = make()
    ranks = tuple(min(rank, 2) for rank in selection.ranks)
    selection = dataclasses.replace(selection, ranks=ranks, factors=())
    with pytest.raises(ValueError, match=r"a part of the rank 4, but it has another one here: 8"):
        apply_selection(make(r=8)[1], selection)
    name = selection.selected[0]
    lora_layers(model, "default")[name].lora_A["default"] = nn.Conv2d(16, 4, 1, bias=False)
    with pytest.raises(ValueError, match=f"leaves {name} a lower rank, but only a LoRA of two linear layers"):
        apply_selection(model, selection)
    _, model, _ = make()
    apply_selection(model, selection)
    shapes = {lora(model, name)[0].shape[0] for name in selection.selected}
    assert shapes == {2} and model.peft_config["default"].r == 2 and not model.peft_config["default"].rank_pattern


def test_shared_pairs_are_trained_once_and_saved_as_plain_lora(tmp_path: Path) -> None:
    tiny, model, selection = make()
    o, q = "model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.q_proj"
    ranks = tuple(0 if name in (o, q) else rank for name, rank in zip(selection.modules, selection.ranks, strict=True))
    selection = dataclasses.replace(selection, ranks=ranks, shared=((q, o),))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    leader = [p.detach().clone() for p in lora(model, q)]
    gate = dict(zip(selection.modules, selection.factors, strict=True))[q]
    apply_selection(model, selection, optimizer)
    assert all(a is b for a, b in zip(lora(model, q), lora(model, o), strict=True))
    assert lora(model, o)[0].equal(leader[0]) and lora(model, o)[1].equal(leader[1] * gate)
    params = optimizer.param_groups[0]["params"]
    assert len(params) == len(set(params)) == 2 * len(selection.selected) + 2
    # An optimizer that is built anew has them in this order, and takes saved moments by it.
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(found is expected for found, expected in zip(params, trained, strict=True))
    assert sum(p.numel() for p in params) == selection.trainable_parameters
    model(**tiny.batch).loss.backward()
    optimizer.step()
    assert all(a is b for a, b in zip(lora(model, q), lora(model, o), strict=True))

    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert len(tensors) == 2 * len(selection.adapted)
    assert tensors[f"base_model.model.{o}.lora_B.weight"].equal(lora(model, q)[1])
    loaded = PeftModel.from_pretrained(llama().model, tmp_path).eval()
    assert adapted_names(loaded) == set(selection.adapted)
    assert logits(loaded, tiny).equal(logits(model, tiny))
    assert lora(loaded, q)[0] is not lora(loaded, o)[0]


def test_a_second_adapter_stays_apart() -> None:
    """DPO keeps a frozen copy of the adapter as its reference."""
    tiny, alone, selection = make()
    apply_selection(alone, selection)
    _, model, _ = make()
    model.add_adapter("reference", LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B.reference" in name:
            parameter.data.normal_(0, 0.2)
    model.set_adapter("reference")
    reference = logits(model, tiny)
    model.set_adapter("default")
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    apply_selection(model, selection)
    live = {n.split(".lora_A")[0] for n, _ in model.named_parameters() if "lora_A.default" in n}
    assert live == {f"base_model.model.{name}" for name in selection.selected}
    assert {name for name, p in model.named_parameters() if p.requires_grad} <= trainable
    assert logits(model, tiny).equal(logits(alone, tiny))  # the reference takes no part in it
    model.set_adapter("reference")
    assert logits(model, tiny).equal(reference)


def test_layer_restrictions_are_spelled_out(tmp_path: Path) -> None:
    tiny, model, _ = make(target_modules=["q_proj", "v_proj", "up_proj"], layers_to_transform=[1])
    selection = random_selection(AdapterGrid.from_model(model).grid, count=2)
    apply_selection(model, selection)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama().model, tmp_path).eval()
    assert adapted_names(loaded) == set(selection.selected) and logits(loaded, tiny).equal(logits(model, tiny))


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, [lambda s, k=k: 1 / (1 + k * s) for k in range(4)]),
    "multiplicative": lambda o: lr_scheduler.MultiplicativeLR(o, [lambda s, k=k: 1 - k / 10 for k in range(4)]),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=[0.1, 0.2, 0.3, 0.4], total_steps=20),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, [0.01] * 4, [0.1, 0.2, 0.3, 0.4], 3, cycle_momentum=False),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=20),
    "restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=7),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=8), lr_scheduler.CosineAnnealingLR(o, T_max=12)], [8]
    ),
    "chained": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.LinearLR(o, 0.1, total_iters=8), lr_scheduler.ExponentialLR(o, 0.9)], o
    ),
    "transformers cosine": lambda o: get_cosine_schedule_with_warmup(o, 3, 20),
    "transformers wsd": lambda o: get_wsd_schedule(o, 3, 10, num_stable_steps=7),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=0, min_lr=[0.1, 0.01, 0.001, 0.0001]),
}
if hasattr(optimization, "GreedyLR"):  # newer transformers; it goes back to the first rates from its lowest ones
    SCHEDULERS["greedy"] = lambda o: optimization.GreedyLR(
        o, factor=0.5, patience=0, min_lr=[0.03, 0.06, 0.09, 0.12], reset_start=2
    )
OF_METRICS = ("plateau", "greedy")


@pytest.mark.parametrize("kind", SCHEDULERS)
@pytest.mark.parametrize("gone", [(0,), (1, 2), (0, 3)], ids=str)
def test_schedulers_go_on_when_groups_are_emptied(kind: str, gone: tuple[int, ...]) -> None:
    def trace(cut: bool) -> list[list[float]]:
        groups = [[nn.Parameter(torch.ones(2)) for _ in range(2)] for _ in range(4)]
        optimizer = torch.optim.SGD([{"params": group, "lr": 0.1 * (i + 1)} for i, group in enumerate(groups)], lr=1.0)
        scheduler = SCHEDULERS[kind](optimizer)
        rates = []
        for step in range(16):
            for parameter in (p for group in groups for p in group):
                parameter.grad = torch.ones(2)
            optimizer.step()
            if kind in OF_METRICS:
                scheduler.step(1.0)
            else:
                scheduler.step()
            if cut and step == 4:
                half = [groups[index][0] for index in range(4) if index not in gone]  # they keep their other one
                remove_from_optimizer(optimizer, [*(p for index in gone for p in groups[index]), *half], scheduler)
                assert [len(group["params"]) for group in optimizer.param_groups] == [1] * (4 - len(gone))
            found = [group["lr"] for group in optimizer.param_groups]
            assert kind in OF_METRICS or scheduler.get_last_lr() == found
            rates.append(found)
        if cut:
            scheduler.load_state_dict(scheduler.state_dict())
            assert all(torch.equal(p, torch.ones(2)) is False for g in optimizer.param_groups for p in g["params"])
        return rates

    stock, found = trace(cut=False), trace(cut=True)
    left = [index for index in range(4) if index not in gone]
    assert found == [rates if step < 4 else [rates[i] for i in left] for step, rates in enumerate(stock)]
    assert stock[5:] != [stock[5]] * 11


def test_wrapped_optimizer_and_scheduler() -> None:
    """Accelerate hands out wrappers; the groups and entries to forget are inside."""
    first, second = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    inner = torch.optim.AdamW([{"params": [first], "lr": 0.1}, {"params": [second], "lr": 0.2}])
    scheduler = lr_scheduler.LambdaLR(inner, [lambda step: 0.5**step, lambda step: 0.9**step])
    optimizer, wrapped = Accelerator(cpu=True).prepare(inner, scheduler)
    for parameter in (first, second):
        parameter.grad = torch.ones(2)
    optimizer.step()
    wrapped.step()
    remove_from_optimizer(optimizer, [first], wrapped)
    assert optimizer.param_groups is inner.param_groups and set(inner.state) == {second}
    optimizer.step()
    wrapped.step()
    assert wrapped.get_last_lr() == [pytest.approx(0.2 * 0.81)] and scheduler.base_lrs == [0.2]


def test_lists_beside_the_parameters_of_a_group_go_with_them() -> None:
    """The names of named parameters, and what a user has put beside them; no option, such as `betas`."""
    model = nn.ParameterDict({name: nn.Parameter(torch.ones(2)) for name in "abcd"})
    group = [(name, model[name]) for name in "dbac"]
    sizes, betas = [4.0, 2.0, 1.0, 3.0], [0.5, 0.9]
    optimizer = torch.optim.AdamW([{"params": group, "sizes": sizes, "betas": betas, "kinds": ("x",) * 4}], lr=0.1)
    (found,) = optimizer.param_groups
    remove_from_optimizer(optimizer, [model["b"], model["c"]])
    assert found["param_names"] == ["d", "a"] and found["sizes"] == [4.0, 1.0]
    assert found["params"] == [model["d"], model["a"]]
    sort_parameters(optimizer, model)
    assert found["param_names"] == ["a", "d"] and found["sizes"] == [1.0, 4.0]
    assert found["params"] == [model["a"], model["d"]]
    remove_from_optimizer(optimizer, [model["d"]])
    assert found["param_names"] == ["a"] and found["betas"] == betas


def test_an_optimizer_that_has_only_groups_and_a_state() -> None:
    """As wrappers that are no `torch.optim.Optimizer` may."""
    first, second = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    group = {"params": [first, second], "param_names": ["a", "b"]}
    optimizer: Any = SimpleNamespace(param_groups=[group], state={first: {}, second: {}})
    remove_from_optimizer(optimizer, [first])
    assert group == {"params": [second], "param_names": ["b"]} and optimizer.state == {second: {}}
