"""What changes how a model runs: `torch.compile` and activation checkpointing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from diffora_trainer import ArchitectureSearch, DiffoRAConfig, apply_selection
from diffora_trainer.adapters.grid import AdapterGrid
from helpers.models import llama
from helpers.trainers import Probe, causal_model, classifier, make_trainer


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    return model(**batch).loss


def make(change: Callable[[Any], Any] | None = None) -> tuple[Any, dict[str, Tensor]]:
    """A tiny model with LoRA; a function may change its base model before, and return another."""
    tiny = llama()
    torch.manual_seed(1)
    changed = None if change is None else change(tiny.model)
    base = tiny.model if changed is None else changed
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.2)
    return model, tiny.batch


# torch.compile. Nothing is compiled before the first call, so these tests cost no time.


def wrap_layers(model: Any) -> None:
    for index, layer in enumerate(model.model.layers):
        model.model.layers[index] = torch.compile(layer, backend="eager")


def compiled_in_place() -> Any:
    model, _ = make()
    model.compile(backend="eager")
    return model


COMPILED: dict[str, Callable[[], Any]] = {
    "PeftModel, wrapped": lambda: torch.compile(make()[0], backend="eager"),
    "PeftModel, in place": compiled_in_place,
    "base, wrapped": lambda: make(lambda base: torch.compile(base, backend="eager"))[0],
    "base, in place": lambda: make(lambda base: base.compile(backend="eager"))[0],
    "layers, wrapped": lambda: make(wrap_layers)[0],
    "a part, in place": lambda: make(lambda base: base.model.layers[1].mlp.compile(backend="eager"))[0],
}


@pytest.mark.parametrize("how", COMPILED)
def test_compiled_models_are_refused(how: str) -> None:
    """What was traced before the gates were there runs on without them, in silence."""
    model = COMPILED[how]()
    for use in (AdapterGrid.from_model, lambda model: ArchitectureSearch(model, loss_fn=loss_of)):
        with pytest.raises(ValueError, match=r"compiled model.*torch\.compile.*gates.*model\.compile\(\).*after"):
            use(model)


@pytest.mark.parametrize("task", ["cls", "sft"])
@pytest.mark.parametrize("wrapped", [True, False])
def test_trainers_refuse_a_compiled_model_and_leave_it_alone(task: str, wrapped: bool, tmp_path: Path) -> None:
    model = causal_model() if task == "sft" else classifier().model
    names = [name for name, _ in model.named_modules()]
    if wrapped:
        compiled = torch.compile(model, backend="eager")
    else:
        model.compile(backend="eager")
        compiled = model
    with pytest.raises(ValueError, match=r"compiled model.*gates.*after the training"):
        make_trainer(tmp_path, task, model=compiled)
    assert [name for name, _ in model.named_modules()] == names
    # Compiled after the trainer was built.
    trainer = make_trainer(tmp_path, task)
    trainer.model.compile(backend="eager")
    with pytest.raises(ValueError, match="compiled model"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_the_finished_model_can_be_compiled() -> None:
    """After the cut the model is an ordinary one: compiled, it computes and learns the same, and compiles once."""
    model, batch = make()
    search = ArchitectureSearch(model, DiffoRAConfig(), loss_fn=loss_of)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    search.begin()
    for _ in range(3):
        search.draw_gates()
        loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        search.step(batch)
    apply_selection(model, search.finish(), optimizer)

    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights = [p for p in model.parameters() if p.requires_grad]
    found, graphs = [], []
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for runner in (model, torch.compile(model, backend="aot_eager")):
        model.load_state_dict(state)
        sgd = torch.optim.SGD(weights, lr=1e-2)
        for _ in range(3):
            loss = loss_of(runner, batch)
            loss.backward()
            sgd.step()
            found.append([loss.detach(), *(weight.grad for weight in weights)])
            sgd.zero_grad()
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[:3] == [0, 0, 0] and 0 < graphs[3] == graphs[4] == graphs[5]
    for eager, compiled in zip(found[:3], found[3:], strict=True):
        assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(eager, compiled, strict=True))


# Activation checkpointing


# Without `use_reentrant`, PyTorch takes the reentrant way; so does PEFT's `prepare_model_for_kbit_training(model)`.
@pytest.mark.parametrize("kwargs", [{"use_reentrant": True}, {"preserve_rng_state": True}, {}], ids=str)
@pytest.mark.parametrize("place", ["base", "PeftModel"])
def test_reentrant_checkpointing_of_the_user_s_own_is_refused(place: str, kwargs: dict[str, Any]) -> None:
    def enable(model: Any, kwargs: Any) -> None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
        model.enable_input_require_grads()

    model, batch = make(lambda base: enable(base, kwargs) if place == "base" else None)
    if place == "PeftModel":
        enable(model, kwargs)
    search = ArchitectureSearch(model, loss_fn=loss_of)
    with pytest.raises(ValueError, match=r"reentrant.*'use_reentrant': False.*gradient_checkpointing_enable"):
        search.begin()
    assert not search.gates.attached
    enable(model, {"use_reentrant": False})
    search.begin()
    assert search.step(batch) is not None


@pytest.mark.parametrize("task", ["llama", "sft"])
def test_trainers_refuse_reentrant_checkpointing(task: str, tmp_path: Path) -> None:
    """Switched on by the user; by the training arguments, it is PyTorch's default as soon as anything is passed."""
    steps = Probe(lambda **kwargs: None)
    model = causal_model() if task == "sft" else classifier("llama").model
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    args = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"preserve_rng_state": True}}
    for trainer in (
        make_trainer(tmp_path, task, model=model, callbacks=[steps]),
        make_trainer(tmp_path, task, args=args, callbacks=[steps]),
    ):
        with pytest.raises(ValueError, match=r"reentrant.*'use_reentrant': False"):
            trainer.train()
        assert not steps.found
    # The arguments of a run take the place of what was switched on before.
    args = {"gradient_checkpointing": True}
    model = causal_model() if task == "sft" else classifier("llama").model
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    trainer = make_trainer(tmp_path, task, model=model, args=args, callbacks=[steps])
    trainer.train()
    assert trainer.selection is not None and len(steps.found) == 12


