"""Modules that are not selected and stay: what they have learned is kept, and nothing below the others is computed."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import DataCollatorForLanguageModeling

from diffora_trainer import ArchitectureSearch, DiffoRAConfig, Selection, selected_lora_config
from diffora_trainer.adapters.freezing import frozen_view
from diffora_trainer.adapters.grid import AdapterGrid
from diffora_trainer.compat.peft import keep_frozen
from helpers.adapted import base_weights
from helpers.checks import adapter, assert_helpful, assert_same, raw_optimizer, step_logs
from helpers.data import classification_dataset, tiny_tokenizer, token_rows
from helpers.depth import LAYERS, NOT_REENTRANT, Reach, deep, layer_of, trainer_of
from helpers.processes import elsewhere
from helpers.trainers import CUT, Probe, deep_model, lora, make_trainer


FREEZE = {"unselected": "freeze"}
DROPOUT = {"peft_config": lora(lora_dropout=0.2)}


def run(folder: Path, task: str = "sft", search: dict[str, Any] | None = None, **kwargs: Any) -> Any:
    args = {"max_steps": CUT + 6, **kwargs.pop("args", {})}
    return trainer_of(folder, task, kwargs.pop("model", None) or deep("llama", task), args, search=search, **kwargs)


def names_of(trainer: Any, modules: tuple[str, ...]) -> list[str]:
    return [name for name in adapter(trainer.model) if any(f".{module}." in name for module in modules)]


# DPO takes the model without its adapter for a reference, and PEFT makes all of it trainable afterwards.
@pytest.mark.parametrize(("task", "checkpointing"), [("sft", False), ("sft", True), ("dpo", False)])
def test_what_is_not_selected_stays_as_it_was_and_is_not_computed_backwards(
    tmp_path: Path, task: str, checkpointing: bool
):
    trainer = run(tmp_path, task, search=FREEZE, args=NOT_REENTRANT if checkpointing else {})
    reach = Reach().watch(trainer.model)
    probe = Probe(lambda model, **_: adapter(model), CUT)
    for callback in (reach, probe):
        trainer.add_callback(callback)
    before = base_weights(trainer.model)
    trainer.train()
    selection, now, then = trainer.selection, adapter(trainer.model), probe.found[CUT]
    assert set(selection.frozen) == set(selection.modules) - set(selection.selected)
    assert selection.dropped == () and set(selection.present) == set(selection.modules)
    assert list(now) == list(then)  # nothing has left the adapter
    frozen, trained = names_of(trainer, selection.frozen), names_of(trainer, selection.selected)
    assert set(frozen) | set(trained) == set(now)
    assert all(torch.equal(now[name], then[name]) for name in frozen)
    assert all(bool(now[name].any()) for name in frozen)  # they have learned something
    assert not any(torch.equal(now[name], then[name]) for name in trained)
    assert_same(base_weights(trainer.model), before)
    # All the way down before, and afterwards to the lowest selected module alone.
    lowest = min(map(layer_of, selection.selected))
    assert min(reach.steps[CUT]) == 0 < lowest == min(reach.steps[CUT + 1])
    held = {parameter for group in raw_optimizer(trainer.optimizer).param_groups for parameter in group["params"]}
    assert held == {parameter for parameter in trainer.model.parameters() if parameter.requires_grad}
    assert len(held) == len(trained)
    with trainer.model.disable_adapter():
        pass
    live = {name for name, p in trainer.model.named_parameters() if p.requires_grad and "lora_" in name}
    assert len(live) == len(trained) and not any(f".{name}." in other for name in selection.frozen for other in live)


def test_it_is_a_run_of_all_modules_of_which_some_are_frozen_by_hand(tmp_path: Path):
    ours = run(tmp_path / "ours", search=FREEZE)
    ours.train()
    frozen = ours.selection.frozen

    def by_hand(model: nn.Module, **_: Any) -> None:
        for name, parameter in model.named_parameters():
            if any(f".{module}." in name for module in frozen):
                parameter.requires_grad_(False)
                parameter.grad = None

    # Same rows are held out until the same step, at which all modules are kept.
    other = run(tmp_path / "other", search={"selection_ratio": 1.0})
    other.add_callback(Probe(by_hand, CUT))
    other.train()
    assert other.selection.frozen == () and len(other.selection.selected) == len(other.selection.modules)
    found, expected = ({step: log["loss"] for step, log in step_logs(trainer).items()} for trainer in (ours, other))
    assert found == expected
    assert_same(adapter(ours.model), adapter(other.model))


def test_the_saved_adapter_is_a_plain_one_with_all_modules(tmp_path: Path):
    trainer = run(tmp_path, "cls", FREEZE)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    model = trainer.model.eval()
    rows = [[5, 6, 7, 8], [9, 10, 11, 12]]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor(rows)).logits
    model.get_base_model().config.save_pretrained(tmp_path / "base")
    torch.save(base_weights(model), tmp_path / "base.pt")
    report = elsewhere(
        """
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForSequenceClassification

base = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(jobs["base"]))
weights = {
    name.removeprefix("base_model.model.").replace(".base_layer", "").replace(".modules_to_save.default", "")
    .replace(".original_module", ""): value
    for name, value in torch.load(jobs["weights"]).items()
}
base.load_state_dict(weights, strict=False)
model = PeftModel.from_pretrained(base, jobs["saved"]).eval()
with torch.no_grad():
    report = {
        "logits": model(input_ids=torch.tensor(jobs["rows"])).logits.tolist(),
        "modules": sorted({name.split(".lora_")[0] for name in model.state_dict() if ".lora_A." in name}),
    }
""",
        {
            "base": str(tmp_path / "base"),
            "weights": str(tmp_path / "base.pt"),
            "saved": str(tmp_path / "saved"),
            "rows": rows,
        },
        tmp_path,
    )
    assert torch.allclose(torch.tensor(report["logits"]), logits, atol=1e-5)
    assert report["modules"] == sorted(f"base_model.model.{name}" for name in trainer.selection.modules)
    selection = Selection.load(tmp_path / "saved")
    assert selection == trainer.selection and selection.frozen
    assert (
        f"{len(selection.frozen)} others are frozen" in selection.summary()
        and "x kept in training   f frozen" in selection.table()
    )
    assert "❄️" in (tmp_path / "saved" / "README.md").read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="frozen"):
        selected_lora_config(tmp_path / "saved")


def test_frozen_modules_draw_nothing(tmp_path: Path):
    trainer = run(tmp_path, "cls", FREEZE, **DROPOUT)
    trainer.train()
    lowest = min(map(layer_of, trainer.selection.selected))
    layers = trainer.model.get_base_model().model.layers
    found: list[torch.Tensor] = []
    layers[lowest].register_forward_pre_hook(lambda layer, args, kwargs: found.append(args[0]), with_kwargs=True)
    for module in trainer.model.train().modules():  # that of the base model is another matter
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    for _ in range(2):
        trainer.model(input_ids=torch.tensor([[5, 6, 7, 8]]))
    assert torch.equal(*found)


@pytest.mark.parametrize(
    "config",
    [lora(use_dora=True), lora(init_lora_weights="pissa"), lora(target_modules=["embed_tokens", "q_proj", "up_proj"])],
    ids=["DoRA", "PiSSA", "embeddings"],
)
def test_other_forms_of_lora_are_frozen_whole(tmp_path: Path, config: Any):
    trainer = run(tmp_path, search={**FREEZE, "selection_ratio": 0.5}, peft_config=config)
    probe = Probe(lambda model, **_: adapter(model), CUT)
    trainer.add_callback(probe)
    trainer.train()
    frozen = names_of(trainer, trainer.selection.frozen)
    now, then = adapter(trainer.model), probe.found[CUT]
    changed = {name for name in now if not torch.equal(now[name], then[name])}
    assert frozen and changed == set(now) - set(frozen)


def test_the_cache_of_the_prefix_works_below_what_is_trained(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    runs = []
    for where in ("none", "memory"):
        model = deep("llama", "sft")
        for module in model.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.0
        trainer = run(tmp_path / where, search={**FREEZE, "prefix_cache": where}, model=model, args={"max_steps": 30})
        with caplog.at_level("INFO", "diffora_trainer"):
            trainer.train()
        runs.append(trainer)
    assert "compute is kept" in caplog.text and "% of the rows were found" in caplog.text
    plain, cached = ([log["loss"] for log in step_logs(trainer).values()] for trainer in runs)
    assert cached == pytest.approx(plain, rel=2e-4)


# In DPO the measured step takes the reference too.
@pytest.mark.parametrize(
    ("task", "args"), [("sft", {}), ("dpo", {"gradient_checkpointing": False}), ("dpo", NOT_REENTRANT)]
)
def test_a_limit_of_the_time_is_measured_with_frozen_modules(
    tmp_path: Path, task: str, args: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    search = {**FREEZE, "method": "diffora", "max_step_time": 0.7, "selection_ratio": None}
    trainer = run(tmp_path, task, search, args=args)
    count = len([name for name, _ in trainer.model.named_parameters() if "lora_A" in name])
    present = []

    def timed(step: Any, device: Any) -> float:
        step()
        live = [name for name, p in trainer.model.named_parameters() if "lora_A" in name and p.requires_grad]
        taking_part = [m for m in trainer.model.modules() if hasattr(m, "lora_A") and "forward" not in vars(m)]
        present.append(len(taking_part))
        return 1.0 + (LAYERS - min(map(layer_of, live))) + 0.001 * len(live)

    monkeypatch.setattr("diffora_trainer.search.timing.timed", timed)
    trainer.train()
    assert set(present) == {count}  # also in the steps that are measured, all of them take part
    selection = trainer.selection
    assert selection.times["predicted"] <= 0.7 * selection.times["all_modules"]
    assert selection.times["after_pruning"] == pytest.approx(selection.times["predicted"], rel=0.01)
    # Nothing but the depth costs much here, so that all modules above it go on.
    lowest = min(map(layer_of, selection.selected))
    assert lowest > 0 and set(selection.selected) == {n for n in selection.modules if layer_of(n) >= lowest}
    assert trainer.model.training and not any(layer_of(name) >= lowest for name in selection.frozen)


def test_a_limit_of_the_memory_is_counted_with_frozen_modules(tmp_path: Path):
    trainer = make_trainer(
        tmp_path,
        model=deep_model,
        search={**FREEZE, "max_step_memory": 0.6},
        train_dataset=token_rows(),
        data_collator=DataCollatorForLanguageModeling(tiny_tokenizer(), mlm=False),
    )
    trainer.train()
    memory = trainer.selection.memory
    assert memory["predicted"] <= 0.6 * memory["all_modules"]
    assert memory["after_pruning"] == pytest.approx(memory["predicted"], rel=0.1)
    assert trainer.selection.frozen and min(map(layer_of, trainer.selection.selected)) > 0


def test_a_measured_step_may_take_its_reference_first():
    def loss_fn(model: nn.Module, batch: dict[str, torch.Tensor], first: bool) -> torch.Tensor:
        if first:
            with torch.no_grad(), model.disable_adapter():
                model(**batch)
        return model(**batch).loss

    costs = []
    rows = torch.randint(3, 30, (4, 12), generator=torch.Generator().manual_seed(1))
    for first in (False, True):
        model = get_peft_model(deep_model(), lora())
        config = DiffoRAConfig(max_step_memory=0.6, **FREEZE)
        search = ArchitectureSearch(model, config, loss_fn=partial(loss_fn, first=first))
        search.begin()
        costs.append(search.meter.memory({"input_ids": rows, "labels": rows}))
    assert costs[0] == costs[1] and costs[0].depth[-1] < 0.9 * costs[0].depth[0]


def test_a_view_of_frozen_modules_leaves_them_as_they_were():
    model = get_peft_model(deep_model(), lora())
    sites = AdapterGrid.from_model(model).sites
    resting = sites[0].layer
    keep_frozen(resting, "default", ("lora_B",))  # as by `AlternateFactors`

    def trainable() -> set[str]:
        return {name for name, parameter in model.named_parameters() if parameter.requires_grad}

    def after_a_reference() -> set[str]:
        with model.disable_adapter():
            pass
        return trainable()

    everything = trainable()
    with frozen_view(model, sites, [len(sites) - 1]):
        assert trainable() == after_a_reference() and len(trainable()) == 2
    assert trainable() == everything
    rest = {name for name, parameter in model.named_parameters() if parameter is resting.lora_B["default"].weight}
    assert len(rest) == 1 and after_a_reference() == everything - rest


@pytest.mark.parametrize(
    ("options", "essential"),
    [
        ({"weight_sharing": "layer"}, r"weight_sharing='layer'.*share a pair"),
        ({"search_only": True}, r"search_only=True.*second run"),
        ({"method": "sampled"}, r"method='sampled'.*gates"),
        ({"method": "adalora"}, r"method='adalora'.*ranks"),
        ({"method": "sora"}, r"method='sora'.*ranks"),
        ({"selection_granularity": "rank"}, r"selection_granularity='rank'.*unselected='freeze'"),
        ({"selection_granularity": "component"}, r"selection_granularity='component'.*unselected='freeze'"),
        ({"method": "snip", "reallocate_every": 2}, r"reallocate_every=2.*switches"),
        ({"unselected": "keep"}, r"unselected='keep'.*'prune', 'freeze'"),
    ],
)
def test_what_cannot_be_combined_is_refused(tmp_path: Path, options: dict[str, Any], essential: str):
    with pytest.raises(ValueError) as caught:
        make_trainer(tmp_path, search={**FREEZE, **options}).train()
    assert_helpful(str(caught.value), essential)


def test_an_adapter_beside_another_one_is_not_frozen(tmp_path: Path):
    trainer = make_trainer(tmp_path, search=FREEZE, train_dataset=classification_dataset(24))
    trainer.model.add_adapter("reference", lora())
    with pytest.raises(ValueError) as caught:
        trainer.train()
    assert_helpful(str(caught.value), r"other adapters as well \(reference\)")
