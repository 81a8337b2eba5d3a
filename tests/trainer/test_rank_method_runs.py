"""Whole runs by methods that give ranks or choose layers: plain adapters, and runs that were interrupted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from diffora_trainer import Selection
from diffora_trainer.adapters.base import find_sites
from helpers.adapted import logits, lora_layers
from helpers.checks import assert_continues
from helpers.data import classification_dataset
from helpers.marks import mostly_slow
from helpers.models import llama_classifier
from helpers.trainers import CUT, VOCABULARY, causal_model, classifier, lora, make_trainer, saving_trainer


METHODS: dict[str, dict[str, Any]] = {
    "adalora": {"score_batches": 2},
    "prilora": {"score_batches": 1},
    "gelora": {"score_batches": 6},
    "eva": {"score_batches": 1},
    "alora": {"score_batches": 1},
    "sora": {"method_options": {"gate_learning_rate": 0.1}},
    "beamlora": {
        "selection_ratio": 0.5,
        "method_options": {"beam_every": 4, "top_p": 0.5, "gate_learning_rate": 0.02},
    },
    "cka": {"score_batches": 6},
    "aletheia": {"score_batches": 1},
}
RANKS = ("adalora", "prilora", "gelora", "eva", "alora", "sora", "beamlora")


@pytest.mark.parametrize("method", mostly_slow(METHODS, "sora", "beamlora", "prilora"))
def test_run_is_plain_peft_and_goes_on_where_it_stopped(method: str, tmp_path: Path) -> None:
    search = {"method": method, "selection_ratio": 0.3, "arch_split": 0.5, **METHODS[method]}
    rows = classification_dataset(24)
    whole = saving_trainer(tmp_path / "whole", "cls", 2, search=search, rows=rows)
    every = sum(p.numel() for n, p in whole.model.named_parameters() if ".lora_" in n)
    whole.train()
    whole.save_model()
    folder = Path(whole.args.output_dir)
    selection = whole.selection
    assert selection.step == CUT and selection == Selection.load(folder) and len(set(selection.scores)) > 1
    assert selection.in_ranks == (method in RANKS)
    left = sum(p.numel() for n, p in whole.model.named_parameters() if ".lora_" in n)
    budget = search["selection_ratio"] * every
    assert left == selection.trainable_parameters and (method not in RANKS or left <= budget)
    if method in RANKS:
        assert budget - left < min(site.cost for site in selection.grid.sites)
    assert set(lora_layers(whole.model, "default")) == set(selection.selected)
    optimized = {p for group in whole.optimizer.param_groups for p in group["params"]}
    assert {p for n, p in whole.model.named_parameters() if ".lora_" in n} <= optimized

    tiny = classifier()
    expected = logits(whole.model.eval(), tiny)
    reloaded = PeftModel.from_pretrained(classifier().model, str(folder)).eval()
    torch.testing.assert_close(logits(reloaded, tiny), expected, atol=1e-6, rtol=1e-6)
    sites: Any = find_sites(reloaded, "default")
    kept = {name: rank for name, rank in zip(selection.modules, selection.ranks, strict=True) if rank}
    assert {name: site.rank for name, site in sites.items()} == kept
    card = (folder / "README.md").read_text()
    assert "huggingface.co/papers" in card and "eprint" in card and f"`{method}`" in card

    for step in (5, CUT, 10):
        resumed = saving_trainer(tmp_path / str(step), "cls", 2, search=search, rows=rows)
        resumed.train(resume_from_checkpoint=f"{folder}/checkpoint-{step}")
        assert_continues(resumed, whole, step)


def test_orthogonal_start_of_odd_ranks_is_loaded_and_resumed(tmp_path: Path) -> None:
    """PEFT makes none of an odd rank, and makes it before it loads what was saved."""
    options = {"search": {"method": "adalora", "selection_ratio": 0.4, "score_batches": 1}}

    def trainer(folder: str) -> Any:
        return saving_trainer(tmp_path / folder, "sft", peft_config=lora(init_lora_weights="orthogonal"), **options)

    whole = trainer("whole")
    whole.train()
    whole.save_model()
    assert {rank % 2 for rank in whole.selection.ranks} == {0, 1}
    batch = {"input_ids": torch.tensor([[3, 4, 5, 6]])}
    reloaded = PeftModel.from_pretrained(causal_model(), whole.args.output_dir).eval()
    with torch.no_grad():
        assert reloaded(**batch).logits.equal(whole.model.eval()(**batch).logits)
    for step in (5, 10):
        resumed = trainer(str(step))
        resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-{step}")
        assert_continues(resumed, whole, step)


@pytest.mark.parametrize(
    "method", mostly_slow(["prilora", "gelora", "eva", "cka", "aletheia", "grad_norm"], "eva", "aletheia")
)
def test_choice_before_the_first_step(method: str, tmp_path: Path) -> None:
    """A start: the run is one of a smaller LoRA from its first step on."""
    search = {
        "method": method,
        "selection_ratio": 0.3,
        "selection_scope": "model",
        "discretize_at": 0,
        "score_batches": 2,
    }
    trainer = saving_trainer(tmp_path, "llama", search=search)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if "lora_A" in n}
    trainer.train()
    trainer.save_model()
    selection = trainer.selection
    assert selection.step == 0 and len(set(selection.scores)) > 1
    state = json.loads((Path(trainer.args.output_dir) / "checkpoint-2" / "diffora_state.json").read_text())
    assert state["selection"] is not None and before
    reloaded = PeftModel.from_pretrained(llama_classifier(VOCABULARY).model, str(tmp_path)).eval()
    tiny = classifier("llama")
    torch.testing.assert_close(logits(reloaded, tiny), logits(trainer.model.eval(), tiny), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("method", ["gelora", "cka"])
def test_rows_in_one_have_the_scores_of_padded_ones(method: str, tmp_path: Path) -> None:
    scores = []
    for args in ({}, {"padding_free": True, "max_length": None}):
        search = {"method": method, "discretize_at": 0, "score_batches": 3, "arch_split": 0.5}
        trainer = make_trainer(tmp_path, "sft", args={"max_steps": 2, **args}, search=search)
        trainer.train()
        scores.append(trainer.selection.scores)
    assert len(set(scores[0])) > 1 and scores[1] == pytest.approx(scores[0], rel=1e-3)
