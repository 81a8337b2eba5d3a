"""Runs that begin with an adapter, an optimizer or data that not every method was made for."""

from __future__ import annotations

import copy
import json
import logging
import math
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import Adafactor

from diffora_trainer import SelectionRun
from helpers.models import bert, llama
from helpers.tiny_model import TinyModel
from helpers.trainers import lora, search_config


ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch).loss


def adapted(tiny: TinyModel, trained: bool = False, **options: Any) -> Any:
    torch.manual_seed(3)
    model = get_peft_model(tiny.model, lora(target_modules=tiny.target_modules, task_type=tiny.task_type, **options))
    for name, weight in model.named_parameters():
        if trained and "lora_B" in name:
            nn.init.normal_(weight, std=0.2)
    return model


def batches_of(tiny: TinyModel) -> list[dict[str, Tensor]]:
    return [{name: value[[i, i + 1]] for name, value in tiny.batch.items()} for i in range(3)]


def weights_of(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def run_of(model: nn.Module, held_out: list[Any], optimizer: Any = None, **search: Any) -> SelectionRun:
    if optimizer is None:
        optimizer = torch.optim.AdamW(weights_of(model), lr=1e-2)
    return SelectionRun(model, optimizer, search_config(selection_ratio=0.5, **search), loss_of, held_out, 12)


def train(run: SelectionRun, batches: list[Any], steps: int = 12) -> None:
    for step in range(steps):
        run.before_step()
        loss_of(run.model, batches[step % len(batches)]).backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
        run.after_step()


def test_beams_of_a_trained_adapter_are_refused() -> None:
    """They begin at half of its rank, and the other half of what it has learned would be gone."""
    tiny = llama()
    run = run_of(adapted(tiny, trained=True), batches_of(tiny), method="beamlora")
    with pytest.raises(ValueError, match="method='beamlora'`, but the adapter of .* was trained before.*'adalora'"):
        run.begin()


@pytest.mark.parametrize("method", ["prilora", "eva", "beamlora"])
def test_components_that_cancel_out_are_not_told_apart(method: str) -> None:
    """A new LoRA would begin with a part of them, and the model with another function."""
    tiny, at = llama(), 8 if method == "beamlora" else 0
    model = adapted(tiny, init_lora_weights="orthogonal", r=8)
    expected = "does not start at zero" if method == "beamlora" else "cancel each other out.*'module'"
    with pytest.raises(ValueError, match=expected):
        run_of(model, batches_of(tiny), method=method, discretize_at=at).begin()
    model = adapted(llama(), init_lora_weights="orthogonal", r=8)
    whole = {"method": "prilora" if method == "beamlora" else method, "selection_granularity": "module"}
    run = run_of(model, batches_of(tiny), discretize_at=at, **whole)
    train(run, batches_of(tiny))
    assert run.selection is not None


@pytest.mark.parametrize("position", ["first", "last", "auto", "mean"])
def test_texts_that_begin_and_end_alike_have_a_dimension(position: str) -> None:
    """The state in front of the first layer is the same one in all rows then: one point."""
    for tiny in (bert(), llama()):
        if tiny.task_type == "CAUSAL_LM":
            tiny.batch["input_ids"][:, -1] = 2
            tiny.batch["attention_mask"][:] = 1
        run = run_of(adapted(tiny), batches_of(tiny), method="gelora", method_options={"position": position})
        train(run, batches_of(tiny))
        assert run.selection is not None


@pytest.mark.parametrize("method", ["alpha_test", "alora", "snip", "diffora"])
def test_a_held_out_batch_without_labels_is_left_out(method: str) -> None:
    tiny = llama()
    batches = batches_of(tiny)
    unlabelled = {**batches[2], "labels": torch.full_like(batches[2]["labels"], -100)}
    options = {"score_batches": 8} if method in ("alora", "alpha_test") else {}
    chosen = []
    for held_out in ([batches[0], batches[1]], [batches[0], batches[1], unlabelled]):
        run = run_of(adapted(llama()), held_out, method=method, method_options=options)
        train(run, batches)
        assert run.selection is not None
        chosen.append(run.selection.scores)
    if method in ("alpha_test", "alora"):  # the same score as without that batch
        assert chosen[0] == pytest.approx(chosen[1], abs=1e-5)


def with_one_unlabelled(tiny: TinyModel) -> list[dict[str, Tensor]]:
    first, second, third = batches_of(tiny)
    return [first, {**second, "labels": torch.full_like(second["labels"], -100)}, third]


@pytest.mark.parametrize("method", ["snip", "diffora"])
def test_the_loss_around_the_choice_is_that_of_the_batches_with_labels(method: str) -> None:
    tiny = llama()
    held_out = with_one_unlabelled(tiny)
    run = run_of(adapted(tiny), held_out, method=method)
    train(run, batches_of(tiny), 7)
    search = run.search
    assert search.held_out_loss(held_out) == pytest.approx(search.held_out_loss([held_out[0], held_out[2]]))
    assert math.isnan(search.held_out_loss(held_out[1:2]))
    train(run, batches_of(tiny), 1)
    report = run.metrics()
    assert run.selection is not None and math.isfinite(report["diffora/gap"])
    expected = float(search.held_out_losses([held_out[0], held_out[2]]).mean())
    assert expected in [pytest.approx(value) for name, value in report.items() if "after" in name]


def test_a_plateau_is_looked_for_on_the_batches_with_labels_also_in_a_resumed_run() -> None:
    def begun() -> SelectionRun:
        model = adapted(llama())
        return run_of(model, with_one_unlabelled(llama()), selection_granularity="rank", selection_scope="model")

    tiny, whole, resumed = llama(), begun(), begun()
    train(whole, batches_of(tiny), 6)
    early = whole.search.early_losses
    assert [math.isfinite(loss) for loss in early] == [True, False, True]
    state = json.loads(json.dumps(whole.state().to_dict(), allow_nan=False))
    resumed.load_state_dict({"run": state, "method": whole.state_dict()["method"]})
    resumed.model.load_state_dict(whole.model.state_dict())
    resumed.optimizer.load_state_dict(copy.deepcopy(whole.optimizer.state_dict()))
    assert resumed.search.early_losses == pytest.approx(early, abs=0, nan_ok=True)
    for run in (whole, resumed):
        train(run, batches_of(tiny), 6)
        assert run.search.progress is not None and run.search.progress[0] == pytest.approx((early[0] + early[2]) / 2)
    assert whole.selection == resumed.selection


def test_gates_that_can_only_close_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    tiny, batches = llama(), batches_of(llama())

    def warned(lr: float, warmup: bool = False, **options: Any) -> bool:
        caplog.clear()
        model = adapted(llama())
        optimizer = torch.optim.AdamW(weights_of(model), lr=lr)
        if warmup:  # the first step has a learning rate of 0
            torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 3))
        with caplog.at_level(logging.WARNING, logger="diffora_trainer"):
            run_of(model, batches, optimizer, method="sora", method_options=options).begin()
        return "all gates can be 0 before the choice" in caplog.text

    assert tiny.batch and not warned(1e-2) and not warned(1e-4)
    assert warned(1e-2, threshold=0.2) and not warned(1e-2, threshold=0.2, gate_learning_rate=0.5)
    assert warned(1e-2, warmup=True, threshold=0.2) and not warned(0.5, warmup=True, threshold=0.2)


