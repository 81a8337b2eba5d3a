"""Quantized models: bitsandbytes' 8 and 4 bits, torchao's int8, and PEFT's layers of GPTQ and AWQ."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.tuners.lora.awq import AwqLoraLinear
from peft.tuners.lora.gptq import GPTQLoraLinear
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, LlamaForCausalLM, TorchAoConfig
from trl import SFTConfig

from diffora_trainer import ArchitectureSearch, DiffoRAConfig, DiffoRASFTTrainer, apply_selection
from helpers.adapted import lora_layers
from helpers.checks import adapter, assert_same, step_logs
from helpers.data import lm_dataset, tiny_tokenizer
from helpers.models import llama
from helpers.quantized import Int8Weight, PackedLinear
from helpers.trainers import CUT, Probe, SaveAt, arguments, causal_model, lora, make_trainer, search_config


NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
NOT_REENTRANT = {"gradient_checkpointing_kwargs": {"use_reentrant": False}}


def packed(folder: Path) -> LlamaForCausalLM:
    model = LlamaForCausalLM.from_pretrained(folder)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, PackedLinear(module))
    return model


def bits(**options: Any) -> Callable[[Path], LlamaForCausalLM]:
    return lambda folder: LlamaForCausalLM.from_pretrained(folder, quantization_config=BitsAndBytesConfig(**options))


def int8(folder: Path) -> LlamaForCausalLM:
    quantization = pytest.importorskip("torchao.quantization")
    return LlamaForCausalLM.from_pretrained(
        folder, quantization_config=TorchAoConfig(quantization.Int8WeightOnlyConfig())
    )


# How the model is loaded, the class of its linear layers, and PEFT's layer where PEFT does not find it by itself:
# gptqmodel, whose layers it looks for, needs a newer torch than the one that this package is tested with.
KINDS: dict[str, tuple[Callable[[Path], LlamaForCausalLM], str, Any]] = {
    "8-bit": (bits(load_in_8bit=True), "Linear8bitLt", None),
    "4-bit": (bits(**NF4), "Linear4bit", None),
    "4-bit, computed in bf16": (bits(**NF4, bnb_4bit_compute_dtype=torch.bfloat16), "Linear4bit", None),
    "int8": (int8, "Linear", None),
    "GPTQ": (packed, "PackedLinear", GPTQLoraLinear),
    "AWQ": (packed, "PackedLinear", AwqLoraLinear),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved tiny Llama."""
    llama().model.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def config_of(layer: Any, source: Path | None = None) -> LoraConfig:
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM")
    if source is not None:
        config = LoraConfig.from_pretrained(source)
    if layer is not None:
        config._register_custom_module({PackedLinear: layer})
    return config


def rows(seed: int) -> Iterator[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        ids = torch.randint(3, 64, (4, 12), generator=generator)
        yield {"input_ids": ids, "labels": ids}


def frozen(model: nn.Module) -> dict[str, Tensor]:
    """The numbers that a quantized layer is made of, under the names of the model without LoRA."""
    return {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): getattr(tensor, "qdata", tensor)
        .detach()
        .clone()
        for name, tensor in sorted(model.state_dict().items())
        if "lora_" not in name and "quant_linear_module" not in name  # PEFT's second name for the same layer
    }


@pytest.mark.filterwarnings("ignore:Unsupported layer type", "ignore:.*get_apply_tensor_subclass")
@pytest.mark.parametrize("kind", KINDS)
def test_a_probe_of_packed_weights_is_refused(kind: str, folder: Path) -> None:
    """Else layers would be compared by the gradients of their norms alone."""
    load, layer_type, peft_layer = KINDS[kind]
    model = get_peft_model(load(folder), config_of(peft_layer))
    with pytest.raises(ValueError, match=rf"q_proj' \({layer_type}\) is quantized.*'grad_norm'"):
        ArchitectureSearch(model, DiffoRAConfig(method="aletheia"), loss_fn=lambda model, batch: model(**batch).loss)


def test_a_probe_of_tensors_around_packed_ones_is_refused() -> None:
    """Without torchao: by what its tensors are, a class of their own that gives a dtype of floats and holds others."""
    tiny = llama()
    for module in tiny.model.model.layers.modules():
        if isinstance(module, nn.Linear):
            module.weight = Int8Weight.of(module.weight)
    model = get_peft_model(tiny.model, config_of(None))
    config, loss = DiffoRAConfig(method="aletheia"), lambda model, batch: model(**batch).loss
    assert loss(model, tiny.batch).isfinite()
    with pytest.raises(ValueError, match=r"q_proj' \(Linear\) is quantized.*'grad_norm'"):
        ArchitectureSearch(model, config, loss_fn=loss)
    search = ArchitectureSearch(model, DiffoRAConfig(method="synflow"), loss_fn=loss)
    search.begin()
    with pytest.raises(ValueError, match=r"q_proj.*weight' is of Int8Weight, as quantized weights are"):
        search.score([tiny.batch])


