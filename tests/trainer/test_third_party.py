"""A method or a site of somebody else's: one file, by a decorator or an entry point, without a change in here."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import HfArgumentParser

from diffora_trainer import DiffoRAConfig, Selection, SelectionRun, register_method
from diffora_trainer.adapters import lora as adapters_lora
from diffora_trainer.adapters.base import load_installed
from diffora_trainer.hub.card import write_card
from diffora_trainer.methods.base import GradientMethod, ScoreMethod, SelectionMethod
from diffora_trainer.methods.build import method_of
from diffora_trainer.methods.options import MethodOptions
from diffora_trainer.methods.ranks import RankMethod, magnitudes
from diffora_trainer.methods.registry import method_names, unregister_method
from diffora_trainer.methods.trained_gates import GateMethod
from helpers.adapted import lora_layers
from helpers.checks import assert_continues
from helpers.data import classification_dataset
from helpers.marks import mostly_slow
from helpers.searches import make_search, make_steps, model_loss, warm
from helpers.trainers import CUT, SAVES, causal_model, lora, make_trainer, saving_trainer


FISHER = '''
"""Fisher information of the modules."""

from dataclasses import dataclass

from diffora_trainer.methods.base import ScoreMethod
from diffora_trainer.methods.options import ScoreOptions
from diffora_trainer.methods.papers import Paper


@dataclass(frozen=True)
class FisherOptions(ScoreOptions):
    """Options of [`Fisher`]."""

    power: float = 1.0


class Fisher(ScoreMethod):
    """Mean squared gradient (Amari, 1998)."""

    paper = Paper("Natural Gradient Works Efficiently in Learning", "https://example.org/amari", "@article{amari98}")
    Options = FisherOptions

    def score(self, context):
        return context.mean_over_batches(lambda gradient: gradient.square().sum()) ** self.options.power
'''

NORMS = '''
"""Ranks by the size of what each component adds."""

import torch

from diffora_trainer.methods.ranks import RankMethod, magnitudes


class Norms(RankMethod):
    """Magnitude pruning."""

    def score(self, context):
        return torch.cat([magnitudes(site) for site in context.sites])
'''

RELATIVE = '''
"""A matrix that counts the gradient in units of its largest entry."""

import torch

from diffora_trainer.methods.base import GradientMethod


class Relative(GradientMethod):
    """How much each gate lowered the loss, where every step counts the same."""

    trains_open = True

    def __init__(self, budget, learning_rate=None, seed=0):
        super().__init__(budget, learning_rate, seed)
        self._count = torch.zeros(len(budget))

    def values(self):
        return torch.sigmoid(self._count)

    def step(self, gradient):
        self.steps += 1
        self._count -= gradient / gradient.abs().max()

    def _tensors(self):
        return {"count": self._count}
'''


MICA = '''
"""MiCA, whose second factor PEFT freezes."""

from peft.tuners.lora import LoraLayer

from diffora_trainer.adapters.lora import LoraSite, register_lora_site


@register_lora_site
class MiCASite(LoraSite):
    """A LoRA of which `lora_A` alone is trained."""

    @classmethod
    def fits(cls, layer, adapter_name):
        variant = layer.lora_variant.get(adapter_name) if isinstance(layer, LoraLayer) else None
        return type(variant).__name__ == "MiCALinearVariant"

    @property
    def parameters(self):
        return [self.layer.lora_A[self.adapter_name].weight]

    @property
    def resizable(self):
        return False

    def obstacle(self):
        return None
'''


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A package beside this one that names its methods in the entry-point group."""
    site = tmp_path / "site"
    about = site / "other_methods-1.0.dist-info"
    about.mkdir(parents=True)
    (site / "other_methods.py").write_text(FISHER)
    (site / "more_methods.py").write_text(RELATIVE)
    (site / "rank_methods.py").write_text(NORMS)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: other-methods\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(
        "[diffora_trainer.methods]\nfisher = other_methods:Fisher\nrelative = more_methods:Relative\n"
        "norms = rank_methods:Norms\n"
    )
    monkeypatch.syspath_prepend(str(site))
    importlib.invalidate_caches()
    yield
    for name in ("fisher", "relative", "norms"):
        unregister_method(name)
    for module in ("other_methods", "more_methods", "rank_methods"):
        sys.modules.pop(module, None)