@pytest.mark.parametrize("first", ["head", "lora"])
def test_gates_have_the_learning_rate_of_the_lora(first: str) -> None:
    """And not that of whatever group of the optimizer comes first."""
    tiny = bert()
    model = adapted(tiny)
    parts = {
        name: [p for n, p in model.named_parameters() if p.requires_grad and ("lora_" in n) == (name == "lora")]
        for name in ("head", "lora")
    }
    assert all(parts.values())
    groups = [{"params": parts[name], "lr": 1e-2 if name == "lora" else 1e-6} for name in sorted(parts)]
    optimizer = torch.optim.AdamW(groups if first == "head" else groups[::-1])
    run = run_of(model, batches_of(tiny), optimizer, method="sora")
    train(run, batches_of(tiny), steps=6)
    gates = torch.cat(run.search.method.component_gates())
    assert gates.max() - gates.min() > 1e-2


@pytest.mark.parametrize("search", [{"method": "sora"}, {"method": "beamlora"}, {"arch_order": 2}], ids=str)
def test_optimizer_without_a_learning_rate_is_refused(search: dict[str, Any]) -> None:
    tiny = llama()
    model = adapted(tiny)
    optimizer = Adafactor(weights_of(model), lr=None, relative_step=True, warmup_init=True)
    with pytest.raises(ValueError, match="Adafactor.*no learning rate.*`(gate_learning_rate|arch_order=2)`"):
        run_of(model, batches_of(tiny), optimizer, **search).begin()
    if search.get("method") == "sora":
        run = run_of(model, batches_of(tiny), optimizer, method="sora", method_options={"gate_learning_rate": 1e-2})
        train(run, batches_of(tiny))
        assert run.selection is not None


