"""What the commands say of ordinary mistakes: one line with what was passed, and no traceback."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from diffora_trainer.cli import main
from helpers.data import tiny_tokenizer
from helpers.trainers import causal_model, make_trainer


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    causal_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def said(capsys: pytest.CaptureFixture, words: list[str]) -> str:
    """The line that a command ends with when it refuses its words."""
    assert main(words) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith(f"diffora {words[0]}: ")]
    assert len(lines) == 1
    return lines[0]


def rows(**columns: Any) -> str:
    """Twenty rows; a pair of values alternates."""
    values = [{name: v[i % 2] if isinstance(v, tuple) else v for name, v in columns.items()} for i in range(20)]
    return "".join(json.dumps(row) + "\n" for row in values)


@pytest.mark.parametrize(
    ("command", "text", "options", "expected"),
    [
        ("sft", "", [], "rows.jsonl'` has no rows"),
        ("classify", "\n\n", [], "rows.jsonl'` has no rows"),
        ("sft", rows(text="red") + "{oops", [], "rows.jsonl'` cannot be read as json: JSON parse error"),
        ("sft", rows(text="red")[: len(rows(text="red")) // 20], [], "has one row"),
        ("sft", rows(text="red"), ["--max_eval_samples", "0"], "`max_eval_samples=0`"),
        ("sft", rows(content="red"), [], "the columns 'content', but what is trained on is read from"),
        ("sft", rows(text=("red", None)), [], "of the training set have nothing (null) in the column 'text'"),
        ("sft", rows(text=1), [], "The column 'text' of the training set holds values of type int64"),
        ("dpo", rows(prompt="red", rejected="green"), [], "is read from 'prompt' and 'chosen' and 'rejected', or"),
        ("dpo", rows(chosen="red", rejected=("green", None)), [], "nothing (null) in the column 'rejected'"),
        ("classify", rows(text=("red", None), label=1), [], "nothing (null) in the column 'text'"),
        ("classify", rows(text="red", label=[1, 0]), [], "'label' holds values such as [1, 0]"),
        ("classify", rows(text="red", label=[1, 0]), ["--regression", "true"], "A label is [1, 0]"),
    ],
)
def test_data(
    command: str, text: str, options: list[str], expected: str, base: Path, tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "rows.jsonl").write_text(text)
    words = [command, "--model_name_or_path", str(base), "--dataset_name", str(tmp_path / "rows.jsonl")]
    words += ["--output_dir", str(tmp_path / "out"), "--use_cpu", "true", "--report_to", "none", "--max_steps", "8"]
    assert expected in said(capsys, [*words, *options])


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.parquet", "rows.jsonl.gz", "folder"])
def test_nothing_in_a_file(name: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Whatever its reader says of it."""
    path = tmp_path / name
    if name == "folder":
        path.mkdir()
        (path / "train.jsonl").touch()
    elif name.endswith(".gz"):
        path.write_bytes(gzip.compress(b""))
    else:
        path.touch()
    words = ["sft", "--dataset_name", str(path), "--use_cpu", "true", "--output_dir", str(tmp_path / "out")]
    assert f"`dataset_name={str(path)!r}` has no rows" in said(capsys, words)


NO_ARGUMENTS = {
    "": "nothing",
    "# max_steps: 8\n": "nothing",
    "- max_steps: 8\n- seed: 1\n": "a list, of 2 entries",
    "max_steps 8": "'max_steps 8', of type str",
    "8": "'8', of type int",
    "max_steps: 8\non: epoch": "an argument that is called True, of type bool",
}


def test_arguments(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "run.yaml"
    words = ["sft", "--config", str(file), "--use_cpu", "true", "--output_dir", str(tmp_path / "out")]
    file.write_text("max_steps: [8\nlogging_steps: {")
    assert "no valid YAML" in (line := said(capsys, words)) and str(file) in line and "line 2" in line
    for text, found in NO_ARGUMENTS.items():
        file.write_text(text)
        line = said(capsys, words)
        assert f"`--config {file}` holds {found}, but arguments by their names are expected" in line
    file.write_text(yaml.safe_dump({"method_options": [1]}))
    assert "`method_options` must be a dictionary of options by their names, got [1]" in said(capsys, words)
    file.write_text(yaml.safe_dump({"method_options": {"arch_every": "four"}}))
    assert "`arch_every` must be an int, got 'four'" in said(capsys, words)
    plan = ["plan", str(base), "--steps", "8", "--method_options", "[1]"]
    assert "`method_options` must be a dictionary of options by their names, got [1]" in said(capsys, plan)
    assert "`--config` names no file" in said(capsys, ["sft", "--config"])


def test_adapters(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for command in ("show", "report"):
        assert "the Hub could not be reached" in said(capsys, [command, "somebody/adapter"])
    trainer = make_trainer(tmp_path / "run", search={"method": "random"})
    trainer.train()
    trainer.save_model(str(tmp_path / "run"))
    for name, kind in (("adapter_model.safetensors", "weights"), ("adapter_config.json", "configuration")):
        shutil.copytree(tmp_path / "run", tmp_path / kind)
        whole = (tmp_path / kind / name).read_bytes()
        (tmp_path / kind / name).write_bytes(whole[: len(whole) // 2])
        words = ["export", str(tmp_path / kind), "--for", "vllm", "--output", str(tmp_path / "out")]
        assert f"The {kind} of the adapter {str(tmp_path / kind)!r}" in said(capsys, words)
