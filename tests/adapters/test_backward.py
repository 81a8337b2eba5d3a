"""How deep backward passes reach, without a Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from diffora_trainer import ArchitectureSearch, DiffoRAConfig, Selection, apply_selection
from diffora_trainer.adapters.backward import restore_input_gradients
from helpers.depth import LATE, LAYERS, Reach, deep, embeddings_require_gradient, late_first, layers_of
from helpers.options import make_config
from helpers.speech_models import wav2vec2
from helpers.trainers import lora


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
        model, DiffoRAConfig(selection_scope="model", max_step_time=1.0), loss_fn=lambda m, b: m(**b).loss
    )
    reach = Reach().watch(model)
    embedded = []
    model.get_input_embeddings().register_forward_hook(lambda m, args, output: embedded.append(output.requires_grad))
    search.measure_costs(batch_of_ids())
    turn = [set(range(lowest, LAYERS)) for lowest in (0, 2, 3, 0)]  # three layers are measured, and all modules
    assert reach.passes == [turn[-1], *turn, *turn]
    assert not any(embedded)
    assert embeddings_require_gradient(model) == checkpointing  # measuring is over


@pytest.mark.parametrize("trained", [False, True])
def test_a_feature_extractor_that_is_not_trained_carries_no_backward_pass(trained: bool) -> None:
    """In training mode those of Wav2Vec2 and its kin make their input require a gradient."""
    tiny = wav2vec2()
    saved = ["feature_extractor"] if trained else None
    config = LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[1], modules_to_save=saved)
    model: Any = get_peft_model(tiny.model, config).train()
    needed = []
    layers = model.get_base_model().wav2vec2.encoder.layers
    layers[0].register_forward_hook(lambda layer, args, output: needed.append(output[0].requires_grad))
    search = ArchitectureSearch(model, DiffoRAConfig(), loss_fn=lambda m, b: m(**b).loss)
    model(**tiny.batch)
    search.begin()
    model(**tiny.batch)
    restore_input_gradients(model)
    model(**tiny.batch)
    assert needed == [True, trained, True]


def warm(config: LoraConfig | None = None) -> PeftModel:
    model = get_peft_model(deep("llama", "sft"), config or lora())
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def test_a_loop_of_one_s_own(tmp_path: Path) -> None:
    """From `begin` on, after `apply_selection` too, and on a model that is cut by a saved selection."""
    config = make_config(**LATE)
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
            model, make_config(**LATE), loss_fn=lambda m, b: m(**b).loss, score_function=late_first
        )
        search.begin()
        assert embeddings_require_gradient(model) == found
        search.gates.detach()
        for layer in layers_of(model):
            layer._gradient_checkpointing_func = lambda run, *args: checkpoint(run, *args, use_reentrant=True)
    model(**batch_of_ids()).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
