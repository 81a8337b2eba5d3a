"""Each method with each kind of adapter: what works keeps whole modules, and the rest is refused before a step."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, VeraConfig, get_peft_model
from torch import Tensor, nn

from diffora_trainer import LoraXS, PRoLoRA, SelectionRun
from helpers.models import llama, moe
from helpers.options import make_config
from helpers.searches import components, make_search, make_steps, model_loss


class Block(nn.Module):
    """Convolutions of one to three dimensions, one of them in groups."""

    def __init__(self) -> None:
        super().__init__()
        self.plane = nn.Conv2d(4, 4, 3, stride=1, padding=1)
        self.grouped = nn.Conv2d(4, 4, 3, padding="same", groups=2)
        self.line = nn.Conv1d(4, 4, 3, padding=1)
        self.space = nn.Conv3d(1, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.tanh(self.grouped(self.plane(x)))
        x = x + self.line(x.flatten(2)).view_as(x)
        return x + self.space(x[:, None])[:, 0]


class Attended(nn.Module):
    """Layers of PyTorch's own, whose attention reads the weight of `out_proj` and never calls it."""

    def __init__(self) -> None:
        super().__init__()
        layers = (nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0) for _ in range(2))
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(16, 2)

    def forward(self, states: Tensor, labels: Tensor) -> Any:
        for layer in self.layers:
            states = layer(states)
        return SimpleNamespace(loss=nn.functional.cross_entropy(self.head(states.mean(1)), labels))


