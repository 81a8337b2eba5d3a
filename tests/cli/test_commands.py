"""The command `diffora`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from peft import AutoPeftModelForCausalLM

from diffora_trainer import Selection
from diffora_trainer.cli import main
from helpers.adapted import lora_layers
from helpers.data import preference_dataset, prompt_completion_dataset, tiny_tokenizer
from helpers.models import llama_config
from helpers.trainers import causal_model, make_trainer


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    found = []
    for seed in (0, 1):
        folder = tmp_path_factory.mktemp(f"run{seed}")
        trainer = make_trainer(folder, search={"method": "random", "arch_seed": seed, "selection_ratio": 0.3})
        trainer.train()
        trainer.save_model(str(folder))
        found.append(folder)
    return found[0], found[1]


def test_show_a_run_and_compare_it_with_another(runs: tuple[Path, Path], capsys: pytest.CaptureFixture) -> None:
    first, second = map(Selection.load, runs)
    assert main(["show", str(runs[0]), "--ranking", "--diff", str(runs[1])]) == 0
    text = capsys.readouterr().out
    assert first.table() in text and "by random, after step 8" in text
    assert [line.split()[-1] for line in text.splitlines() if line[:4].strip().isdigit()] == list(first.ranking())
    shared = len(set(first.selected) & set(second.selected)) / len(first.selected)
    assert f"share {shared:.0%} of their ranks" in text
    for name in set(first.selected) ^ set(second.selected):
        assert f"{name}: rank {'4 and 0' if name in first.selected else '0 and 4'}" in text
    assert main(["show", str(runs[0] / "nothing")]) == 1
    assert "neither a folder here nor an adapter on the Hub" in capsys.readouterr().err


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
    assert "32 scoring passes" in capsys.readouterr().out
    assert main([*words, "--selection_ratio", "3"]) == 1
    assert "selection_ratio=3.0" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.safetensors"))


def test_as_a_module_and_with_words_that_it_does_not_know(runs: tuple[Path, Path], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "diffora_trainer"]
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("diffora-trainer 0.")
    done = subprocess.run([*command, "show", str(runs[0]), "--colour"], capture_output=True, text=True)
    assert done.returncode == 2 and "unrecognized arguments: --colour" in done.stderr
    out = str(tmp_path / "out")
    assert main(["export", str(runs[0]), "--for", "vllm", "--output", out]) == 0
    assert main(["export", str(runs[0]), "--for", "vllm", "--output", out]) == 1


@pytest.mark.parametrize("command", ["sft", "dpo"])
def test_training_from_a_file_and_words(command: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    tokenizer = tiny_tokenizer()
    causal_model(attention_dropout=0.0).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    rows = preference_dataset(24) if command == "dpo" else prompt_completion_dataset(24)
    rows.to_json(tmp_path / "rows.jsonl")
    settings = {"max_steps": 12, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "use_cpu": True}
    settings |= {"model_name_or_path": str(tmp_path / "base"), "dataset_name": str(tmp_path / "rows.jsonl")}
    settings |= {"report_to": "none", "save_strategy": "no", "selection_ratio": 0.3, "discretize_at": 8}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    words = [command, "--config", str(tmp_path / "run.yaml"), "--output_dir", str(tmp_path / "out")]
    assert main([*words, "--selection_ratio", "0.5", "--lora_r", "2"]) == 0
    text = capsys.readouterr().out
    selection = Selection.load(tmp_path / "out")
    assert selection.config["selection_ratio"] == 0.5 and set(selection.grid.ranks) == {2}
    assert selection.table() in text and "Held-out loss: " in text
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    assert len(lora_layers(loaded, "default")) == len(selection.selected)
    assert main([*words, "--selection_ratio", "7"]) == 1
    assert "selection_ratio=7" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert "--selection_ratio" in capsys.readouterr().out