@pytest.mark.parametrize("task", mostly_slow(["cls", "sft"], "cls"))
@pytest.mark.parametrize(
    "search",
    [
        {"method": "fisher", "selection_scope": "model", "score_batches": 2},
        {"method": "fisher", "reallocate_every": 2, "score_batches": 2},
        {"method": "relative", "fade_out": 2},
        {"method": "norms", "selection_ratio": 0.05},
        {
            **{"method": "relative", "fade_out": 2, "selection_scope": "model"},
            **{"selection_granularity": "component", "selection_ratio": 0.15},  # less than rank 1 of 4 for each
        },
    ],
    ids=["scores", "scores anew", "searches", "gives ranks", "searches among components"],
)
def test_installed_method_runs_resumes_and_is_told_of(
    search: dict[str, object], task: str, installed: None, tmp_path: Path
) -> None:
    assert {"fisher", "relative", "norms"} < set(method_names())
    whole = saving_trainer(tmp_path / "whole", task, 2, search=search)
    whole.train()
    whole.save_model()
    selection = whole.selection
    assert selection.step == CUT and selection.config["method"] == search["method"]
    assert set(lora_layers(whole.model, "default")) == set(selection.selected)
    assert 0 < len(selection.selected) < len(selection.modules) and len(set(selection.scores)) > 1
    folder = Path(whole.args.output_dir)
    assert Selection.load(folder) == selection
    card = (folder / "README.md").read_text()
    if search["method"] == "fisher":
        assert "Natural Gradient Works Efficiently in Learning" in card and "@article{amari98}" in card
        assert "| `score_batches` | 2 |" in card and "| `power` | 1.0 |" in card
    for step in SAVES[1:]:
        resumed = saving_trainer(tmp_path / str(step), task, 2, search=search)
        resumed.train(resume_from_checkpoint=f"{folder}/checkpoint-{step}")
        assert_continues(resumed, whole, step)


