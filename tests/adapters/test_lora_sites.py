"""Kinds of LoRA beside the plain one: gates scale their whole effect, and what is pruned is the pre-trained model."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftModel, VeraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from diffora_trainer.adapters.base import find_sites
from diffora_trainer.adapters.gates import Gates, pruned_view
from diffora_trainer.adapters.grid import AdapterGrid
from diffora_trainer.adapters.lora import check_lora_config
from diffora_trainer.adapters.pruning import apply_selection
from diffora_trainer.compat.peft import PLAIN_STARTS, SUBTRACTED_STARTS, lora_start
from helpers.adapted import VERA_TARGETS, base_weights, logits, lora_layers, random_selection
from helpers.models import MOE_PARAMETERS, gpt2, llama, moe
from helpers.tiny_model import TinyModel


class Convolved(nn.Module):
    """Two convolutions and a linear layer, as vision models have them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 6, 3, padding=1)
        self.head = nn.Linear(6, 4)

    def forward(self, pixels: Tensor, labels: Tensor | None = None) -> Any:
        scores = self.head(self.second(torch.tanh(self.first(pixels))).mean((2, 3)))
        found: Any = type("Output", (), {})()
        found.logits = scores
        found.loss = None if labels is None else nn.functional.cross_entropy(scores, labels)
        return found


def convolved() -> Any:
    torch.manual_seed(0)
    batch = {"pixels": torch.randn(4, 3, 5, 5), "labels": torch.arange(4)}
    return TinyModel(Convolved(), batch, ["first", "second", "head"], None, rows=0, kinds=0)  # type: ignore[arg-type]


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "rsLoRA": (llama, {"use_rslora": True, "r": 6}),
    "DoRA": (llama, {"use_dora": True}),
    "DoRA with dropout": (llama, {"use_dora": True, "lora_dropout": 0.3}),
    "DoRA of Conv1D": (gpt2, {"use_dora": True}),
    "DoRA of convolutions": (convolved, {"use_dora": True}),
    "embeddings": (llama, {"target_modules": ["embed_tokens", "q_proj", "down_proj"]}),
    "fused experts": (moe, {"target_modules": ["q_proj"], "target_parameters": MOE_PARAMETERS}),
    "experts and a router": (moe, {"target_modules": [], "target_parameters": [*MOE_PARAMETERS, "mlp.gate.weight"]}),
    "LoHa": (llama, {"type": LoHaConfig, "alpha": 8}),
    "LoKr": (llama, {"type": LoKrConfig, "alpha": 8}),
    "LoHa of convolutions": (
        convolved,
        {"type": LoHaConfig, "use_effective_conv2d": True, "target_modules": ["first", "second"], "std": 0.4},
    ),
    "VeRA": (
        llama,
        {"type": VeraConfig, "target_modules": VERA_TARGETS, "vera_dropout": 0.1, "d_initial": 1.0, "r": 32},
    ),
    "PiSSA": (llama, {"init_lora_weights": "pissa", "lora_alpha": 8}),
    "PiSSA with rsLoRA": (llama, {"init_lora_weights": "pissa", "use_rslora": True, "lora_dropout": 0.3}),
    "PiSSA of Conv1D": (  # some of them square, so that a transposed update fits too
        gpt2,
        {"init_lora_weights": "pissa", "lora_alpha": 8, "target_modules": r".*h\.0\.mlp\.c_fc|.*attn\.c_proj"},
    ),
    "OLoRA": (llama, {"init_lora_weights": "olora", "lora_alpha": 8}),
}


