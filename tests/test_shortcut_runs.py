"""Runs that choose shortcuts lose nothing: resumed, saved, pushed, begun again, on several processes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from conftest import (
    CUT,
    Probe,
    adapter,
    arguments,
    assert_continues,
    assert_same,
    causal_model,
    classifier,
    elsewhere,
    lora,
    make_trainer,
    optimizer_state,
    search_config,
    step_logs,
)
from hub_server import HubServer
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_distributed import train
from test_restart import Given, out_of_memory
from test_security import contents
from test_shortcuts import hooks
from tokenizer import classification_dataset, lm_dataset, preference_dataset, tiny_tokenizer
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import HubStrategy
from trl import DPOConfig, DPOTrainer
from trl.trainer.utils import use_adapter

from diffora_trainer import DiffoRAMixin, Selection, ShortcutModel, load_shortcuts
from diffora_trainer.adapters.grid import ModuleGrid
from diffora_trainer.core.files import ADAPTER_FOLDER, SHORTCUT_CONFIG_NAME, SHORTCUT_TENSORS_NAME
from diffora_trainer.experimental.shortcuts.shortcuts import shortcut_tensors, shortcuts
from diffora_trainer.trainer.checkpoint import newest_checkpoint


ALL = ["residual1", "residual2", "shortcut1", "shortcut2"]
SEARCHED = {"shortcuts": ALL, "shortcut_ranking": "separated", "arch_closing": 2}
SCORED = {"shortcuts": ALL, "selection_scope": "model", "score_batches": 2, "arch_closing": 0}
DYNAMIC = {**SCORED, "method": "grad_norm", "reallocate_every": 2}
# The search ends at step 6, so that the gates of the others close during the steps 7 and 8.
MOMENTS = {"warm-up": 2, "search": 5, "closing": 7, "cut": CUT, "selected": 10}


class SaveAt(TrainerCallback):
    """Saves a checkpoint at some steps."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save = state.global_step in MOMENTS.values()


def build(folder: Path, task: str = "cls", **kwargs: Any) -> Trainer:
    """A trainer whose search chooses among shortcuts, and that saves at the moments."""
    args = {"save_strategy": "steps", "save_steps": 1000, **kwargs.pop("args", {})}
    return make_trainer(folder, task, args=args, **{"search": SEARCHED, "callbacks": [SaveAt()], **kwargs})


def last(model: nn.Module, batches: Any) -> dict[str, float]:
    """Scores by which no shortcut is kept."""
    grid = ModuleGrid.from_model(model)
    return {name: 0.0 if name in grid.shortcuts else 1.0 + at for at, name in enumerate(grid.names)}


PLAIN = {"search": {**SCORED, "method": "custom"}, "score_function": last}


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the shortcuts."""
    return {name: tensor.detach().clone() for name, tensor in shortcut_tensors(model).items()}


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(3, 35).reshape(2, 16)).logits


def assert_chose(trainer: Trainer) -> None:
    """Some shortcuts were kept and some dropped, and the model has those that were kept, which have learned."""
    selection = trainer.selection
    assert 0 < len(selection.selected_shortcuts) < len(selection.shortcuts)
    assert sorted(shortcuts(trainer.model)) == sorted(selection.selected_shortcuts)
    assert all(shortcut.B.any() for shortcut in shortcuts(trainer.model).values())


# Resuming

ACCUMULATED = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "classifier": ("cls", {}),
    "sft, accumulated": (
        "sft",
        {"args": ACCUMULATED, "train_dataset": lm_dataset(12), "search": {**SEARCHED, "shortcut_ranking": "combined"}},
    ),
    "scored once": ("cls", {"search": {**SCORED, "method": "snip"}}),
    "reallocated": ("sft", {"search": DYNAMIC}),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The uninterrupted run of a name, made once."""
    made: dict[str, Trainer] = {}

    def run(name: str) -> Trainer:
        if name not in made:
            task, options = RUNS[name]
            made[name] = build(tmp_path_factory.mktemp("run"), task, **options)
            made[name].train()
        return made[name]

    return run


@pytest.mark.parametrize(
    ("name", "moment"),
    [
        *(("classifier", moment) for moment in MOMENTS),
        ("sft, accumulated", "search"),
        ("sft, accumulated", "cut"),
        pytest.param("sft, accumulated", "closing", marks=pytest.mark.slow),
        ("scored once", "cut"),
        ("reallocated", "search"),
        ("reallocated", "cut"),
    ],
)
def test_resumed_run_is_the_uninterrupted_run(name: str, moment: str, runs: Any, tmp_path: Path) -> None:
    whole, step = runs(name), MOMENTS[moment]
    assert_chose(whole)
    task, options = RUNS[name]
    checkpoint = Path(whole.args.output_dir, f"checkpoint-{step}")
    state = json.loads((checkpoint / "diffora_state.json").read_text())
    if name == "reallocated" and step < CUT:
        off = [name for name, on in zip(state["modules"], state["history"][-1]["on"], strict=True) if not on]
        assert set(off) & set(whole.selection.shortcuts)
    resumed = build(tmp_path, task, **options)
    resumed.train(resume_from_checkpoint=str(checkpoint))

    assert_continues(resumed, whole, step)
    assert_same(tensors(resumed.model), tensors(whole.model))
    states = [optimizer_state(trainer.model, trainer.optimizer) for trainer in (whole, resumed)]
    assert_same(*states)
    assert sum("diffora_shortcuts" in name for name in states[0]) == 2 * len(whole.selection.selected_shortcuts)


