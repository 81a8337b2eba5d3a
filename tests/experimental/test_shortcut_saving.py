"""What a run with shortcuts saves and pushes, and how it is loaded."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import Trainer
from transformers.trainer_utils import HubStrategy

from diffora_trainer import ShortcutModel
from diffora_trainer.experimental.shortcuts.files import ADAPTER_FOLDER, SHORTCUT_CONFIG_NAME, SHORTCUT_TENSORS_NAME
from diffora_trainer.experimental.shortcuts.shortcuts import shortcuts
from helpers import IMPORT_PATH
from helpers.checks import assert_continues, assert_same, optimizer_state
from helpers.hub import HubServer
from helpers.hub.contents import contents
from helpers.processes import elsewhere
from helpers.shortcut_runs import BLOB, JSON, MOMENTS, PLAIN, assert_chose, logits, shortcut_trainer, tensors
from helpers.shortcuts import hooks
from helpers.trainers import CUT, Probe, causal_model, classifier, lora


def test_what_is_left_of_an_earlier_save_is_not_read(tmp_path: Path) -> None:
    """Uploads add to what is on the Hub, so that shortcuts may lie beside a later plain adapter there."""
    whole = shortcut_trainer(tmp_path / "whole", **PLAIN)
    whole.train()
    assert not whole.selection.of_kind("shortcuts")
    mixed = tmp_path / "mixed" / f"checkpoint-{CUT}"
    for step in (5, CUT):
        shutil.copytree(tmp_path / f"whole/checkpoint-{step}", mixed, dirs_exist_ok=True)
    assert (mixed / SHORTCUT_CONFIG_NAME).is_file() and (mixed / ADAPTER_FOLDER).is_dir()
    with pytest.raises(FileNotFoundError, match="plain PEFT adapter"):
        ShortcutModel.from_pretrained(classifier().model, mixed)
    resumed = shortcut_trainer(tmp_path / "resumed", **PLAIN)
    with pytest.raises(ValueError, match=f"(?s){SHORTCUT_CONFIG_NAME} is left of an earlier one.*Please delete"):
        resumed.train(resume_from_checkpoint=str(mixed))
    for path in (SHORTCUT_CONFIG_NAME, SHORTCUT_TENSORS_NAME):
        (mixed / path).unlink()
    shutil.rmtree(mixed / ADAPTER_FOLDER)
    resumed.train(resume_from_checkpoint=str(mixed))
    assert_continues(resumed, whole, CUT)
    assert_same(*(optimizer_state(trainer.model, trainer.optimizer) for trainer in (whole, resumed)))


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


@pytest.mark.slow
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
    trainer = shortcut_trainer(out, callbacks=[], args={"save_strategy": "no"}, **PLAIN)
    trainer.add_callback(Probe(lambda **_: trainer.save_model(), 4))
    trainer.add_callback(was := Probe(lambda **_: {path.name for path in out.iterdir()}, 4))
    trainer.train()
    assert {SHORTCUT_CONFIG_NAME, SHORTCUT_TENSORS_NAME, ADAPTER_FOLDER} <= was.found[4]
    trainer.save_model()
    trainer.create_model_card()
    assert trainer.selection.grid.of_kind("shortcuts") and not trainer.selection.of_kind("shortcuts")
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
    trainer = shortcut_trainer(
        tmp_path, model=model, peft_config=None, callbacks=[], args={"save_strategy": "no"}, **PLAIN
    )
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
        trainer = shortcut_trainer(tmp_path / str(checkpoint is None), model=model, peft_config=None)
        trainer.train(resume_from_checkpoint=checkpoint)
        return trainer

    runs("classifier").save_model()
    whole = run()
    assert set(whole.selection.grid.of_kind("shortcuts")) == set(runs("classifier").selection.of_kind("shortcuts"))
    assert_chose(whole)
    for step in (5, 10):
        resumed = run(f"{tmp_path}/True/checkpoint-{step}")
        assert_continues(resumed, whole, step)
        assert_same(tensors(resumed.model), tensors(whole.model))
    whole.save_model()
    loaded = ShortcutModel.from_pretrained(classifier().model, tmp_path / "True")
    assert torch.equal(logits(loaded), logits(whole.model))


PUSH = """
import sys
import torch
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, TrainingArguments
from peft import LoraConfig, PeftModel
from diffora_trainer import DiffoRATrainer, ShortcutModel
from helpers.data import classification_dataset, tiny_tokenizer
from helpers.shortcut_runs import PLAIN, SEARCHED, logits
from helpers.trainers import search_config

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
    assert 0 < len(trainer.selection.of_kind('shortcuts')) < len(trainer.selection.grid.of_kind('shortcuts'))
    assert torch.equal(logits(ShortcutModel.from_pretrained(base(), "user/kept")), expected)
trainer.push_to_hub(commit_message="the end")
if kind == "kept":
    model = ShortcutModel.from_pretrained(base(), "user/kept")
    assert torch.equal(logits(model), expected)
    assert sorted(model.shortcut_config.names) == sorted(trainer.selection.of_kind('shortcuts'))
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
        done = subprocess.run(
            [sys.executable, "-c", PUSH, kind, str(home), hub.token],
            env=hub.env(tmp_path / "hf_home", PYTHONPATH=IMPORT_PATH, HOME=str(home)),
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
    trainer = shortcut_trainer(tmp_path, callbacks=[], args={"save_strategy": "no"})
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
