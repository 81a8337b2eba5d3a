"""The trainers: phases, what is trained and saved, what is refused, and that the search leaves no trace."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import Trainer
from trl import SFTConfig, SFTTrainer

from diffora_trainer import ArchitectureSearch, DiffoRAConfig, DiffoRAMixin, DiffoRASFTTrainer, DiffoRATrainer
from diffora_trainer.search.run import SelectionRun
from diffora_trainer.trainer.callback import SessionCallback
from helpers.adapted import base_weights, lora_layers
from helpers.checks import adapter, assert_same, assert_was_searched, optimizer_state, search_keys, snapshot, step_logs
from helpers.data import classification_dataset, lm_dataset, tiny_tokenizer
from helpers.trainers import CUT, WARMUP, Probe, arguments, causal_model, classifier, lora, make_trainer, search_config


# A run


@pytest.mark.parametrize("task", ["cls", "llama", "sft"])
def test_run(task: str, tmp_path: Path) -> None:
    """Thirty steps: warm-up until step 4, architecture steps after 5, 7, ..., 13, the cut at 14."""
    config = lora()
    given = copy.deepcopy(config.to_dict())
    tiny = None if task == "sft" else classifier("llama" if task == "llama" else "bert")
    model = causal_model() if tiny is None else tiny.model
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    after = Probe(lambda model, **kwargs: adapter(model), 14)
    trainer = make_trainer(
        tmp_path,
        task,
        model=model,
        peft_config=config,
        args={"max_steps": 30},
        search={"arch_warmup": 4, "discretize_at": 14, "arch_every": 2, "log_gates_by_kind": task == "cls"},
    )
    assert trainer.selection is None
    trainer.add_callback(after)
    trainer.train()

    logs = step_logs(trainer)
    gates = {"entropy", "gate_min", "gate_mean", "gate_max"}
    assert sorted(logs) == list(range(1, 31))
    for step in range(1, 15):
        keys = search_keys(logs[step])
        assert gates <= keys
        assert sum(key.startswith("gate/") for key in keys) == (7 if task == "cls" else 0)  # asked for, or not
        assert ("arch_loss" in keys) == (step in (5, 7, 9, 11, 13)), step
        assert ("gap" in keys) == (step == 14)
    for step in range(1, 5):  # the warm-up does not move the matrix
        assert logs[step]["diffora/entropy"] == logs[1]["diffora/entropy"] != logs[14]["diffora/entropy"]
    cut = logs[14]
    assert cut["diffora/gap"] == pytest.approx(
        cut["diffora/held_out_loss_after_pruning"] - cut["diffora/held_out_loss_before_pruning"]
    )
    assert cut["diffora/selected_modules"] == len(trainer.selection.selected)
    assert cut["diffora/lora_parameters"] == trainer.selection.trainable_parameters
    assert not any(search_keys(log) for log in trainer.state.log_history if log["step"] > 14)
    assert trainer.selection.step == 14
    assert_was_searched(trainer, 14)

    # The base model stays, all that is trained moves, before the pruning and after it.
    assert_same(dict(sorted(base_weights(trainer.model).items())), dict(sorted(start.items())))
    end = adapter(trainer.model)
    assert list(end) == list(after.found[14])
    heads = [name for name in end if "lora_" not in name]
    assert bool(heads) == (task != "sft")
    assert all(not torch.equal(end[name], tensor) for name, tensor in after.found[14].items())
    assert config.to_dict() == given

    # What is saved is the trained model, loaded by PEFT alone.
    trainer.save_model(tmp_path / "saved")
    plain = causal_model() if tiny is None else classifier("llama" if task == "llama" else "bert").model
    reloaded = PeftModel.from_pretrained(plain, tmp_path / "saved")
    assert_same(adapter(reloaded), end)
    batch = {"input_ids": torch.arange(5, 17).reshape(2, 6)}
    trainer.model.eval()
    with torch.no_grad():
        assert torch.equal(reloaded(**batch).logits, trainer.model(**batch).logits)


def test_default_is_lora_on_all_linear_layers(tmp_path: Path) -> None:
    tiny = classifier()
    trainer = make_trainer(tmp_path, model=tiny.model, peft_config=None)
    assert len(lora_layers(trainer.model, "default")) == tiny.linear_modules + len(tiny.outside)
    assert not isinstance(trainer.model.base_model.model.classifier, nn.Linear)  # trained and saved, without LoRA
    assert any("classifier" in name for name in adapter(trainer.model))
    trainer = make_trainer(tmp_path, "sft", peft_config=None)
    assert len(lora_layers(trainer.model, "default")) == 14
    trainer.train()
    assert_was_searched(trainer)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_loss_function_that_divides_by_the_items_of_a_batch(accumulation: int, tmp_path: Path) -> None:
    def mean(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        return nn.functional.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch

    args = {"gradient_accumulation_steps": accumulation}
    given = make_trainer(tmp_path, args=args, compute_loss_func=mean)
    given.train()
    own = make_trainer(tmp_path, args=args)
    own.train()
    assert_was_searched(given)
    assert given.selection.kept == own.selection.kept
    expected = [log["diffora/arch_loss"] for log in step_logs(own).values() if "diffora/arch_loss" in log]
    found = [log["diffora/arch_loss"] for log in step_logs(given).values() if "diffora/arch_loss" in log]
    # Another count would be another factor; the weights drift a little, as training losses are rounded otherwise.
    assert len(found) == 5 and found == pytest.approx(expected, rel=0.1)
    assert given.args.average_tokens_across_devices == own.args.average_tokens_across_devices


def test_sft_trainer_takes_a_path_and_positions(tmp_path: Path) -> None:
    causal_model().save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    trainer = DiffoRASFTTrainer(
        str(tmp_path / "base"),
        arguments(tmp_path / "out", SFTConfig),
        None,
        lm_dataset(24),
        peft_config=lora(),
        diffora_config=search_config(),
    )
    trainer.train()
    assert_was_searched(trainer)
    with pytest.raises(TypeError, match="model"):
        DiffoRASFTTrainer(str(tmp_path / "base"), model=causal_model())


def test_trainer_takes_positions(tmp_path: Path) -> None:
    tiny = classifier("llama")
    collator = make_trainer(tmp_path).data_collator
    args = arguments(tmp_path)
    trainer = DiffoRATrainer(tiny.model, args, collator, classification_dataset(24), diffora_config=search_config())
    assert trainer.args is args and trainer.data_collator is collator
    trainer.train()
    assert_was_searched(trainer)


@pytest.mark.parametrize("task", ["cls", "sft"])
def test_ready_peft_model_is_taken_as_it_is(task: str, tmp_path: Path) -> None:
    base = causal_model() if task == "sft" else classifier().model
    config = lora(r=2, target_modules=["q_proj", "v_proj"] if task == "sft" else ["query", "value"])
    config.task_type = "CAUSAL_LM" if task == "sft" else "SEQ_CLS"
    ready = get_peft_model(base, config)
    start = snapshot(ready)
    trainer = make_trainer(tmp_path, task, model=ready, peft_config=None)
    assert trainer.model is ready
    assert_same(snapshot(trainer.model), start)
    trainer.train()
    assert_was_searched(trainer)
    with pytest.raises(ValueError, match="peft_config"):
        make_trainer(tmp_path, task, model=ready, peft_config=lora())


def test_own_subclasses(tmp_path: Path) -> None:
    class Mine(DiffoRATrainer):
        def __init__(self, *args: Any, my: int = 1, **kwargs: Any) -> None:
            self.my = my
            super().__init__(*args, **kwargs)

    class Parent(Trainer):
        def __init__(self, *args: Any, my: int = 1, **kwargs: Any) -> None:
            self.my = my
            super().__init__(*args, **kwargs)

    class Mixed(DiffoRAMixin, Parent):
        pass

    for cls in (Mine, Mixed):
        common = {
            "peft_config": lora(),
            "train_dataset": classification_dataset(24),
            "diffora_config": search_config(),
        }
        common["data_collator"] = make_trainer(tmp_path).data_collator
        trainer = cls(classifier().model, arguments(tmp_path), my=3, **common)
        assert trainer.my == 3
        trainer.train()
        assert_was_searched(trainer)
        assert cls(model=classifier().model, args=arguments(tmp_path), **common).my == 1


def test_model_init_starts_anew(tmp_path: Path) -> None:
    """Each training of a `model_init` trainer has a new model, and so a new search."""
    trainer = make_trainer(
        tmp_path, model=None, model_init=lambda: classifier().model, search={"base_model_id": "org/base"}
    )
    found = []
    for _ in range(2):
        trainer.train()
        assert_was_searched(trainer)
        assert trainer.model.peft_config["default"].base_model_name_or_path == "org/base"
        found.append((trainer.selection, adapter(trainer.model)))
    assert_same(*found)


# No trace


NO_TRACE = {
    "classifier": ("cls", {}),
    "sft": ("sft", {}),
    "sft, second order": ("sft", {"arch_order": 2, "arch_every": 3}),
}


@pytest.mark.parametrize("name", NO_TRACE)
def test_search_that_drops_nothing_is_a_stock_run(name: str, tmp_path: Path) -> None:
    """With all modules kept, gates set to 1 and held-out data of its own, a run is the parent's, bit for bit."""
    task, search = NO_TRACE[name]
    args = {"gradient_accumulation_steps": 2, "max_steps": 12}
    extra = {"arch_dataset": classification_dataset(8, seed=3)}
    if task == "sft":
        extra["arch_dataset"] = make_trainer(tmp_path, "sft", train_dataset=lm_dataset(8, seed=3)).train_dataset
    search = {"selection_ratio": 1.0, "fold_gates": False, **search}
    trainer = make_trainer(tmp_path, task, args=args, search=search, peft_config=lora(lora_dropout=0.1), **extra)
    trainer.train()
    assert len(trainer.selection.selected) == len(trainer.selection.modules)
    assert min(trainer.selection.gates) < 1  # the matrix has moved

    config = lora(lora_dropout=0.1, task_type=None if task == "sft" else "SEQ_CLS")
    if task == "sft":
        stock = make_trainer(tmp_path, task, cls=SFTTrainer, args=args, peft_config=config)
    else:
        torch.manual_seed(0)
        model = classifier().model
        torch.manual_seed(trainer.args.seed)
        stock = make_trainer(tmp_path, task, cls=Trainer, args=args, model=get_peft_model(model, config))
    stock.train()
    assert_same(step_logs(trainer, ("diffora/",)), step_logs(stock), "logs")
    assert_same(snapshot(trainer.model), snapshot(stock.model), "weights")
    assert_same(
        optimizer_state(trainer.model, trainer.optimizer), optimizer_state(stock.model, stock.optimizer), "optimizer"
    )