def test_stream_resumes(tmp_path: Path) -> None:
    def run(folder: Path, checkpoint: Path | None = None) -> Trainer:
        trainer = build(folder, train_dataset=classification_dataset(100).to_iterable_dataset())
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        return trainer

    whole = run(tmp_path / "whole")
    resumed = run(tmp_path / "resumed", tmp_path / "whole/checkpoint-5")
    assert_chose(whole)
    assert_continues(resumed, whole, 5)
    assert_same(tensors(resumed.model), tensors(whole.model))


def test_what_is_left_of_an_earlier_save_is_not_read(tmp_path: Path) -> None:
    """Uploads add to what is on the Hub, so that shortcuts may lie beside a later plain adapter there."""
    whole = build(tmp_path / "whole", **PLAIN)
    whole.train()
    assert not whole.selection.selected_shortcuts
    mixed = tmp_path / "mixed" / f"checkpoint-{CUT}"
    for step in (5, CUT):
        shutil.copytree(tmp_path / f"whole/checkpoint-{step}", mixed, dirs_exist_ok=True)
    assert (mixed / SHORTCUT_CONFIG_NAME).is_file() and (mixed / ADAPTER_FOLDER).is_dir()
    with pytest.raises(FileNotFoundError, match="plain PEFT adapter"):
        ShortcutModel.from_pretrained(classifier().model, mixed)
    resumed = build(tmp_path / "resumed", **PLAIN)
    with pytest.raises(ValueError, match=f"(?s){SHORTCUT_CONFIG_NAME} is left of an earlier one.*Please delete"):
        resumed.train(resume_from_checkpoint=str(mixed))
    for path in (SHORTCUT_CONFIG_NAME, SHORTCUT_TENSORS_NAME):
        (mixed / path).unlink()
    shutil.rmtree(mixed / ADAPTER_FOLDER)
    resumed.train(resume_from_checkpoint=str(mixed))
    assert_continues(resumed, whole, CUT)
    assert_same(*(optimizer_state(trainer.model, trainer.optimizer) for trainer in (whole, resumed)))


# Saving

OUTSIDE = """
import torch, transformers
from peft import AutoPeftModel, PeftModel

report = []
for job in jobs:
    found = {}
    for way in ("PeftModel", "AutoPeftModel", "load_adapter"):
        base = getattr(transformers, job["auto_class"]).from_pretrained(job["base"])
        try:
            if way == "PeftModel":
                model = PeftModel.from_pretrained(base, job["adapter"])
            elif way == "AutoPeftModel":
                model = AutoPeftModel.from_pretrained(job["adapter"])
            else:
                base.load_adapter(job["adapter"])
        except Exception as error:
            found[way] = f"{type(error).__name__}: {error}"
            continue
        found[way] = "loaded"
        if way == "PeftModel" and "known" in job:
            with torch.no_grad():
                logits = model.eval()(input_ids=torch.arange(3, 35).reshape(2, 16)).logits
            found[way] = bool(logits.equal(torch.load(job["known"])))
    report.append(found)
"""


def outside(jobs: list[dict[str, str]], folder: Path) -> list[dict[str, Any]]:
    """What plain PEFT does with adapters where this package is not installed."""
    report = elsewhere(OUTSIDE, jobs, folder)
    assert len(report) == len(jobs)
    return report


