"""The cut: what is left is an ordinary LoRA of the chosen modules, and its training goes on."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer

from diffora_trainer import ArchitectureSearch, DiffoRAConfig
from helpers.adapted import lora_layers
from helpers.checks import adapter, assert_continues, assert_same, optimizer_state, raw_optimizer, step_logs
from helpers.data import vocabulary
from helpers.tiny_model import TinyModel
from helpers.trainers import CUT, SAVES, Probe, SaveAt, causal_model, classifier, lora, make_trainer, running


def logits(tiny: TinyModel) -> Callable[..., Tensor]:
    """A probe that runs the model on the tiny batch in evaluation mode."""

    def measure(model: nn.Module, **kwargs: object) -> Tensor:
        model.eval()
        with torch.no_grad():
            found = model(**tiny.batch).logits
        model.train()
        return found

    return measure


def adapted(model: nn.Module) -> set[str]:
    return set(lora_layers(model, "default"))


def hooks(model: nn.Module) -> int:
    return sum(len(getattr(m, name)) for m in model.modules() for name in vars(m) if name.endswith("_hooks"))


def stock_of(trainer: Trainer, tiny: TinyModel) -> PeftModel:
    """A plain LoRA model of the chosen modules, made by PEFT alone, with the weights of a trainer's model."""
    config = lora(target_modules=list(trainer.selection.adapted), task_type=tiny.task_type)
    model = get_peft_model(tiny.model, config)
    result = set_peft_model_state_dict(model, adapter(trainer.model))
    assert not result.unexpected_keys
    return model


@pytest.mark.parametrize("method", ["diffora", "sampled", "sigmoid", "softmax"])
def test_output_does_not_jump_when_nothing_is_dropped(method: str, tmp_path: Path) -> None:
    tiny = classifier()
    before = Probe(logits(tiny), CUT)
    trainer = make_trainer(
        tmp_path,
        model=tiny.model,
        callbacks=[before],
        args={"max_steps": CUT},
        search={"selection_ratio": 1.0, "method": method, "arch_every": 3},  # no step at the cut itself
    )
    trainer.train()
    gates = torch.tensor(trainer.selection.factors)
    assert len(trainer.selection.selected) == len(gates)

    after = logits(tiny)(trainer.model)
    torch.testing.assert_close(after, before.found[CUT], rtol=1e-5, atol=1e-5)
    assert abs(step_logs(trainer)[CUT]["diffora/gap"]) < 1e-5
    if method == "sigmoid":  # the others do not train under fractions
        assert gates.min() < 0.7
        with torch.no_grad():  # and the gates do matter: without them the output is another one
            for (_, layer), gate in zip(sorted_layers(trainer), gates, strict=True):
                layer.lora_B["default"].weight.div_(gate.clamp(min=1e-3))
        assert (logits(tiny)(trainer.model) - after).abs().max() > 1e-3


def sorted_layers(trainer: Trainer) -> list[tuple[str, LoraLayer]]:
    layers = lora_layers(trainer.model, "default")
    return [(name, layers[name]) for name in trainer.selection.modules]


@pytest.mark.parametrize("scope", ["layer", "model"])
@pytest.mark.parametrize("task", ["cls", "llama"])
def test_cut_model_is_a_stock_lora(task: str, scope: str, tmp_path: Path) -> None:
    kind = "llama" if task == "llama" else "bert"
    tiny = classifier(kind)
    trainer = make_trainer(tmp_path, task, model=tiny.model, search={"selection_scope": scope, "selection_ratio": 0.3})
    everything = adapted(trainer.model)
    trainer.train()
    selected = set(trainer.selection.selected)

    assert selected == adapted(trainer.model) < everything
    assert trainer.model.peft_config["default"].target_modules == selected
    assert sum(isinstance(module, LoraLayer) for module in trainer.model.modules()) == len(selected)
    assert trainer.model.base_model.targeted_module_names == sorted(selected)

    stock = stock_of(trainer, classifier(kind))
    assert hooks(trainer.model) == hooks(stock)
    assert b"diffora" not in pickle.dumps(trainer.model)
    names = [name for name, _ in stock.named_parameters()]
    assert [name for name, _ in trainer.model.named_parameters()] == names
    assert_same(dict(trainer.model.state_dict()), dict(stock.state_dict()))

    found = []
    for model in (trainer.model, stock):
        model.train()
        model.zero_grad()
        torch.manual_seed(5)  # dropout
        loss = model(**tiny.batch).loss
        loss.backward()
        found.append({"loss": loss.detach(), **{n: p.grad for n, p in model.named_parameters() if p.requires_grad}})
    assert_same(*found)


