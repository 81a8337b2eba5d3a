"""Shortcuts: nothing changes when they are put in, and then they compute what their formulas say."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from diffora_trainer import (
    ShortcutConfig,
    ShortcutModel,
    add_shortcuts,
    remove_shortcuts,
)
from diffora_trainer.experimental.shortcuts.shortcuts import KINDS, shortcuts
from helpers.checks import assert_same, snapshot
from helpers.models import ARCHITECTURES, bert, deberta_v2, gpt2, llama, opt, opt_post_norm, qwen, roberta, vit
from helpers.shortcuts import filled, gradients, hooks, result
from helpers.tiny_model import HIDDEN
from helpers.trainers import lora


MODELS = {f.__name__: f for f in (llama, qwen, opt, opt_post_norm, gpt2, bert, roberta, deberta_v2, vit)}
MODELS["moe"] = ARCHITECTURES["moe"]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("adapted", [False, True])
def test_fresh_shortcuts_change_no_bit_and_removed_ones_leave_no_trace(name: str, adapted: bool) -> None:
    tiny = MODELS[name]()
    model: nn.Module = tiny.model
    if adapted:
        router = {"target_modules": [], "target_parameters": ["mlp.gate.weight"]}
        model = get_peft_model(model, lora(**(router if name == "moe" else {})))
    before, found, names = snapshot(model), hooks(model), [n for n, _ in model.named_modules()]
    plain = {mode: result(model.train(mode), tiny.batch) for mode in (True, False)}
    count = sum(p.numel() for p in model.parameters())

    added = add_shortcuts(model, ShortcutConfig(r=3))

    assert len(added) == len(KINDS) * tiny.rows - 1, "the first layer has no layer before it"
    assert sum(p.numel() for p in model.parameters()) == count + 2 * 3 * HIDDEN * len(added)
    assert all(min(p.shape) == 3 for s in added.values() for p in s.parameters()), "no dense d x d tensor"
    for mode in (True, False):
        assert_same(result(model.train(mode), tiny.batch), plain[mode])
    for shortcut in added.values():
        nn.init.ones_(shortcut.B)
    assert not torch.equal(result(model, tiny.batch)["logits"], plain[False]["logits"])
    remove_shortcuts(model)
    assert_same(result(model, tiny.batch), plain[False])
    assert_same(snapshot(model), before)
    assert hooks(model) == found and [n for n, _ in model.named_modules()] == names


def by_hand(model: PreTrainedModel, ids: Tensor, deltas: dict[str, object]) -> Tensor:
    """The last hidden states from the formulas of the module's docstring. `deltas` holds the shortcuts that act."""
    added = {
        name: lambda v, s=s: 2.0 * (v @ s.A.T @ s.B.T)  # lora_alpha / r
        for name, s in deltas.items()
    }
    zero = torch.zeros_like
    if model.config.model_type == "llama":
        base, stack = model.model, "model.layers"
        x = base.embed_tokens(ids)
        place = torch.arange(ids.shape[1])[None]
        rotary = base.rotary_emb(x, place)
    elif model.config.model_type == "opt":
        base, stack = model.model.decoder, "model.decoder.layers"
        mask = torch.ones_like(ids)
        x = base.embed_tokens(ids) + base.embed_positions(mask, 0)
    else:
        base, stack = model.bert, "bert.encoder.layer"
        x = base.embeddings(ids)
    f = None
    for index, layer in enumerate(base.encoder.layer if stack.startswith("bert") else base.layers):

        def delta(kind: str, value: Tensor | None, index: int = index) -> Tensor:
            return added.get(f"{stack}.{index}.{kind}", zero)(value) if value is not None else 0

        extra = delta("residual1", x) + delta("shortcut2", f)
        if model.config.model_type == "llama":
            attended = layer.self_attn(layer.input_layernorm(x), position_embeddings=rotary, attention_mask=None)[0]
            f = x + attended + extra
            out = f + layer.mlp(layer.post_attention_layernorm(f)) + delta("residual2", f)
        elif model.config.model_type == "opt":
            f = layer.self_attn_layer_norm(x + layer.self_attn(x, attention_mask=None)[0] + extra)
            fed = layer.fc2(layer.fc1(f).relu())
            out = layer.final_layer_norm(f + fed + delta("residual2", f))
        else:
            attended = layer.attention.output.dense(layer.attention.self(x)[0])
            f = layer.attention.output.LayerNorm(x + attended + extra)
            fed = layer.output.dense(layer.intermediate(f))
            out = layer.output.LayerNorm(f + fed + delta("residual2", f))
        x = out + delta("shortcut1", x)
    return base.norm(x) if stack == "model.layers" else x


