"""Kinds of site: one of a third party's in this file, and what shortcuts do as one."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from diffora_trainer import ShortcutConfig, ShortcutModel, add_shortcuts
from diffora_trainer.adapters import base
from diffora_trainer.adapters.base import (
    AdapterSite,
    SiteKind,
    extra_kinds,
    find_sites,
    prune_sites,
    register_site_kind,
    site_kind,
    site_kinds,
)
from diffora_trainer.adapters.gates import disabled
from diffora_trainer.experimental.shortcuts.shortcuts import KINDS, shortcuts


SIZES = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
IDS = torch.arange(12)[None] % 7


@pytest.fixture(autouse=True)
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone after it."""
    extra_kinds()
    monkeypatch.setattr(base, "_KINDS", dict(base._KINDS))


def llama(**options: Any) -> Any:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=24, num_key_value_heads=2))
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))


def opt() -> Any:
    """A model whose feed-forward is two linear layers of the layer itself."""
    torch.manual_seed(0)
    sizes = {"ffn_dim": 24, "word_embed_proj_dim": 16, "max_position_embeddings": 32, "dropout": 0.0}
    model = OPTForCausalLM(OPTConfig(**SIZES, **sizes, init_std=0.2))
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "fc1", "fc2"], task_type="CAUSAL_LM"))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def randomize(sites: Mapping[str, AdapterSite]) -> None:
    """Let every site do something, as after some training."""
    torch.manual_seed(1)
    for site in sites.values():
        nn.init.normal_(site.parameters[-1], std=0.5)


# A kind of a third party's: a low-rank adapter after each norm


class Adjusted(nn.Module):
    """A norm, and what is added to it."""

    def __init__(self, norm: Any, rank: int) -> None:
        super().__init__()
        self.norm, self.on = norm, True
        self.adjust_down = nn.Linear(len(norm.weight), rank, bias=False)
        self.adjust_up = nn.Linear(rank, len(norm.weight), bias=False)
        nn.init.zeros_(self.adjust_up.weight)

    def forward(self, value: Tensor) -> Tensor:
        value = self.norm(value)
        return value + self.adjust_up(self.adjust_down(value)) if self.on else value


class AdjustedSite(AdapterSite):
    kind = "norms"

    def __init__(self, name: str, module: Adjusted) -> None:
        super().__init__(name, module.adjust_down.out_features)
        self.module = module

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [self.module.adjust_down.weight, self.module.adjust_up.weight]

    @property
    def gated(self) -> nn.Module:
        return self.module.adjust_down

    @property
    def shape(self) -> tuple[Any, ...]:
        return tuple(self.module.adjust_up.weight.shape)

    @property
    def enabled(self) -> bool:
        return self.module.on

    @enabled.setter
    def enabled(self, value: bool) -> None:
        self.module.on = value
        for parameter in self.parameters:
            parameter.requires_grad_(value)

    def check(self) -> None:
        if not all(parameter.requires_grad for parameter in self.parameters):
            raise ValueError(f"{self.name!r} is frozen.")


class NormKind(SiteKind):
    name = "norms"
    parameter_marks = (".adjust_",)

    def __init__(self) -> None:
        self.reattached = 0

    def match(self, name: str, module: nn.Module, adapter_name: str) -> AdjustedSite | None:
        return AdjustedSite(name, module) if isinstance(module, Adjusted) else None

    def install(self, model: Any, options: Mapping[str, Any]) -> None:
        for name, module in list(model.named_modules()):
            if name.endswith("_layernorm"):
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, Adjusted(module, options.get("rank", 3)))

    def prune(self, model: Any, sites: Sequence[Any], adapter_name: str) -> None:
        for site in sites:
            parent, _, child = f"base_model.model.{site.name}".rpartition(".")
            setattr(model.get_submodule(parent), child, site.module.norm)

    def reattach(self, model: nn.Module) -> None:
        self.reattached += 1

    def installed(self, model: nn.Module) -> bool:
        return any(isinstance(module, Adjusted) for module in model.modules())


@pytest.fixture
def adjusted() -> Iterator[Any]:
    """A model with sites of two kinds, each of which does something."""
    register_site_kind(NormKind)
    model = llama()
    site_kind("norms").install(model, {"rank": 3})
    randomize(find_sites(model, "default"))
    yield model