@pytest.fixture
def installed_site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A package beside this one that names a site in the entry-point group."""
    site = tmp_path / "site"
    about = site / "other_sites-1.0.dist-info"
    about.mkdir(parents=True)
    (site / "other_sites.py").write_text(MICA)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: other-sites\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[diffora_trainer.sites]\nmica = other_sites\n")
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setattr(adapters_lora, "_OTHER_SITES", list(adapters_lora._OTHER_SITES))
    importlib.invalidate_caches()
    load_installed.cache_clear()
    yield
    load_installed.cache_clear()
    sys.modules.pop("other_sites", None)


@pytest.mark.skipif(not hasattr(LoraLayer, "mica_init"), reason="this PEFT has no MiCA")
def test_installed_site_is_searched_saved_and_resumed(installed_site: None, tmp_path: Path) -> None:
    def build(folder: str) -> Any:
        return saving_trainer(tmp_path / folder, "sft", 2, peft_config=lora(init_lora_weights="mica"))

    whole = build("whole")
    trained = sum(p.numel() for p in whole.model.parameters() if p.requires_grad)
    whole.train()
    whole.save_model()
    assert sum(whole.selection.parameters) == trained
    assert set(lora_layers(whole.model, "default")) == set(whole.selection.selected)
    assert {n.split(".")[-3] for n, p in whole.model.named_parameters() if p.requires_grad} == {"lora_A"}
    loaded = PeftModel.from_pretrained(causal_model(), whole.args.output_dir).eval()
    batch = {"input_ids": torch.arange(3, 15)[None]}
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, whole.model.eval()(**batch).logits)
    for step in SAVES[1:]:
        resumed = build(str(step))
        resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-{step}")
        assert_continues(resumed, whole, step)


def test_options_are_read_wherever_a_configuration_is(installed: None, tmp_path: Path) -> None:
    options = {"score_batches": 2, "power": 2.0}
    line = ["--method", "fisher", "--method_options", json.dumps(options)]
    (config,) = HfArgumentParser(DiffoRAConfig).parse_args_into_dataclasses(line)
    assert config == DiffoRAConfig(method="fisher", method_options=options)
    assert DiffoRAConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    found = {}
    for power in (1.0, 2.0):
        search = {"method": "fisher", "method_options": {**options, "power": power}}
        trainer = make_trainer(tmp_path / str(power), search=search)
        trainer.train()
        found[power] = torch.tensor(trainer.selection.scores)
    torch.testing.assert_close(found[2.0], found[1.0] ** 2)
    with pytest.raises(ValueError, match="`arch_every` with `method='fisher'`.*'power'"):
        make_trainer(tmp_path, search={"method": "fisher", "arch_every": 1})


def test_method_of_a_script() -> None:
    """The example of the documentation, in a loop of one's own; afterwards nobody knows it."""

    @register_method("example")
    class Example(ScoreMethod):
        def score(self, context):
            return context.mean_over_batches(lambda gradient: gradient.square().sum())

    model, batches = warm()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    config = DiffoRAConfig(method="example", method_options={"score_batches": 3})
    try:
        run = SelectionRun(model, optimizer, config, lambda m, b: m(**b).loss, batches, total_steps=4)
        twin_gradients = []
        for batch in batches:
            loss = model.eval()(**batch).loss
            weights = {n: p for n, p in model.named_parameters() if "lora_" in n}
            twin_gradients.append(dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True)))
        scores = run.search.score(batches)
        for name, score in zip(run.search.grid.names, scores.tolist(), strict=True):
            by_hand = [
                sum(float(g.double().square().sum()) for n, g in found.items() if f".{name}.lora_" in n)
                for found in twin_gradients
            ]
            assert score == pytest.approx(sum(by_hand) / len(by_hand), rel=1e-5)
        assert "example" in method_names()
    finally:
        unregister_method("example")
    with pytest.raises(ValueError, match="method='example'.*must be one of.*'diffora'"):
        SelectionRun(model, optimizer, config, lambda m, b: m(**b).loss, batches, total_steps=4)


def test_a_rank_method_may_say_how_ties_are_decided() -> None:
    """By the second of the two tensors that its `score` may return."""

    @register_method("ties")
    class Ties(RankMethod):
        def score(self, context):
            sizes = torch.cat([magnitudes(site) for site in context.sites])
            return torch.ones_like(sizes), sizes

    model, batches = warm()
    try:
        search = make_search(model, "ties", selection_ratio=0.3, selection_scope="model")
        search.score(batches)
        kept = search.method.components()
    finally:
        unregister_method("ties")
    sizes = torch.cat([magnitudes(site) for site in search.adapters.sites])
    costs = torch.tensor([site.cost for site in search.grid.sites])[search.method.owner]
    for cost in set(costs.tolist()):
        stay, go = kept & (costs == cost), ~kept & (costs == cost)
        assert stay.any() and go.any() and sizes[stay].min() > sizes[go].max()


