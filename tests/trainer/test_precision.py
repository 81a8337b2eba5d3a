"""Half precision: bf16 and fp16 autocast, the loss scaler, models and LoRA weights in bf16, and exact gates."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import Trainer

from diffora_trainer import ArchitectureSearch, DiffoRAConfig, SelectionRun, apply_selection
from diffora_trainer.adapters.gates import Gates, pruned_view
from diffora_trainer.adapters.grid import AdapterGrid
from diffora_trainer.search.bilevel import ArchitectureGradient
from diffora_trainer.search.runtime import Runtime
from helpers.adapted import lora_layers
from helpers.checks import adapter, assert_continues, assert_same, step_logs
from helpers.marks import mostly_slow
from helpers.models import llama
from helpers.options import make_config
from helpers.searches import gradients_of
from helpers.trainers import CUT, WARMUP, causal_model, classifier, lora, make_trainer, saving_trainer, search_config


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CLOSING = 2
TASKS = {"cls": "SEQ_CLS", "sft": "CAUSAL_LM"}


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    return model(**batch).loss


def similarity(first: Tensor, second: Tensor) -> float:
    return float(nn.functional.cosine_similarity(first.float(), second.float(), dim=0))


# Trainers. What the base model is loaded in, the LoRA weights' type, and whether the run is under bf16 autocast.

PRECISIONS = {
    "autocast": (FP32, FP32, True),
    "bf16 model": (BF16, FP32, False),
    "bf16 model, autocast": (BF16, FP32, True),
    "bf16 model and LoRA": (BF16, BF16, False),
    "bf16 model and LoRA, autocast": (BF16, BF16, True),
}


def base_model(task: str, dtype: torch.dtype) -> nn.Module:
    return (causal_model() if task == "sft" else classifier().model).to(dtype)


def half_trainer(folder: Path, task: str, precision: str, **kwargs: Any) -> Trainer:
    dtype, lora_dtype, autocast = PRECISIONS[precision]
    torch.manual_seed(0)
    model = get_peft_model(
        base_model(task, dtype), lora(task_type=TASKS[task]), autocast_adapter_dtype=lora_dtype == FP32
    )
    assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {lora_dtype}
    return saving_trainer(
        folder,
        task,
        model=model,
        peft_config=None,
        args={"bf16": autocast},
        search={"fade_out": CLOSING},
        **kwargs,
    )


def recorded_gradients(patch: pytest.MonkeyPatch) -> list[tuple[Any, dict[str, Tensor], Tensor, Tensor]]:
    """The batch, the weights, the gates and their gradient at each architecture step from here on."""
    found: list[tuple[Any, dict[str, Tensor], Tensor, Tensor]] = []
    plain = ArchitectureGradient._gradients

    def gradients(self: ArchitectureSearch, batch: Any, gates: Tensor, weights: Any) -> Any:
        loss, (gradient,) = plain(self, batch, gates, weights)
        found.append((batch, {n: p.detach().clone() for n, p in self.model.named_parameters()}, gates, gradient))
        return loss, [gradient]

    patch.setattr(ArchitectureGradient, "_gradients", gradients)
    return found


def assert_gradients_are_exact(found: list[Any], task: str, dtype: torch.dtype) -> None:
    """They are those of the same weights in float32, but for what half precision makes of the activations."""
    exact = get_peft_model(base_model(task, dtype), lora(task_type=TASKS[task])).float().eval()
    gates = Gates(AdapterGrid.from_model(exact).sites)
    gates.attach()
    for batch, weights, values, gradient in found:
        exact.load_state_dict(weights, strict=False)
        leaf = values.clone().requires_grad_()
        with gates.override(leaf):
            (reference,) = torch.autograd.grad(loss_of(exact, batch), leaf)
        assert gradient.dtype == FP32 and not gradient.equal(gradient.bfloat16().float())
        assert similarity(gradient, reference) > 0.999
        assert float(gradient.norm()) == pytest.approx(float(reference.norm()), rel=0.03)


@pytest.mark.parametrize(
    ("task", "precision"),
    mostly_slow(
        [
            ("cls", "autocast"),
            ("sft", "autocast"),
            ("sft", "bf16 model"),
            ("cls", "bf16 model, autocast"),
            ("cls", "bf16 model and LoRA"),
            ("sft", "bf16 model and LoRA, autocast"),
        ],
        *(("cls", "autocast"), ("sft", "bf16 model")),
    ),
)
def test_run_in_bf16(task: str, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dtype, lora_dtype, autocast = PRECISIONS[precision]
    whole = half_trainer(tmp_path / "whole", task, precision)
    with monkeypatch.context() as patch:
        found = recorded_gradients(patch)
        whole.train()
    logs = step_logs(whole)
    assert sorted(logs) == list(range(1, 13)) and len(found) == CUT - CLOSING - WARMUP
    assert all(math.isfinite(log["loss"]) and math.isfinite(log["grad_norm"]) for log in logs.values())
    assert "diffora/gap" in logs[CUT] and whole.selection.step == CUT
    assert {p.dtype for n, p in whole.model.named_parameters() if "lora_" in n} == {lora_dtype}
    assert_gradients_are_exact(found, task, dtype)

    # After the cut it is the stock model, whose loss and gradient under the same autocast are equal bit for bit.
    whole.save_model(tmp_path / "saved")
    stock = PeftModel.from_pretrained(
        base_model(task, dtype), tmp_path / "saved", is_trainable=True, autocast_adapter_dtype=lora_dtype == FP32
    )
    assert_same(adapter(stock), adapter(whole.model))
    results = []
    for model in (whole.model, stock):
        with torch.autocast("cpu", BF16, enabled=autocast):
            loss = loss_of(model.eval(), found[0][0])
        weights = [p for n, p in model.named_parameters() if "lora_" in n]
        results.append([loss.detach(), *torch.autograd.grad(loss, weights)])
    assert_same(*results)

    resumed = half_trainer(tmp_path / "resumed", task, precision)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    assert_continues(resumed, whole, 5)


# Gates


@pytest.mark.parametrize("lora_dtype", ["half", "float32"])
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("autocast", [False, True])
def test_gates_are_exact_in_half_precision(dtype: torch.dtype, lora_dtype: str, autocast: bool) -> None:
    """1 changes nothing, 0 removes the module, and what lies between is the same in both levels of the search."""
    tiny, model = half_llama(dtype, lora_dtype == "float32")
    adapters = AdapterGrid.from_model(model)
    grid, gates = adapters.grid, Gates(adapters.sites)

    def logits() -> Tensor:
        with torch.autocast("cpu", dtype, enabled=autocast):
            return model(**tiny.batch).logits.detach()

    stock = logits()
    kept = [index for index in range(len(grid)) if index % 3]
    with pruned_view(model, adapters.sites, kept):
        cut = logits()
    gates.attach()
    for wants_gradient in (False, True):
        with gates.override(torch.ones(len(grid)).requires_grad_(wants_gradient)):
            assert logits().equal(stock)
        with gates.override(
            torch.tensor([float(index in kept) for index in range(len(grid))]).requires_grad_(wants_gradient)
        ):
            assert logits().equal(cut) and not cut.equal(stock)
    values = torch.linspace(0.1, 0.9, len(grid))
    with gates.override(values):
        relaxed = logits()
    with gates.override(values.requires_grad_()):
        assert logits().equal(relaxed)
    # Exact gates, not gates that were rounded first: 0.3 is 0.30078125 in bf16.
    layer = lora_layers(model, "default")[grid.names[0]].lora_A["default"]
    x = torch.linspace(-1, 1, layer.in_features).to(layer.weight.dtype)
    open_ = layer(x)
    with gates.override(torch.full((len(grid),), 0.3)):
        assert layer(x).equal((open_.double() * torch.tensor(0.3).double()).to(open_.dtype))


def test_gates_that_are_trained_have_exact_gradients_in_half_precision() -> None:
    """They are sums over all tokens, in float32, of a model and a LoRA in bf16."""
    found: list[Tensor] = []
    for dtype in (BF16, FP32):
        tiny, model = half_llama(BF16, False)
        model.to(dtype)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        run = SelectionRun(model, optimizer, search_config(method="sora"), loss_of, [tiny.batch], 12)
        run.search.method.gate_step = lambda gradient, rate: found.append(gradient)  # type: ignore[method-assign]
        while len(found) < (1 if dtype == BF16 else 2):
            run.before_step()
            loss_of(model, tiny.batch).backward()
            run.after_step()
    gradient, reference = found
    assert gradient.dtype == FP32 and not gradient.equal(gradient.bfloat16().float())
    assert similarity(gradient, reference) > 0.999


def wake(model: nn.Module) -> None:
    """Give the LoRA weights as if they had been trained."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.2)


