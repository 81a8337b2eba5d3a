"""A training that ends by an exception leaves the model to whoever has it next: what acts is what is saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from transformers import Trainer, TrainerCallback

from diffora_trainer import DiffoRACallback
from diffora_trainer.adapters.gates import gates_active
from helpers.checks import adapter, assert_continues, assert_same
from helpers.data import classification_dataset
from helpers.trainers import classifier, lora, make_trainer, saving_trainer, search_config


EVALUATION = classification_dataset(8, seed=5)
CHECKPOINT, STEP = 5, 7
"""The latest checkpoint before the interruption, and the step at whose end that comes."""
SEARCHES: dict[str, dict[str, Any]] = {
    "fade-out": {"fade_out": 4},
    "relaxed gates": {"method": "sigmoid"},
    "modules off": {"method": "snip", "method_options": {"reallocate_every": 2, "score_batches": 2}},
    "ranks": {"fade_out": 4, "selection_granularity": "rank"},
}


class Interrupt(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == STEP:
            raise KeyboardInterrupt


def stock(folder: Path, model: Any) -> Trainer:
    return make_trainer(folder, cls=Trainer, model=model, peft_config=None, args={"learning_rate": 3e-2})


def fail(prediction: Any) -> dict[str, float]:
    raise RuntimeError("no such metric")


@pytest.mark.parametrize(("name", "way"), [*((name, "mixin") for name in SEARCHES), ("fade-out", "attached")])
def test_interrupted_model_is_what_is_saved_and_the_run_resumes(name: str, way: str, tmp_path: Path) -> None:
    args = {"learning_rate": 3e-2}  # so that a gate shows in a loss

    def build(folder: Path) -> Any:
        if way == "mixin":
            return saving_trainer(folder, "llama", args=args, search=SEARCHES[name])
        model = classifier("llama").model
        wrapped = make_trainer(folder, "llama", model=model, peft_config=lora()).model
        trainer = saving_trainer(folder, "llama", cls=Trainer, model=wrapped, peft_config=None, args=args)
        return DiffoRACallback(search_config(**SEARCHES[name])).attach(trainer)

    trainer = build(tmp_path)
    interrupt = Interrupt()
    trainer.add_callback(interrupt)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert not gates_active(trainer.model)
    trainer.save_model(str(tmp_path / "saved"))
    reloaded = PeftModel.from_pretrained(classifier("llama").model, tmp_path / "saved", is_trainable=True)
    loss = trainer.evaluate(EVALUATION)["eval_loss"]
    assert loss == stock(tmp_path, reloaded).evaluate(EVALUATION)["eval_loss"]

    # The same trainer goes back to its checkpoint, and then to a search of its own.
    trainer.remove_callback(interrupt)
    trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{CHECKPOINT}"))
    whole = build(tmp_path / "whole")
    whole.train()
    assert_continues(trainer, whole, CHECKPOINT)


@pytest.mark.parametrize("name", ["fade-out", "relaxed gates"])
def test_another_trainer_trains_what_it_saves(name: str, tmp_path: Path) -> None:
    """After an exception in an evaluation: on the live model as on the saved and loaded one."""
    args = {"learning_rate": 3e-2, "eval_strategy": "steps", "eval_steps": STEP}
    search = SEARCHES[name]
    failed = make_trainer(tmp_path, "llama", args=args, search=search, eval_dataset=EVALUATION, compute_metrics=fail)
    with pytest.raises(RuntimeError, match="no such metric"):
        failed.train()
    failed.model.save_pretrained(tmp_path / "saved")
    reloaded = PeftModel.from_pretrained(classifier("llama").model, tmp_path / "saved", is_trainable=True)
    found = []
    for model in (failed.model, reloaded):
        trainer = stock(tmp_path, model)
        trainer.train()
        found.append((trainer.evaluate(EVALUATION)["eval_loss"], adapter(model)))
    assert_same(*found)


def test_noise_of_embeddings_is_not_added_twice(tmp_path: Path) -> None:
    """The stock Trainer leaves NEFTune on the embeddings when a training ends by an exception."""

    def build(folder: str) -> Trainer:
        return saving_trainer(tmp_path / folder, "llama", args={"neftune_noise_alpha": 5})

    trainer, interrupt = build("interrupted"), Interrupt()
    trainer.add_callback(interrupt)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    embeddings = trainer.model.get_input_embeddings()
    assert not embeddings._forward_hooks and not hasattr(embeddings, "neftune_noise_alpha")
    trainer.remove_callback(interrupt)
    trainer.train(resume_from_checkpoint=str(tmp_path / "interrupted" / f"checkpoint-{CHECKPOINT}"))
    whole = build("whole")  # its noise begins with the seed of its trainer
    whole.train()
    assert_continues(trainer, whole, CHECKPOINT)