def test_lbfgs_is_refused() -> None:
    tiny = llama()
    model = adapted(tiny)
    with pytest.raises(ValueError, match="`LBFGS`.*one vector"):
        run_of(model, batches_of(tiny), torch.optim.LBFGS(weights_of(model)))


class Packed(Tensor):
    """A state of the shape of its weight that is more than its numbers, as those of 8-bit optimizers are."""


class PackedMomentum(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["packed"] = torch.zeros_like(weight).as_subclass(Packed)
                assert type(state["packed"]) is Packed
                state["packed"].mul_(0.9).add_(weight.grad)
                weight.data.add_(state["packed"].as_subclass(Tensor), alpha=-group["lr"])


def test_states_of_a_class_of_their_own_begin_anew() -> None:
    tiny = llama()
    model = adapted(tiny)
    optimizer = PackedMomentum(weights_of(model), lr=1e-2)
    run = run_of(model, batches_of(tiny), optimizer, method="adalora")
    train(run, batches_of(tiny))
    assert run.selection is not None and any(0 < rank < 4 for rank in run.selection.ranks)


@pytest.mark.parametrize(
    ("names", "options", "reason"),
    [
        (["q_proj"], {"selection_ratio": 0.3}, "all 2 modules, since at least one of each layer is kept."),
        (["q_proj"], {"selection_ratio": 0.5}, "all 2 modules, since each layer has one module."),
        (
            ATTENTION,
            {"selection_ratio": 0.9},
            "all 8 modules, since 0.9 of them is rounded to whole modules in each la",
        ),
        (["q_proj"], {"selection_ratio": 0.9, "selection_scope": "model"}, "since 0.9 of them is rounded to whole mo"),
        (["q_proj"], {"max_trainable_parameters": 10**6}, "all 2 modules."),
        (["q_proj"], {"selection_ratio": 0.9, "method": "adalora"}, None),
        (ATTENTION, {"selection_ratio": 0.95, "method": "adalora"}, None),
        (ATTENTION, {"max_trainable_parameters": 10**6, "method": "adalora"}, "all 8 modules."),
    ],
)
def test_why_there_is_nothing_to_choose(
    names: list[str], options: dict[str, Any], reason: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    tiny = llama()
    model = get_peft_model(tiny.model, lora(r=4, target_modules=names, task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW(weights_of(model), lr=1e-2)
    run = SelectionRun(model, optimizer, search_config(**options), loss_of, batches_of(tiny), 12)
    with caplog.at_level(logging.WARNING, logger="diffora_trainer"):
        run.begin()
    (line, *_) = [record.getMessage() for record in caplog.records if "nothing to choose" in record.msg] or [""]
    assert ("There is nothing to choose" in line) == (reason is not None)
    by_layer = "max_trainable_parameters" not in options and options.get("selection_scope") != "model"
    assert ("selection_scope='model'" in line) == (reason is not None and by_layer)
    train(run, batches_of(tiny))
    assert run.selection is not None
    (note, *_) = [note for note in run.selection.notes if "nothing to choose" in note] or [""]
    assert bool(note) == (reason is not None) and (reason or "").removesuffix(".") in note
    assert reason is None or reason.removesuffix(".") in line
    assert all(run.selection.kept) or reason is None
    assert reason is not None or run.selection.in_ranks  # components go
