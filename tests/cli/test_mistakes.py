"""What the commands say of ordinary mistakes: one line with what was passed, and no traceback."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from peft import PeftConfig
from transformers.debug_utils import DebugOption
from trl import SFTConfig, SFTTrainer

from diffora_trainer import Selection, selected_lora_config
from diffora_trainer.cli import main, train
from helpers.data import tiny_tokenizer
from helpers.models import encoder_for
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
        ("sft", rows(text=["red"]), [], "The column 'text' of the training set holds values of type List"),
        ("sft", rows(text="r\udcfcd"), [], "'text' of the training set cannot be read: In chunk 0: Invalid"),
        ("classify", rows(text=["red", "green"], label=1), [], "'text' of the training set holds values of type List"),
        ("classify", rows(text="red", label=1), [], "All rows of the training set have 1 in the column 'label'"),
        ("classify", rows(text="red", label=(0, 1)), ["--max_length", "0"], "`max_length=0`"),
        (
            "classify",
            rows(text=("red", ""), label=(0, 1)),
            [],
            "'text' of a row is '', of which the tokenizer makes no",
        ),
        ("classify", rows(text="red", label=[1, 0]), [], "'label' holds values such as [1, 0]"),
        ("classify", rows(text="red", label=[1, 0]), ["--regression", "true"], "A label is [1, 0]"),
    ],
)
def test_data(
    command: str, text: str, options: list[str], expected: str, base: Path, tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "rows.jsonl").write_text(text.replace("\\udcfc", "\udcfc"), errors="surrogateescape")
    words = [command, "--model_name_or_path", str(base), "--dataset_name", str(tmp_path / "rows.jsonl")]
    words += ["--output_dir", str(tmp_path / "out"), "--use_cpu", "true", "--report_to", "none", "--max_steps", "8"]
    assert expected in said(capsys, [*words, *options])


def test_models_and_files_of_another_kind(base: Path, adapter: Path, tmp_path: Path, capsys: Any) -> None:
    encoder_for(tiny_tokenizer(), layers=2).bert.save_pretrained(tmp_path / "encoder")
    (tmp_path / "rows.jsonl").write_text(rows(text=("red", "green"), prompt="red", chosen="red", rejected="green"))
    words = [
        "--dataset_name",
        str(tmp_path / "rows.jsonl"),
        "--output_dir",
        str(tmp_path / "out"),
        "--use_cpu",
        "true",
    ]
    for command in ("sft", "dpo"):
        line = said(capsys, [command, *words, "--model_name_or_path", str(tmp_path / "encoder")])
        assert "is a BertModel, which is not a language model" in line
    for command in ("sft", "classify"):
        assert "is an adapter, not a model" in said(capsys, [command, *words, "--model_name_or_path", str(adapter)])
        line = said(capsys, [command, *words, "--model_name_or_path", str(tmp_path / "gone")])
        assert f"but there is no {tmp_path / 'gone'}" in line
    (tmp_path / "rows.txt").write_text("red\n")
    words = ["sft", "--dataset_name", str(tmp_path / "rows.txt"), "--model_name_or_path", str(base), *words[2:]]
    assert "is a file of a kind that is not read" in said(capsys, words)


def test_a_model_is_looked_up_where_it_is_loaded_from(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "writer")
    encoder_for(tiny_tokenizer(), layers=2).bert.save_pretrained(tmp_path / "encoder")
    train.check_language_model(str(tmp_path), {"subfolder": "writer", "dtype": "auto"})
    with pytest.raises(ValueError, match="is a BertModel, which is not a language model"):
        train.check_language_model(str(tmp_path), {"subfolder": "encoder", "local_files_only": True})


@pytest.mark.parametrize("content", ['{"fine_tune_type": "lora", "num_layers": 4}', "[]", "\udcfc"])
def test_an_adapter_of_another_tool(content: str, adapter: Path, tmp_path: Path, capsys: Any) -> None:
    shutil.copytree(adapter, tmp_path / "run")
    (tmp_path / "run" / "adapter_config.json").write_text(content, errors="surrogateescape")
    expected = f"The configuration of the adapter in {tmp_path / 'run'} is not one of PEFT's: "
    for server in ("vllm", "merged"):
        words = ["export", str(tmp_path / "run"), "--for", server, "--output", str(tmp_path / "out")]
        assert expected in said(capsys, words)
    assert expected in said(capsys, ["show", str(tmp_path / "run"), "--lora_config", str(tmp_path / "lora.json")])


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

WRONG = (
    ("max_steps", 4.5, "an int"),
    ("max_steps", True, "an int"),
    ("lora_r", [8], "an int"),
    ("learning_rate", [1], "a number"),
    ("seed", None, "an int. Please write one, or leave the line out"),
    ("learning_rate", None, "a number"),
    ("dataloader_pin_memory", None, "true or false"),
    ("eval_strategy", False, "a string. Please write it in quotes: YAML reads `no`"),
    ("output_dir", 3, "a string. Please write it in quotes: '3'"),
    ("dataset_name", 5, "a string"),
    ("model_name_or_path", 7, "a string"),
    ("lora_target_modules", [5], "a list with entries that are each a string"),
    ("debug", ["gradients"], "a string or a list with entries of 'underflow_overflow', 'tpu_metrics_debug'"),
    ("model_init_kwargs", 5, "a mapping or a string"),
    ("method_options", [1], "a mapping or a string"),
)


def test_arguments(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "run.yaml"
    words = ["sft", "--config", str(file), "--use_cpu", "true", "--output_dir", str(tmp_path / "out")]
    file.write_text("max_steps: [8\nlogging_steps: {")
    assert "is not valid YAML" in (line := said(capsys, words)) and str(file) in line and "line 2" in line
    for text, found in NO_ARGUMENTS.items():
        file.write_text(text)
        line = said(capsys, words)
        assert f"`--config {file}` holds {found}, but arguments by their names are expected" in line
    for name, value, expected in WRONG:
        file.write_text(yaml.safe_dump({name: value}))
        shown = "null" if value is None else value
        assert f"gives `{name}` as {shown}, of type" in (line := said(capsys, words)) and expected in line
    file.write_text("max_step: 8\nlerning_rate: 1")
    assert "gives `max_step`, `lerning_rate`: there is no such argument" in said(capsys, words)
    file.write_text("env: 3\nmax_steps: 8")
    assert "gives `env` as 3, but" in said(capsys, words)
    file.write_text(yaml.safe_dump({"method_options": {"arch_every": "four"}}))
    assert "`arch_every` must be an int, got 'four'" in said(capsys, words)
    plan = ["plan", str(base), "--steps", "8", "--method_options", "[1]"]
    assert "`method_options` must be a dictionary of options by their names, got [1]" in said(capsys, plan)
    assert "`--config` names no file" in said(capsys, ["sft", "--config"])
    assert "`--config` names no file" in said(capsys, ["sft", "--config", "--max_steps", "8"])
    assert "`--config` names 2 files" in said(capsys, [*words, "--config", str(file)])


def test_what_a_file_may_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing for what is nothing by default, and each value in all the ways that it is written."""
    values = {"data_seed": None, "max_length": None, "report_to": None, "learning_rate": "1e-3", "max_steps": 8}
    values |= {"warmup_steps": 3, "packing": 1, "resume_from_checkpoint": True, "lora_target_modules": "q_proj"}
    values |= {"model_init_kwargs": {"revision": "main"}, "eval_strategy": "no", "env": {"DIFFORA_TEST": 3}}
    monkeypatch.setenv("DIFFORA_TEST", "")
    values |= {"fsdp": False, "debug": ["underflow_overflow"]}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**values, "project": "Grün", "use_cpu": True}))
    words = [f"--config={tmp_path / 'run.yaml'}", "--max_steps", "9", "--output_dir", str(tmp_path / "out")]
    _, args, model_args, _ = train.read_arguments(train.make_parser(SFTConfig), words)
    assert args.max_steps == 9 and args.learning_rate == 1e-3 and args.max_length is None and args.data_seed is None
    assert args.resume_from_checkpoint is True and args.project == "Grün" and os.environ["DIFFORA_TEST"] == "3"
    assert not args.fsdp and DebugOption.UNDERFLOW_OVERFLOW in args.debug
    assert args.model_init_kwargs == {"revision": "main"} and model_args.lora_target_modules == "q_proj"


