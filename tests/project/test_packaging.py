"""What the package declares, imports and ships, and how it depends on the versions of the libraries."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import peft
import pytest
import torch
import transformers
from packaging.requirements import Requirement
from packaging.version import Version
from peft.tuners.lora import LoraLayer

import diffora_trainer
from diffora_trainer import DiffoRAMixin, DiffoRASFTTrainer, DiffoRATrainer
from diffora_trainer.compat.transformers import TRAINER_METHODS
from helpers import ROOT
from helpers.processes import elsewhere
from helpers.trainers import make_trainer


PACKAGE = Path(diffora_trainer.__file__).parent
SOURCES = {str(path.relative_to(PACKAGE)): path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")}
TEMPLATES = ("hub/templates/diffora_card.md", "hub/templates/diffora_report.html")
TREES = {name: ast.parse(source) for name, source in SOURCES.items()}
COMPAT = {name for name in SOURCES if name.startswith("compat/")}


def project() -> dict:
    tomllib = pytest.importorskip("tomllib")
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


# Imports


def imported(tree: ast.Module) -> Iterator[str]:
    """The packages that a module imports, at its top or inside of a function."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield str(node.module).partition(".")[0]


def test_what_is_imported_is_what_is_declared() -> None:
    declared = project()
    names = {Requirement(line).name for line in declared["dependencies"]}
    plots = {Requirement(line).name for line in declared["optional-dependencies"]["plots"]}
    # A tool loads its plugin itself, so what the plugin imports is there.
    tools = {"integrations/axolotl.py": {"axolotl", "pydantic"}}
    found = {name for file, tree in TREES.items() for name in set(imported(tree)) - tools.get(file, set())}
    assert found - sys.stdlib_module_names == names | plots
    assert all(needed <= set(imported(TREES[file])) for file, needed in tools.items())
    training = {"trainer/sft.py", "cli/sft.py", "cli/dpo.py", "cli/train.py", "cli/parser.py", "compat/trl.py"}
    assert {name for name, tree in TREES.items() if "trl" in imported(tree)} == training
    assert {name for name, tree in TREES.items() if plots & set(imported(tree))} == {"hub/plots.py"}


def test_held_out_batches_need_neither_a_trainer_nor_its_libraries() -> None:
    for name, others in (("held_out", {"core.isolation", "batches"}), ("batches", {"core.isolation"})):
        tree = TREES[f"search/{name}.py"]
        own = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level}
        assert set(imported(tree)) - sys.stdlib_module_names == {"torch"} and own == others


def test_the_oldest_versions_that_are_declared_are_those_that_are_tested() -> None:
    declared = project()
    lines = (ROOT / "constraints-oldest.txt").read_text().splitlines()
    pins = {name.lower(): Version(pin) for name, pin in (line.split("==") for line in lines if "==" in line)}
    for line in (*declared["dependencies"], *declared["optional-dependencies"]["plots"]):
        requirement = Requirement(line)
        (specifier,) = requirement.specifier
        assert specifier.operator == ">="
        if requirement.name != "torch":  # as low as transformers asks for; one version is run
            assert Version(specifier.version) == pins[requirement.name], requirement.name
        else:
            assert Version(specifier.version) <= pins["torch"]


def test_all_but_one_trainer_works_without_trl(tmp_path: Path) -> None:
    """Train, save and load with `DiffoRATrainer`, where TRL cannot be imported."""
    program = """
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments
import diffora_trainer

for name in diffora_trainer.__all__:
    if name != "DiffoRASFTTrainer":
        getattr(diffora_trainer, name)
def base():
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2))
trainer = diffora_trainer.DiffoRATrainer(
    model=base(),
    args=TrainingArguments("out", max_steps=8, use_cpu=True, report_to="none", disable_tqdm=True, learning_rate=1e-2),
    train_dataset=Dataset.from_list([{"input_ids": [3, 4 + i % 20, 5], "labels": i % 2} for i in range(48)]),
)
trainer.train()
trainer.save_model()
model = PeftModel.from_pretrained(base(), "out").eval()
ids = torch.tensor([[3, 9, 5]])
with torch.no_grad():
    off = (model(ids).logits - trainer.model.eval()(ids).logits).abs().max().item()
try:
    diffora_trainer.DiffoRASFTTrainer
    error = None
except ImportError as failure:
    error = str(failure)
report = {"off": off, "kept": len(trainer.selection.selected), "of": len(trainer.selection.modules), "error": error}
"""
    found = elsewhere(program, None, tmp_path, missing=("trl",))
    assert found["off"] < 1e-6 and 0 < found["kept"] < found["of"]
    assert "trl" in found["error"]


def test_the_trainer_of_trl_is_found_where_it_was() -> None:
    from diffora_trainer import trainer
    from diffora_trainer.trainer import sft

    assert trainer.DiffoRASFTTrainer is sft.DiffoRASFTTrainer is diffora_trainer.DiffoRASFTTrainer
    with pytest.raises(AttributeError, match="has no attribute 'DiffoRAGRPOTrainer'"):
        trainer.DiffoRAGRPOTrainer  # noqa: B018