def half_llama(dtype: torch.dtype, float32_lora: bool) -> tuple[Any, Any]:
    tiny = llama()
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(tiny.model.to(dtype), config, autocast_adapter_dtype=float32_lora).eval()
    wake(model)
    return tiny, model


# The loss scaler of fp16. Accelerate refuses fp16 on a CPU, PyTorch does not.


def fp16_loss(model: nn.Module, batch: Any) -> Tensor:
    with torch.autocast("cpu", FP16):
        return model(**batch).loss


def rows(seed: int) -> Iterator[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        ids = torch.randint(3, 64, (4, 12), generator=generator)
        yield {"input_ids": ids, "labels": ids}


def fp16_run(searching: bool) -> tuple[Any, Any, torch.amp.GradScaler, ArchitectureSearch, list[Any]]:
    """A loop without a Trainer, up to before the pruning, with the architecture step in the worst place: between the
    backward pass and the scaler's step. The scale is too high at first."""
    _, model = half_llama(FP32, True)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**22, growth_interval=3)
    search = ArchitectureSearch(
        model, DiffoRAConfig(), loss_fn=fp16_loss, runtime=Runtime(loss_scale=scaler.get_scale)
    )
    search.begin()
    training, held_out = rows(1), rows(2)
    scales = []
    for _ in range(10):
        search.draw_gates()
        scaler.scale(fp16_loss(model, next(training))).backward()
        if searching:
            scales.append((scaler.get_scale(), search.step(next(held_out))))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return model, optimizer, scaler, search, scales