def test_a_file_that_can_be_read_once(tmp_path: Path) -> None:
    """Such as what another command prints, `--config <(...)`."""
    read, write = os.pipe()
    with open(write, "w") as file:
        file.write("max_steps: 7\nuse_cpu: true")
    words = ["--config", f"/dev/fd/{read}", "--output_dir", str(tmp_path)]
    try:
        assert train.read_arguments(train.make_parser(SFTConfig), words)[1].max_steps == 7
    finally:
        os.close(read)


WITH_SHORTCUTS = "LoRA with shortcuts, which PEFT alone cannot load: use diffora_trainer.ShortcutModel.from_pretrained"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    trainer = make_trainer(folder, search={"method": "random"})
    trainer.train()
    trainer.save_model(str(folder))
    return folder


def test_a_type_of_adapter_that_peft_does_not_know(adapter: Path, tmp_path: Path, capsys: Any) -> None:
    """One with shortcuts says in its type by what it is loaded."""
    shutil.copytree(adapter, tmp_path / "run")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (tmp_path / "run" / "adapter_config.json").write_text(json.dumps({**config, "peft_type": WITH_SHORTCUTS}))
    for server in ("vllm", "merged"):
        words = ["export", str(tmp_path / "run"), "--for", server, "--output", str(tmp_path / "out")]
        assert "ShortcutModel.from_pretrained" in said(capsys, words)
    words = ["show", str(tmp_path / "run"), "--lora_config", str(tmp_path / "lora.json")]
    assert "ShortcutModel.from_pretrained" in said(capsys, words)
    with pytest.raises(ValueError, match="PEFT does not know"):
        selected_lora_config(tmp_path / "run")


