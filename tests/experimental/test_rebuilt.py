"""LoRA-XS and PRoLoRA: trained in a form of their own, saved as plain LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor
from transformers import TrainerControl, TrainerState, TrainingArguments

from diffora_trainer import LoraXS, PRoLoRA
from diffora_trainer.adapters.base import find_sites
from diffora_trainer.adapters.gates import Gates
from diffora_trainer.adapters.grid import AdapterGrid
from helpers.adapted import base_weights, logits
from helpers.checks import assert_continues, assert_same
from helpers.marks import mostly_slow
from helpers.models import llama
from helpers.trainers import SAVES, SaveAt, causal_model, lora, make_trainer


FORMS: dict[str, tuple[Any, int]] = {
    "LoRA-XS": (LoraXS, 16),
    "PRoLoRA": (lambda: PRoLoRA(chunks=4, unshared=1), 0),
    "PRoLoRA without rest": (lambda: PRoLoRA(chunks=2, unshared=0), 0),
}


def is_of_form(name: str, weights: dict[str, Tensor], pre_trained: Tensor) -> bool:
    """Whether saved matrices are what the paper says."""
    a, b = weights["A"], weights["B"]
    if name == "LoRA-XS":
        left, sizes, right = torch.linalg.svd(pre_trained)
        assert torch.allclose(a, sizes[:4, None] * right[:4], atol=1e-5)
        return torch.allclose(left[:, :4] @ left[:, :4].T @ b, b, atol=1e-5)
    chunks, unshared = (4, 1) if name == "PRoLoRA" else (2, 0)
    a_chunks, b_chunks = a[unshared:].chunk(chunks, 1), b[:, unshared:].chunk(chunks, 0)
    stride = max((4 - unshared) // chunks, 1)
    return all(
        torch.equal(a_chunks[i], a_chunks[0].roll(i * stride, 0))
        and torch.equal(b_chunks[i], b_chunks[0].roll(i * stride, 1))
        for i in range(chunks)
    )


@pytest.mark.parametrize("name", mostly_slow(FORMS, "LoRA-XS"))
def test_a_run_chooses_saves_plain_lora_and_resumes(name: str, tmp_path: Path) -> None:
    form, cost = FORMS[name]

    def build(folder: str) -> Any:
        args = {"save_strategy": "steps", "save_steps": 1000}
        callbacks = [SaveAt(), form()]
        return make_trainer(tmp_path / folder, "sft", args=args, callbacks=callbacks, search={"fade_out": 2})

    pre_trained = base_weights(causal_model())  # before anything is drawn for the run
    whole = build("whole")
    trained = sum(p.numel() for p in whole.model.parameters() if p.requires_grad)
    plain = sum(p.numel() for n, p in get_peft_model(causal_model(), lora()).named_parameters() if "lora_" in n)
    assert trained == 14 * cost if cost else trained < 0.55 * plain
    whole = build("whole")
    whole.train()
    whole.save_model()
    selection = whole.selection
    assert sum(selection.parameters) == trained
    assert selection.trainable_parameters == sum(p.numel() for p in whole.model.parameters() if p.requires_grad)
    assert_same(base_weights(whole.model), pre_trained)
    saved = load_file(Path(whole.args.output_dir) / "adapter_model.safetensors")
    assert len(saved) == 2 * len(selection.selected)
    for module in selection.selected:
        weights = {part: saved[f"base_model.model.{module}.lora_{part}.weight"] for part in "AB"}
        assert weights["B"].abs().max() > 1e-3 and is_of_form(name, weights, pre_trained[f"{module}.weight"])

    loaded = PeftModel.from_pretrained(causal_model(), whole.args.output_dir).eval()
    assert set(find_sites(loaded, "default")) == set(selection.selected)
    batch = {"input_ids": torch.arange(3, 15)[None]}
    with torch.no_grad():
        found, live = loaded(**batch).logits, whole.model.eval()(**batch).logits
    torch.testing.assert_close(found, live, atol=1e-5, rtol=1e-5)
    for step in SAVES:
        resumed = build(str(step))
        resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-{step}")
        assert_continues(resumed, whole, step)


@pytest.mark.parametrize("name", FORMS)
def test_gates_and_what_is_folded(name: str) -> None:
    tiny = llama()
    stock = logits(tiny.model.eval(), tiny)
    model = get_peft_model(tiny.model, lora()).eval()
    FORMS[name][0]().attach(model)
    assert_same(logits(model, tiny), stock)
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.2)
    sites = AdapterGrid.from_model(model).sites
    gates = Gates(sites)
    gates.attach()
    with gates.override(torch.zeros(14)):
        torch.testing.assert_close(logits(model, tiny), stock)
    values = torch.linspace(0.1, 0.9, 14)
    with gates.override(values):
        gated = logits(model, tiny)
    gates.detach()
    for site, factor in zip(sites, values.tolist(), strict=True):
        site.fold(factor)
    torch.testing.assert_close(logits(model, tiny), gated, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("saved_in", "loaded_in"),
    [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16), (torch.bfloat16, torch.float32)],
    ids=str,
)
def test_lora_xs_in_half_precision_is_loaded_and_resumed(
    saved_in: torch.dtype, loaded_in: torch.dtype, tmp_path: Path
) -> None:
    def build(dtype: torch.dtype) -> tuple[Any, LoraXS]:
        model = get_peft_model(llama().model.bfloat16().to(dtype), lora(r=8), autocast_adapter_dtype=False)
        (callback := LoraXS()).attach(model)
        return model, callback

    first, callback = build(saved_in)
    torch.manual_seed(1)
    for module in callback.found().values():
        module.core.data.normal_(std=0.05)
    second, other = build(loaded_in)
    set_peft_model_state_dict(second, get_peft_model_state_dict(first))
    for name, module in other.found().items():
        core = callback.found()[name].core
        assert (module.core - core).abs().max() < 0.02 * core.abs().max()

    state = TrainerState(global_step=1, stateful_callbacks={"LoraXS": callback.state()})
    other.on_train_begin(TrainingArguments(str(tmp_path)), state, TrainerControl(), model=second)
    for name, module in other.found().items():
        assert module.core.equal(callback.found()[name].core.to(loaded_in))

    foreign = {name: torch.randn_like(value) for name, value in get_peft_model_state_dict(first).items()}
    with pytest.raises(ValueError, match="not a LoRA-XS of this model"):
        set_peft_model_state_dict(second, foreign)


def test_what_is_no_new_lora_of_this_model_is_refused(tmp_path: Path) -> None:
    def fresh(**options: Any) -> Any:
        return get_peft_model(llama().model, lora(**options))

    for form in (LoraXS, PRoLoRA):
        with pytest.raises(ValueError, match="needs a new one.*init_lora_weights=True"):
            form().attach(fresh(init_lora_weights="pissa"))
        with pytest.raises(ValueError, match="not a plain LoRA of a linear layer"):
            form().attach(fresh(use_dora=True))
        trainer = make_trainer(tmp_path, "sft")
        trainer.add_callback(form())
        with pytest.raises(ValueError, match="in `callbacks` of the constructor"):
            trainer.train()
    with pytest.raises(ValueError, match="has rank 64, but its weight only 16"):
        LoraXS().attach(fresh(r=64, target_modules=["k_proj"]))
    with pytest.raises(ValueError, match="32 inputs, 32 outputs and rank 4, cannot be cut into 3 chunks"):
        PRoLoRA(chunks=3).attach(fresh())
    with pytest.raises(ValueError, match="`chunks=0`"):
        PRoLoRA(chunks=0)
    plain = fresh()
    for name, parameter in plain.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    for form, message in (
        (LoraXS, "not a LoRA-XS of this model.*base model of the run"),
        (PRoLoRA, "not a PRoLoRA of 2"),
    ):
        other = fresh()
        form().attach(other)
        with pytest.raises(ValueError, match=message):
            other.load_state_dict(plain.state_dict())
