"""
What the documentation shows is run as it is written: Python in order, commands and YAML by the parser of the command.

Tiny models and data stand in folders of the same names where a page names those of the Hub. Nothing else is changed. A
snippet with `<!-- needs: package -->` before it is compiled only, where that package is not installed.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import TrainingArguments
from trl import DPOConfig, SFTConfig

from diffora_trainer import Selection
from diffora_trainer.cli import TRAINING, classify, make_parser, plan, train
from diffora_trainer.methods import registry
from helpers import ROOT
from helpers.data import chat_dataset, preference_dataset, tiny_tokenizer
from helpers.documentation import PAGES, Fence, fences, read
from helpers.models import encoder_for
from helpers.trainers import causal_model


CAUSAL = ("HuggingFaceTB/SmolLM2-135M-Instruct", "Qwen/Qwen3-0.6B")
ENCODERS = ("FacebookAI/roberta-base",)
CHATS, PREFERENCES = ("trl-lib/Capybara",), ("trl-lib/ultrafeedback_binarized",)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the pages take from the Hub, each by its name there."""
    folder = tmp_path_factory.mktemp("hub")
    tokenizer = tiny_tokenizer()
    for names, model in ((CAUSAL, causal_model(num_hidden_layers=1)), (ENCODERS, encoder_for(tokenizer, layers=2))):
        for name in names:
            model.save_pretrained(folder / name)
            tokenizer.save_pretrained(folder / name)
    for names, rows in ((CHATS, chat_dataset(64)), (PREFERENCES, preference_dataset(32))):
        for name in names:
            (folder / name).mkdir(parents=True)
            (folder / name / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def place(hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder beside what stands for the Hub."""
    for owner in hub.iterdir():
        (tmp_path / owner.name).symlink_to(owner)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def methods(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a page registers is forgotten afterwards."""
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))


def missing(fence: Fence) -> bool:
    return fence.needs is not None and importlib.util.find_spec(fence.needs) is None


def table_is_printed(names: dict[str, Any], said: str) -> None:
    assert names["trainer"].selection.step == 75 and "x kept   . removed" in said


def files_are_written(names: dict[str, Any], said: str) -> None:
    table_is_printed(names, said)
    listed = re.findall(r"^\| `(.+?)`(?:, `(.+?)`)? \|", read("docs/quickstart.md"), re.MULTILINE)
    files = [name for pair in listed for name in pair if "." in name]
    assert len(files) == 6 and all(Path("smollm2-diffora", name).is_file() for name in files)
    assert not [name for name, _ in names["model"].named_modules() if "lora" in name]


def second_run_trains_the_chosen_modules(names: dict[str, Any], said: str) -> None:
    search, trainer = names["search"], names["trainer"]
    assert search.state.global_step == 75 and trainer.state.global_step == 300
    trained = {name.split(".lora_A")[0] for name, _ in trainer.model.named_parameters() if ".lora_A." in name}
    assert {name.removeprefix("base_model.model.") for name in trained} == set(search.selection.selected)


def stock_trainer_goes_on(names: dict[str, Any], said: str) -> None:
    assert type(names["trainer"]).__name__ == "SFTTrainer" and names["trainer"].state.global_step == 40
    assert names["config"].target_modules
    further, chosen = names["further"], Selection.load("out/checkpoint-40").selected
    assert type(further).__name__ == "SFTTrainer" and further.state.global_step == 10
    trained = {name.split(".lora_A")[0] for name, _ in further.model.named_parameters() if ".lora_A." in name}
    assert {name.removeprefix("base_model.model.") for name in trained} == set(chosen)
    if importlib.util.find_spec("bitsandbytes") is not None:
        qlora = names["qlora"]
        assert qlora.model.get_base_model().is_loaded_in_4bit and 0 < len(qlora.selection.selected) < 7


SAID = {
    "README.md": table_is_printed,
    "docs/quickstart.md": files_are_written,
    "docs/launchers.md": second_run_trains_the_chosen_modules,
    "docs/trainers.md": stock_trainer_goes_on,
}
"""What a page says of the outcome of its snippets."""


LONG = ("docs/launchers.md",)
"""Pages with two whole runs."""


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[pytest.mark.slow] if page in LONG else [])
        for page in PAGES
        if any(fences(page, "python"))
    ],
)
def test_python(
    page: str,
    place: Path,
    methods: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    names: dict[str, Any] = {"__name__": "__main__"}
    for fence in fences(page, "python"):
        code = compile("\n" * (fence.line - 1) + fence.text, page, "exec")
        if missing(fence):
            continue
        with monkeypatch.context() as alone:
            if "PeftModel." in fence.text and "diffora_trainer" not in fence.text:
                # Whoever loads an adapter does not have this package.
                alone.setitem(sys.modules, "diffora_trainer", None)
            exec(code, names)
    if page in SAID:
        captured = capsys.readouterr()
        SAID[page](names, captured.out + captured.err)


# Commands


def commands(page: str) -> Iterator[list[str]]:
    """The words of each command of a page."""
    for fence in fences(page, "bash"):
        for line in fence.text.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                yield words


def extras() -> set[str]:
    section = read("pyproject.toml").partition("[project.optional-dependencies]\n")[2].partition("\n[")[0]
    return set(re.findall(r"^(\w+) = \[", section, re.MULTILINE))


def parse(words: list[str]) -> None:
    """Read the words after `diffora` as the command does."""
    found, rest = make_parser(words[0]).parse_known_args(words)
    if found.command in TRAINING:
        config = {"sft": SFTConfig, "dpo": DPOConfig, "classify": TrainingArguments}[found.command]
        data = {"classify": {"data": classify.LabelledDataArguments}}.get(found.command, {})
        data_args, _, model_args, _ = train.make_parser(config, **data).parse_args_and_config(rest)
        assert data_args.dataset_name and model_args.model_name_or_path
    elif found.command == "plan":
        args, model_args, _ = plan.read_arguments(rest)
        assert args.max_steps and model_args.model_name_or_path
    else:
        assert not rest


@pytest.mark.parametrize("page", [page for page in PAGES if any(fences(page, "bash", "yaml"))])
def test_commands_and_their_files(page: str, place: Path) -> None:
    files = {}
    for fence in fences(page, "yaml"):
        name = re.match(r"# ([\w.]+\.yaml)\n", fence.text)
        assert name is not None, f"{page}:{fence.line}: a comment at the top should name the file"
        assert isinstance(yaml.safe_load(fence.text), dict)
        files[name[1]] = False
        Path(name[1]).write_text(fence.text)
    for words in commands(page):
        files.update((word, True) for word in words if word in files)
        if words[0] == "diffora":
            parse(words[1:])
        elif words[0] == "accelerate":
            if "diffora_trainer" in words:
                parse(words[words.index("diffora_trainer") + 1 :])
        elif words[0] == "make":
            assert re.search(rf"^{words[1]}:", read("Makefile"), re.MULTILINE)
        elif words[:2] == ["pip", "install"]:
            for extra in re.findall(r"\[(.+?)\]", " ".join(words)):
                assert extra in extras()
        elif words[0] in ("axolotl", "swift"):
            assert page == "docs/integrations.md"
        elif words[0] == "python":
            assert words[1].startswith("recipes/")
        else:
            assert words[0] in ("for", "done"), words
        for word in words:
            if word.startswith("recipes/") and "$" not in word:
                assert list(ROOT.glob(word)), word
    assert all(files.values()), f"No command of {page} reads {[name for name, read in files.items() if not read]}"