def test_without_matplotlib(adapter: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    words = ["show", str(adapter), "--picture", str(tmp_path / "dam.png")]
    assert "pip install diffora-trainer[plots]" in said(capsys, words)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ImportError("Loading in 4 bits requires `bitsandbytes`: `pip install bitsandbytes`"), True),
        (ModuleNotFoundError("No module named 'wandb'", name="wandb"), True),
        (RuntimeError("WandbCallback requires wandb to be installed. Run `pip install wandb`."), True),
        (RuntimeError("CUDA out of memory"), False),
        (ModuleNotFoundError("No module named 'diffora_trainer.gone'", name="diffora_trainer.gone"), False),
        (ImportError("cannot import name 'SFTConfig' from 'trl'", name="trl"), False),
        (TypeError("'NoneType' object is not subscriptable"), False),
    ],
)
def test_what_is_not_installed(error: Exception, line: bool, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said in a line, unless it is no more than a missing name, of which a traceback says more."""

    def fail(words: Any) -> None:
        raise error

    monkeypatch.setattr("diffora_trainer.cli.env.run", fail)
    if line:
        assert said(capsys, ["env"]) == f"diffora env: {error}"
    else:
        with pytest.raises(type(error)):
            main(["env"])


def test_an_evaluation_that_fails_costs_no_training(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("out of memory in the evaluation")

    monkeypatch.setattr(SFTTrainer, "evaluate", fail)
    (tmp_path / "rows.jsonl").write_text(rows(text=("red", "green")))
    words = ["sft", "--model_name_or_path", str(base), "--dataset_name", str(tmp_path / "rows.jsonl")]
    words += ["--output_dir", str(tmp_path / "out"), "--use_cpu", "true", "--report_to", "none"]
    words += ["--max_steps", "6", "--discretize_at", "4", "--save_strategy", "no"]
    with pytest.raises(RuntimeError, match="in the evaluation"):
        main(words)
    selection = Selection.load(tmp_path / "out")
    assert PeftConfig.from_pretrained(tmp_path / "out").target_modules == set(selection.selected)


def test_adapters(adapter: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for command in ("show", "report"):
        assert "the Hub could not be reached" in said(capsys, [command, "somebody/adapter"])
    for name, kind in (("adapter_model.safetensors", "weights"), ("adapter_config.json", "configuration")):
        shutil.copytree(adapter, tmp_path / kind)
        whole = (tmp_path / kind / name).read_bytes()
        (tmp_path / kind / name).write_bytes(whole[: len(whole) // 2])
        words = ["export", str(tmp_path / kind), "--for", "vllm", "--output", str(tmp_path / "out")]
        assert f"The {kind} of the adapter {str(tmp_path / kind)!r}" in said(capsys, words)