# Names of the libraries


def private(name: object) -> bool:
    return isinstance(name, str) and re.fullmatch(r"_[a-z]\w*", name) is not None


def defined(tree: ast.Module) -> set[str]:
    """The private names that a module defines itself: functions, variables, and attributes that it sets on `self`."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
                found.add(node.attr)
    return {name for name in found if private(name)}


def touched(tree: ast.Module) -> set[str]:
    """The private names that a module imports, reads or sets, also by `getattr` and its like."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.ImportFrom):
            parts = str(node.module).split(".") if not node.level else []
            found |= {*parts, *(alias.name for alias in node.names)}
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id.endswith("attr"):
            found |= {argument.value for argument in node.args[1:2] if isinstance(argument, ast.Constant)}
    return {name for name in found if private(name)}


OF_LIBRARIES = {
    name
    for found in (
        dir(transformers.Trainer),
        dir(peft.PeftModel),
        dir(LoraLayer),
        dir(torch.optim.Optimizer),
        dir(torch.optim.lr_scheduler.LRScheduler),
        [*dir(torch.nn.Module), *vars(torch.nn.Module())],
    )
    for name in found
}


OWN = {name for tree in TREES.values() for name in defined(tree)} - OF_LIBRARIES


def foreign(name: str) -> set[str]:
    """The private names that a module touches and this package does not define."""
    return touched(TREES[name]) - OWN - defined(TREES[name]) - set(TRAINER_METHODS)


def test_private_names_of_libraries_stand_in_one_folder() -> None:
    assert {name: found for name in SOURCES if name not in COMPAT and (found := foreign(name))} == {}
    assert {"_gradient_checkpointing_func", "_train_batch_size"} <= foreign("compat/transformers.py")
    assert "_prepare_inputs" in foreign("compat/trl.py") and "_adapters_disabled" in foreign("compat/peft.py")


def test_no_other_file_names_a_version() -> None:
    pattern = r"\b(transformers|TRL|PEFT|accelerate|torch|PyTorch|bitsandbytes) v?\(?\d+\.\d+"
    named = {name: re.findall(pattern, source) for name, source in SOURCES.items()}
    others = {"compat/__init__.py", "compat/kernels.py", "compat/sentence_transformers.py"}
    assert {name for name, found in named.items() if found} == COMPAT - others


def test_overridden_methods_are_listed_and_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A version of transformers that calls an overridden method by another name is refused, not trained with."""
    overridden = {name for name in vars(DiffoRAMixin) if private(name)} & set(dir(transformers.Trainer))
    assert overridden == set(TRAINER_METHODS)
    assert DiffoRAMixin.__bases__ == (object,)  # the mixin alone overrides them
    for trainer in (DiffoRATrainer, DiffoRASFTTrainer):
        assert trainer.__bases__[0] is DiffoRAMixin
        assert not {name for name in vars(trainer) if not name.startswith("__")}
    monkeypatch.delattr(transformers.Trainer, "_save_rng_state")
    with pytest.raises(ImportError, match=r"overrides \['_save_rng_state'\].*install a version that is older"):
        make_trainer(tmp_path)


# Distributions


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist and the wheel, built from a copy of what git has; what the build has said is in `log.txt`."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("this is not a checkout")
    folder = tmp_path_factory.mktemp("build")
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / "copy" / name)
    build = "from setuptools import build_meta as b; b.build_sdist('../built'); b.build_wheel('../built')"
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, "-c", build]
    done = subprocess.run(command, cwd=folder / "copy", env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (folder / "log.txt").write_text(done.stdout + done.stderr)
    return folder


def test_sdist_holds_what_the_tests_need(distributions: Path) -> None:
    (path,) = (distributions / "built").glob("*.tar.gz")
    with tarfile.open(path) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    files = [path.relative_to(distributions / "copy") for path in (distributions / "copy").rglob("*")]
    wanted = {str(path) for path in files if path.parts[0] in ("tests", "recipes", "docs") and path.suffix}
    others = {
        "Makefile",
        "CITATION.cff",
        "constraints.txt",
        "constraints-oldest.txt",
        "CHANGELOG.md",
        "LICENSE",
        "pyproject.toml",
    }
    assert len(wanted) > 80 and wanted | others <= held
    assert not [name for name in held if name.endswith(".pyc") or "/outputs/" in name]


def test_wheel_holds_the_package_alone(distributions: Path) -> None:
    (path,) = (distributions / "built").glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        held = set(archive.namelist())
        metadata = archive.read(next(name for name in held if name.endswith("METADATA"))).decode()
    assert {f"diffora_trainer/{name}" for name in (*SOURCES, "py.typed", *TEMPLATES)} <= held
    assert {name.partition("/")[0].partition("-")[0] for name in held} == {"diffora_trainer"}
    assert "Requires-Python: >=3.10" in metadata and "Project-URL: Repository, https://" in metadata
    log = (distributions / "log.txt").read_text().replace("deprecated.py", "")  # a module's name
    assert not re.search(r"warning|deprecat", log, re.IGNORECASE)
