"""Schedules of the two factors of a LoRA, in stock trainers, in ours and in a loop."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer, GRPOTrainer, SFTTrainer

from diffora_trainer import AlternateFactors, ChainedLoRA
from diffora_trainer.adapters.base import find_sites
from helpers.adapted import adapted_names, base_weights, logits
from helpers.checks import adapter, assert_continues, assert_same, step_logs
from helpers.data import lm_dataset, preference_dataset, tiny_tokenizer
from helpers.marks import mostly_slow
from helpers.models import llama
from helpers.rollouts import rollout_trainer
from helpers.trainers import CUT, SAVES, SaveAt, arguments, causal_model, classifier, lora, make_trainer


SAVING = {"save_strategy": "steps", "save_steps": 3}


class Moves(TrainerCallback):
    """Which factors each step has moved."""

    def __init__(self) -> None:
        self.found: dict[int, set[str]] = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.before = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        moved = {n for n, p in model.named_parameters() if n in self.before and not p.equal(self.before[n])}
        self.found[state.global_step] = {part for part in "AB" if any(f"lora_{part}." in name for name in moved)}


def test_factors_take_turns_in_a_stock_trainer(tmp_path: Path) -> None:
    moves = Moves()
    callbacks = [AlternateFactors(every=2), moves]
    trainer = make_trainer(
        tmp_path / "whole", "sft", SFTTrainer, callbacks=callbacks, args={**SAVING, "weight_decay": 0.1}
    )
    trainer.train()
    assert moves.found == {step: {"BA"[(step - 1) // 2 % 2]} for step in range(1, 13)}
    assert all(p.requires_grad for n, p in trainer.model.named_parameters() if "lora_" in n)
    state = trainer.optimizer.optimizer.state
    steps = {n: int(state[p]["step"]) for n, p in trainer.model.named_parameters() if p in state}
    assert set(steps.values()) == {6} and len(steps) == 28
    resumed = make_trainer(
        tmp_path / "resumed", "sft", SFTTrainer, callbacks=[AlternateFactors(every=2)], args={"weight_decay": 0.1}
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert_same(adapter(resumed.model), adapter(trainer.model))


def test_gradients_of_zero_do_not_move_the_frozen_factor() -> None:
    """As a loop leaves them that calls `zero_grad(set_to_none=False)`: AdamW would decay it, by its moments too."""
    tiny, schedule = llama(), AlternateFactors(every=2)
    model = get_peft_model(tiny.model, lora(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, weight_decay=0.1)
    for step in range(6):
        schedule.before_step(model, optimizer, step)
        before = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}
        model(**tiny.batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        moved = {name for name, p in model.named_parameters() if name in before and not p.equal(before[name])}
        assert moved == {name for name in before if f"lora_{'BA'[step // 2 % 2]}." in name}, step


class Interrupt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def interrupted(folder: Path, step: int = 4) -> PeftModel:
    """A model whose training was interrupted after this step."""
    callbacks = [AlternateFactors(every=1), Interrupt(step)]
    trainer = make_trainer(folder, "sft", SFTTrainer, callbacks=callbacks)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    return trainer.model


def trainable(model: Any) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("step", [3, 4])  # of `lora_B`, of `lora_A`
def test_factors_are_free_after_an_interruption(step: int, tmp_path: Path) -> None:
    model = interrupted(tmp_path, step)
    whole = {name for name, _ in model.named_parameters() if "lora_" in name}
    model.set_adapter("default")
    assert trainable(model) < whole
    AlternateFactors().finish(copied := copy.deepcopy(model))
    copied.set_adapter("default")
    assert trainable(copied) == whole

    moves = Moves()
    callbacks = [AlternateFactors(every=2), moves]
    trainer = make_trainer(tmp_path, "sft", SFTTrainer, callbacks=callbacks, model=model, peft_config=None)
    assert trainable(model) == whole  # before its optimizer is made
    trainer.train()
    assert moves.found == {step: {"BA"[(step - 1) // 2 % 2]} for step in range(1, 13)}
    model.set_adapter("default")
    assert trainable(model) == whole


def test_a_search_after_an_interruption(tmp_path: Path) -> None:
    model = interrupted(tmp_path)
    with pytest.raises(ValueError, match=r"A part of the LoRA.*interrupted, please call its `finish\(model\)`"):
        make_trainer(tmp_path, "sft", model=copy.deepcopy(model), peft_config=None).train()
    moves = Moves()
    callbacks = [AlternateFactors(every=1), moves]
    make_trainer(tmp_path, "sft", model=model, peft_config=None, callbacks=callbacks).train()
    assert moves.found[2] == moves.found[CUT] == {"A", "B"} and moves.found[CUT + 1] == {"B"}


def with_a_reference(kind: str, folder: Path, callbacks: list[Any]) -> Any:
    """A trainer that switches the adapter off and on within a step, for the reference that it compares with."""
    if kind == "GRPO":
        return rollout_trainer(folder, cls=GRPOTrainer, args={"beta": 0.1, "max_steps": 6}, callbacks=callbacks)
    halves = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "max_steps": 6}
    return DPOTrainer(
        causal_model(),
        args=arguments(folder, DPOConfig, **halves),
        train_dataset=preference_dataset(24),
        processing_class=tiny_tokenizer(),
        peft_config=lora(task_type="CAUSAL_LM"),
        callbacks=callbacks,
    )


@pytest.mark.parametrize("kind", ["DPO", "GRPO"])
def test_factors_take_turns_where_the_adapter_is_switched_off_and_on(kind: str, tmp_path: Path) -> None:
    moves = Moves()
    trainer = with_a_reference(kind, tmp_path, [AlternateFactors(every=2), moves])
    trainer.train()
    assert moves.found == {step: {"BA"[(step - 1) // 2 % 2]} for step in range(1, 7)}
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in trainer.model.named_parameters() if "lora_" in name}
    with trainer.model.disable_adapter():
        copied = copy.deepcopy(trainer.model)
    for model in (trainer.model, copied):  # nothing is left on it that would freeze a factor
        model.set_adapter("default")
        assert {name for name, p in model.named_parameters() if p.requires_grad} == trained


@pytest.mark.parametrize("kind", mostly_slow(["DPO", "GRPO"], "DPO"))
def test_earlier_rounds_stay_where_the_adapter_is_switched_off_and_on(kind: str, tmp_path: Path) -> None:
    moves = Moves()
    trainer = with_a_reference(kind, tmp_path, [ChainedLoRA(every=3, train_a=False), moves])
    trainer.train()  # stops if an earlier round has moved
    assert moves.found == {step: {"B"} for step in range(1, 7)} and trainer.model.peft_config["default"].r == 8


@pytest.mark.parametrize("schedule", [lambda: AlternateFactors(every=1), lambda: ChainedLoRA(every=5)])
def test_a_schedule_begins_after_the_choice(schedule: Any, tmp_path: Path) -> None:
    whole, moves = with_schedule(tmp_path / "whole", schedule())
    whole.train()
    whole.save_model()
    alternating = isinstance(schedule(), AlternateFactors)
    for step, found in moves.found.items():
        expected = {"BA"[(step - 1) % 2]} if alternating and step > CUT else {"A", "B"}
        new = step in ((1,) if alternating else (1, 11))  # `lora_B` is 0, so `lora_A` has no gradient
        assert found == ({"B"} if new else expected), step
    rank = 4 if alternating else 8  # a second round from step 10 on
    assert whole.model.peft_config["default"].r == rank
    assert set(whole.selection.selected) == adapted_names(whole.model)
    for step in SAVES[1:]:
        resumed, _ = with_schedule(tmp_path / str(step), schedule())
        resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-{step}")
        assert_continues(resumed, whole, step)


def with_schedule(folder: Path, schedule: Any) -> tuple[Any, Moves]:
    moves = Moves()
    args = {"save_strategy": "steps", "save_steps": 1000}
    trainer = make_trainer(folder, args=args, callbacks=[SaveAt(), schedule, moves], search={"fade_out": 2})
    return trainer, moves


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
        callbacks = [ChainedLoRA(every=4)]
        config = lora(r=rank)
        return make_trainer(tmp_path / folder, "sft", SFTTrainer, callbacks=callbacks, args=SAVING, peft_config=config)

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


def test_both_schedules_at_once(tmp_path: Path) -> None:
    moves = Moves()
    callbacks = [ChainedLoRA(every=4), AlternateFactors(every=2), moves]
    trainer = make_trainer(tmp_path, "sft", SFTTrainer, callbacks=callbacks)
    trainer.train()
    assert moves.found == {step: {"BA"[(step - 1) // 2 % 2]} for step in range(1, 13)}
    assert trainer.model.peft_config["default"].r == 12


@pytest.mark.parametrize(
    ("schedule", "options", "message"),
    [
        (lambda: ChainedLoRA(every=2, max_rank=20), {}, "grow to rank 24, above `max_rank=20`.*longer rounds"),
        (lambda: ChainedLoRA(every=4), {"args": {"weight_decay": 0.1}}, "weight decay of 0.1.*`weight_decay=0`"),
        (lambda: ChainedLoRA(every=4), {"peft_config": lora(lora_dropout=0.1)}, "dropout.*`lora_dropout=0`"),
        (lambda: ChainedLoRA(every=4), {"peft_config": lora(use_dora=True)}, "cannot grow: only a plain LoRA"),
        (lambda: ChainedLoRA(every=0), {}, "`every=0`.*above 0"),
        (lambda: AlternateFactors(every=True), {}, "`every=True`.*integer"),
    ],
)
def test_what_does_not_go_together_is_refused(
    schedule: Any, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, "sft", SFTTrainer, callbacks=[schedule()], **options).train()


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


def test_a_model_without_lora_and_an_optimizer_of_one_factor_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="needs a `PeftModel`, got LlamaForCausalLM"):
        make_trainer(tmp_path, "sft", SFTTrainer, callbacks=[AlternateFactors()], peft_config=None).train()
    tiny = llama()
    model = get_peft_model(tiny.model, lora())
    half = torch.optim.SGD([p for n, p in model.named_parameters() if "lora_A" in n], lr=0.1)
    with pytest.raises(ValueError, match="does not hold all of the B factors"):
        AlternateFactors().before_step(model, half, 0)


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


def test_modules_that_a_choice_has_frozen_take_no_turn(tmp_path: Path) -> None:
    moves = Moves()
    callbacks = [AlternateFactors(every=2), moves]
    trainer = make_trainer(tmp_path, callbacks=callbacks, search={"unselected": "freeze"})
    trainer.train()
    assert {step: found for step, found in moves.found.items() if step > CUT} == {
        step: {"BA"[(step - 1) // 2 % 2]} for step in range(CUT + 1, 13)
    }
    trained = {name for name, p in trainer.model.named_parameters() if ".lora_" in name and p.requires_grad}
    selected = {name for name in trained if any(f".{module}." in name for module in trainer.selection.selected)}
    assert trainer.selection.frozen and trained == selected != set()
