"""Rounds of LoRA one after the other, in stock trainers, in ours and in a loop."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from trl import SFTTrainer

from diffora_trainer import ChainedLoRA
from diffora_trainer.adapters.base import find_sites
from helpers.adapted import base_weights, logits
from helpers.checks import adapter, assert_continues, assert_same, step_logs
from helpers.data import lm_dataset
from helpers.models import llama
from helpers.trainers import CUT, SAVES, SaveAt, causal_model, classifier, lora, make_trainer


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}], ids=["LoRA", "rsLoRA"])
@pytest.mark.parametrize("train_a", [True, False])
def test_a_chain_is_what_merging_each_round_would_give(train_a: bool, options: dict[str, Any], tmp_path: Path) -> None:
    tiny = llama()
    torch.manual_seed(1)
    config = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM", **options)
    model = get_peft_model(copy.deepcopy(tiny.model), config)
    first = copy.deepcopy(adapter(model))
    base = base_weights(model)
    chain = ChainedLoRA(every=3, train_a=train_a)
    chain.attach(model)
    starts = train(model, tiny, 8, chain)

    # By hand: a new LoRA on a model into which the last one was merged. It starts as the chain started it.
    merged = copy.deepcopy(tiny.model)
    for index in range(3):
        one = get_peft_model(merged, copy.deepcopy(config))
        with torch.no_grad():
            for name, parameter in one.named_parameters():
                if "lora_A" in name:
                    key = name.replace(".default", "")
                    parameter.copy_(starts[key, index] if index else first[key])
                    parameter.requires_grad_(train_a)
        train(one, tiny, min(3, 8 - 3 * index))
        merged = one.merge_and_unload()
    torch.testing.assert_close(logits(model.eval(), tiny), logits(merged.eval(), tiny), atol=5e-5, rtol=1e-4)

    assert_same(base_weights(model), base)
    saved = model.peft_config["default"]
    assert (saved.r, chain._chain.rank) == (6, 6)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(tiny.model), tmp_path).eval()
    assert_same(logits(loaded, tiny), logits(model, tiny))


def train(model: Any, tiny: Any, steps: int, chain: ChainedLoRA | None = None) -> dict[tuple[str, int], Tensor]:
    """Train in a loop; gives `lora_A` of each later round of rank 2 as it started, by name and number."""
    starts = {}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02, weight_decay=0.0)
    model.train()
    for step in range(steps):
        if chain is not None:
            chain.before_step(model, optimizer, step)
            chain.before_step(model, optimizer, step)  # a second call changes nothing
            if step and step % chain.every == 0:
                for name, tensor in adapter(model).items():
                    if "lora_A" in name:
                        starts[name, step // chain.every] = tensor[-2:].clone()
        model(**tiny.batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return starts


def test_each_round_draws_another_lora_a() -> None:
    """Rounds whose `lora_A` is the same frozen one could learn nothing new."""

    def run(seed: int) -> tuple[Any, list[Tensor]]:
        tiny = llama()
        torch.manual_seed(1)
        config = LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[0], task_type="CAUSAL_LM")
        model = get_peft_model(tiny.model, config)
        chain = ChainedLoRA(every=2, train_a=False, seed=seed)
        starts = train(model, tiny, 8, chain)
        (site,) = find_sites(model, "default").values()
        assert len(starts) == 3
        return site, [site.parameters[0].detach()[:2], *starts.values()]

    site, starts = run(0)
    a, b = site.parameters
    assert a.equal(torch.cat(starts)) and torch.linalg.matrix_rank(b @ a) == a.shape[0] == 8
    assert_same(run(0)[1], starts)
    others = run(1)[1]
    assert others[0].equal(starts[0])  # of PEFT
    drawn = [*starts, *others[1:]]
    assert not any(x.equal(y) for index, x in enumerate(drawn) for y in drawn[:index])


@pytest.mark.parametrize("rank", [1, 4])
def test_a_chain_in_a_stock_trainer_is_saved_whole_and_resumed(rank: int, tmp_path: Path) -> None:
    def build(folder: str) -> Any:
        args = {"save_strategy": "steps", "save_steps": 3}
        callbacks = [ChainedLoRA(every=4)]
        config = lora(r=rank)
        return make_trainer(tmp_path / folder, "sft", SFTTrainer, callbacks=callbacks, args=args, peft_config=config)

    whole = build("whole")
    whole.train()
    whole.save_model()
    assert whole.model.peft_config["default"].r == 3 * rank
    assert whole.state.log_history[-2]["loss"] < whole.state.log_history[0]["loss"]
    for step, rounds in {3: 1, 6: 2, 9: 3}.items():
        folder = str(tmp_path / "whole" / f"checkpoint-{step}")
        assert PeftModel.from_pretrained(causal_model(), folder).peft_config["default"].r == rounds * rank
        resumed = build(str(step))
        resumed.train(resume_from_checkpoint=folder)
        assert_same(adapter(resumed.model), adapter(whole.model))
        assert_same(step_logs(resumed, ("num_tokens",))[12], step_logs(whole, ("num_tokens",))[12])
    loaded = PeftModel.from_pretrained(causal_model(), str(tmp_path / "whole")).eval()
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        assert_same(loaded(ids).logits, whole.model.eval()(ids).logits)


def test_a_chain_does_not_load_the_best_model_and_notes_where_it_is(tmp_path: Path) -> None:
    """A checkpoint of an earlier round is an adapter of another rank."""
    args = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "max_steps": 6}
    args |= {"metric_for_best_model": "eval_loss", "greater_is_better": True, "load_best_model_at_end": True}
    rows = lm_dataset(8)

    def build(**overrides: Any) -> Any:
        model = get_peft_model(causal_model(), lora())
        options = {"model": model, "peft_config": None, "eval_dataset": rows, "args": {**args, **overrides}}
        return make_trainer(tmp_path, "sft", SFTTrainer, callbacks=[ChainedLoRA(every=2)], **options)

    with pytest.raises(ValueError, match="`load_best_model_at_end` would load a checkpoint of fewer rounds"):
        build().train()
    trainer = build(load_best_model_at_end=False)
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best == str(tmp_path / "checkpoint-2")  # of one round
    assert PeftModel.from_pretrained(causal_model(), best).peft_config["default"].r == 4
    assert trainer.model.peft_config["default"].r == 12


def test_rank_1_of_rslora_keeps_its_scaling(tmp_path: Path) -> None:
    """There `alpha / r` is `alpha / sqrt(r)`."""
    tiny = llama()
    config = LoraConfig(r=1, lora_alpha=8, target_modules=["q_proj"], task_type="CAUSAL_LM", use_rslora=True)
    model = get_peft_model(copy.deepcopy(tiny.model), config)
    train(model, tiny, 6, ChainedLoRA(every=2))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(tiny.model), tmp_path).eval()
    assert loaded.peft_config["default"].r == 3
    torch.testing.assert_close(logits(loaded, tiny), logits(model.eval(), tiny))


def test_rounds_after_a_choice_of_ranks_have_the_chosen_ranks(tmp_path: Path) -> None:
    """Also where the choice falls between two rounds: at step 8, with rounds from 9 and 12 on."""

    def build(folder: str) -> Any:
        args = {"save_strategy": "steps", "save_steps": 1, "max_steps": 14}
        callbacks = [ChainedLoRA(every=3)]
        search = {"method": "adalora", "selection_ratio": 0.4}
        return make_trainer(tmp_path / folder, args=args, callbacks=callbacks, search=search)

    whole = build("whole")
    whole.train()
    whole.save_model()
    kept = {name: rank for name, rank in zip(whole.selection.modules, whole.selection.ranks, strict=True) if rank}
    assert len(set(kept.values())) > 1 and whole.selection.step == CUT
    for rounds, model in (
        (3, whole.model),
        (3, PeftModel.from_pretrained(classifier().model, whole.args.output_dir)),
        (2, PeftModel.from_pretrained(classifier().model, f"{whole.args.output_dir}/checkpoint-10")),
    ):
        found = {name: site.rank for name, site in find_sites(model, "default").items()}
        assert found == {name: rounds * rank for name, rank in kept.items()}
    for step in (8, 10, 13):
        resumed = build(str(step))
        resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-{step}")
        assert_same(adapter(resumed.model), adapter(whole.model))


@pytest.mark.parametrize(
    ("options", "peft"),
    [
        ({}, {"rank_pattern": {"q_proj": 2}}),
        ({}, {"alpha_pattern": {"q_proj": 3}}),
        ({"shortcuts": ["shortcut1"]}, {}),
    ],
    ids=["rank_pattern", "alpha_pattern", "shortcuts"],
)
def test_a_chain_under_a_search_is_resumed(options: dict[str, Any], peft: dict[str, Any], tmp_path: Path) -> None:
    def build(folder: str) -> Any:
        args = {"save_strategy": "steps", "save_steps": 1000}
        callbacks = [ChainedLoRA(every=4), SaveAt()]
        search = {"fade_out": 0, **options}
        config = lora(lora_dropout=0.0, **peft)
        return make_trainer(tmp_path / folder, args=args, callbacks=callbacks, search=search, peft_config=config)

    whole = build("whole")
    whole.train()
    kinds = {site.kind for site in find_sites(whole.model, "default").values()}
    assert ("shortcuts" in kinds) == ("shortcuts" in options)
    for step in SAVES:  # before the choice, at it and in a later round
        resumed = build(str(step))
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert_continues(resumed, whole, step)


def test_modules_of_a_chain_share_no_matrices(tmp_path: Path) -> None:
    options = {"search": {"weight_sharing": "layer"}, "peft_config": lora(lora_dropout=0.0)}
    with pytest.raises(ValueError, match="`weight_sharing='layer'` with `ChainedLoRA`"):
        make_trainer(tmp_path, callbacks=[ChainedLoRA(every=4)], **options)