def test_saved_results_load_with_one_call_or_with_plain_peft(runs: Any, tmp_path: Path) -> None:
    jobs: list[dict[str, str]] = []
    for task, name, fresh, auto_class in (
        ("cls", "classifier", lambda: classifier().model, "AutoModelForSequenceClassification"),
        ("sft", "reallocated", causal_model, "AutoModelForCausalLM"),
    ):
        trainer = runs(name)
        fresh().save_pretrained(tmp_path / task)
        out = Path(trainer.args.output_dir)
        trainer.save_model()
        trainer.create_model_card()

        # The base model is as it was, and what was trained is all in the files.
        before = {name: p.data for name, p in fresh().named_parameters() if not name.startswith("classifier.")}
        live = {
            name.removeprefix("base_model.model.").replace(".base_layer", ""): p.data
            for name, p in trainer.model.named_parameters()
        }
        assert_same({name: live[name] for name in before}, before)
        expected = logits(trainer.model)
        assert not torch.equal(expected, logits(fresh()))
        for trainable in (False, True):
            loaded = ShortcutModel.from_pretrained(fresh(), out, is_trainable=trainable)
            assert torch.equal(logits(loaded), expected)
            names = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
            found = {name.removeprefix("model.") for name, p in loaded.model.named_parameters() if p.requires_grad}
            assert found == ({name.removeprefix("model.") for name in names} if trainable else set())
        assert_same(tensors(loaded.model), tensors(trainer.model))
        card = (out / "README.md").read_text()
        assert "ShortcutModel.from_pretrained(model" in card and "PeftModel" not in card
        folders = [out, *(out / f"checkpoint-{step}" for step in MOMENTS.values())]
        jobs += [
            {"base": str(tmp_path / task), "adapter": str(folder), "auto_class": auto_class}
            for folder in (folders if task == "cls" else folders[:1])
        ]
    refused = len(jobs)

    # A run whose selection keeps none, into a folder that held some from a save in the search.
    out = tmp_path / "plain"
    trainer = build(out, callbacks=[], args={"save_strategy": "no"}, **PLAIN)
    trainer.add_callback(Probe(lambda **_: trainer.save_model(), 4))
    trainer.add_callback(was := Probe(lambda **_: {path.name for path in out.iterdir()}, 4))
    trainer.train()
    assert {SHORTCUT_CONFIG_NAME, SHORTCUT_TENSORS_NAME, ADAPTER_FOLDER} <= was.found[4]
    trainer.save_model()
    trainer.create_model_card()
    assert trainer.selection.shortcuts and not trainer.selection.selected_shortcuts
    assert not shortcuts(trainer.model) and not hooks(trainer.model)
    assert not [name for name, _ in trainer.model.named_modules() if "shortcuts" in name]
    left = [path.relative_to(out).as_posix() for path in out.rglob("*")]
    assert not [path for path in left if "shortcut" in path or path.split("/")[0] == ADAPTER_FOLDER], left
    card = (out / "README.md").read_text()
    assert "PeftModel.from_pretrained(model" in card and "ShortcutModel" not in card and "library_name: peft" in card
    torch.save(logits(trainer.model), tmp_path / "known.pt")
    jobs.append({**jobs[0], "adapter": str(out), "known": str(tmp_path / "known.pt")})

    report = outside(jobs, tmp_path)
    for job, found in zip(jobs[:refused], report[:refused], strict=True):
        for way in ("PeftModel", "AutoPeftModel", "load_adapter"):
            assert "use diffora_trainer.ShortcutModel.from_pretrained" in str(found[way]), (job, way)
    assert report[-1]["PeftModel"] is True


@pytest.mark.parametrize("name", ["mine", ADAPTER_FOLDER])
def test_an_adapter_of_another_name_is_not_lost(name: str, tmp_path: Path) -> None:
    """PEFT saves it in a folder of its own, which may be that of the adapter beside shortcuts, or hold more."""
    model = get_peft_model(classifier().model, lora(task_type="SEQ_CLS"), adapter_name=name)
    trainer = build(tmp_path, model=model, peft_config=None, callbacks=[], args={"save_strategy": "no"}, **PLAIN)
    for _ in range(2):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "notes.txt").write_text("precious")
        trainer.save_model()
        ShortcutModel(trainer.model).save_pretrained(tmp_path / "by hand")
        for folder in (tmp_path, tmp_path / "by hand"):
            loaded = ShortcutModel.from_pretrained(classifier().model, folder)
            assert torch.equal(logits(loaded), logits(trainer.model))
    trainer.train()
    trainer.save_model()
    assert not (tmp_path / SHORTCUT_CONFIG_NAME).exists()
    loaded = PeftModel.from_pretrained(classifier().model, tmp_path / name)
    assert torch.equal(logits(loaded), logits(trainer.model))
    assert (tmp_path / name / "notes.txt").read_text() == "precious"


@pytest.mark.slow
def test_a_loaded_model_is_trained_on(runs: Any, tmp_path: Path) -> None:
    """The shortcuts that it has are chosen among, and its checkpoints resume."""
    folder = runs("classifier").args.output_dir

    def run(checkpoint: str | None = None) -> Trainer:
        model = ShortcutModel.from_pretrained(classifier().model, folder, is_trainable=True).model
        trainer = build(tmp_path / str(checkpoint is None), model=model, peft_config=None)
        trainer.train(resume_from_checkpoint=checkpoint)
        return trainer

    runs("classifier").save_model()
    whole = run()
    assert set(whole.selection.shortcuts) == set(runs("classifier").selection.selected_shortcuts)
    assert_chose(whole)
    for step in (5, 10):
        resumed = run(f"{tmp_path}/True/checkpoint-{step}")
        assert_continues(resumed, whole, step)
        assert_same(tensors(resumed.model), tensors(whole.model))
    whole.save_model()
    loaded = ShortcutModel.from_pretrained(classifier().model, tmp_path / "True")
    assert torch.equal(logits(loaded), logits(whole.model))