class Convolved(nn.Module):
    """Numbered layers that hand on images."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(4, 3)

    def forward(self, pixels: Tensor, labels: Tensor) -> Any:
        for layer in self.layers:
            pixels = layer(pixels)
        found: Any = type("Output", (), {})()
        found.logits = self.head(pixels.mean((2, 3)))
        found.loss = nn.functional.cross_entropy(found.logits, labels)
        return found


def convolved(targets: tuple[str, ...] = ("plane", "line", "space"), **options: Any) -> tuple[Any, list[Any]]:
    torch.manual_seed(0)
    model = get_peft_model(Convolved(), LoraConfig(r=2, target_modules=list(targets), **options))  # type: ignore
    return model, [{"pixels": torch.randn(3, 4, 5, 5), "labels": torch.arange(3)} for _ in range(3)]


def language(config: Any = None, tiny: Any = llama, form: Any = None, **options: Any) -> tuple[Any, list[Any]]:
    built = tiny()
    settings = {"r": 2, "target_modules": ["q_proj", "up_proj"], **options}
    torch.manual_seed(1)
    model = get_peft_model(built.model, (config or LoraConfig)(**settings))
    if form is not None:
        form.attach(model)
    return model, [{key: value[[i, i + 1, i]] for key, value in built.batch.items()} for i in range(3)]


KINDS: dict[str, Callable[[], tuple[Any, list[Any]]]] = {
    "LoRA": language,
    "DoRA": lambda: language(use_dora=True),
    "PiSSA": lambda: language(init_lora_weights="pissa"),
    "embeddings": lambda: language(target_modules=["q_proj", "embed_tokens"]),
    "experts": lambda: language(
        tiny=moe, target_modules=["q_proj"], target_parameters=["experts.down_proj", "mlp.gate.weight"]
    ),
    "convolutions": convolved,
    "grouped": lambda: convolved(("grouped", "line")),
    "DoRA of convolutions": lambda: convolved(("plane", "line"), use_dora=True),
    "LoHa": lambda: language(LoHaConfig),
    "LoKr": lambda: language(LoKrConfig),
    "VeRA": lambda: language(VeraConfig),
    "LoRA-XS": lambda: language(form=LoraXS()),
    "PRoLoRA": lambda: language(form=PRoLoRA(chunks=2, unshared=1)),
    "PRoLoRA without rest": lambda: language(form=PRoLoRA(chunks=2, unshared=0)),
}
METHODS = ("adalora", "eva", "prilora", "gelora", "alora", "sora", "beamlora", "cka", "aletheia", "synflow")
MATRICES = "has no such pair of trained matrices"
WITHOUT_MATRICES = ("experts", "grouped", "LoHa", "LoKr", "VeRA", "LoRA-XS", "PRoLoRA", "PRoLoRA without rest")
IMAGES = ("convolutions", "DoRA of convolutions")
REFUSED: dict[tuple[str, str], str] = {
    **{(m, kind): MATRICES for m in ("adalora", "eva", "prilora", "gelora") for kind in WITHOUT_MATRICES},
    **{(method, "embeddings"): "is an embedding, which reads indices" for method in ("eva", "prilora")},
    **{(method, "PiSSA"): "needs twice its rank" for method in ("sora", "beamlora")},
    **{(method, kind): "not states of shape" for method in ("gelora", "cka") for kind in IMAGES},
    ("cka", "grouped"): "not states of shape",
    **{("synflow", kind): "has no token embeddings" for kind in (*IMAGES, "grouped")},
    ("synflow", "embeddings"): "nothing passes through",
}


def start(method: str, kind: str, **options: Any) -> tuple[SelectionRun, Any, list[Any], Any]:
    model, batches = KINDS[kind]()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3)
    ratio = {"beamlora": 1.0}.get(method, 0.5)
    settings = {"selection_ratio": ratio, "selection_scope": "model", "discretize_at": 3, **options}
    config = make_config(method=method, **settings)
    return SelectionRun(model, optimizer, config, model_loss, batches, total_steps=4), model, batches, optimizer


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_each_pair_works_or_is_refused_before_the_first_step(method: str, kind: str) -> None:
    if (method, kind) in REFUSED:
        with pytest.raises(ValueError, match=f"(?s){REFUSED[method, kind]}.*Please"):
            start(method, kind)[0].begin()
        return
    run, model, batches, optimizer = start(method, kind)
    make_steps(run, model, batches, optimizer, 4)
    assert run.selection is not None and any(run.selection.kept)
    assert not [note for note in run.selection.notes if "never called" in note]
    if kind != "LoRA":
        assert not run.selection.in_ranks


@pytest.mark.parametrize("method", ["prilora", "cka", "gelora", "eva", "alora", "aletheia", "adalora", "sora"])
def test_modules_that_are_never_called_are_told(method: str) -> None:
    torch.manual_seed(0)
    model = get_peft_model(
        Attended(),  # type: ignore[arg-type]
        LoraConfig(r=2, target_modules=["out_proj", "linear1", "linear2"]),
    )
    batches = [{"states": torch.randn(8, 5, 16), "labels": torch.arange(8) % 2}]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3)
    config = make_config(method=method, selection_ratio=0.5, discretize_at=3)
    run = SelectionRun(model, optimizer, config, model_loss, batches, total_steps=4)
    make_steps(run, model, batches, optimizer, 4)
    assert run.selection is not None
    what = "The gates .* never had a gradient" if method in ("adalora", "sora") else "The LoRA .* was never called"
    pattern = what.replace(".*", r"of 2 of 6 modules") + r" \(.*0\.self_attn\.out_proj.*1\.self_attn\.out_proj\)"
    assert [note for note in run.selection.notes if re.match(pattern, note)], run.selection.notes


@pytest.mark.parametrize("kind", [kind for kind in KINDS if ("sora", kind) not in REFUSED])
def test_the_model_does_not_jump_when_trained_gates_become_weights(kind: str) -> None:
    rates = {"gate_learning_rate": 0.1, "threshold": 0.02}
    run, model, batches, optimizer = start("sora", kind, discretize_at=4, selection_ratio=1.0, method_options=rates)
    generator = torch.Generator().manual_seed(0)
    for parameter in (p for p in model.parameters() if p.requires_grad):  # no effect is near 0
        parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    make_steps(run, model, batches, optimizer, 3)
    gates = torch.cat(run.search.method.component_gates())
    assert (gates - 1).abs().max() > 0.1
    model.eval()
    with torch.no_grad():
        gated = model(**batches[0]).logits
        with run.search.gates.masked([None] * len(run.search.grid)):
            assert not torch.allclose(gated, model(**batches[0]).logits, atol=1e-3)
        run.search.method.before_pruning(run.search.adapters.sites)
        run.search.gates.detach()
        torch.testing.assert_close(model(**batches[0]).logits, gated, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("dora", [False, True])
def test_a_convolution_reads_patches(dora: bool) -> None:
    """Against the variance of the patches that `unfold` gives."""
    model, batches = convolved(("plane",), use_dora=dora)
    search = make_search(model, "eva")
    search.score(batches)
    found: dict[str, list[Tensor]] = {name: [] for name in search.grid.names}
    for name, patches in found.items():
        model.base_model.model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, patches=patches: patches.append(nn.functional.unfold(args[0], 3, padding=1).mT)
        )
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for own, patches in zip(components(search), found.values(), strict=True):
        vectors = torch.cat(patches).flatten(0, 1).double()
        parts = torch.linalg.svdvals(vectors - vectors.mean(dim=0)).square()
        torch.testing.assert_close(own.sort(descending=True).values, (parts / parts.sum())[:2], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", ["LoRA-XS", "VeRA"])
def test_synflow_sees_frozen_matrices_that_are_not_saved(kind: str) -> None:
    """Against a model all of whose matrices are made positive by hand."""
    form = LoraXS() if kind == "LoRA-XS" else None
    config = VeraConfig if kind == "VeRA" else None
    model, batches = language(config, form=form, r=4, target_modules=["q_proj", "o_proj"],
                              **({"save_projection": False} if config else {}))  # fmt: skip
    for parameter in (p for p in model.parameters() if p.requires_grad):
        nn.init.normal_(parameter, std=0.3)
    twin = copy.deepcopy(model).eval()
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    search = make_search(model, "synflow", selection_scope="model")
    found = search.score(batches)
    for name, buffer in model.named_buffers():
        assert buffer.equal(buffers[name])

    hidden = [buffer for name, buffer in twin.named_buffers() if "inv_freq" not in name]
    assert hidden and any(bool((buffer < 0).any()) for buffer in hidden)
    with torch.no_grad():
        for tensor in [*twin.parameters(), *hidden]:
            tensor.abs_()
    size = twin.get_input_embeddings().embedding_dim
    inputs = {"inputs_embeds": torch.ones(1, 32, size), "attention_mask": torch.ones(1, 32).long()}
    twin.get_base_model()(**inputs).logits.sum().backward()
    expected = dict.fromkeys(search.grid.names, 0.0)
    for path, parameter in twin.named_parameters():
        if parameter.grad is not None and parameter.requires_grad:
            name = next(name for name in expected if f".{name}." in path)
            expected[name] += float((parameter.detach() * parameter.grad).abs().sum())
    torch.testing.assert_close(found, torch.tensor(list(expected.values()), dtype=torch.float64), rtol=1e-4, atol=1e-6)


def test_synflow_goes_on_beside_trained_tokens() -> None:
    plain, batches = language()
    tokens, _ = language(trainable_token_indices=[3, 4])
    scores = []
    for model in (plain, tokens):
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.constant_(parameter, 0.1)
        scores.append(make_search(model, "synflow", selection_scope="model").score(batches))
    torch.testing.assert_close(scores[0], scores[1])