def test_an_argument_that_pytorch_hands_to_the_layers_is_no_obstacle() -> None:
    """TRL's trainer takes `selective`, and one of transformers that it does not know may get it as well."""
    kwargs = {"selective": True, "use_reentrant": False}
    model, batch = make(lambda base: base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs))
    search = ArchitectureSearch(model.train(), loss_fn=loss_of)
    search.begin()
    assert search.step(batch) is not None


def checkpoint_every_second_layer(model: nn.Module, kwargs: dict[str, bool] | None) -> None:
    """Or none. What `activation_checkpointing_enable(kwargs, every_n_layers=2)` does; transformers 5.2 has no such."""
    model.gradient_checkpointing_disable()
    if kwargs is not None:
        model.gradient_checkpointing_enable(kwargs)
        for layer in model.model.layers[1::2]:
            layer.gradient_checkpointing = False


def test_reentrant_checkpointing_of_some_layers_is_noticed() -> None:
    """Every second layer is checkpointed: the gates of the others would have a gradient, and these none."""
    model, batch = make()
    base = model.base_model.model
    gradients = []
    for kwargs in (None, {"use_reentrant": False}):
        checkpoint_every_second_layer(base, kwargs)
        search = ArchitectureSearch(model.train(), loss_fn=loss_of)
        search.begin()
        gradients.append(search._gradient.first_order(batch, torch.ones(14))[1])
        search.finish()
    assert (gradients[0] != 0).all() and torch.allclose(*gradients, atol=1e-6)
    checkpoint_every_second_layer(base, {"use_reentrant": True})
    with pytest.raises(ValueError, match="reentrant"):
        ArchitectureSearch(model, loss_fn=loss_of).begin()
