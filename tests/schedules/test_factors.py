"""Schedules of the two factors of a LoRA, in stock trainers, in ours and in a loop."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer, GRPOTrainer, SFTTrainer

from diffora_trainer import AlternateFactors, ChainedLoRA
from helpers.adapted import adapted_names
from helpers.checks import adapter, assert_continues, assert_same
from helpers.data import preference_dataset, tiny_tokenizer
from helpers.marks import mostly_slow
from helpers.models import llama
from helpers.rollouts import rollout_trainer
from helpers.trainers import CUT, SAVES, SaveAt, arguments, causal_model, lora, make_trainer


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


def test_a_model_without_lora_and_an_optimizer_of_one_factor_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="needs a `PeftModel`, got LlamaForCausalLM"):
        make_trainer(tmp_path, "sft", SFTTrainer, callbacks=[AlternateFactors()], peft_config=None).train()
    tiny = llama()
    model = get_peft_model(tiny.model, lora())
    half = torch.optim.SGD([p for n, p in model.named_parameters() if "lora_A" in n], lr=0.1)
    with pytest.raises(ValueError, match="does not hold all of the B factors"):
        AlternateFactors().before_step(model, half, 0)


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