def make(case: str) -> tuple[TinyModel, Any]:
    """A model, and the same with an adapter that was trained a little."""
    build, options = CASES[case]
    tiny = build()
    torch.manual_seed(1)
    options = dict(options)
    spread = options.pop("std", None)
    settings = {"r": 4, "target_modules": tiny.target_modules, "task_type": tiny.task_type, **options}
    model = get_peft_model(copy.deepcopy(tiny.model), settings.pop("type", LoraConfig)(**settings))
    AdapterGrid.from_model(model)  # before the first step, as each run reads it
    rate = 5.0 if build is convolved else 0.05
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=rate)
    for _ in range(3):
        model(**tiny.batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    if spread is not None:  # its gradients are too small for a few steps
        for parameter in (p for p in model.parameters() if p.requires_grad):
            nn.init.normal_(parameter, std=spread)
    return tiny, model.eval()


@pytest.mark.parametrize("case", CASES)
def test_a_gate_scales_the_whole_effect(case: str) -> None:
    tiny, model = make(case)
    stock = logits(model, tiny)
    sites = AdapterGrid.from_model(model).sites
    gates = Gates(sites)
    gates.attach()
    assert torch.equal(logits(model, tiny), stock)
    ones, zeros = torch.ones(len(sites)), torch.zeros(len(sites))
    with gates.override(ones):
        torch.testing.assert_close(logits(model, tiny), stock, atol=1e-5, rtol=1e-5)
    tiny.model.eval()
    with gates.override(zeros):
        torch.testing.assert_close(logits(model, tiny), logits(tiny.model, tiny), atol=1e-5, rtol=1e-5)
    assert (stock - logits(tiny.model, tiny)).abs().max() > 1e-2

    # The gradient of each gate against the difference of the losses, where it is not open.
    values = torch.linspace(0.25, 0.75, len(sites)).requires_grad_()
    with gates.override(values):
        (gradient,) = torch.autograd.grad(model(**tiny.batch).loss, values)
    width = 2.0**-5

    def moved(index: int, steps: int) -> float:
        there = values.detach().clone()
        there[index] += steps * width
        with torch.no_grad(), gates.override(there):
            return float(model(**tiny.batch).loss)

    for index in range(len(sites)):
        slope = (8 * (moved(index, 1) - moved(index, -1)) - moved(index, 2) + moved(index, -2)) / (12 * width)
        assert float(gradient[index]) == pytest.approx(slope, rel=1e-2, abs=3e-4)
    assert (gradient.abs() > 1e-3).any()
    gates.detach()
    torch.testing.assert_close(logits(model, tiny), stock)


@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith(("PiSSA", "OLoRA"))])
def test_what_is_folded_is_what_was_gated(case: str) -> None:
    tiny, model = make(case)
    sites = AdapterGrid.from_model(model).sites
    gates = Gates(sites)
    gates.attach()
    values = torch.linspace(0.1, 0.9, len(sites))
    with gates.override(values):
        gated = logits(model, tiny)
    gates.detach()
    assert not torch.allclose(logits(model, tiny), gated, atol=1e-3)
    for site, factor in zip(sites, values.tolist(), strict=True):
        site.fold(factor)
    torch.testing.assert_close(logits(model, tiny), gated, atol=1e-5, rtol=1e-5)


