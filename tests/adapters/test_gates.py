"""Gates on live modules, and the models that they cannot be put on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from safetensors import safe_open
from torch import Tensor, nn

from diffora_trainer.adapters.gates import Gates
from diffora_trainer.adapters.grid import AdapterGrid
from diffora_trainer.adapters.pruning import apply_selection
from helpers.adapted import random_selection
from helpers.models import bert, llama


def gated(dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Any, dict[str, Tensor], Gates]:
    tiny = llama()
    torch.manual_seed(1)
    config = LoraConfig(**{"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options})
    model = get_peft_model(tiny.model, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.2)
    model.to(dtype)
    return model, tiny.batch, Gates(AdapterGrid.from_model(model).sites)


def loss(model: nn.Module, batch: dict[str, Tensor]) -> float:
    with torch.no_grad():
        return float(model(**batch).loss)


def test_mode_says_which_gates_apply() -> None:
    model, batch, gates = gated()
    stock = loss(model, batch)
    assert not gates.attached
    gates.set_training(torch.zeros(14))
    gates.set_evaluation(torch.full((14,), 0.5))
    assert loss(model.eval(), batch) == stock  # not attached yet
    gates.attach()
    gates.attach()  # a second time must not gate twice
    half, off = loss(model.eval(), batch), loss(model.train(), batch)
    assert len({stock, half, off}) == 3
    with model.disable_adapter():
        assert loss(model, batch) == pytest.approx(off, abs=1e-6)
    with pytest.raises(RuntimeError), gates.override(torch.ones(14)):
        assert loss(model.train(), batch) == loss(model.eval(), batch) == stock
        with gates.override(torch.zeros(14)):
            assert loss(model, batch) == off
        assert loss(model, batch) == stock
        raise RuntimeError
    assert loss(model.eval(), batch) == half  # the override is over
    gates.detach()
    assert not gates.attached and loss(model, batch) == stock


def test_gates_leave_no_trace_in_the_model(tmp_path: Path) -> None:
    model, _, gates = gated()
    keys, buffers = set(model.state_dict()), [name for name, _ in model.named_buffers()]
    hooks = sum(len(module._forward_hooks) for module in model.modules())
    gates.attach()
    gates.set_training(torch.rand(14))
    gates.set_evaluation(torch.rand(14))
    assert set(model.state_dict()) == keys and [name for name, _ in model.named_buffers()] == buffers
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        names = list(file.keys())
    assert len(names) == 28 and all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in names)
    gates.detach()
    assert sum(len(module._forward_hooks) for module in model.modules()) == hooks


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradient_of_a_half_precision_model_is_float32(dtype: torch.dtype) -> None:
    gradients = []
    for kind in (torch.float32, dtype):
        model, batch, gates = gated(kind)
        gates.attach()
        values = torch.full((14,), 0.5, requires_grad=True)
        outputs: list[torch.dtype] = []
        layer = model.base_model.model.model.layers[0].self_attn.q_proj
        layer.lora_B["default"].register_forward_pre_hook(lambda _, args, seen=outputs: seen.append(args[0].dtype))
        with gates.override(values):
            (gradient,) = torch.autograd.grad(model.eval()(**batch).loss, values)
        assert gradient.dtype == torch.float32 and outputs == [kind]
        gradients.append(gradient)
    exact, half = gradients
    assert torch.nn.functional.cosine_similarity(exact, half, dim=0) > 0.98
    # Numbers that were rounded to half precision anywhere after the sum would come back from it unchanged.
    assert not half.equal(half.to(dtype).float())


def test_activation_checkpointing_gives_the_same_gradient() -> None:
    found = []
    for checkpointing in (False, True):
        model, batch, gates = gated()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        gates.attach()
        values = torch.linspace(0, 1, 14).requires_grad_()
        with gates.override(values):
            found.append(torch.autograd.grad(model.train()(**batch).loss, values)[0])
    assert found[0].abs().max() > 1e-3 and torch.allclose(found[0], found[1], atol=1e-6)


def test_shapes_tell_who_can_share() -> None:
    model, _, _ = gated()
    shapes = [site.shape for site in AdapterGrid.from_model(model).sites]
    q, k, v, o, gate, up, down = shapes[:7]
    assert q == o and k == v and gate == up and shapes[7:] == shapes[:7]
    assert len({q, k, gate, down}) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alora_invocation_tokens": [3]}, "`alora_invocation_tokens`.*plain LoRA"),
        ({"lora_bias": True}, "`lora_bias=True`.*`lora_bias=False`"),
        ({"bias": "lora_only"}, "`bias='lora_only'`.*`bias='none'`"),
        ({"init_lora_weights": "pissa_niter_2"}, "`init_lora_weights='pissa_niter_2'`.*`init_lora_weights='pissa'`"),
    ],
)
def test_variants_that_a_gate_cannot_scale_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gated(**options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: model.merge_adapter(), "merged.*unmerge_adapter"),
        (lambda model: model.base_model.disable_adapter_layers(), "disabled.*enable_adapter_layers"),
        (lambda model: model.requires_grad_(False), "frozen.*is_trainable=True"),
        (
            lambda model: (
                model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
                or model.base_model.set_adapter(["default", "second"])
            ),
            "2 active adapters.*set_adapter",
        ),
    ],
)
def test_states_that_cannot_be_searched_are_refused(change: Any, message: str) -> None:
    model, _, _ = gated()
    change(model)
    with pytest.raises(ValueError, match=message):
        AdapterGrid.from_model(model)


def test_the_named_adapter_has_to_be_the_only_active_one() -> None:
    """Where it is pruned, or off, another one beside it would be off too."""
    model, _, _ = gated()
    selection = random_selection(AdapterGrid.from_model(model).grid)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    before = list(model.named_parameters())
    for active in (["default", "other"], ["other"]):
        model.base_model.set_adapter(active)
        for parameter_name, parameter in model.named_parameters():
            parameter.requires_grad_(".default." in parameter_name)
        message = f"{len(active)} active adapters.*'default' alone.*set_adapter\\('default'\\).*merge_and_unload"
        with pytest.raises(ValueError, match=message):
            AdapterGrid.from_model(model, "default")
        with pytest.raises(ValueError, match=message):
            apply_selection(model, selection, adapter_name="default")
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in before]
    model.set_adapter("default")
    assert AdapterGrid.from_model(model, "default").grid.names == selection.grid.names


def test_other_models_are_refused() -> None:
    with pytest.raises(TypeError, match="got LlamaForCausalLM.*get_peft_model"):
        AdapterGrid.from_model(llama().model)
    model = get_peft_model(bert().model, IA3Config(target_modules=["query"], feedforward_modules=[]))
    with pytest.raises(TypeError, match="IA3Config.*LoraConfig"):
        AdapterGrid.from_model(model)