def test_fp16_loop_with_a_scaler(tmp_path: Path) -> None:
    model, optimizer, scaler, search, steps = fp16_run(searching=True)
    _, _, stock_scaler, stock_search, _ = fp16_run(searching=False)
    assert_same(dict(model.named_parameters()), dict(stock_search.model.named_parameters()))
    assert_same(scaler.state_dict(), stock_scaler.state_dict())
    skipped = [scale for scale, loss in steps if loss is None]
    assert 0 < len(skipped) < len(steps) and min(skipped) > max(scale for scale, loss in steps if loss is not None)
    assert search.skipped_steps == len(skipped) and search.method.steps == len(steps) - len(skipped)

    selection = search.finish(10)
    apply_selection(model, selection, optimizer)
    batch = next(rows(3))
    for _ in range(2):
        scaler.scale(fp16_loss(model, batch)).backward()
        before = adapter(model)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert all(not tensor.equal(before[name]) for name, tensor in adapter(model).items())
    model.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(llama().model, tmp_path)
    assert set(lora_layers(reloaded, "default")) == set(selection.selected)
    assert fp16_loss(reloaded.eval(), batch).equal(fp16_loss(model.eval(), batch))


@pytest.mark.parametrize("order", [1, 2])
def test_scaled_gradient_is_the_unscaled_one(order: int) -> None:
    _, model = half_llama(FP32, True)
    batch, train = next(rows(1)), next(rows(2))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaler.scale(fp16_loss(model, train))  # it makes its state with the first loss
    found, config = [], make_config(arch_order=order)
    for loss, scale in ((loss_of, None), (fp16_loss, scaler.get_scale)):
        runtime = Runtime() if scale is None else Runtime(loss_scale=scale)
        search = ArchitectureSearch(model, config, loss_fn=loss, runtime=runtime)
        search.begin()
        seen = gradients_of(search)
        assert search.step(batch, train, 0.1) is not None
        found.append(seen[0])
        if scale is None:
            search.finish()
    exact, half = found
    assert similarity(exact, half) > 0.99
    assert float(half.norm()) == pytest.approx(float(exact.norm()), rel=0.05)
    # Too high a scale: neither the matrix nor the weights nor the scaler notice the step that was too large.
    scaler.update(new_scale=1e30)
    before = search.method.state_dict(), adapter(model), scaler.state_dict()
    assert search.step(batch, train, 0.1) is None and search.skipped_steps == 1
    assert_same((search.method.state_dict(), adapter(model), scaler.state_dict()), before)
    assert search.metrics()["diffora/skipped_steps"] == 1.0


def test_a_look_ahead_in_half_precision_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    message = "`arch_order=2` to a run in half precision"
    config = search_config(arch_order=2)
    for dtype, float32_lora, count in ((FP32, True, 0), (BF16, True, 1), (BF16, False, 1)):
        tiny, model = half_llama(dtype, float32_lora)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        caplog.clear()
        run = SelectionRun(model, optimizer, config, loss_of, [tiny.batch], 12)
        run.before_step(tiny.batch)
        assert caplog.text.count(message) == count
    for dtype, bf16, count in ((FP32, False, 0), (FP32, True, 1), (BF16, True, 1)):
        caplog.clear()
        trainer = make_trainer(
            tmp_path,
            model=base_model("cls", dtype),
            args={"bf16": bf16, "max_steps": 12},
            search={"arch_order": 2},
        )
        trainer.train()
        assert caplog.text.count(message) == count


def test_trainer_in_fp16_hands_its_scaler_to_the_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's fp16 on the CPU: accelerate refuses it there, but only when its `Accelerator` is made."""
    model = get_peft_model(causal_model(), lora(task_type="CAUSAL_LM"))
    wake(model)
    trainer = make_trainer(tmp_path, "sft", model=model, peft_config=None)
    trainer.accelerator.state._mixed_precision = "fp16"
    trainer.accelerator.native_amp = True
    trainer.accelerator.scaler = scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
    found = recorded_gradients(monkeypatch)
    trainer.train()
    assert trainer.optimizer.scaler is scaler and scaler.get_scale() < 2.0**24
    logs = step_logs(trainer)
    finite = [entry for entry in found if entry[-1].isfinite().all()]
    assert 0 < len(finite) < len(found) == CUT - WARMUP
    assert logs[CUT]["diffora/skipped_steps"] == len(found) - len(finite)
    assert_gradients_are_exact(finite, "sft", FP32)
    assert all(math.isfinite(log["loss"]) for log in logs.values())
    assert set(lora_layers(model, "default")) == set(trainer.selection.selected) != set(trainer.selection.modules)
