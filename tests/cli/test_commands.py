"""The command `diffora`."""

from __future__ import annotations

import json
import logging
import os
import platform
import subprocess
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest
import torch
import yaml
from datasets import ClassLabel, Dataset
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification, PeftConfig
from transformers import AutoModelForSequenceClassification

import diffora_trainer
from diffora_trainer import Selection
from diffora_trainer.cli import COMMANDS, main
from helpers import ROOT
from helpers.adapted import lora_layers
from helpers.data import NAMES, preference_dataset, prompt_completion_dataset, tiny_tokenizer
from helpers.models import encoder_for, llama_config
from helpers.trainers import causal_model, make_trainer


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    found = []
    for seed in (0, 1):
        folder = tmp_path_factory.mktemp(f"run{seed}")
        trainer = make_trainer(folder, "sft", search={"method": "random", "arch_seed": seed, "selection_ratio": 0.3})
        trainer.train()
        trainer.save_model(str(folder))
        found.append(folder)
    return found[0], found[1]


def test_show_a_run_and_compare_it_with_another(runs: tuple[Path, Path], capsys: pytest.CaptureFixture) -> None:
    first, second = map(Selection.load, runs)
    assert main(["show", str(runs[0]), "--ranking", "--diff", str(runs[1])]) == 0
    text = capsys.readouterr().out
    assert first.table() in text and "by random, after step 8" in text and text.count("x kept") == 1
    assert [line.split()[-1] for line in text.splitlines() if line[:4].strip().isdigit()] == list(first.ranking())
    shared = len(set(first.selected) & set(second.selected)) / len(first.selected)
    assert f"share {shared:.0%} of their ranks" in text
    for name in set(first.selected) ^ set(second.selected):
        assert f"{name}: rank {'4 and 0' if name in first.selected else '0 and 4'}" in text
    assert main(["show", str(runs[0] / "nothing")]) == 1
    assert "neither a folder here nor an adapter on the Hub" in capsys.readouterr().err