# The Trainer's own ways


@pytest.mark.parametrize("alone", [False, True], ids=["with states", "models alone"])
def test_best_model_is_loaded_with_its_shortcuts(alone: bool, tmp_path: Path) -> None:
    """From after the cut, though losses before it were lower, and with all but two checkpoints rotated away."""
    losses = {2: 0.1, 4: 0.2, 6: 0.3, 8: 0.8, 10: 0.5, 12: 0.7}
    every = {"save_steps": 2, "eval_steps": 2, "eval_strategy": "steps", "save_total_limit": 2}
    args = {**every, "load_best_model_at_end": True, "save_only_model": alone}
    trainer = build(tmp_path, callbacks=[], args=args, eval_dataset=classification_dataset(8, seed=5))
    trainer.evaluate = lambda *args, **kwargs: {"eval_loss": losses[trainer.state.global_step]}
    trainer.add_callback(held := Probe(lambda model, **_: (tensors(model), adapter(model)), 10, 12))
    trainer.train()
    assert_chose(trainer)
    best = tmp_path / "checkpoint-10"
    assert Path(trainer.state.best_model_checkpoint) == best
    assert_same((tensors(trainer.model), adapter(trainer.model)), held.found[10])
    assert not any(map(torch.equal, held.found[10][0].values(), held.found[12][0].values()))
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-10", "checkpoint-12"]
    loaded = ShortcutModel.from_pretrained(classifier().model, best)
    assert torch.equal(logits(loaded), logits(trainer.model))
    if alone:
        with pytest.raises(ValueError, match="(?s)save_only_model=True.*please start a new run"):
            build(tmp_path).train(resume_from_checkpoint=True)
    else:
        again = build(tmp_path / "again", callbacks=[])
        again.train(resume_from_checkpoint=str(best))
        assert_same(tensors(again.model), held.found[12][0])


def test_second_training_is_that_of_the_chosen_ones(tmp_path: Path) -> None:
    """Its checkpoint resumes, and the trainer goes back to one of its first training after the cut."""
    trainer = build(tmp_path)
    trainer.train()
    selection, first = trainer.selection, tensors(trainer.model)
    trainer.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-{CUT}")
    assert trainer.selection == selection
    assert_same(tensors(trainer.model), first)
    trainer.optimizer = None
    trainer.train()
    assert trainer.selection == selection and "diffora/entropy" not in step_logs(trainer)[1]
    assert not any(map(torch.equal, first.values(), tensors(trainer.model).values()))
    assert_chose(trainer)
    resumed = build(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-5")
    assert_continues(resumed, trainer, 5)
    assert_same(tensors(resumed.model), tensors(trainer.model))
    assert_same(*(optimizer_state(t.model, t.optimizer) for t in (trainer, resumed)))


@pytest.mark.slow
def test_each_trial_of_a_hyperparameter_search_has_its_own_shortcuts(tmp_path: Path) -> None:
    rates, found = [1e-2, 1e-3], []
    settings = {"eval_strategy": "steps", "eval_steps": 12, "save_strategy": "no"}
    given = {
        "model": None,
        "model_init": lambda: classifier().model,
        "eval_dataset": classification_dataset(8, seed=5),
        "callbacks": [],
    }
    trainer = build(tmp_path, args=settings, **given)

    class Watch(TrainerCallback):
        def on_train_end(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
            found.append((args.learning_rate, trainer.selection, tensors(model), step_logs(trainer)))

    trainer.add_callback(Watch())
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    trainer.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_categorical("learning_rate", rates)},
        n_trials=2,
        backend="optuna",
        sampler=Given(rates),
    )
    assert [rate for rate, *_ in found] == rates
    rate, selection, weights, logs = found[1]
    alone = build(tmp_path / "alone", args={**settings, "learning_rate": rate}, **given)
    alone.train()
    assert_chose(alone)
    assert selection == alone.selection
    assert_same((weights, logs), (tensors(alone.model), step_logs(alone)))


@pytest.mark.parametrize("begun", [5, pytest.param(10, marks=pytest.mark.slow)])
def test_smaller_batches_are_those_of_a_run_begun_with_them(begun: int, runs: Any, tmp_path: Path) -> None:
    """Memory runs out in the search, or after the cut."""
    checkpoint = f"{runs('classifier').args.output_dir}/checkpoint-{begun}"

    def run(folder: Path, batch: int, *steps: int) -> Trainer:
        args = {"auto_find_batch_size": bool(steps), "per_device_train_batch_size": batch}
        trainer = out_of_memory(build(folder, args=args), *steps)
        trainer.train(resume_from_checkpoint=checkpoint)
        return trainer

    found, asked = run(tmp_path / "found", 4, begun + 1), run(tmp_path / "asked", 3)
    assert_chose(found)
    assert_continues(found, asked, begun)
    assert_same(tensors(found.model), tensors(asked.model))


