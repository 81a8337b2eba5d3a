"""Runs of adapters beside plain LoRA: chosen, saved as plain PEFT loads them, and resumed bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from diffora_trainer import Selection
from diffora_trainer.adapters.base import find_sites
from helpers.adapted import VERA_TARGETS, base_weights
from helpers.checks import assert_continues
from helpers.marks import mostly_slow
from helpers.trainers import SAVES, adapter_config, causal_model, lora, make_trainer, saving_trainer


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "DoRA": ({"use_dora": True}, {"fade_out": 2}),
    "DoRA under gates": ({"use_dora": True}, {"method": "sigmoid"}),
    "embeddings": ({"target_modules": ["embed_tokens", "q_proj", "up_proj"]}, {"selection_scope": "model"}),
    "PiSSA": ({"init_lora_weights": "pissa"}, {"fade_out": 2}),
    "OLoRA": ({"init_lora_weights": "olora"}, {"method": "snip", "score_batches": 1}),
    "LoHa": ({"type": "LoHaConfig", "alpha": 8}, {"fade_out": 2}),
    "LoKr": ({"type": "LoKrConfig", "alpha": 8}, {"method": "sampled"}),
    "VeRA": ({"type": "VeraConfig", "target_modules": VERA_TARGETS}, {"selection_scope": "model"}),
    "a pattern for each module": (
        {
            "target_modules": ["q_proj", "v_proj"],
            "alpha_pattern": {f"{layer}.self_attn.{kind}_proj": 3 + layer for layer in (0, 1) for kind in "qv"},
        },
        {"selection_scope": "model", "selection_ratio": 0.25},
    ),
    "rsLoRA in ranks": ({"use_rslora": True}, {"max_trainable_parameters": 2500}),
}


@pytest.mark.parametrize(
    "case", mostly_slow(CASES, "rsLoRA in ranks", "DoRA under gates", "PiSSA", "LoHa", "embeddings")
)
def test_a_run_chooses_saves_and_resumes(case: str, tmp_path: Path) -> None:
    options, search = CASES[case]
    started = "init_lora_weights" in options

    def build(folder: str) -> Any:
        return saving_trainer(tmp_path / folder, "sft", peft_config=adapter_config(**options), search=search)

    pre_trained = base_weights(causal_model())  # before anything is drawn for the run
    whole = build("whole")
    whole.train()
    whole.save_model()
    selection = whole.selection
    assert Selection.load(whole.args.output_dir) == selection
    assert set(find_sites(whole.model, "default")) == set(selection.selected)
    trained = sum(p.numel() for p in whole.model.parameters() if p.requires_grad)
    assert trained == selection.trainable_parameters < sum(selection.parameters)
    for name, weight in base_weights(whole.model).items():
        if not (started and name.removesuffix(".weight") in selection.selected):
            torch.testing.assert_close(weight, pre_trained[name], atol=1e-6 if started else 0, rtol=0)

    loaded = PeftModel.from_pretrained(causal_model(), whole.args.output_dir).eval()
    batch = {"input_ids": torch.arange(3, 15)[None]}
    with torch.no_grad():
        live, found = whole.model.eval()(**batch).logits, loaded(**batch).logits
    torch.testing.assert_close(found, live, atol=1e-5 if started else 0, rtol=0)
    for step in SAVES:
        resumed = build(str(step))
        resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-{step}")
        assert_continues(resumed, whole, step)


@pytest.mark.parametrize("method", ["sampled", "sigmoid"])
def test_what_cannot_hold_a_gate_is_refused_before_training(method: str, tmp_path: Path) -> None:
    config = lora(init_lora_weights="pissa")
    with pytest.raises(ValueError, match=f"`method='{method}'`.*twice its rank.*'fold_gates': False"):
        make_trainer(tmp_path, "sft", peft_config=config, search={"method": method})
    make_trainer(tmp_path, "sft", peft_config=config, search={"method": method, "fold_gates": False}).train()


@pytest.mark.parametrize("options", [{"use_dora": True}, {"init_lora_weights": "olora"}])
def test_an_adapter_of_its_own_weight_is_not_shared(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`weight_sharing='layer'`.*rests on the weight of its own module"):
        make_trainer(tmp_path, "sft", peft_config=lora(**options), search={"weight_sharing": "layer"})


def test_a_checkpoint_of_another_start_is_refused(tmp_path: Path) -> None:
    whole = saving_trainer(tmp_path / "whole", "sft", peft_config=lora(init_lora_weights="pissa"))
    whole.train()
    other = saving_trainer(tmp_path / "other", "sft", peft_config=lora(init_lora_weights="olora"))
    with pytest.raises(ValueError, match="`init_lora_weights` of the LoRA"):
        other.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-{SAVES[0]}")