@pytest.mark.parametrize("make", [llama, bert, opt_post_norm])
@pytest.mark.parametrize("kinds", [*((kind,) for kind in KINDS), KINDS])
def test_each_kind_computes_its_formula(make: object, kinds: tuple[str, ...]) -> None:
    tiny = make()
    model = tiny.model.eval()
    clean, ids = copy.deepcopy(model), tiny.batch["input_ids"][:, :6]
    filled(model, ShortcutConfig(r=4, lora_alpha=8, kinds=kinds))
    expected = by_hand(clean, ids, shortcuts(model))
    found = model.base_model(ids).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        assert (found - by_hand(clean, ids, {})).abs().max() > 0.01, "the formula without shortcuts fits as well"
    # The gradient takes every path, through the shortcuts to the layers below too.
    weights = [p for s in shortcuts(model).values() for p in s.parameters()]
    direction = torch.linspace(-1, 1, found.numel()).view_as(found)
    for ours, theirs in zip(
        torch.autograd.grad((found * direction).sum(), [model.get_input_embeddings().weight, *weights]),
        torch.autograd.grad((expected * direction).sum(), [clean.get_input_embeddings().weight, *weights]),
        strict=True,
    ):
        assert ours.abs().sum() > 0
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_in_a_post_norm_layer_no_dropout_acts_on_a_shortcut() -> None:
    tiny = opt_post_norm()
    model = filled(tiny.model, ShortcutConfig(kinds=("residual1", "residual2"))).train()
    layer = model.model.decoder.layers[0]
    layer.dropout = 0.9
    seen: dict[str, Tensor] = {}
    layer.register_forward_pre_hook(lambda m, a: seen.update(residual1=a[0].detach()))
    layer.fc1.register_forward_pre_hook(lambda m, a: seen.update(residual2=a[0].detach()))
    layer.self_attn_layer_norm.register_forward_pre_hook(lambda m, a: seen.update(sum1=a[0].detach()))
    layer.final_layer_norm.register_forward_pre_hook(lambda m, a: seen.update(sum2=a[0].detach()))
    for number in (2, 1):  # the second first, so that what it reads is the same in both runs
        shortcut = shortcuts(model)[f"model.decoder.layers.0.residual{number}"]
        result(model, tiny.batch)
        read, sums = seen[f"residual{number}"], seen[f"sum{number}"]
        with torch.no_grad():
            delta = shortcut(read).view_as(sums)
            nn.init.zeros_(shortcut.B)
        result(model, tiny.batch)  # with the same masks
        torch.testing.assert_close(sums, seen[f"sum{number}"] + delta)


@pytest.mark.parametrize("make", [opt, gpt2, llama])
def test_a_pre_norm_layer_reads_the_residual_and_not_the_norm(make: object) -> None:
    # With A = B.T = e_0 the first shortcut of a layer adds 2 * x_0 to x_0 alone.
    tiny = make()
    model = tiny.model.eval()
    added = add_shortcuts(model, ShortcutConfig(r=1, lora_alpha=2, kinds=("residual1",)))
    name, shortcut = next(iter(added.items()))
    layer = model.get_submodule(name.removesuffix(".residual1"))
    norm = layer.get_submodule(
        {"opt": "final_layer_norm", "gpt2": "ln_2"}.get(make.__name__, "post_attention_layernorm")
    )
    seen: dict[str, Tensor] = {}
    layer.register_forward_pre_hook(
        lambda m, a, k: seen.update(x=(a[0] if a else k["hidden_states"]).clone()), with_kwargs=True
    )
    norm.register_forward_pre_hook(lambda m, a: seen.update(f=a[0].clone()))
    model(**tiny.batch)
    before = seen["f"].reshape(seen["x"].shape)
    with torch.no_grad():
        for parameter in shortcut.parameters():
            parameter.zero_().view(-1)[0] = 1.0
    model(**tiny.batch)
    expected = before.clone()
    expected[..., 0] += 2 * seen["x"][..., 0]
    torch.testing.assert_close(seen["f"].reshape(before.shape), expected)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "opt_post_norm"])
