"""The backward pass ends at the lowest module that is trained, with activation checkpointing too."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    CUT,
    VOCABULARY,
    WARMUP,
    Probe,
    adapter,
    arguments,
    assert_continues,
    assert_same,
    lora,
    make_trainer,
    search_config,
    step_logs,
)
from models import llama_config
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from tokenizer import preference_dataset, tiny_tokenizer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    Trainer,
    TrainerCallback,
)
from trl import DPOConfig, DPOTrainer

from diffora_trainer import ArchitectureSearch, DiffoRAConfig, DiffoRAMixin, DiffoRATrainer, Selection, apply_selection
from diffora_trainer.adapters.grid import ModuleGrid


LAYERS = 4
NOT_REENTRANT = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
LATE = {"method": "custom", "selection_scope": "model", "selection_ratio": 0.4}


class DiffoRADPOTrainer(DiffoRAMixin, DPOTrainer):
    pass


def layer_of(name: str) -> int:
    """The number of the layer that a module is in; what stands outside of the layers comes after them."""
    return next((int(part) for part in name.split(".") if part.isdigit()), LAYERS)


def late_first(model: nn.Module, batches: list[Any]) -> dict[str, float]:
    return {name: layer_of(name) + index / 1e3 for index, name in enumerate(ModuleGrid.from_model(model).names)}


def deep(kind: str, task: str) -> Any:
    torch.manual_seed(0)
    if kind == "llama":
        config = llama_config(VOCABULARY, num_hidden_layers=LAYERS, attention_dropout=0.1)
        return LlamaForSequenceClassification(config) if task == "cls" else LlamaForCausalLM(config)
    common = {"vocab_size": VOCABULARY, "pad_token_id": 0, "initializer_range": 0.2}
    if kind == "gpt2":
        config = GPT2Config(n_embd=32, n_layer=LAYERS, n_head=4, n_positions=128, bos_token_id=1, **common)
        return GPT2ForSequenceClassification(config) if task == "cls" else GPT2LMHeadModel(config)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "max_position_embeddings": 128}
    return BertForSequenceClassification(BertConfig(num_hidden_layers=LAYERS, **sizes, **common))


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The layers, in order: the one list of that many modules."""
    return next(
        list(m) for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == LAYERS and "Layer" in repr(m[0])
    )


class Reach(TrainerCallback):
    """The layers whose output has a gradient, in each training step and in each forward and backward pass."""

    def __init__(self) -> None:
        self.steps: dict[int, set[int]] = {}
        self.passes: list[set[int]] = []

    def watch(self, model: nn.Module) -> Reach:
        model.register_forward_pre_hook(lambda *_: self.passes.append(set()))
        for index, layer in enumerate(layers_of(model)):
            layer.register_forward_hook(lambda _, args, output, index=index: self._note(index, output))
        return self

    def _note(self, index: int, output: Any) -> None:
        output = output[0] if isinstance(output, tuple) else output
        if output.requires_grad:
            found = self.passes[-1]
            output.register_hook(lambda gradient: found.add(index))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.passes.clear()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps[state.global_step + 1] = set().union(*self.passes)


def embeddings_require_gradient(model: Any) -> bool:
    return model.get_input_embeddings()(torch.tensor([[3]])).requires_grad


def trainer_of(folder: Path, task: str, model: Any, args: dict[str, Any], **kwargs: Any) -> Trainer:
    search = {**LATE, **kwargs.pop("search", {})}
    if search["method"] == "custom":
        kwargs["score_function"] = late_first
    if task == "dpo":
        return DiffoRADPOTrainer(
            model=model,
            args=arguments(folder, DPOConfig, **args),
            train_dataset=preference_dataset(24),
            processing_class=tiny_tokenizer(),
            diffora_config=search_config(**search),
            **{"peft_config": lora(), **kwargs},
        )
    return make_trainer(folder, task, model=model, args=args, search=search, **kwargs)


CASES = [("cls", "llama"), ("cls", "gpt2"), ("cls", "bert")]
CASES += [("sft", "llama"), ("sft", "gpt2"), ("dpo", "llama"), ("dpo", "gpt2")]