def test_a_kind_is_found_beside_lora(adjusted: Any) -> None:
    assert {kind.name for kind in extra_kinds()} == {"shortcuts", "norms"}
    assert len(site_kinds()) == 3
    sites = find_sites(adjusted, "default")
    assert {site.kind for site in sites.values()} == {"lora", "norms"}
    norms = {name: site for name, site in sites.items() if site.kind == "norms"}
    assert sorted(norms) == [
        f"model.layers.{layer}.{kind}_layernorm" for layer in "01" for kind in ("input", "post_attention")
    ]
    marked = [name for name, _ in adjusted.named_parameters() if NormKind.parameter_marks[0] in name]
    assert len(marked) == 8
    for site in norms.values():
        assert (site.rank, site.cost, site.shape) == (3, 32, (16, 3))
        site.check()
    site.parameters[0].requires_grad_(False)
    with pytest.raises(ValueError, match="frozen"):
        site.check()
    with pytest.raises(ValueError, match="kind 'norms', which shares no parameters"):
        site.share(site)


def test_a_gate_is_what_is_folded(adjusted: Any) -> None:
    before = logits(adjusted)
    for site in find_sites(adjusted, "default").values():
        handle = site.gated.register_forward_hook(lambda module, args, output: output * 0.25)
        gated = logits(adjusted)
        handle.remove()
        assert not torch.equal(gated, before)
        site.fold(0.25)
        torch.testing.assert_close(logits(adjusted), gated)
        site.fold(4.0)
        torch.testing.assert_close(logits(adjusted), before)


def test_what_is_off_computes_what_is_left_after_pruning(adjusted: Any) -> None:
    before, kind = logits(adjusted), site_kind("norms")
    assert isinstance(kind, NormKind)
    sites = find_sites(adjusted, "default")
    gone = [site for name, site in sites.items() if ".0." in name and "q_proj" not in name]
    assert {site.kind for site in gone} == {"lora", "norms"}
    gone[0].enabled = False
    with disabled(gone):
        off = logits(adjusted)
        assert not any(p.requires_grad for site in gone for p in site.parameters)
        assert not any(site.enabled for site in gone)
        adjusted(IDS, labels=IDS).loss.backward()
        assert all(p.grad is None for site in gone for p in site.parameters)
    assert [site.enabled for site in gone] == [False, True, True], "what was off before stays off"
    gone[0].enabled = True
    torch.testing.assert_close(logits(adjusted), before)

    twin = copy.deepcopy(adjusted)
    names = {site.name for site in gone}
    prune_sites(twin, [site for name, site in find_sites(twin, "default").items() if name in names], "default")
    torch.testing.assert_close(logits(twin), off)
    assert set(find_sites(twin, "default")) == set(sites) - names
    assert kind.reattached == 1 and kind.installed(twin) and not kind.installed(llama())


def test_a_kind_comes_with_the_package_that_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = SimpleNamespace(load=lambda: register_site_kind(NormKind))

    def entries(group: str, name: str | None = None) -> list[Any]:
        return [entry] if group == "diffora_trainer.sites" and name in ("norms", None) else []

    monkeypatch.setattr(base, "entry_points", entries)
    with pytest.raises(ValueError, match=r"no kind of site 'none'; known are \['lora', 'shortcuts'\]"):
        site_kind("none")
    assert isinstance(site_kind("norms"), NormKind)
    del base._KINDS["norms"]
    base.load_installed.cache_clear()
    assert {kind.name for kind in extra_kinds()} == {"shortcuts", "norms"}
    base.load_installed.cache_clear()