# PEFT's gradient of a LoHa of convolutions is not that of what it computes, so it is in no proportion to a gate.
@pytest.mark.parametrize(
    "case", [case for case in CASES if not case.startswith(("PiSSA", "OLoRA", "LoHa of convolutions"))]
)
def test_moments_follow_what_is_folded(case: str) -> None:
    """The moments of one step under gates are then those of one step without: of all parameters of a site."""
    tiny, model = make(case)
    sites = AdapterGrid.from_model(model).sites
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)
    gates = Gates(sites)
    gates.attach()
    with gates.override(torch.linspace(0.2, 0.8, len(sites))):
        model(**tiny.batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    gates.detach()
    for site, factor in zip(sites, torch.linspace(0.2, 0.8, len(sites)).tolist(), strict=True):
        site.fold(factor)
        site.rescale_moments(optimizer)
        site.rescale_moments(optimizer)  # there is nothing left to do
    model(**tiny.batch).loss.backward()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        found, expected = optimizer.state[parameter], parameter.grad
        assert expected is not None
        if "magnitude" in name:  # of DoRA, where it holds while the norms stay what they are
            assert (10 * found["exp_avg"] - expected).norm() < 0.5 * expected.norm()
            continue
        for moment, value in (("exp_avg", expected / 10), ("exp_avg_sq", expected.square() / 1000)):
            assert (found[moment] - value).norm() <= 1e-3 * value.norm() + 1e-12, name


@pytest.mark.parametrize("case", CASES)
def test_what_is_pruned_is_the_pre_trained_model_and_the_rest_is_stock(case: str, tmp_path: Path) -> None:
    tiny, model = make(case)
    adapters = AdapterGrid.from_model(model)
    numbers = {site.name: sum(p.numel() for p in site.parameters) for site in adapters.sites}
    assert dict(zip(adapters.grid.names, adapters.grid.parameters, strict=True)) == numbers
    assert sum(numbers.values()) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    selection = random_selection(adapters.grid, count=max(2, len(adapters.grid) // 2))
    selection = dataclasses.replace(selection, factors=())
    kept = [index for index, keep in enumerate(selection.kept) if keep]
    with pruned_view(model, adapters.sites, kept):
        assert {p for i in kept for p in adapters.sites[i].parameters} == {
            p for p in model.parameters() if p.requires_grad
        }
        viewed = logits(model, tiny)
    gates = Gates(adapters.sites)
    gates.attach()
    gates.set_evaluation(torch.tensor(selection.kept).float())
    faded = logits(model, tiny)
    gates.detach()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    model(**tiny.batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    with pruned_view(model, adapters.sites, kept):
        stepped = logits(model, tiny)

    apply_selection(model, selection, optimizer)
    pruned = logits(model, tiny)
    torch.testing.assert_close(viewed, faded, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(pruned, stepped, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(viewed, pruned, atol=1e-3)
    assert set(find_sites(model, "default")) == set(selection.selected)
    trained = {p for p in model.parameters() if p.requires_grad}
    assert {p for group in optimizer.param_groups for p in group["params"]} == trained
    assert sum(p.numel() for p in trained) == selection.trainable_parameters
    pre_trained, left = base_weights(tiny.model), base_weights(model)
    started = "init_lora_weights" in CASES[case][1]
    for name, weight in pre_trained.items():
        if not (started and name.removesuffix(".weight") in selection.selected):
            torch.testing.assert_close(left[name], weight, atol=1e-6 if started else 0, rtol=0)

    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(tiny.model), tmp_path).eval()
    assert set(find_sites(loaded, "default")) == set(selection.selected)
    torch.testing.assert_close(logits(loaded, tiny), pruned, atol=1e-5 if started else 0, rtol=0)


def test_gates_of_embeddings_leave_another_adapter_alone() -> None:
    """As DPO's reference, which is made the active one for a while."""
    tiny, model = make("embeddings")
    sites = AdapterGrid.from_model(model).sites
    model.add_adapter("other", LoraConfig(r=2, target_modules=CASES["embeddings"][1]["target_modules"]))
    for name, parameter in model.named_parameters():
        if "lora_embedding_A.other" in name:  # PEFT starts it at 0
            nn.init.normal_(parameter, std=0.3)
    model.set_adapter("other")
    expected = logits(model, tiny)
    assert not torch.allclose(expected, logits(tiny.model.eval(), tiny), atol=1e-2)
    gates = Gates(sites)
    gates.attach()
    with gates.override(torch.zeros(len(sites))):
        assert logits(model, tiny).equal(expected)
        model.set_adapter("default")
        torch.testing.assert_close(logits(model, tiny), logits(tiny.model, tiny), atol=1e-5, rtol=1e-5)


def test_a_smaller_rank_keeps_the_scaling_of_rslora(tmp_path: Path) -> None:
    """`lora_alpha` goes with the root of the rank there."""
    tiny, model = make("rsLoRA")
    grid = AdapterGrid.from_model(model).grid
    selection = random_selection(grid)
    ranks = tuple(min(rank, 2 + index % 3) for index, rank in enumerate(selection.ranks))
    selection = dataclasses.replace(selection, factors=(), ranks=ranks)
    scaling = {name: site.layer.scaling["default"] for name, site in find_sites(model, "default").items()}  # type: ignore
    left = dict(zip(selection.modules, ranks, strict=True))
    expected = {}
    for name, site in find_sites(model, "default").items():
        a, b = (parameter.detach() for parameter in site.parameters)
        expected[name] = scaling[name] * b[:, : left[name]] @ a[: left[name]]
    apply_selection(model, selection)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(tiny.model), tmp_path).eval()
    assert loaded.peft_config["default"].use_rslora
    for name in selection.selected:
        layer: Any = loaded.get_submodule(f"base_model.model.{name}")
        assert layer.r["default"] == left[name]
        torch.testing.assert_close(layer.get_delta_weight("default"), expected[name])
    torch.testing.assert_close(logits(loaded, tiny), logits(model, tiny))


def test_it_is_known_of_each_start_what_it_does_to_the_base_weights() -> None:
    """Each is in a table, or refused; what PEFT takes in other letters is the same start."""
    texts = [name for hint in get_args(get_type_hints(LoraConfig)["init_lora_weights"]) for name in get_args(hint)]
    assert len(texts) > 5
    for text in (*texts, "Gaussian", "OLoRA"):
        config = LoraConfig(init_lora_weights=True)
        config.init_lora_weights = text
        if lora_start(config) in (*PLAIN_STARTS, *SUBTRACTED_STARTS):
            check_lora_config(config)
        else:
            with pytest.raises(ValueError, match="init_lora_weights="):
                check_lora_config(config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init_lora_weights": "pissa_niter_4"}, "random approximation.*`init_lora_weights='pissa'`"),
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}, "quantizes.*BitsAndBytesConfig"),
        ({"init_lora_weights": "corda"}, "computed from data.*'pissa'"),
        ({"init_lora_weights": "mica"}, "variant MiCALinearVariant.*plain LoRA"),
        ({"use_dora": True, "target_modules": ["embed_tokens", "q_proj"]}, "embed_tokens.*in place.*exclude_modules"),
        (
            {"use_dora": True, "init_lora_weights": "pissa"},
            "starts as a part.*of a variant such as DoRA.*init_lora_weights=True",
        ),
        (
            {"use_dora": True, "init_lora_weights": "olora"},
            "starts as a part.*of a variant such as DoRA.*init_lora_weights=True",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_exact_is_refused(options: dict[str, Any], message: str) -> None:
    if options.get("init_lora_weights") == "mica" and not hasattr(LoraLayer, "mica_init"):
        pytest.skip("this PEFT has no MiCA")
    model = get_peft_model(llama().model, LoraConfig(**{"r": 4, "target_modules": "all-linear"}))
    if options.get("init_lora_weights") in ("pissa_niter_4", "mica") or "use_dora" in options:
        model = get_peft_model(llama().model, LoraConfig(**{"r": 4, "target_modules": "all-linear", **options}))
    else:  # those need more than a model to be made
        for name, value in options.items():
            setattr(model.peft_config["default"], name, value)
    with pytest.raises(ValueError, match=message):
        AdapterGrid.from_model(model)


def test_attention_of_pytorch_is_refused() -> None:
    model = nn.Sequential(nn.MultiheadAttention(8, 2), nn.Linear(8, 8))
    adapted: Any = get_peft_model(model, LoraConfig(r=2, target_modules=["0", "1"]))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'0' cannot be gated.*moves by a rounding.*exclude_modules"):
        AdapterGrid.from_model(adapted)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_start_that_cannot_be_given_back_is_refused(init: str, tmp_path: Path) -> None:
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=init)
    with pytest.raises(ValueError, match="float32.*init_lora_weights=True"):
        AdapterGrid.from_model(get_peft_model(llama().model.to(torch.bfloat16), config))
    case = {"pissa": "PiSSA", "olora": "OLoRA"}[init]
    tiny, model = make(case)
    model.save_pretrained(tmp_path)
    trained = PeftModel.from_pretrained(tiny.model, tmp_path, is_trainable=True)
    with pytest.raises(ValueError, match="the adapter has to be new"):
        AdapterGrid.from_model(trained)
    selection = random_selection(AdapterGrid.from_model(make("rsLoRA")[1]).grid)
    ranks = tuple(min(rank, 4) for rank in selection.ranks)
    sites = tuple(dataclasses.replace(site, rank=4) for site in selection.grid.sites)
    grid = dataclasses.replace(selection.grid, sites=sites)
    with pytest.raises(ValueError, match="cannot be pruned.*the adapter has to be new"):
        apply_selection(trained, dataclasses.replace(selection, grid=grid, ranks=ranks, factors=()))
    with pytest.raises(ValueError, match="`torch_compile`.*StartedSite"):
        Gates(list(find_sites(model, "default").values()), compiled=True)
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="another adapter on its layer would lose"):
        AdapterGrid.from_model(model)


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("targets", [["down_proj"], ["layers.0.mlp.down_proj"]])
def test_a_start_taken_out_of_a_weight_of_two_layers_is_refused(init: str, targets: list[str]) -> None:
    base = llama().model
    first, second = (layer.mlp.down_proj for layer in base.model.layers[:2])
    first.weight = second.weight
    model = get_peft_model(base, LoraConfig(r=2, target_modules=targets, init_lora_weights=init))
    message = "layers.0.mlp.down_proj' cannot be gated.*also that of 'model.layers.1.mlp.down_proj'.*weights=True"
    with pytest.raises(ValueError, match=message):
        AdapterGrid.from_model(model)


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_start_that_says_it_is_plain_lora_is_refused(init: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """PEFT's conversion of such adapters has the flag set to True while the start is saved."""
    # PEFT's OLoRA does not know the transposed weights of GPT-2.
    for alpha, build in ((4, gpt2 if init == "pissa" else llama), (8, llama)):
        config = LoraConfig(r=4, lora_alpha=alpha, target_modules="all-linear", init_lora_weights=init)
        model = get_peft_model(build().model.to(dtype), config)
        model.peft_config["default"].init_lora_weights = True
        message = f"taken out of its base weight.*\\['default'\\].init_lora_weights = '{init}'.*pre-trained one"
        with pytest.raises(ValueError, match=message):
            AdapterGrid.from_model(model)
    model.save_pretrained(tmp_path)
    residual = PeftModel.from_pretrained(model.unload(), tmp_path, is_trainable=True)
    with pytest.raises(ValueError, match=message):
        AdapterGrid.from_model(residual)


def test_plain_lora_is_never_taken_for_a_start() -> None:
    for rank in (1, 4):
        for init in (True, False, "gaussian", "orthogonal")[: 3 if rank == 1 else None]:
            options: Any = {"r": rank, "target_modules": "all-linear", "init_lora_weights": init}
            tiny = llama()
            model = get_peft_model(tiny.model, LoraConfig(**options))
            optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
            for _ in range(3):
                AdapterGrid.from_model(model)
                model(**tiny.batch).loss.backward()
                optimizer.step()
            for layer in lora_layers(model, "default").values():  # of the lengths that PiSSA would give it
                a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
                b.data = torch.linalg.qr(b.data)[0] @ torch.linalg.cholesky((a @ a.T).detach()).T
            AdapterGrid.from_model(model)