@pytest.mark.parametrize(
    "search",
    [pytest.param(SEARCHED, id="searched", marks=pytest.mark.slow), pytest.param(DYNAMIC, id="reallocated")],
)
def test_gradient_checkpointing_changes_nothing(search: dict[str, Any], tmp_path: Path) -> None:
    found = []
    for checkpointing in (False, True):
        args = {"gradient_checkpointing": checkpointing, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
        trainer = build(tmp_path, "sft", args={**args, "save_strategy": "no"}, search=search, callbacks=[])
        trainer.train()
        assert_chose(trainer)
        assert any(getattr(m, "gradient_checkpointing", False) for m in trainer.model.modules()) == checkpointing
        found.append((trainer.selection.kept, {step: log["loss"] for step, log in step_logs(trainer).items()}))
    assert found[0][0] == found[1][0]
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-4)


class DiffoRADPOTrainer(DiffoRAMixin, DPOTrainer):
    pass


def test_the_reference_of_dpo_is_the_base_model(tmp_path: Path) -> None:
    """The adapter is switched off for it, and so are the shortcuts, in the search and after the cut."""
    trainer = DiffoRADPOTrainer(
        model=causal_model(attention_dropout=0.0),
        args=arguments(tmp_path, DPOConfig),
        train_dataset=preference_dataset(24),
        processing_class=tiny_tokenizer(),
        peft_config=lora(),
        diffora_config=search_config(**SEARCHED),
    )
    base, checked = causal_model(attention_dropout=0.0), []
    expected = logits(base)

    def compare(decoder: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if trainer.model._adapters_disabled:  # a pass for the reference
            with torch.no_grad():
                same = torch.equal(output.last_hidden_state, base.model(*args, **kwargs).last_hidden_state)
            checked.append((trainer.state.global_step, same))

    trainer.model.get_base_model().model.register_forward_hook(compare, with_kwargs=True)
    trainer.train()
    assert_chose(trainer)
    assert {step for step, _ in checked} == set(range(12)) and all(same for _, same in checked)
    trained = logits(trainer.model)
    assert not torch.equal(trained, expected)
    with use_adapter(trainer.model, None):
        assert torch.equal(logits(trainer.model), expected)
    assert torch.equal(logits(trainer.model), trained)
    trainer.save_model()
    assert torch.equal(logits(ShortcutModel.from_pretrained(causal_model(), tmp_path)), trained)


# Damaged and hostile files


def edit(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        config = json.loads((folder / SHORTCUT_CONFIG_NAME).read_text())
        change(config)
        (folder / SHORTCUT_CONFIG_NAME).write_text(json.dumps(config))

    return damage


def put(name: str, content: str | bytes) -> Callable[[Path], None]:
    return lambda folder: (
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode()) and None
    )


def cut_short(name: str, left: float) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(len(content) * left)])

    return damage


def remove(*names: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / name).unlink() for name in names] and None


def change_tensors(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = load_file(folder / SHORTCUT_TENSORS_NAME)
        change(content)
        save_file(content, folder / SHORTCUT_TENSORS_NAME)

    return damage


def of_other_type(folder: Path) -> None:
    """A data type that the format knows and PyTorch does not."""
    path = folder / SHORTCUT_TENSORS_NAME
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + size].replace(b'"F32"', b'"U42"', 1)
    path.write_bytes(content[:8] + header + content[8 + size :])


