"""The backward pass ends at the lowest module that is trained, with activation checkpointing too."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import prepare_model_for_kbit_training
from torch import Tensor, nn
from transformers import (
    BitsAndBytesConfig,
    LlamaForCausalLM,
)

from diffora_trainer import DiffoRATrainer
from helpers.checks import adapter, assert_continues, assert_same, step_logs
from helpers.depth import LAYERS, NOT_REENTRANT, Reach, deep, embeddings_require_gradient, layer_of, trainer_of
from helpers.marks import mostly_slow
from helpers.trainers import CUT, WARMUP, Probe, lora


CASES = [("cls", "llama"), ("cls", "gpt2"), ("cls", "bert")]
CASES += [("sft", "llama"), ("sft", "gpt2"), ("dpo", "llama"), ("dpo", "gpt2")]


@pytest.mark.parametrize(("task", "kind"), mostly_slow(CASES, ("cls", "llama"), ("cls", "bert"), ("sft", "gpt2")))
def test_a_step_after_the_cut_ends_at_the_lowest_layer_that_was_kept(task: str, kind: str, tmp_path: Path) -> None:
    found = []
    for checkpointing in (False, True):
        args = {"max_steps": CUT + 3, **(NOT_REENTRANT if checkpointing else {})}
        trainer = trainer_of(tmp_path, task, deep(kind, task), args)
        trainer.add_callback(reach := Reach().watch(trainer.model))
        requires = []  # while all modules train too, what lies below them has no gradient
        trainer.add_callback(Probe(lambda model, seen=requires, **_: seen.append(embeddings_require_gradient(model))))
        trainer.train()
        lowest = min(map(layer_of, trainer.selection.selected))
        assert lowest == 2
        assert reach.steps == {
            step: set(range(0 if step <= CUT else lowest, LAYERS)) for step in range(1, trainer.state.max_steps + 1)
        }
        assert not any(requires)
        # What comes after the run finds the model as it was set up.
        assert embeddings_require_gradient(trainer.model) == checkpointing
        found.append((step_logs(trainer), adapter(trainer.model)))
    losses = [{step: log["loss"] for step, log in logs.items()} for logs, _ in found]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_resumed_after_the_cut_and_trained_again(tmp_path: Path) -> None:
    args = {**NOT_REENTRANT, "save_strategy": "steps", "save_steps": CUT + 1}
    whole, resumed = (trainer_of(tmp_path, "sft", deep("llama", "sft"), args) for _ in range(2))
    whole.train()
    resumed.add_callback(reach := Reach().watch(resumed.model))
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{CUT + 1}"))
    assert_continues(resumed, whole, CUT + 1)
    assert set(reach.steps) == {CUT + 2, CUT + 3, CUT + 4}
    resumed.train()
    assert set(reach.steps) == set(range(1, CUT + 5))
    assert all(layers == {2, 3} for layers in reach.steps.values())
    assert embeddings_require_gradient(resumed.model)


def test_a_run_that_fails_gives_back_what_it_took(tmp_path: Path) -> None:
    def fail(**kwargs: Any) -> None:
        raise RuntimeError("enough")

    for stop in (1, CUT + 1):
        trainer = trainer_of(tmp_path, "sft", deep("llama", "sft"), NOT_REENTRANT, callbacks=[Probe(fail, stop)])
        hooks = sum(len(module._forward_pre_hooks) for module in trainer.model.modules())
        with pytest.raises(RuntimeError, match="enough"):
            trainer.train()
        assert embeddings_require_gradient(trainer.model)
        assert sum(len(module._forward_pre_hooks) for module in trainer.model.modules()) == hooks


def test_embeddings_that_are_trained_keep_their_gradient(tmp_path: Path) -> None:
    """Through `modules_to_save` and `trainable_token_indices`: the backward pass goes on down to them."""
    for options in ({"modules_to_save": ["embed_tokens"]}, {"trainable_token_indices": [5, 6, 7, 8, 9, 10]}):
        found = []
        for args in ({}, NOT_REENTRANT):
            config = lora(**options)
            trainer = trainer_of(tmp_path, "sft", deep("llama", "sft"), args, peft_config=config)
            trainer.add_callback(reach := Reach().watch(trainer.model))
            trainer.add_callback(after := Probe(lambda model, **_: adapter(model), CUT))
            trainer.train()
            end = adapter(trainer.model)
            moved = {name for name, tensor in end.items() if not torch.equal(tensor, after.found[CUT][name])}
            assert any("embed_tokens" in name for name in moved) and moved == set(end)
            assert reach.steps[CUT + 1] == set(range(LAYERS))
            found.append(end)
        assert_same(*found)
        timed = {"method": "diffora", "max_step_time": 0.7}
        with pytest.raises(ValueError, match=r"max_step_time.*embed_tokens.*leave the limit out"):
            trainer_of(tmp_path, "sft", deep("llama", "sft"), {}, peft_config=config, search=timed)


@pytest.mark.parametrize("reentrant", ["not reentrant", "by the training arguments alone"])
def test_a_model_prepared_for_kbit_training(reentrant: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    deep("llama", "sft").save_pretrained(tmp_path / "base")
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base", quantization_config=quantization)
    args = {"max_steps": CUT + 2}
    if reentrant == "not reentrant":
        model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    else:  # the arguments of the run take the place of the reentrant way, whose hook stays
        model, args = prepare_model_for_kbit_training(model), {**args, **NOT_REENTRANT}
    trainer = trainer_of(tmp_path, "sft", model, args)
    trainer.add_callback(reach := Reach().watch(trainer.model))
    trainer.train()
    assert [reach.steps[step] for step in (1, CUT + 1, CUT + 2)] == [{0, 1, 2, 3}, {2, 3}, {2, 3}]


# Time and memory


def test_a_run_under_a_time_budget_is_as_short_as_it_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = {"method": "diffora", "max_step_time": 0.6}
    trainer = trainer_of(tmp_path, "sft", deep("llama", "sft"), NOT_REENTRANT, search=search)
    reach = Reach().watch(trainer.model)
    # A clock that counts the layers of the pass that it is held to, and no noise.
    monkeypatch.setattr(
        "diffora_trainer.search.timing.timed", lambda step, device: (step(), 1.0 + len(reach.passes[-1]))[1]
    )
    measured = Probe(lambda **_: [set(layers) for layers in reach.passes], WARMUP)
    trainer.add_callback(measured)
    trainer.add_callback(reach)
    trainer.train()
    for lowest in (0, 2, LAYERS - 1):  # the layers between them follow from these
        assert set(range(lowest, LAYERS)) in measured.found[WARMUP]
    lowest = min(map(layer_of, trainer.selection.selected))
    assert lowest == 2
    assert all(layers == set(range(lowest, LAYERS)) for step, layers in reach.steps.items() if step > CUT)


@contextmanager
def saved_activations(model: nn.Module) -> Iterator[list[int]]:
    """The most bytes of activations that autograd holds at a time."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    live, peak = [0], [0]

    class Held:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor

    def release(size: int) -> None:
        live[0] -= size

    def pack(tensor: Tensor) -> Held:
        held = Held(tensor)
        if tensor.untyped_storage().data_ptr() not in own:
            size = tensor.numel() * tensor.element_size()
            live[0] += size
            weakref.finalize(held, release, size)
        peak[0] = max(peak[0], live[0])
        return held

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor):
        yield peak


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_peak_of_saved_activations_falls(checkpointing: bool, tmp_path: Path) -> None:
    peaks = []

    class Measured(DiffoRATrainer):
        def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
            with saved_activations(model) as peak:
                loss = super().training_step(model, inputs, *args, **kwargs)
            peaks.append(peak[0])
            return loss

    args = NOT_REENTRANT if checkpointing else {}
    search = {"selection_ratio": 0.2}  # a part of the last layer
    trainer = trainer_of(tmp_path, "llama", deep("llama", "cls"), args, cls=Measured, search=search)
    trainer.train()
    assert {layer_of(name) for name in trainer.selection.selected} == {3}
    assert max(peaks[CUT:]) < 0.6 * min(peaks[:CUT])


# A loop of one's own