def test_kinds_of_the_package_are_known_to_whoever_reads_a_folder() -> None:
    """
    Also where nothing has asked for them: a folder may have files of theirs that are left of an earlier run. What
    registers no kind is not imported for that.
    """
    program = """
import json
import sys
from diffora_trainer.adapters.base import extra_kinds, site_kinds
found = [[kind.name for kind in kinds()] for kinds in (site_kinds, extra_kinds)]
home = "diffora_trainer.experimental."
print(json.dumps([*found, sorted({name.split(".")[2] for name in sys.modules if name.startswith(home)})]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [["lora"], ["shortcuts"], ["shortcuts"]]


def test_a_kind_may_have_one_mark_as_before() -> None:
    class Old(NormKind):
        parameter_mark = ".old_"
        parameter_marks = SiteKind.parameter_marks

    assert Old().parameter_marks == (".old_",)
    del Old.parameter_mark
    with pytest.raises(NotImplementedError, match="Old does not say"):
        Old().parameter_marks  # noqa: B018


def test_what_a_kind_need_not_say(adjusted: Any, tmp_path: Any) -> None:
    class Silent(NormKind):
        install = SiteKind.install

    kind = Silent()
    with pytest.raises(ValueError, match="kind 'norms' cannot be put into a model by a configuration"):
        kind.install(adjusted, {})
    assert not kind.separately({}) and not kind.holds(tmp_path) and kind.unwrap(adjusted) is adjusted
    assert kind.card_note(1) == "" and kind.loader == ("peft", "PeftModel") and kind.library == "peft"
    kind.save(adjusted, tmp_path)
    kind.load(adjusted, tmp_path)
    kind.copy(tmp_path, tmp_path)
    kind.check_whole(tmp_path, True)
    kind.check_fits(tmp_path, adjusted, [])
    assert not list(tmp_path.iterdir())


# Shortcuts


def test_shortcuts_are_sites() -> None:
    model = llama()
    kind = site_kind("shortcuts")
    assert not kind.installed(model)
    kind.install(model, {"kinds": ["shortcut2", "residual1"]})
    kind.install(model, {})  # it has some
    assert kind.installed(model)
    assert set(shortcuts(model)) == {
        *("model.layers.0.residual1", "model.layers.1.residual1", "model.layers.1.shortcut2")
    }
    sites = find_sites(model, "default")
    assert {name for name, site in sites.items() if site.kind == "shortcuts"} == set(shortcuts(model))
    marked = {p for name, p in model.named_parameters() if kind.parameter_marks[0] in name}
    assert marked == {p for site in sites.values() if site.kind == "shortcuts" for p in site.parameters}
    site = sites["model.layers.1.residual1"]
    assert (site.rank, site.cost, site.gated) == (2, 32, shortcuts(model)[site.name])

    site.enabled = False
    assert not shortcuts(model)[site.name].enabled and not any(p.requires_grad for p in site.parameters)
    with pytest.raises(ValueError, match="shortcut 'model.layers.1.residual1' is frozen, so it cannot be trained"):
        site.check()
    site.enabled = True
    site.check()
    prune_sites(model, [site], "default")
    assert set(shortcuts(model)) == {"model.layers.0.residual1", "model.layers.1.shortcut2"}
    prune_sites(model, [s for s in find_sites(model, "default").values() if s.kind == "shortcuts"], "default")
    assert not kind.installed(model)

    wrapped = ShortcutModel(llama(), ShortcutConfig(kinds=("residual1",)))
    assert kind.unwrap(wrapped) is wrapped.model and kind.unwrap(model) is model


def test_shortcuts_are_put_beside_lora_alone() -> None:
    plain = llama().unload()
    site_kind("shortcuts").install(plain, {})
    assert not shortcuts(plain)
    model = llama()
    site_kind("shortcuts").install(model, {"ranking": "separated"})
    assert {name.rpartition(".")[2] for name in shortcuts(model)} == set(KINDS)
    assert {len(shortcut.A) for shortcut in shortcuts(model).values()} == {2}, "the rank of the LoRA"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"kinds": "residual1"}, TypeError, "must be a list of names, got 'residual1'"),
        ({"kinds": []}, ValueError, "must name one or more of"),
        ({"kinds": ["residual1", "residual1"]}, ValueError, "each once"),
        ({"kinds": ["residual3"]}, ValueError, "'residual3'"),
        ({"kinds": [1]}, ValueError, "must name one or more of"),
        ({"ranking": "apart"}, ValueError, "`ranking='apart'`.*'combined', 'separated'"),
        ({"ranking": None}, ValueError, "`ranking=None`"),
        ({"rank": 3}, ValueError, "option 'rank' of shortcuts; there are 'kinds' and 'ranking'"),
    ],
)
def test_options_of_shortcuts(options: dict[str, Any], error: type[Exception], message: str) -> None:
    kind = site_kind("shortcuts")
    with pytest.raises(error, match=message):
        kind.separately(options)
    model = llama()
    with pytest.raises(error, match=message):
        kind.install(model, options)
    assert not kind.installed(model)
    assert kind.separately({"ranking": "separated"}) and not kind.separately({"ranking": "combined", "kinds": None})


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("every", [False, True])
def test_shortcuts_stay_where_they_act_when_what_they_hang_on_is_pruned(every: bool, order: int) -> None:
    """The LoRA of `fc1` wraps the module that a shortcut's hooks are on."""
    model = opt()
    add_shortcuts(model, ShortcutConfig(r=2))
    sites = find_sites(model, "default")
    randomize(sites)
    parameters = {name: site.parameters for name, site in sites.items() if site.kind == "shortcuts"}
    ends = ("fc1", "fc2") if every else ("fc1", "fc2", "1.residual1")
    gone = [site for name, site in sites.items() if name.endswith(ends)][::order]
    before = logits(model)
    with disabled(gone):
        expected = logits(model)
    assert not torch.equal(before, expected)
    prune_sites(model, gone, "default")
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=0)
    left = find_sites(model, "default")
    assert set(left) == set(sites) - {site.name for site in gone}
    for name, pair in parameters.items():
        assert name not in left or all(a is b for a, b in zip(left[name].parameters, pair, strict=True))