def test_a_method_may_train_gates_of_its_own() -> None:
    """It says which gates there are and how they move. What they come to is in the weights after the choice."""

    @register_method("descent")
    class Descent(GateMethod):
        def gates(self):
            return self.numbers

        def move(self, gradient, learning_rate):
            self.numbers.sub_(learning_rate * gradient)

    model, batches = warm()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    options = {"gate_learning_rate": 0.5}
    config = DiffoRAConfig(method="descent", discretize_at=3, selection_ratio=0.5, method_options=options)
    try:
        run = SelectionRun(model, optimizer, config, model_loss, batches, total_steps=4)
        make_steps(run, model, batches, optimizer, 2)
        gates = torch.cat(run.search.method.component_gates())
        assert len(gates.unique()) > 20 and torch.equal(run.search.method.state_dict()["gates"], gates)
        make_steps(run, model, batches, optimizer, 1)
    finally:
        unregister_method("descent")
    assert run.selection is not None and 0 < sum(run.selection.ranks) < sum(run.search.grid.ranks)
    assert bool((torch.cat(run.search.method.component_gates()) == 1).all())


def test_a_card_is_written_where_the_method_is_not_installed(installed: None, tmp_path: Path) -> None:
    """Somebody reads a selection who does not have the other package."""
    trainer = make_trainer(tmp_path / "run", search={"method": "fisher", "score_batches": 1})
    trainer.train()
    for name in ("fisher", "relative"):
        unregister_method(name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [path for path in sys.path if path != str(tmp_path / "site")])
        importlib.invalidate_caches()
        assert "fisher" not in method_names()
        text = write_card(tmp_path / "card", trainer.selection, lora(task_type="SEQ_CLS")).read_text()
        assert "Chosen modules" in text and "fisher" in text and "amari98" not in text


def test_method_may_have_none_but_its_own_options(tmp_path: Path) -> None:
    """What others are asked for has a default, and cannot be passed: it is scored on one batch of a stream."""

    @dataclass(frozen=True)
    class TiltOptions(MethodOptions):
        tilt: float = 1.0

    @register_method("tilt")
    class Tilt(ScoreMethod):
        """Prefers one end of the model."""

        Options = TiltOptions

        def __init__(self, budget, seed=0):
            super().__init__(budget, seed)
            self.tilt = self.options.tilt

        def score(self, context):
            assert len(context.batches) == 1
            return self.tilt * torch.arange(len(context.sites), dtype=torch.float64)

    search: dict[str, Any] = {"method": "tilt", "method_options": {"tilt": -1.0}}
    try:
        stream = classification_dataset(48).to_iterable_dataset()
        trainer = make_trainer(tmp_path, search=search, train_dataset=stream)
        trainer.train()
        assert trainer.selection.config["method_options"] == {"tilt": -1.0}
        assert list(trainer.selection.scores) == [-i for i in range(len(trainer.selection.modules))]
        with pytest.raises(ValueError, match=r"`score_batches` with `method='tilt'`.*\['tilt'\]"):
            make_trainer(tmp_path, search={**search, "method_options": {"score_batches": 2}})
    finally:
        unregister_method("tilt")


def test_method_without_options_takes_none() -> None:
    @register_method("bare")
    class Bare(SelectionMethod):
        searches = False

    try:
        assert method_of(DiffoRAConfig(method="bare")) == (Bare, MethodOptions())
        with pytest.raises(ValueError, match="`score_batches` with `method='bare'`"):
            method_of(DiffoRAConfig(method="bare", method_options={"score_batches": 2}))
    finally:
        unregister_method("bare")


def test_options_of_no_method_are_refused() -> None:
    @dataclass(frozen=True)
    class Plain:
        power: float = 1.0

    for parent, needed in ((ScoreMethod, "MethodOptions"), (GradientMethod, "GradientOptions")):
        method = type("Fisher", (parent,), {"Options": Plain})
        with pytest.raises(TypeError, match=rf"`Fisher.Options` is Plain.*derive it from.*\.{needed}`"):
            register_method("plain")(method)
    assert "plain" not in method_names()


def test_what_is_no_method_is_refused() -> None:
    with pytest.raises(TypeError, match="is not a subclass of `SelectionMethod`.*ScoreMethod"):
        register_method("nothing")(dict)
    assert "nothing" not in method_names()
