"""What plain PEFT makes of an adapter that was pruned and saved: the model of the run, and nothing else."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, VeraConfig, get_peft_model
from torch import Tensor, nn

from diffora_trainer.adapters.base import find_sites
from diffora_trainer.adapters.grid import AdapterGrid
from diffora_trainer.adapters.pruning import apply_selection
from diffora_trainer.compat.peft import LOADS_VERA_MATRICES
from diffora_trainer.core.selection import Selection
from helpers.adapted import logits, random_selection
from helpers.models import llama, llama_config


def wrapped(base: nn.Module, config: Any) -> Any:
    """A copy of a model with an adapter that has learned something."""
    torch.manual_seed(1)
    model = get_peft_model(copy.deepcopy(base), config).eval()
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.2, generator=generator)
    return model


def keeping(model: Any, *kinds: str, rank: int | None = None) -> Selection:
    """A selection that keeps the modules of these kinds, as they are or with another rank."""
    grid = AdapterGrid.from_model(model).grid
    ranks = tuple((rank or site.rank) if site.name.endswith(kinds) else 0 for site in grid.sites)
    return dataclasses.replace(random_selection(grid), ranks=ranks, factors=())


def loads_as_it_is(model: Any, base: nn.Module, folder: Path) -> Any:
    """The saved adapter on the base model, once it was seen to compute the same and to load without a warning."""
    model.save_pretrained(folder)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()
    texts = [str(warning.message) for warning in caught]
    assert not [text for text in texts if "did not match" in text or "issing" in text]
    assert set(find_sites(loaded, "default")) == set(find_sites(model, "default"))
    inputs = torch.randint(3, 30, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        outputs = [getattr(found, "logits", found) for found in (model(inputs), loaded(inputs))]
    assert torch.equal(*outputs)
    return loaded


needs_matrices = pytest.mark.skipif(not LOADS_VERA_MATRICES, reason="this PEFT loads no matrices of VeRA")


@needs_matrices
@pytest.mark.parametrize("kinds", [("q_proj",), ("up_proj",), ("k_proj", "down_proj")], ids=str)
def test_the_shared_matrices_of_vera_are_cut_to_what_is_left(kinds: tuple[str, ...], tmp_path: Path) -> None:
    tiny = llama()
    config = VeraConfig(r=4, target_modules="all-linear", d_initial=1.0)
    model = wrapped(tiny.model, config)
    whole = [model.base_model.vera_A["default"].clone(), model.base_model.vera_B["default"].clone()]
    selection = keeping(model, *kinds)
    before = {name: site.layer.get_delta_weight("default") for name, site in find_sites(model, "default").items()}  # type: ignore[attr-defined]
    apply_selection(model, selection)
    layers: list[Any] = [site.layer for site in find_sites(model, "default").values()]  # type: ignore[attr-defined]
    a, b = model.base_model.vera_A["default"], model.base_model.vera_B["default"]
    assert a.shape == (4, max(layer.in_features for layer in layers))
    assert b.shape == (max(layer.out_features for layer in layers), 4)
    assert a.shape != whole[0].shape or b.shape != whole[1].shape
    assert torch.equal(a, whole[0][:, : a.shape[1]]) and torch.equal(b, whole[1][: b.shape[0]])
    for name, site in find_sites(model, "default").items():
        assert torch.equal(site.layer.get_delta_weight("default"), before[name])  # type: ignore[attr-defined]
    loads_as_it_is(model, tiny.model, tmp_path)


def test_vera_is_refused_where_its_matrices_would_be_drawn_anew(tmp_path: Path) -> None:
    tiny = llama()
    for saved in (False,) if LOADS_VERA_MATRICES else (False, True):
        remedy = "use PEFT 0.21" if saved else "set `save_projection=True`"
        whole = wrapped(tiny.model, VeraConfig(r=4, target_modules="all-linear", save_projection=saved))
        with pytest.raises(ValueError, match=f"cannot be gated.*draw the shared matrices anew.*{remedy}"):
            AdapterGrid.from_model(whole)
        model = wrapped(tiny.model, VeraConfig(r=4, target_modules=["q_proj", "o_proj"], save_projection=saved))
        apply_selection(model, keeping(model, "1.self_attn.q_proj"))  # of one shape
        loads_as_it_is(model, tiny.model, tmp_path / str(saved))


def test_vera_beside_another_adapter_keeps_the_matrices_of_both() -> None:
    tiny = llama()
    targets = "all-linear" if LOADS_VERA_MATRICES else ["q_proj", "o_proj"]
    config = VeraConfig(r=4, target_modules=targets, d_initial=1.0)
    alone, model = wrapped(tiny.model, config), wrapped(tiny.model, config)
    model.add_adapter("reference", copy.deepcopy(config))
    for name, parameter in model.named_parameters():
        if "vera_lambda_b.reference" in name:
            parameter.data.fill_(0.5)
    model.set_adapter("reference")
    reference = logits(model, tiny)
    model.set_adapter("default")
    selection = keeping(model, "q_proj")
    for found in (alone, model):
        apply_selection(found, selection)
    assert set(find_sites(model, "default")) == set(selection.selected)
    assert torch.equal(logits(model, tiny), logits(alone, tiny))
    model.set_adapter("reference")
    assert torch.equal(logits(model, tiny), reference)


def tied() -> nn.Module:
    torch.manual_seed(0)
    config = llama_config(64)
    config.tie_word_embeddings = True
    return type(llama().model)(config)


def test_tied_lora_is_refused() -> None:
    for targets in (["embed_tokens", "lm_head", "q_proj"], ["lm_head", "q_proj"], r".*(embed_tokens|q_proj)"):
        model = wrapped(tied(), LoraConfig(r=4, target_modules=targets, ensure_weight_tying=True))
        if getattr(model.peft_config["default"], "target_modules_to_tie", None) is None:
            pytest.skip("this PEFT ties no LoRA")
        with pytest.raises(ValueError, match="`ensure_weight_tying=True`.*lm_head.*put it back.*leave"):
            AdapterGrid.from_model(model)


@pytest.mark.parametrize(
    "beside", [{"modules_to_save": ["embed_tokens"]}, {"trainable_token_indices": [1, 2]}], ids=str
)
def test_tied_weights_beside_the_lora_are_saved_and_loaded(beside: dict[str, Any], tmp_path: Path) -> None:
    options: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"], "ensure_weight_tying": True, **beside}
    model = wrapped(tied(), LoraConfig(r=4, task_type="CAUSAL_LM", **options))
    apply_selection(model, keeping(model, "q_proj"))
    loads_as_it_is(model, tied(), tmp_path)


class Named(nn.Module):
    """Linear layers whose names mean something else as regular expressions."""

    names = ("a(b)", "a+b", "aab", "a|b", "[ab]", "b", "a(b", "x-y", "inner.a+b")

    def __init__(self) -> None:
        super().__init__()
        for name in self.names[:-1]:
            self.add_module(name, nn.Linear(8, 8, bias=False))
        self.inner = nn.Module()
        self.inner.add_module("a+b", nn.Linear(8, 8, bias=False))

    def forward(self, numbers: Tensor) -> Tensor:
        states = torch.nn.functional.one_hot(numbers % 8, 8).float()
        for name in self.names:
            states = states + self.get_submodule(name)(states)
        return states


def test_ranks_go_to_modules_of_any_name(tmp_path: Path) -> None:
    base = Named()
    model = wrapped(base, LoraConfig(r=6, target_modules=list(Named.names[:-1])))
    grid = AdapterGrid.from_model(model).grid
    assert set(grid.names) == set(Named.names)
    ranks = {name: 1 + number % 5 for number, name in enumerate(grid.names)}
    selection = dataclasses.replace(random_selection(grid), ranks=tuple(ranks.values()), factors=())
    apply_selection(model, selection)
    loaded = loads_as_it_is(model, base, tmp_path)
    assert {name: site.rank for name, site in find_sites(loaded, "default").items()} == ranks


def test_a_pattern_that_is_a_name_stays(tmp_path: Path) -> None:
    """PEFT reads a key as the name itself where it is none of a module as a regular expression."""
    base = Named()
    options: dict[str, Any] = {"rank_pattern": {"x-y": 3, "[ab]": 4, "b": 2}, "alpha_pattern": {"a+b": 5}}
    model = wrapped(base, LoraConfig(r=6, target_modules=["x-y", "a+b", "b"], **options))
    apply_selection(model, keeping(model, "+b"))
    assert (model.peft_config["default"].rank_pattern, model.peft_config["default"].alpha_pattern) == ({}, {"a+b": 5})
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(torch.arange(8)), model(torch.arange(8)))


def test_patterns_of_modules_that_went_are_not_saved(tmp_path: Path) -> None:
    tiny = llama()
    ranks, alphas = {"v_proj": 2, "layers.0.mlp.up_proj": 3}, {"v_proj": 5, "^model.layers.1.self_attn.q_proj": 7}
    config = LoraConfig(r=4, target_modules="all-linear", rank_pattern=ranks, alpha_pattern=alphas)
    given = copy.deepcopy(config)
    model = get_peft_model(copy.deepcopy(tiny.model), config).eval()
    apply_selection(model, keeping(model, "q_proj", "up_proj"))
    saved = model.peft_config["default"]
    assert saved.rank_pattern == {"layers.0.mlp.up_proj": 3}
    assert saved.alpha_pattern == {"^model.layers.1.self_attn.q_proj": 7}
    assert (config.rank_pattern, config.alpha_pattern) == (given.rank_pattern, given.alpha_pattern)
    loads_as_it_is(model, tiny.model, tmp_path)


class Nested(nn.Module):
    """A parameter whose name ends with that of another one."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Linear(8, 8, bias=False)
        self.outer = nn.ModuleDict({"part": nn.Linear(8, 8, bias=False)})
        self.last = nn.Linear(8, 8, bias=False)

    def forward(self, numbers: Tensor) -> Tensor:
        states = torch.nn.functional.one_hot(numbers % 8, 8).float()
        return self.last(self.outer["part"](self.part(states)))


def test_a_parameter_that_cannot_be_named_alone_is_refused_before_anything_changes() -> None:
    model = wrapped(Nested(), LoraConfig(r=2, target_modules=["last"], target_parameters=["part.weight"]))
    selection = keeping(model, "last")
    assert {"part.weight", "outer.part.weight", "last"} == set(selection.modules)
    ranks = [site.rank if site.name == "part.weight" else 0 for site in selection.grid.sites]
    selection = dataclasses.replace(selection, ranks=tuple(ranks))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    targets = set(model.peft_config["default"].target_modules)
    with pytest.raises(ValueError, match="'outer.part.weight' ends with the name of one that is kept"):
        apply_selection(model, selection)
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
    assert model.peft_config["default"].target_modules == targets