JSON, BLOB = SHORTCUT_CONFIG_NAME, SHORTCUT_TENSORS_NAME
DAMAGES: list[tuple[Callable[[Path], None], str]] = [
    (remove(JSON), JSON),
    (remove(BLOB), BLOB),
    (remove(JSON, BLOB), JSON),
    *((cut_short(name, left), name) for name in (JSON, BLOB) for left in (0.9, 0.1, 0)),
    (put(BLOB, b"\xff" * 5000), BLOB),
    (of_other_type, BLOB),
    (change_tensors(lambda t: t.pop(min(t))), BLOB),
    (change_tensors(lambda t: t.update(more=torch.zeros(2))), BLOB),
    (change_tensors(lambda t: t.update({min(t): torch.zeros(2, 2)})), BLOB),
    (change_tensors(lambda t: t[min(t)].fill_(float("nan"))), BLOB),
    (change_tensors(lambda t: t.update({min(t): torch.zeros(t[min(t)].shape, dtype=torch.int64)})), BLOB),
    (edit(lambda c: c.update(r=8)), JSON),
    (edit(lambda c: c.update(lora_alpha=9)), JSON),
    (edit(lambda c: c.update(dropout=0.5)), JSON),
    (edit(lambda c: c.update(kinds=["residual1", "residual2"], names=None)), JSON),
    (edit(lambda c: c.update(format=2)), JSON),
    (edit(lambda c: c.pop("r")), JSON),
    (edit(lambda c: c.update(more=1)), JSON),
    (put(f"{ADAPTER_FOLDER}/adapter_config.json", "{"), "adapter_config.json"),
    (remove(f"{ADAPTER_FOLDER}/adapter_model.safetensors"), "adapter_model.safetensors"),
]
HOSTILE: list[Callable[[Path], None]] = [
    put(JSON, "[" * 100_000),
    put(JSON, '{"a":' * 100_000),
    put(JSON, "{}" + " " * 1_000_000 + "x"),
    put(JSON, bytes(range(256))),
    put(JSON, "null"),
    put(JSON, '{"py/reduce": [{"py/type": "pathlib.Path.touch"}, {"py/tuple": ["executed"]}]}'),
    *(
        edit(lambda c, key=key, value=value: c.update({key: value}))
        for key, value in (
            ("names", ["../../x.residual1"]),
            ("names", ["/etc/passwd.residual1", "C:\\x.residual1"]),
            ("names", ["../../x"]),
            ("names", ["x" * 10_000_000 + ".residual1"]),
            ("names", ["\x1b[2J\u202e\ud800\n.residual1"]),
            ("names", ["__class__.__init__.residual1"]),
            ("names", [f"{number}.residual1" for number in range(100_000)]),
            ("names", "all"),
            ("names", [{"a": []}]),
            ("names", []),
            ("kinds", [["residual1"]]),
            ("kinds", ["../../x"] * 100_000),
            ("kinds", {"residual1": 1}),
            ("r", 10**18),
            ("r", 10**3000),
            ("r", "4"),
            ("r", True),
            ("r", float("nan")),
            ("lora_alpha", 10**3000),
            ("lora_alpha", float("inf")),
            ("lora_alpha", -1),
            ("dropout", 10**3000),
            ("dropout", float("nan")),
            ("format", {"x": 1}),
            ("format", None),
        )
    ),
]  # fmt: skip


def test_every_damage_is_named(runs: Any, tmp_path: Path) -> None:
    """Nothing is resumed from a damaged checkpoint, from before the cut or after it: no step can be taken."""
    whole = runs("classifier")
    for step in (5, 10):
        source = Path(whole.args.output_dir, f"checkpoint-{step}")
        trainer = build(tmp_path / "resumed", callbacks=[])
        training_step, trainer.training_step = trainer.training_step, None
        for number, (damage, name) in enumerate(DAMAGES):
            checkpoint = tmp_path / str(number) / source.name
            shutil.copytree(source, checkpoint)
            damage(checkpoint)
            with pytest.raises(Exception) as error:
                trainer.train(resume_from_checkpoint=str(checkpoint))
            assert error.type is ValueError, (number, name, error.value)
            error.match(re.escape(name))
            assert "lease" in str(error.value) and len(str(error.value)) < 2000  # what to do
        trainer.training_step = training_step
        trainer.train(resume_from_checkpoint=str(source))
        assert_continues(trainer, whole, step)
        assert_same(tensors(trainer.model), tensors(whole.model))


def test_shortcuts_of_another_run_are_refused(runs: Any, tmp_path: Path) -> None:
    whole, changes = (
        runs("classifier"),
        {
            f"`r` of the shortcuts in {JSON}": {"r": 2},
            f"`lora_alpha` of the shortcuts in {JSON}": {"lora_alpha": 4},
            f"`dropout` of the shortcuts in {JSON}": {"lora_dropout": 0.1},
            "other LoRA modules.*`shortcuts` of the run": {},
        },
    )
    for step in (5, 10):
        for message, change in changes.items():
            search = SEARCHED if change else {**SEARCHED, "shortcuts": ALL[:2]}
            trainer = build(tmp_path, peft_config=lora(**change), search=search)
            with pytest.raises(ValueError, match=f"(?s){message}"):
                trainer.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-{step}")
    other = build(tmp_path / "other", search={**SEARCHED, "selection_ratio": 0.2}, args={"seed": 3})
    other.train()
    mixed = tmp_path / "mixed" / "checkpoint-10"
    shutil.copytree(f"{whole.args.output_dir}/checkpoint-10", mixed)
    for name in (JSON, BLOB):
        shutil.copy(f"{tmp_path}/other/checkpoint-10/{name}", mixed)
        with pytest.raises(ValueError, match=f"{BLOB}.*does not fit diffora_state.json"):
            build(tmp_path / "resumed").train(resume_from_checkpoint=str(mixed))