OPTIMIZERS = {
    "adamw": {},
    "momentum": {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9})},
    "adafactor": {"args": {"optim": "adafactor"}},
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_survivors_keep_their_optimizer_state(name: str, tmp_path: Path) -> None:
    def look(model: nn.Module, optimizer: object, lr_scheduler: object, **kwargs: object) -> dict[str, object]:
        inner = raw_optimizer(optimizer)
        return {
            "state": optimizer_state(model, optimizer),
            "held": [p for group in inner.param_groups for p in group["params"]],
            "groups": [len(group["params"]) for group in inner.param_groups],
            "trainable": [p for p in model.parameters() if p.requires_grad],
            "orphans": len(set(inner.state) - set(model.parameters())),
        }

    kwargs: dict[str, Any] = dict(OPTIMIZERS[name])
    kwargs["args"] = {
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "weight_decay": 0.1,
        **kwargs.get("args", {}),
    }
    before, after = Probe(look, CUT), Probe(look, CUT)
    trainer = make_trainer(tmp_path / "a", callbacks=[before], **kwargs)
    trainer.add_callback(after)
    trainer.train()
    old, new = before.found[CUT], after.found[CUT]

    assert len(new["held"]) < len(old["held"]) and set(new["held"]) == set(new["trainable"])
    assert new["orphans"] == 0 and len(new["groups"]) == len(old["groups"])
    assert len(new["state"]) == len(new["trainable"])
    assert_same(new["state"], {key: old["state"][key] for key in new["state"]})
    assert all(len(state) for state in new["state"].values())

    stock_model = get_peft_model(classifier().model, lora(task_type="SEQ_CLS"))
    stock = make_trainer(tmp_path / "b", cls=Trainer, model=stock_model, **kwargs)
    stock.train()
    rates = [log["learning_rate"] for log in step_logs(trainer).values()]
    assert len(set(rates)) > 8 and rates == [log["learning_rate"] for log in step_logs(stock).values()]


@pytest.mark.parametrize("empty_from_the_start", [False, True])
def test_custom_optimizer_loses_the_groups_that_the_cut_empties(empty_from_the_start: bool, tmp_path: Path) -> None:
    """One group a layer, each with a learning rate and a schedule of its own; only one module survives."""
    model = get_peft_model(classifier("llama").model, lora(task_type="SEQ_CLS"))
    groups: dict[str, list[nn.Parameter]] = {"layers.0.": [], "layers.1.": [], "score": []}
    owner = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            owner[parameter] = next(key for key in groups if key in name)
            groups[owner[parameter]].append(parameter)
    settings = {key: (10 ** -(index + 2), index + 1) for index, key in enumerate(groups)}
    parts = [{"params": groups[key], "lr": settings[key][0]} for key in groups]
    schedules = [lambda step, power=settings[key][1]: (1 - step / 20) ** power for key in groups]
    if empty_from_the_start:
        parts.insert(1, {"params": [], "lr": 1.0})
        schedules.insert(1, lambda step: 1.0)
    optimizer = torch.optim.AdamW(parts)
    scheduler = LambdaLR(optimizer, schedules)

    trainer = make_trainer(
        tmp_path,
        "llama",
        model=model,
        peft_config=None,
        optimizers=(optimizer, scheduler),
        search={"selection_scope": "model", "selection_ratio": 0.07},
    )
    trainer.train()

    assert len(trainer.selection.selected) == 1
    left = raw_optimizer(trainer.optimizer).param_groups
    assert raw_optimizer(trainer.optimizer) is optimizer
    assert [bool(group["params"]) for group in left] == [True, False, True][:: 1 if empty_from_the_start else 2]
    for group in filter(lambda group: group["params"], left):
        rate, power = settings[owner[group["params"][0]]]
        assert group["initial_lr"] == rate
        assert group["lr"] == pytest.approx(rate * (1 - 12 / 20) ** power, rel=1e-9)
    assert scheduler.get_last_lr() == [group["lr"] for group in left]


@pytest.mark.parametrize("sharing", ["layer", "model"])
def test_shared_pairs_are_tied_and_saved_as_ordinary_ones(sharing: str, tmp_path: Path) -> None:
    tiny = classifier("llama")
    trainer = make_trainer(
        tmp_path, "llama", model=tiny.model, search={"weight_sharing": sharing, "selection_ratio": 0.3}
    )
    trainer.train()
    selection, layers = trainer.selection, lora_layers(trainer.model, "default")
    assert selection.shared and set(layers) == set(selection.adapted)
    # A pair has one shape and, within a layer, one row; q_proj and o_proj are both square.
    members = [name.rpartition(".")[2] for group in selection.shared for name in group]
    assert {"q_proj", "o_proj"} & set(members)
    if sharing == "layer":
        assert all(len({name.split(".")[2] for name in group}) == 1 for group in selection.shared)
    else:
        assert any(len({name.split(".")[2] for name in group}) == 2 for group in selection.shared)

    for group in selection.shared:
        for part in ("lora_A", "lora_B"):
            assert len({getattr(layers[name], part)["default"].weight for name in group}) == 1
    trainable = sum(p.numel() for n, p in trainer.model.named_parameters() if "lora_" in n)
    assert trainable == selection.trainable_parameters < sum(selection.parameters)
    held = [p for group in raw_optimizer(trainer.optimizer).param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in trainer.model.parameters() if p.requires_grad}
    assert len(held) == len(set(held))

    trainer.save_model(tmp_path / "saved")
    tensors = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    saved = {name.removeprefix("base_model.model.") for name in tensors if "lora_" in name}
    assert saved == {f"{name}.{part}.weight" for name in layers for part in ("lora_A", "lora_B")}
    reloaded = PeftModel.from_pretrained(classifier("llama").model, tmp_path / "saved")
    assert torch.equal(logits(tiny)(reloaded), logits(tiny)(trainer.model))