@pytest.mark.parametrize(("task", "kind"), CASES)
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
        timed = {"method": "diffora", "cost": "time"}
        with pytest.raises(ValueError, match=r"cost='time'.*embed_tokens.*cost='parameters'"):
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


def checkpointed(model: Any) -> Any:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    return model.train()


def batch_of_ids() -> dict[str, Tensor]:
    found = torch.randint(3, 30, (4, 12), generator=torch.Generator().manual_seed(1))
    return {"input_ids": found, "labels": found}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_measured_steps_are_as_deep_as_those_after_the_cut(checkpointing: bool) -> None:
    model = get_peft_model(deep("llama", "sft"), lora())
    if checkpointing:
        checkpointed(model)
    search = ArchitectureSearch(
        model, DiffoRAConfig(selection_scope="model", cost="time"), loss_fn=lambda m, b: m(**b).loss
    )
    reach = Reach().watch(model)
    embedded = []
    model.get_input_embeddings().register_forward_hook(lambda m, args, output: embedded.append(output.requires_grad))
    search.measure_times(batch_of_ids())
    turn = [set(range(lowest, LAYERS)) for lowest in (*range(LAYERS), 0)]
    assert reach.passes == [turn[-1], *turn, *turn]
    assert not any(embedded)
    assert embeddings_require_gradient(model) == checkpointing  # measuring is over


def test_a_run_under_a_time_budget_is_as_short_as_it_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = {"method": "diffora", "cost": "time", "max_step_time": 0.5}
    trainer = trainer_of(tmp_path, "sft", deep("llama", "sft"), NOT_REENTRANT, search=search)
    reach = Reach().watch(trainer.model)
    # A clock that counts the layers of the pass that it is held to, and no noise.
    monkeypatch.setattr(
        "diffora_trainer.search.search.timed", lambda step, device: (step(), 1.0 + len(reach.passes[-1]))[1]
    )
    measured = Probe(lambda **_: [set(layers) for layers in reach.passes], WARMUP)
    trainer.add_callback(measured)
    trainer.add_callback(reach)
    trainer.train()
    for lowest in range(LAYERS):
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


def warm(config: LoraConfig | None = None) -> PeftModel:
    model = get_peft_model(deep("llama", "sft"), config or lora())
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def test_a_loop_of_one_s_own(tmp_path: Path) -> None:
    """From `begin` on, after `apply_selection` too, and on a model that is cut by a saved selection."""
    config = DiffoRAConfig(**LATE)
    model, batch = checkpointed(warm()), batch_of_ids()
    checkpointed(model)  # a second hook, of which transformers no longer knows the first
    reach = Reach().watch(model)
    search = ArchitectureSearch(model, config, loss_fn=lambda m, b: m(**b).loss, score_function=late_first)
    search.begin()
    assert not embeddings_require_gradient(model)
    model(**batch).loss.backward()
    search.score([batch])
    apply_selection(model, selection := search.finish())
    reach.passes.clear()
    model(**batch).loss.backward()
    assert reach.passes == [{2, 3}]
    selection.save(tmp_path)

    other = checkpointed(warm())
    apply_selection(other, Selection.load(tmp_path))
    reach = Reach().watch(other)
    other(**batch).loss.backward()
    assert reach.passes == [{2, 3}]
    # Who trains on in the reentrant way asks for it, as always, and is given it.
    other.zero_grad()
    other.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    other.enable_input_require_grads()
    other(**batch).loss.backward()
    assert all(parameter.grad is not None for parameter in other.parameters() if parameter.requires_grad)


def test_checkpointing_that_may_be_reentrant_keeps_what_it_needs() -> None:
    """A model of someone else's that checkpoints by a function of its own is trained with its hook as without us."""
    model = checkpointed(warm())
    for found in (False, True):
        search = ArchitectureSearch(
            model, DiffoRAConfig(**LATE), loss_fn=lambda m, b: m(**b).loss, score_function=late_first
        )
        search.begin()
        assert embeddings_require_gradient(model) == found
        search.gates.detach()
        for layer in layers_of(model):
            layer._gradient_checkpointing_func = lambda run, *args: checkpoint(run, *args, use_reentrant=True)
    model(**batch_of_ids()).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