@pytest.mark.filterwarnings("ignore:Unsupported layer type", "ignore:.*get_apply_tensor_subclass")
@pytest.mark.parametrize("kind", KINDS)
def test_quantized_model(kind: str, folder: Path, tmp_path: Path) -> None:
    load, layer_type, peft_layer = KINDS[kind]
    base = prepare_model_for_kbit_training(load(folder), **NOT_REENTRANT)
    layers = {n: m for n, m in base.named_modules() if n.endswith("_proj")}
    assert {type(module).__name__ for module in layers.values()} == {layer_type}
    start = frozen(base)
    model = get_peft_model(base, config_of(peft_layer))
    search = ArchitectureSearch(model, DiffoRAConfig(), loss_fn=lambda model, batch: model(**batch).loss)
    assert len(search.grid) == 14
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    training, held_out = rows(1), rows(2)
    model.train()
    search.begin()
    for step in range(1, 9):
        search.draw_gates()
        model(**next(training)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step > 2:
            assert search.step(next(held_out)) is not None

    # What scales the output of `lora_A` scales `lora_B`, so the gates' gradient is an inner product of its weights.
    batch = next(held_out)
    _, gradient = search._gradient.first_order(batch, torch.ones(14))
    weights = [lora_layers(model, "default")[name].lora_B["default"].weight for name in search.grid.names]
    found = torch.autograd.grad(model(**batch).loss, weights)
    expected = torch.stack([(weight * grad).sum() for weight, grad in zip(weights, found, strict=True)])
    assert gradient.abs().max() > 1e-3
    assert torch.allclose(gradient, expected.detach(), rtol=1e-3, atol=1e-3 * float(expected.abs().max()))

    # The cut puts the very layers back, with not a bit changed, and the model is the one with closed gates.
    selection = search.select()
    closed = torch.tensor([float(kept) for kept in selection.kept])
    with torch.no_grad(), search.gates.override(closed):
        relaxed = model(**batch).logits
    apply_selection(model, search.finish(), optimizer)
    with torch.no_grad():
        logits = model(**batch).logits
    assert logits.equal(relaxed)
    for name in selection.dropped:
        assert model.get_submodule(f"base_model.model.{name}") is layers[name]
    for name in selection.selected:
        assert model.get_submodule(f"base_model.model.{name}").get_base_layer() is layers[name]
    assert type(layers[name]).__name__ == layer_type
    model.train()
    model(**next(training)).loss.backward()
    optimizer.step()
    assert_same(dict(sorted(frozen(model).items())), dict(sorted(start.items())))

    # The adapter is an ordinary one: PEFT puts it on the quantized model, and on the whole one.
    model.save_pretrained(tmp_path / "saved")
    fresh = prepare_model_for_kbit_training(load(folder), **NOT_REENTRANT)
    reloaded = PeftModel.from_pretrained(fresh, tmp_path / "saved", config=config_of(peft_layer, tmp_path / "saved"))
    assert set(lora_layers(reloaded, "default")) == set(selection.selected)
    with torch.no_grad():
        assert reloaded.train()(**batch).logits.equal(model(**batch).logits)
    whole = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(folder), tmp_path / "saved")
    assert_same(adapter(whole), adapter(model))


@pytest.mark.parametrize("options", [{"load_in_8bit": True}, NF4], ids=["8-bit", "4-bit"])
def test_sft_trainer_loads_and_searches_a_quantized_model(options: dict[str, Any], tmp_path: Path) -> None:
    """TRL loads the model by its name and makes the LoRA weights bf16. A resumed run is the same run."""
    causal_model().save_pretrained(tmp_path / "base")

    def build(folder: Path) -> DiffoRASFTTrainer:
        return DiffoRASFTTrainer(
            model=str(tmp_path / "base"),
            args=arguments(
                folder,
                SFTConfig,
                gradient_checkpointing="load_in_8bit" in options,  # without it, architecture steps are evaluations
                save_strategy="steps",
                save_steps=1000,
                model_init_kwargs={"quantization_config": BitsAndBytesConfig(**options)},
            ),
            train_dataset=lm_dataset(24),
            processing_class=tiny_tokenizer(),
            peft_config=lora(),
            diffora_config=search_config(),
            callbacks=[SaveAt()],
        )

    whole = build(tmp_path / "whole")
    start = frozen(whole.model)
    whole.train()
    assert {p.dtype for n, p in whole.model.named_parameters() if "lora_" in n} == {torch.bfloat16}
    assert all(math.isfinite(log["loss"]) for log in step_logs(whole).values())
    assert "diffora/gap" in step_logs(whole)[CUT]
    assert set(lora_layers(whole.model, "default")) == set(whole.selection.selected)
    assert_same(dict(sorted(frozen(whole.model).items())), dict(sorted(start.items())))
    for step in (5, 10):
        resumed = build(tmp_path / str(step))
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert resumed.selection == whole.selection
        assert_same(adapter(resumed.model), adapter(whole.model))


def test_default_of_prepare_model_is_refused_with_the_remedy(folder: Path, tmp_path: Path) -> None:
    """`prepare_model_for_kbit_training(model)` switches reentrant checkpointing on."""
    steps = Probe(lambda **kwargs: None)
    for options in ({}, NOT_REENTRANT):
        causal_model().save_pretrained(folder)
        model = prepare_model_for_kbit_training(bits(**NF4)(folder), **options)
        trainer = make_trainer(tmp_path, "sft", model=model, callbacks=[steps])
        if options:
            trainer.train()
            assert trainer.selection is not None
        else:
            with pytest.raises(ValueError, match=r"reentrant.*'use_reentrant': False.*prepare_model_for_kbit"):
                trainer.train()
            assert not steps.found