def test_newest_whole_checkpoint_is_taken(runs: Any, tmp_path: Path) -> None:
    whole = runs("classifier")
    shutil.copytree(whole.args.output_dir, tmp_path / "run")
    remove(BLOB)(tmp_path / "run/checkpoint-10")
    cut_short(JSON, 0.5)(tmp_path / "run/checkpoint-8")
    remove(JSON, BLOB, "adapter_config.json")(tmp_path / "run/checkpoint-7")
    found, passed = newest_checkpoint(tmp_path / "run")
    assert found == str(tmp_path / "run/checkpoint-5") and list(passed) == [f"checkpoint-{at}" for at in (10, 8, 7)]
    assert BLOB in passed["checkpoint-10"] and JSON in passed["checkpoint-8"] and JSON in passed["checkpoint-7"]
    trainer = build(tmp_path / "run")
    trainer.train(resume_from_checkpoint=True)
    assert_continues(trainer, whole, 5)
    assert_same(tensors(trainer.model), tensors(whole.model))


def test_foreign_configurations_are_data(runs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They execute nothing, write nothing, take no memory, leave the model as it was, and are told in short."""
    whole = runs("classifier")
    source = tmp_path / "inside" / "checkpoint-10"
    shutil.copytree(f"{whole.args.output_dir}/checkpoint-10", source)
    text = (source / JSON).read_text()
    monkeypatch.chdir(tmp_path / "inside")
    model = get_peft_model(classifier().model, lora(task_type="SEQ_CLS"))
    trainer = build(tmp_path / "resumed", callbacks=[])
    names, held = [[name for name, _ in m.named_modules()] for m in (model, trainer.model)], hooks(model)
    before = sorted(tmp_path.rglob("*"))
    for number, hostile in enumerate(HOSTILE):
        hostile(source)
        for load in (
            lambda: ShortcutModel.from_pretrained(classifier().model, source),
            lambda: load_shortcuts(model, source),
            lambda: trainer.train(resume_from_checkpoint=str(source)),
        ):
            with pytest.raises(Exception) as error:
                load()
            assert error.type is ValueError, (number, error.value)
            told = str(error.value)
            assert "shortcut" in told and len(told) < 1500 and told.replace("\n", "").isprintable(), (number, told)
        assert [[name for name, _ in m.named_modules()] for m in (model, trainer.model)] == names
        assert hooks(model) == held
        (source / JSON).write_text(text)
    assert sorted(tmp_path.rglob("*")) == before


# The Hub


PUSH = """
import sys
import torch
from conftest import search_config
from tokenizer import classification_dataset, tiny_tokenizer
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, TrainingArguments
from peft import LoraConfig, PeftModel
from diffora_trainer import DiffoRATrainer, ShortcutModel
from test_shortcut_runs import PLAIN, SEARCHED, logits

kind, home, token = sys.argv[1:]
options = {"search": SEARCHED} if kind == "kept" else PLAIN
trainer = DiffoRATrainer(
    model=AutoModelForSequenceClassification.from_pretrained("user/base"),
    args=TrainingArguments(
        home + "/out", max_steps=10, learning_rate=0.01, use_cpu=True, report_to="none", disable_tqdm=True,
        logging_steps=1, save_strategy="steps", save_steps=5, push_to_hub=True, hub_always_push=True,
        hub_strategy="checkpoint", hub_model_id="user/" + kind, hub_token=token, run_name=home + "/out", seed=7,
    ),
    train_dataset=classification_dataset(24),
    data_collator=DataCollatorWithPadding(tiny_tokenizer()),
    peft_config=LoraConfig(r=4, target_modules="all-linear"),
    diffora_config=search_config(**options["search"]),
    score_function=options.get("score_function"),
)
trainer.train()
expected = logits(trainer.model)


def base():
    return AutoModelForSequenceClassification.from_pretrained("user/base")


if kind == "kept":  # pushed at a checkpoint, and again at the end
    assert 0 < len(trainer.selection.selected_shortcuts) < len(trainer.selection.shortcuts)
    assert torch.equal(logits(ShortcutModel.from_pretrained(base(), "user/kept")), expected)
trainer.push_to_hub(commit_message="the end")
if kind == "kept":
    model = ShortcutModel.from_pretrained(base(), "user/kept")
    assert torch.equal(logits(model), expected)
    assert sorted(model.shortcut_config.names) == sorted(trainer.selection.selected_shortcuts)
else:
    assert torch.equal(logits(PeftModel.from_pretrained(base(), "user/plain")), expected)
    try:
        ShortcutModel.from_pretrained(base(), "user/plain")
    except FileNotFoundError as error:
        assert "plain PEFT adapter" in str(error)
    else:
        raise SystemExit("shortcuts of an earlier push were loaded")
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["kept", "plain"])
def test_what_is_pushed_loads_with_one_call(kind: str, tmp_path: Path) -> None:
    """At each checkpoint and at the end; and nothing private is pushed."""
    home = tmp_path / "home" / "alice"
    home.mkdir(parents=True)
    classifier().model.save_pretrained(tmp_path / "base")
    with HubServer() as hub:
        hub.add_repo("user/base", {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()})
        roots = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parent.parent)])
        done = subprocess.run(
            [sys.executable, "-c", PUSH, kind, str(home), hub.token],
            # `conftest` leaves the settings that it finds.
            env=hub.env(tmp_path / "hf_home", PYTHONPATH=roots, HOME=str(home), HF_HUB_OFFLINE="0"),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert done.returncode == 0, done.stderr
        repo = hub.repos[f"user/{kind}"]
    assert len([commit for commit in repo.commits if "in progress" in commit]) >= 2 and repo.commits[-1] == "the end"
    config = json.loads(repo.files["adapter_config.json"])
    card = repo.files["README.md"].decode()
    if kind == "kept":
        assert "ShortcutModel.from_pretrained" in config["peft_type"] and "adapter_model.safetensors" not in repo.files
        held = {JSON, BLOB, *(f"{ADAPTER_FOLDER}/adapter_{name}" for name in ("config.json", "model.safetensors"))}
        assert held | {f"last-checkpoint/{name}" for name in held} <= set(repo.files)
        assert 'ShortcutModel.from_pretrained(model, "user/kept")' in card and "PeftModel" not in card
    else:
        assert config["peft_type"] == "LORA" and "PeftModel.from_pretrained" in card and "ShortcutModel" not in card
    assert config["base_model_name_or_path"] == "user/base"
    assert ("library_name: diffora-trainer" if kind == "kept" else "library_name: peft") in card
    for name, data in repo.files.items():
        for part, content in contents(name, data):
            assert not [secret for secret in (hub.token, "alice", str(tmp_path)) if secret.encode() in content], part


def test_card_of_the_first_push_is_of_what_was_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The output holds nothing yet when the first checkpoint is pushed."""
    trainer = build(tmp_path, callbacks=[], args={"save_strategy": "no"})
    trainer.train()
    trainer.save_model(str(tmp_path / "checkpoint-12"))
    trainer.args.hub_strategy, trainer.push_in_progress = HubStrategy.EVERY_SAVE, None
    cards: list[str] = []
    monkeypatch.setattr(
        Trainer,
        "_push_from_checkpoint",
        lambda self, folder: cards.append(Path(self.args.output_dir, "README.md").read_text()),
    )
    trainer._push_from_checkpoint(str(tmp_path / "checkpoint-12"))
    (card,) = cards
    assert "ShortcutModel.from_pretrained" in card and "library_name: diffora-trainer" in card
    assert torch.equal(logits(ShortcutModel.from_pretrained(classifier().model, tmp_path)), logits(trainer.model))


# Several processes


@pytest.mark.slow
@pytest.mark.parametrize(
    "search",
    [
        {"relaxation": "sigmoid", "arch_closing": 0},  # scores that differ by little
        {"method": "constant", "reallocate_every": 1, "selection_scope": "model", "selection_ratio": 0.25},
    ],
    ids=["searched", "reallocated"],
)
def test_two_processes_decide_as_one(search: dict[str, Any], tmp_path: Path) -> None:
    """With gradient accumulation and checkpointing, as one process on the same rows."""
    search = {"shortcuts": ALL, "shortcut_ranking": "separated", **search}
    args = {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "ddp_find_unused_parameters": False,  # so that one that gets no gradient any more is an error
    }
    alone = train(None, tmp_path / "alone", search=search)[0]
    reports = train("ddp", tmp_path / "two", search=search, args=args, save_at=[5, 10])
    assert [report["wrapper"] for report in reports] == ["DistributedDataParallel"] * 2
    assert reports[0] == reports[1]
    report = reports[0]
    assert report["selected"] == alone["selected"] and 0 < len(report["selected_shortcuts"]) < 7
    assert report["scores"] == pytest.approx(alone["scores"], abs=1e-5)
    assert report["losses"] == pytest.approx(alone["losses"], abs=1e-4)
    for name, weights in alone["weights"].items():
        assert report["weights"][name] == pytest.approx(weights, abs=1e-4), name
    assert all(report["moved"]) and report["gathered"] == report["parameters"]
    assert report["optimized"] == report["trainable"]
    if "reallocate_every" in search:
        history = Selection.load(tmp_path / "two").history
        assert history == Selection.load(tmp_path / "alone").history and len({entry.on for entry in history}) == 5

    # What they saved together, and a run that goes on from it.
    model = ShortcutModel.from_pretrained(causal_model(attention_dropout=0.0), tmp_path / "two").model
    held = {name: p.flatten().tolist() for name, p in model.named_parameters() if name in report["weights"]}
    assert held == report["weights"]
    for step in (5, 10):
        assert {JSON, BLOB} <= {path.name for path in (tmp_path / f"two/checkpoint-{step}").iterdir()}
    resumed = train("ddp", tmp_path / "resumed", search=search, args=args, resume=f"{tmp_path}/two/checkpoint-5")
    for key in ("losses", "scores", "selected", "weights"):
        assert [r[key] for r in resumed] == [w[key] for w in reports], key