@pytest.mark.parametrize(("task", "checkpointing"), [("cls", False), ("sft", False), ("sft", True)])
def test_architecture_steps_leave_no_trace(
    task: str, checkpointing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With gates drawn at random the run is, up to the cut, the one that makes no architecture steps. These are made
    in training mode, with dropout, when activations are checkpointed, and else in evaluation mode."""

    def look(model: nn.Module, optimizer: Any, **kwargs: Any) -> dict[str, Any]:
        numbers = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        state = optimizer_state(model, optimizer)
        return {"weights": snapshot(model), "optimizer": state, "grad": numbers, "random": torch.get_rng_state()}

    found, logs, steps = [], [], []
    for searching in (True, False):
        if not searching:
            monkeypatch.setattr(SelectionRun, "_architecture_step", lambda self, *args: steps.append(args))
        probe = Probe(look, 5, CUT)
        trainer = make_trainer(
            tmp_path,
            task,
            callbacks=[probe],
            args={"gradient_accumulation_steps": 2, "logging_steps": 2, "gradient_checkpointing": checkpointing},
            peft_config=lora(lora_dropout=0.1),
        )
        trainer.train()
        if task == "sft":
            assert not trainer._metrics["eval"]  # nothing was evaluated
        found.append(probe.found)
        logs.append({step: log for step, log in step_logs(trainer, ("diffora/",)).items() if step <= CUT})
    assert len(steps) == CUT - WARMUP
    assert_same(*found)
    assert_same(*logs)
    if task == "sft":
        assert {"num_tokens", "mean_token_accuracy", "entropy"} <= set(logs[0][CUT])


def test_nonfinite_architecture_loss_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad, values = (2, 3), {}
    plain_step, plain_loss = ArchitectureSearch.step, DiffoRATrainer.compute_architecture_loss
    count = [0]

    def step(self: ArchitectureSearch, *args: Any, **kwargs: Any) -> float | None:
        before = self.method.values()
        count[0] += 1
        result = plain_step(self, *args, **kwargs)
        values[count[0]] = (before, self.method.values(), result)
        return result

    def loss(self: DiffoRATrainer, model: nn.Module, batch: Any) -> torch.Tensor:
        return plain_loss(self, model, batch) * (float("nan") if count[0] in bad and torch.is_grad_enabled() else 1.0)

    monkeypatch.setattr(ArchitectureSearch, "step", step)
    monkeypatch.setattr(DiffoRATrainer, "compute_architecture_loss", loss)
    trainer = make_trainer(tmp_path)
    trainer.train()

    for number, (before, after, result) in values.items():
        assert torch.isfinite(after).all()
        assert torch.equal(before, after) == (number in bad) == (result is None)
    logs = step_logs(trainer)
    skipped = [logs[step].get("diffora/skipped_steps", 0.0) for step in range(WARMUP + 1, CUT + 1)]
    assert skipped == [0.0, 1.0, 2.0, 2.0, 2.0]
    assert all(math.isfinite(log.get("diffora/arch_loss", 0.0)) for log in logs.values())
    assert_was_searched(trainer)


@pytest.mark.parametrize("task", ["llama", "sft"])
def test_gradient_checkpointing_changes_nothing(task: str, tmp_path: Path) -> None:
    found = []
    for checkpointing in (False, True):
        args = {"gradient_checkpointing": checkpointing, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
        model = causal_model(attention_dropout=0.0) if task == "sft" else classifier("llama").model
        trainer = make_trainer(tmp_path, task, model=model, args=args)
        trainer.train()
        assert_was_searched(trainer)
        found.append((trainer.selection.kept, {s: log["loss"] for s, log in step_logs(trainer).items()}))
    assert found[0][0] == found[1][0]
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-4)


def test_interrupted_run_is_cut_when_it_ends(tmp_path: Path) -> None:
    class Stop(Probe):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == self.steps[0]

    trainer = make_trainer(tmp_path, callbacks=[Stop(None, 6)])
    trainer.train()
    assert trainer.selection.step == 6 and trainer.state.global_step == 6
    assert set(lora_layers(trainer.model, "default")) == set(trainer.selection.selected)
    trainer = make_trainer(tmp_path, callbacks=[Stop(None, 2)])  # nothing is known yet
    trainer.train()
    assert trainer.selection is None and len(lora_layers(trainer.model, "default")) == 13
    assert not any(module._forward_hooks for module in trainer.model.modules())


def test_removed_callback_is_noticed(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.remove_callback(SessionCallback)
    with pytest.raises(ValueError, match="SessionCallback"):
        trainer.train()


def test_short_run_works_with_the_defaults(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, args={"max_steps": 3}, diffora_config=DiffoRAConfig())
    trainer.train()
    assert trainer.selection.step == 2
    assert_was_searched(trainer, 2)