def test_what_became_of_each_module(runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    first = Selection.load(runs[0])
    fates = {"removed": {}, "frozen": {"frozen": first.dropped}, "shares": {"shared": (first.dropped,)}}
    for fate, others in fates.items():
        replace(first, **others).save(tmp_path)
        assert main(["show", str(tmp_path), "--ranking"]) == 0
        lines = [line.split() for line in capsys.readouterr().out.splitlines() if line[:4].strip().isdigit()]
        assert {line[-1] for line in lines if line[1] == "rank"} == set(first.selected)
        assert {line[-1] for line in lines if line[1] == fate} == set(first.dropped)


@pytest.mark.parametrize(
    ("command", "option", "name"),
    [
        ("report", "--output", "diffora_report.html"),
        ("show", "--picture", "dam.png"),
        ("show", "--lora_config", "adapter_config.json"),
    ],
)
def test_a_file_into_a_folder(
    command: str, option: str, name: str, runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """One that is not there yet, and one that is."""
    for folder in (f"{tmp_path / 'new'}/", str(tmp_path / "new")):
        assert main([command, str(runs[0]), option, folder]) == 0
        assert f"Written: {tmp_path / 'new' / name}" in capsys.readouterr().out
        assert [path.name for path in (tmp_path / "new").iterdir()] == [name]
        (tmp_path / "new" / name).unlink()
    if option == "--lora_config":
        assert main([command, str(runs[0]), option, str(runs[1])]) == 1
        assert "is the configuration of the adapter beside it" in capsys.readouterr().err


def test_plan_is_what_a_run_then_does(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    llama_config(200, num_hidden_layers=2).save_pretrained(tmp_path)
    words = ["plan", str(tmp_path), "--steps", "300", "--rows", "1000", "--batch_size", "4"]
    assert main([*words, "--selection_ratio", "0.3", "--arch_split", "0.2"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "14 LoRA modules in 2 layers x 7 kinds" in text and "Kept 4 of 14 modules" in text
    assert "warm-up until step 15, search until step 60" in text and "alone until step 300" in text
    assert "200 of 1,000 rows until step 75" in text and "12 architecture steps of 4 rows" in text
    assert main([*words, "--max_trainable_parameters", "5000"]) == 0
    assert "LoRA parameters to the end" in capsys.readouterr().out
    assert main([*words, "--method", "snip"]) == 0
    assert "25 scoring passes of 4 rows" in capsys.readouterr().out  # all of the 100 held-out rows
    assert main([*words, "--method", "alora"]) == 0  # one batch: a component alone and missing, all, and none
    assert f"{2 + 2 * 14 * 16} scoring passes" in capsys.readouterr().out
    assert main([*words, "--method", "alpha_test"]) == 0
    assert f"{25 * (2 + 14)} to {25 * (2 + 5 * 14):,} scoring passes" in capsys.readouterr().out
    assert main([*words, "--method", "random"]) == 0
    assert "random reads no rows" in capsys.readouterr().out
    assert main([*words, "--method", "snip", "--method_options", '{"reallocate_every": 20}']) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "train until step 15 they are scored 3 times, every 20 steps" in text and "until step 75 the" in text
    assert "75 scoring passes" in text
    for method in ("diffora", "snip"):
        assert main([*words, "--method", method, "--search_only", "true"]) == 0
        text = capsys.readouterr().out
        assert "until step 75" in text and "the run ends there" in text and "until step 300" not in text
    assert main([*words, "--selection_ratio", "3"]) == 1
    assert "selection_ratio=3.0" in capsys.readouterr().err
    for size in ("0", "-1"):
        assert main([*words, "--method", "snip", "--batch_size", size]) == 1
        assert f"`per_device_train_batch_size` is {size}" in capsys.readouterr().err
    assert main(["plan", str(tmp_path), "--steps", "300", "--rows", "1"]) == 1
    assert "no row is left to train on" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_plan_of_the_file_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """It has the names of a run, and what a plan does not ask for is passed over. The command line goes before it."""
    base, file = tmp_path / "base", tmp_path / "run.yaml"
    llama_config(200, num_hidden_layers=2).save_pretrained(base)
    data = {"dataset_name": "embedded", "output_dir": "out", "learning_rate": 1e-4, "gradient_accumulation_steps": 8}
    model = {"model_name_or_path": str(base), "lora_r": 4, "lora_target_modules": ["q_proj", "v_proj"]}
    search = {"selection_ratio": 0.5, "method_options": {"arch_every": 2}}
    file.write_text(yaml.safe_dump({**data, **model, **search, "max_steps": 100, "per_device_train_batch_size": 2}))
    own = [str(base), "--r", "4", "--target_modules", "q_proj", "v_proj", "--steps", "100", "--batch_size", "2"]
    others = ["--selection_ratio", "0.5", "--method_options", '{"arch_every": 2}']
    plans = []
    for words in (["--config", str(file)], [*own, *others], [*others, "--config", str(file)]):
        assert main(["plan", *words]) == 0
        plans.append(capsys.readouterr().out)
    assert (
        "4 LoRA modules in 2 layers" in plans[0] and "until step 100" in plans[0] and plans[0].count("of 2 rows") == 1
    )
    assert plans[0] == plans[1] == plans[2]
    assert main(["plan", "--max_steps", "200", "--config", str(file), "--lora_r", "2"]) == 0
    assert "until step 200" in capsys.readouterr().out

    file.write_text("num_train_epochs: 3")
    assert main(["plan", str(base), "--config", str(file)]) == 1
    assert "for a number of optimizer steps, and not of epochs" in capsys.readouterr().err
    assert main(["plan", "--steps", "100"]) == 1
    assert "`model_name_or_path` is missing" in capsys.readouterr().err
    for wrong in (["--selecton_ratio", "0.5"], ["second"]):
        assert main(["plan", str(base), "--steps", "100", *wrong]) == 1
        assert "There is no such argument: " in capsys.readouterr().err


def test_as_a_module_and_with_words_that_it_does_not_know(
    runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [sys.executable, "-m", "diffora_trainer"]
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("diffora-trainer 0.")
    with pytest.raises(SystemExit) as stop:
        main(["show", str(runs[0]), "--colour"])
    assert stop.value.code == 2 and "unrecognized arguments: --colour" in capsys.readouterr().err
    out = str(tmp_path / "out")
    assert main(["export", str(runs[0]), "--for", "vllm", "--output", out]) == 0
    assert main(["export", str(runs[0]), "--for", "vllm", "--output", out]) == 1
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert main(["export", str(runs[0]), "--for", "vllm", "--output", "."]) == 0
    assert {path.name for path in Path().iterdir()} == {path.name for path in Path(out).iterdir()}


def test_every_command_explains_itself(capsys: pytest.CaptureFixture) -> None:
    for command in COMMANDS:
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        text = capsys.readouterr().out
        assert stop.value.code == 0 and text.startswith(f"usage: diffora {command}"), command


def test_env_is_what_a_bug_report_may_say(tmp_path: Path) -> None:
    """Versions as they are installed, also of a library that cannot be imported; no folder, no name and no token."""
    for broken in ("trl", "torch"):
        (tmp_path / broken).mkdir()
        (tmp_path / broken / "__init__.py").write_text("raise ImportError('broken')")
    secrets = {"HF_TOKEN": "hf_secret", "HF_HOME": str(tmp_path), "USER": "somebody"}

    def said(path: list[Path]) -> str:
        environment = {**os.environ, **secrets, "PYTHONPATH": os.pathsep.join(map(str, [*path, ROOT]))}
        command = [sys.executable, "-m", "diffora_trainer", "env"]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout

    text = said([])
    found = dict(line.removeprefix("- ").split(": ", 1) for line in text.splitlines())
    assert found["diffora-trainer"] == diffora_trainer.__version__ and found["Python"] == platform.python_version()
    for name in ("torch", "transformers", "trl", "peft", "accelerate", "datasets"):
        assert found[name] == metadata.version(name), name
    assert torch.accelerator.is_available() or found["Devices"] == "CPU"
    private = [*secrets.values(), str(Path.home()), str(ROOT), platform.node()]
    assert not [word for word in private if len(word) > 3 and word in text]
    assert said([tmp_path]) == text.replace(
        f"Devices: {found['Devices']}", "Devices: unknown, torch cannot be imported (ImportError)"
    )


@pytest.mark.parametrize("command", ["sft", "dpo"])
def test_training_from_a_file_and_words(command: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    tokenizer = tiny_tokenizer()
    causal_model(attention_dropout=0.0).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    rows = preference_dataset(24) if command == "dpo" else prompt_completion_dataset(24)
    data = tmp_path / "data [v1]" / "rows*.jsonl"  # no pattern, though it looks like one
    data.parent.mkdir()
    rows.to_json(data)
    settings = {"max_steps": 12, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "use_cpu": True}
    settings |= {"model_name_or_path": str(tmp_path / "base"), "dataset_name": str(data)}
    settings |= {"report_to": "none", "save_strategy": "no", "selection_ratio": 0.3, "discretize_at": 8}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    words = [command, "--config", str(tmp_path / "run.yaml"), "--output_dir", str(tmp_path / "out")]
    assert main([*words, "--selection_ratio", "0.5", "--lora_r", "2"]) == 0
    text = capsys.readouterr().out
    selection = Selection.load(tmp_path / "out")
    assert selection.config["selection_ratio"] == 0.5 and set(selection.grid.ranks) == {2}
    assert selection.table() in text and "Evaluation loss: " in text
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    assert len(lora_layers(loaded, "default")) == len(selection.selected)
    assert main([*words, "--selection_ratio", "7"]) == 1
    assert "selection_ratio=7" in capsys.readouterr().err
    assert main([*words, "--resume_from_checkpoint", "true"]) == 1  # the last one in the output folder; there is none
    assert str(tmp_path / "out") in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert "--selection_ratio" in capsys.readouterr().out


def opinions(kind: str, count: int = 40) -> Dataset:
    """Texts whose first word says what they are labelled: as names, as numbers of named classes, or as a score."""
    words = ["bad", "dull", "good"]
    rows = [{"review": f"{words[i % 3]} {NAMES[i % len(NAMES)]}", "stars": i % 3} for i in range(count)]
    if kind == "names":
        rows = [{**row, "stars": words[row["stars"]]} for row in rows]
    if kind == "scores":
        rows = [{**row, "stars": row["stars"] / 2} for row in rows]
    data = Dataset.from_list(rows)
    return data.cast_column("stars", ClassLabel(names=words)) if kind == "classes" else data


def test_classify_with_a_base_that_is_a_classifier_of_another_size(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture
) -> None:
    """The old head, here of a regression, is replaced, and what is saved tells how to load the base."""
    tokenizer = tiny_tokenizer()
    base = encoder_for(tokenizer, layers=2)
    base.config.num_labels, base.config.problem_type = 1, "regression"
    type(base)(base.config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    opinions("names").to_json(tmp_path / "rows.jsonl")
    words = [
        "classify",
        "--model_name_or_path",
        str(tmp_path / "base"),
        "--dataset_name",
        str(tmp_path / "rows.jsonl"),
    ]
    words += ["--text_columns", "review", "--label_column", "stars", "--max_steps", "8", "--discretize_at", "6"]
    words += [
        "--use_cpu",
        "true",
        "--report_to",
        "none",
        "--save_strategy",
        "no",
        "--output_dir",
        str(tmp_path / "out"),
    ]
    with caplog.at_level(logging.INFO, logger="diffora_trainer"):
        assert main(words) == 0
    assert "replaced by a new one: classifier.bias, classifier.weight." in caplog.text
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert '2: "good"}, ignore_mismatched_sizes=True)' in card
    assert main(["export", str(tmp_path / "out"), "--for", "merged", "--output", str(tmp_path / "merged")]) == 0
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert merged.config.num_labels == 3 and merged.config.problem_type != "regression"
    path = tmp_path / "base" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "max_position_embeddings": 99}))
    assert main(words) == 1
    assert "position_embeddings.weight' in another shape than its configuration" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["names", "classes", "scores"])
def test_classify(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    tokenizer = tiny_tokenizer()
    encoder_for(tokenizer, layers=2).bert.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    data = opinions(kind)
    if kind == "classes":  # a data set that knows the names of its classes
        data.to_parquet(tmp_path / "rows.parquet")
    else:
        data.to_json(tmp_path / "rows.jsonl")
    settings = {"model_name_or_path": str(tmp_path / "base"), "dataset_name": str(next(tmp_path.glob("rows.*")))}
    settings |= {"max_steps": 100, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "use_cpu": True}
    settings |= {"text_columns": "review" if kind == "names" else ["review"]}
    settings |= {"label_column": "stars", "eval_fraction": 0.2, "report_to": "none"}
    settings |= {"save_strategy": "no", "discretize_at": 20, "selection_ratio": 0.5, "lora_r": 2}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    words = ["classify", "--config", str(tmp_path / "run.yaml"), "--output_dir", str(tmp_path / "out")]
    assert main(words) == 0
    text = capsys.readouterr().out
    selection = Selection.load(tmp_path / "out")
    assert selection.table() in text and set(selection.grid.ranks) == {2}
    found = dict(line.split(": ") for line in text.splitlines() if line.startswith(("Accuracy", "Pearson", "Mse")))
    labels = {} if kind == "scores" else {"num_labels": 3}
    if kind == "scores":
        assert float(found["Pearson"]) > 0.9 and float(found["Mse"]) < 0.1 and "Accuracy" not in found
        labels = {"num_labels": 1}
    else:
        assert float(found["Accuracy"]) > 0.9
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "out", **labels)
    assert len(lora_layers(loaded, "default")) == len(selection.selected)
    assert PeftConfig.from_pretrained(tmp_path / "out").task_type == "SEQ_CLS"
    answers = loaded(**tokenizer(["good", "bad"], return_tensors="pt")).logits
    if kind == "scores":
        assert float(answers[0, 0]) > float(answers[1, 0]) + 0.5
    else:  # `ClassLabel` keeps its order, names are sorted: here both are bad, dull, good
        assert answers.argmax(-1).tolist() == [2, 0]

    assert main([*words, "--label_column", "points"]) == 1
    assert "no column 'points'; it has review, stars" in capsys.readouterr().err
    if kind == "names":
        assert main([*words, "--regression", "true"]) == 1
        assert "a regression needs finite numbers" in capsys.readouterr().err
    if kind == "scores":
        assert main([*words, "--regression", "false"]) == 1
        assert "A class must be a name or a whole number" in capsys.readouterr().err


def test_search_only_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The first of two runs, and the configuration that it hands over."""
    tokenizer = tiny_tokenizer()
    causal_model(attention_dropout=0.0).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    prompt_completion_dataset(24).to_json(tmp_path / "rows.jsonl")
    words = ["sft", "--model_name_or_path", str(tmp_path / "base"), "--dataset_name", str(tmp_path / "rows.jsonl")]
    words += ["--max_steps", "12", "--use_cpu", "true", "--report_to", "none", "--save_strategy", "no"]
    words += ["--search_only", "true", "--discretize_at", "8", "--output_dir", str(tmp_path / "out")]
    assert main(words) == 0
    assert f"diffora show {tmp_path / 'out'} --lora_config" in capsys.readouterr().out
    selection = Selection.load(tmp_path / "out")
    assert selection.step == 8
    assert main(["plan", str(tmp_path / "base"), "--steps", "12", "--discretize_at", "8"]) == 0
    assert f" {sum(selection.grid.parameters):,} LoRA parameters" in capsys.readouterr().out  # from the same LoRA
    assert main(["show", str(tmp_path / "out"), "--lora_config", str(tmp_path / "adapter_config.json")]) == 0
    config = PeftConfig.from_pretrained(tmp_path)
    assert config.target_modules == set(Selection.load(tmp_path / "out").selected)
    assert main([*words[:-1], str(tmp_path / "one kind"), "--lora_target_modules", "down_proj"]) == 0
    assert {name.rsplit(".", 1)[-1] for name in Selection.load(tmp_path / "one kind").modules} == {"down_proj"}