def test_training_moves_the_shortcuts_alone(name: str) -> None:
    tiny = MODELS[name]()
    model = ShortcutModel(tiny.model, ShortcutConfig(r=4))
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    before = snapshot(model)
    optimizer = torch.optim.AdamW(trained.values(), lr=0.01)
    losses = []
    for _ in range(6):
        loss = model.eval()(**tiny.batch).loss
        found = gradients(model, loss)
        losses.append(loss.item())
        if len(losses) == 2:  # B has left zero
            assert set(found) == set(trained) and all(g.abs().sum() > 0 for g in found.values())
        optimizer.step()
    assert losses[-1] < losses[0]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) != (name in trained), name


@pytest.mark.parametrize("name", MODELS)
def test_gradient_checkpointing_gives_the_same_gradients(name: str) -> None:
    # Two batches are in flight at once: each recomputation must read what its own forward read.
    tiny = MODELS[name]()
    model = filled(tiny.model).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.1
    other = {k: v.flip(0).roll(1, -1) if v.dim() > 1 else v for k, v in tiny.batch.items()}
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        functions = [getattr(m, "_gradient_checkpointing_func", None) for m in model.modules()]
        torch.manual_seed(0)
        first, second = model(**tiny.batch).loss, model(**other).loss
        with torch.no_grad():
            model(**other)
        found.append(gradients(model, first, second))
        assert functions == [getattr(m, "_gradient_checkpointing_func", None) for m in model.modules()]
    assert found[1].keys() == found[0].keys() and any("diffora_shortcuts" in key for key in found[0])
    for key, gradient in found[0].items():  # to rounding: the sum of the two passes may be taken in another order
        torch.testing.assert_close(found[1][key], gradient, rtol=1e-4, atol=1e-6, msg=key)


def test_checkpointing_that_would_lose_a_gradient_is_refused() -> None:
    tiny = llama()
    model = filled(tiny.model).train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="use_reentrant"):
        model(**tiny.batch)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert gradients(model, model(**tiny.batch).loss), "the refusal has left the model unusable"

    # Checkpointing around a layer from outside recomputes it without the layer before.
    model.gradient_checkpointing_disable()
    layer = model.model.layers[1]
    called = layer.__call__
    wrapped = nn.Module.__call__
    model.model.layers[1] = outer = nn.Module()
    outer.forward = lambda *a, **k: torch.utils.checkpoint.checkpoint(wrapped, layer, *a, use_reentrant=False, **k)
    assert called is not None
    with pytest.raises(RuntimeError, match="only that of transformers"):
        gradients(model, model(**tiny.batch).loss)


def test_generation_with_a_cache_gives_what_it_gives_without() -> None:
    tiny = llama()
    model = filled(tiny.model).eval()
    settings = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones(2, 5, dtype=torch.long)}
    ids = tiny.batch["input_ids"][:2, :5]
    assert torch.equal(
        model.generate(ids, use_cache=True, **settings), model.generate(ids, use_cache=False, **settings)
    )


def test_switched_off_adapters_switch_off_the_shortcuts() -> None:
    tiny = llama()
    plain = result(tiny.model.eval(), tiny.batch)
    model = filled(get_peft_model(tiny.model, lora())).eval()
    assert not torch.equal(result(model, tiny.batch)["logits"], plain["logits"])
    with model.disable_adapter():
        assert_same(result(model, tiny.batch), plain)


def test_a_copied_model_has_shortcuts_of_its_own() -> None:
    tiny = llama()
    model = filled(tiny.model, ShortcutConfig(kinds=("residual1", "shortcut2"))).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model(**tiny.batch).loss.backward()  # recomputed up to the last thing that is needed, not to the end
    model.gradient_checkpointing_disable()
    model.disable_input_require_grads()  # a hook that cannot be pickled
    for twin in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert_same(result(twin.eval(), tiny.batch), result(model.eval(), tiny.batch))
    expected = result(model, tiny.batch)
    remove_shortcuts(model)
    assert_same(result(twin, tiny.batch), expected)
    remove_shortcuts(twin)
    assert_same(result(twin, tiny.batch), result(model, tiny.batch))
    assert not hooks(twin)


def test_shortcuts_follow_the_data_type_of_their_layer() -> None:
    tiny = llama()
    model = tiny.model.to(torch.bfloat16).eval()
    plain = result(model, tiny.batch)
    added = add_shortcuts(model)
    assert {p.dtype for s in added.values() for p in s.parameters()} == {torch.bfloat16}
    assert_same(result(model, tiny.batch), plain)
    for shortcut in added.values():
        shortcut.float()  # as PEFT holds its own
        nn.init.ones_(shortcut.B)
    assert result(model, tiny.batch)["logits"].dtype == torch.bfloat16