def test_unfolded_gates_are_set_to_one(tmp_path: Path) -> None:
    """With `fold_gates=False` the selected modules go on with the weights that they have, else under their gates."""

    def weights(model: nn.Module, **kwargs: object) -> dict[str, Tensor]:
        return adapter(model)

    before, after = Probe(weights, CUT), Probe(weights, CUT)
    for fold in (False, True):
        search = {"fold_gates": fold, "method": "sigmoid"}
        trainer = make_trainer(tmp_path, callbacks=[before], args={"max_steps": CUT}, search=search)
        trainer.add_callback(after)
        trainer.train()
        gates = dict(zip(trainer.selection.modules, trainer.selection.gates, strict=True))
        for name in trainer.selection.selected:
            for part, factor in (("lora_A", 1.0), ("lora_B", gates[name] if fold else 1.0)):
                key = f"base_model.model.{name}.{part}.weight"
                torch.testing.assert_close(after.found[CUT][key], before.found[CUT][key] * factor, rtol=1e-6, atol=0)


def test_parameter_cap_is_kept(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, "sft", model=causal_model(), search={"max_trainable_parameters": 1000})
    trainer.train()
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    assert 0 < trained == trainer.selection.trainable_parameters <= 1000
    smallest = min(
        size
        for name, size in zip(trainer.selection.modules, trainer.selection.parameters, strict=True)
        if name not in trainer.selection.selected
    )
    assert trained + smallest > 1000
    assert len(vocabulary()) == trainer.model.config.vocab_size


def test_gates_close_before_the_cut_and_nothing_is_lost_at_it(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, "cls", search={"fade_out": 4, "selection_scope": "model"})
    search_gates: dict[int, Tensor] = {}
    scores: dict[int, Tensor] = {}

    def look(model: nn.Module, **kwargs: object) -> None:
        run, step = running(trainer), trainer.state.global_step
        if run is not None:
            search = run.search
            scores[step] = search.method.scores()
            if search.kept is not None:
                search_gates[step + 1] = search.training_gates()

    trainer.add_callback(Probe(look))
    trainer.train()
    kept = torch.tensor(trainer.selection.kept)
    assert sorted(search_gates) == [5, 6, 7, 8]  # the steps that train under closing gates
    for step, gates in search_gates.items():
        assert torch.all(gates[kept] == 1)
        assert torch.allclose(gates[~kept], torch.tensor(1 - (step - 4) / 4))
    assert torch.equal(scores[4], scores[7])  # no search on what is decided
    logs = {k: v for log in trainer.state.log_history for k, v in log.items() if k.startswith("diffora/")}
    assert logs["diffora/gap"] == pytest.approx(0, abs=1e-6)
    assert logs["diffora/held_out_loss_before_fade_out"] > 0
    assert torch.all(torch.tensor(trainer.selection.factors)[kept] == 1)
    fresh = get_peft_model(classifier().model, lora())
    with pytest.raises(ValueError, match="call `discretize` first"):
        ArchitectureSearch(fresh, DiffoRAConfig(), loss_fn=lambda model, batch: model(**batch).loss).fade_out(0.5)


def test_noise_of_embeddings_goes_on_where_their_lora_is_pruned(tmp_path: Path) -> None:
    """NEFTune, which a Trainer hangs on the module that the input embeddings are at the start."""

    def noisy(model: nn.Module, **kwargs: object) -> bool:
        embeddings, tokens = model.get_input_embeddings(), torch.tensor([[5, 6, 7]])
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            return not torch.equal(embeddings(tokens), embeddings(tokens))

    def scores(model: nn.Module, batches: object) -> dict[str, float]:
        return {name: float("embed" not in name) for name in adapted(model)}

    def build(folder: str) -> tuple[Trainer, Probe]:
        trainer = make_trainer(
            tmp_path / folder,
            "sft",
            args={"neftune_noise_alpha": 5, "save_strategy": "steps", "save_steps": 1000},
            peft_config=lora(target_modules=["embed_tokens", "q_proj"], lora_dropout=0.0),
            search={"method": "custom", "selection_scope": "model", "max_trainable_parameters": 1000},
            score_function=scores,
            callbacks=[SaveAt()],
        )
        trainer.add_callback(probe := Probe(noisy))
        return trainer, probe

    whole, probe = build("whole")
    whole.train()
    assert whole.selection.dropped and all("embed" in name for name in whole.selection.dropped)
    assert probe.found == dict.fromkeys(range(1, 13), True) and not noisy(whole.model.train())
    resumed, probe = build("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{SAVES[-1]}"))
    assert set(probe.found.values()) == {True} and not noisy(resumed.model.train())
    assert_continues(resumed, whole, SAVES[-1])
