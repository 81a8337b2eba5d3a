"""Files from anywhere run nothing and write nowhere else; nothing private is published; remote code stays off."""

from __future__ import annotations

import ast
import json
import os
import pickle
import re
from collections.abc import Iterator
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from trl import SFTConfig

from diffora_trainer import DiffoRASFTTrainer, Selection
from diffora_trainer.adapters.grid import AdapterGrid
from diffora_trainer.adapters.pruning import apply_selection
from diffora_trainer.cli import main
from diffora_trainer.core.selection import SELECTION_NAME
from diffora_trainer.core.state import RunState
from diffora_trainer.hub.card import write_card
from diffora_trainer.hub.plots import plot_selection
from diffora_trainer.hub.report import REPORT_NAME, write_report
from diffora_trainer.trainer.checkpoint import STATE_NAME, TENSORS_NAME, load_state, save_state
from helpers import ROOT
from helpers.adapted import make_grid, make_selection
from helpers.checks import assert_same
from helpers.data import lm_dataset, tiny_tokenizer
from helpers.hub import check_card
from helpers.models import llama
from helpers.pages import Page
from helpers.trainers import causal_model, lora, saving_trainer, search_config


PACKAGE = sorted((ROOT / "diffora_trainer").rglob("*.py"))
RECIPES = sorted((ROOT / "recipes").rglob("*.py"))


# What is read runs nothing


def calls(path: Path) -> Iterator[str]:
    """What a module calls and imports, by name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def test_the_package_reads_no_pickle_and_runs_no_text() -> None:
    """A cheap guard; the files themselves are tried below."""
    assert len(PACKAGE) > 15
    for path in PACKAGE:
        found = set(calls(path))
        assert not found & {"eval", "exec", "compile", "__import__", "os.system", "torch.load", "np.load"}, path
        roots = {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "subprocess", "yaml"}
        assert not {name.split(".")[0] for name in found} & roots, path


class Exploit:
    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return Path.touch, (Path(self.path),)


@pytest.mark.parametrize("kind", ["pickle", "torch", "reduce in JSON"])
def test_a_state_that_is_a_program_is_refused_and_not_run(kind: str, tmp_path: Path) -> None:
    marker, folder = tmp_path / "executed", tmp_path / "checkpoint"
    save_state(folder, RunState(3, {}, {}, selection=make_selection()), {})
    buffer = BytesIO()
    if kind == "torch":
        torch.save({"values": Exploit(marker)}, buffer)
    else:
        pickle.dump(Exploit(marker), buffer)
    blob = buffer.getvalue()
    if kind == "reduce in JSON":
        state = {"py/reduce": [{"py/type": "pathlib.Path.touch"}, {"py/tuple": [str(marker)]}], "__reduce__": "touch"}
        (folder / STATE_NAME).write_text(json.dumps({"format": 1, "tensor_bytes": 8, **state}))
        selection = {**json.loads(make_selection().to_json()), "config": state, "modules": state}
        (folder / SELECTION_NAME).write_text(json.dumps(selection))
    else:
        (folder / TENSORS_NAME).write_bytes(blob)
        record = json.loads((folder / STATE_NAME).read_text())
        (folder / STATE_NAME).write_text(json.dumps({**record, "tensor_bytes": len(blob)}))  # the size is right
        (folder / SELECTION_NAME).write_bytes(blob)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=re.escape(STATE_NAME if kind == "reduce in JSON" else TENSORS_NAME)):
        load_state(folder)
    with pytest.raises(ValueError, match=re.escape(SELECTION_NAME)):
        Selection.load(folder)
    assert sorted(tmp_path.rglob("*")) == before and not marker.exists()


@pytest.mark.parametrize(
    "change",
    [
        {"phase": "selected", "selection": None},
        {"phase": "selected", "selection": "[]"},
        {"phase": None, "modules": None},
        {"modules": [1, 2]},
        {"modules": ["../../etc/passwd"]},
        {"held_out_position": 10**40},
        {"held_out_position": -1},
        {"skipped_steps": "many"},
        {"losses": ["low"]},
        {"losses": [1e999]},
        {"kept": [1]},
        {"costs": []},
        {"costs": {"time": {"all_modules": 1.0, "per_module": 1.0, "depth": ["a"]}, "memory": None}},
        {"config": None},
        {"config": {}},
        {"warmup": True},
    ],
    ids=str,
)
def test_a_foreign_state_is_a_value_error(change: dict[str, Any], checkpoint: Path, tmp_path: Path) -> None:
    """Whatever a checkpoint says, the run that resumes from it stops with a reason, before its first step."""
    folder = tmp_path / "checkpoint-5"
    folder.mkdir()
    for path in checkpoint.iterdir():
        os.link(path, folder / path.name)
    record = json.loads((folder / STATE_NAME).read_text())
    (folder / STATE_NAME).unlink()
    (folder / STATE_NAME).write_text(json.dumps({**record, **change}))
    trainer, steps = saving_trainer(tmp_path / "resumed", "cls"), []
    trainer.training_step = lambda *args, **kwargs: steps.append(1)
    with pytest.raises(ValueError, match="Please"):
        trainer.train(resume_from_checkpoint=str(folder))
    assert not steps


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint from the middle of a search."""
    trainer = saving_trainer(tmp_path_factory.mktemp("run"), "cls", args={"max_steps": 9})
    trainer.train()
    return Path(trainer.args.output_dir) / "checkpoint-5"


# What is named writes nowhere else and is no markup


HOSTILE_NAMES = {
    "path": "../../etc/passwd",
    "absolute": "/etc/passwd",
    "windows": "C:\\Windows\\x",
    "jinja": "{{ 7 * 191 }}{% for x in [1] %}{% endfor %}{{ selection.__class__.__mro__ }}",
    "html": "<script>alert(1)</script><img src=x onerror=y>",
    "end of the section": "<!-- diffora-trainer: end -->",
    "table": "a | b | c",
    "link": "[click](https://evil.example) ![x](file:///etc/passwd) `rm`",
    "lines": "a\n\n# A heading\n---\nlicense: evil\r\n| x |",
    "escape codes": "\x1b[2J\x1b]0;title\x07\x9b31m\x00\x7f",
    "right to left": "a\u202egnp.exe\u200b\u2028\u2066",
    "surrogate": "a\ud800b",
    "long": "x" * 900 + ".weight",
    "formula": "$\\frac{1}{$",
    "dunder": "__class__.__init__.__globals__",
    "empty": "",
    "percent": "%s %(name)s {0} {name}",
}


@pytest.mark.parametrize("kind", HOSTILE_NAMES)
def test_hostile_names_are_data(kind: str, tmp_path: Path) -> None:
    """Rows, columns and options as a foreign checkpoint may name them: in the log, the picture and the card."""
    name = HOSTILE_NAMES[kind]
    plain = make_selection(config={"option": "value"})
    hostile = make_selection(
        grid=make_grid(rows=(name, "layers.1", "other"), columns=(f"attn{name}", "attn.v", "mlp.down", "pooler")),
        config={f"option{name}": f"value{name}"},
    )
    selection = Selection.from_json(hostile.to_json())
    assert selection == hostile
    inside, texts, pages = tmp_path / "adapter", [], []
    for part, found in (("plain", plain), ("hostile", selection)):
        folder = inside / part / "same"
        found.save(folder)
        plot_selection(found, folder / "dam.png")
        pages.append(Page(write_report(folder, found, title=name).read_text(encoding="utf-8")))
        texts.append(write_card(folder, found, LoraConfig(task_type="CAUSAL_LM")).read_text())
        again = write_card(folder, found, LoraConfig(task_type="CAUSAL_LM")).read_text()
        assert again == texts[-1]  # the section ends where it ends, whatever stands in it
    written = {path.relative_to(inside).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    files = (SELECTION_NAME, "README.md", "dam.png", REPORT_NAME)
    assert written == {f"{part}/same/{file}" for part in ("plain", "hostile") for file in files}

    assert [tag for tag, _ in pages[0].elements] == [tag for tag, _ in pages[1].elements]

    # The card has the same lines, cells and metadata as the one of harmless names: nothing of a name is markup.
    shapes = [[(line[:2], line.count("|")) for line in text.splitlines()] for text in texts]
    assert shapes[0] == shapes[1]
    head, body = texts[1].split("\n---\n", 1)
    assert head == texts[0].split("\n---\n", 1)[0] and not check_card(texts[1])[1]
    body = body.split("```")[0]
    assert not re.search(r"<script|<img|https://evil|\]\(file|\{\{|\{%|1337|[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028]", body)
    assert texts[1].count("diffora-trainer: end -->") == 1

    table = selection.table()
    assert len(table.splitlines()) == len(plain.table().splitlines())
    assert all(letter.isprintable() for letter in table.replace("\n", ""))
    assert max(map(len, table.splitlines())) < 300


def test_names_of_another_model_touch_nothing() -> None:
    """A selection names modules, and only the LoRA layers that a model has are ever looked up by them."""
    model: Any = get_peft_model(llama().model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    names = AdapterGrid.from_model(model).grid.names
    grid = make_grid()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    strange = ("base_layer/../x", "__class__", "", "..", "base_model.model", f"{names[0]}.lora_A.default", "\x1b[2J")
    for hostile in strange:
        for modules in ((hostile, *grid.names[1:]), (hostile, *names[1:6])):
            sites = [replace(site, name=name) for site, name in zip(grid.sites, modules, strict=True)]
            foreign = make_selection(grid=replace(grid, sites=tuple(sites)), shared=())
            with pytest.raises(ValueError, match="made for other modules") as error:
                apply_selection(model, foreign)
            assert str(error.value).isprintable()
    assert_same({name: value for name, value in model.state_dict().items()}, before)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes


def test_names_are_no_patterns(tmp_path: Path) -> None:
    """Names with signs of regular expressions are matched as they are when the adapter is loaded."""
    names = ("a.c", "abc", "q(x+)", "q[x]", "^$", "x|y")

    class Odd(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in names:
                if "." not in name:
                    self.add_module(name, torch.nn.Linear(4, 4))
            self.a = torch.nn.ModuleDict({"c": torch.nn.Linear(4, 4)})
            self.vision = torch.nn.ModuleDict({"x|y": torch.nn.Linear(4, 4)})  # its suffix, so a pattern is needed

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    for kept in (("a.c", "x|y"), ("q(x+)",), ("^$", "vision.x|y")):
        model: Any = get_peft_model(Odd(), LoraConfig(r=2, target_modules=[*names, "vision.x|y"]))
        grid = AdapterGrid.from_model(model).grid
        ranks = tuple(site.rank if site.name in kept else 0 for site in grid.sites)
        selection = Selection(grid, ranks, (0.0,) * len(grid), (1.0,) * len(grid))
        apply_selection(model, selection)
        model.save_pretrained(tmp_path / "adapter")
        loaded = PeftModel.from_pretrained(Odd(), tmp_path / "adapter")
        found = {name.removeprefix("base_model.model.") for name, m in loaded.named_modules() if hasattr(m, "lora_A")}
        assert found == set(kept)


def test_links_are_replaced_and_not_followed(tmp_path: Path) -> None:
    outside, folder = tmp_path / "outside", tmp_path / "adapter"
    folder.mkdir()
    for name in (SELECTION_NAME, STATE_NAME, TENSORS_NAME, "dam.png", REPORT_NAME):
        for link in (name, f".{name}.{os.getpid()}"):  # and at the name of the temporary file
            outside.write_text("precious")
            (folder / link).unlink(missing_ok=True)
            (folder / link).symlink_to(outside)
            if name == SELECTION_NAME:
                make_selection().save(folder)
            elif name == "dam.png":
                plot_selection(make_selection(), folder / name)
            elif name == REPORT_NAME:
                write_report(folder, make_selection())
            else:
                save_state(folder, RunState(3, {}, {}, selection=make_selection()), {"values": torch.zeros(2)})
            assert outside.read_text() == "precious" and not (folder / name).is_symlink(), link
    outside.write_text("---\ntags: []\n---\nprecious")
    (folder / "README.md").symlink_to(outside)
    write_card(folder, make_selection(), LoraConfig())
    assert outside.read_text() == "---\ntags: []\n---\nprecious" and not (folder / "README.md").is_symlink()


# Remote code


def test_remote_code_is_never_turned_on() -> None:
    """The package does not speak of it; a recipe may hand on what its user asks for."""
    assert not [path for path in PACKAGE if "trust_remote_code" in path.read_text()]
    for path in [*RECIPES, *(ROOT / "recipes").rglob("*.yaml"), *(ROOT / "recipes").rglob("*.md"), ROOT / "README.md"]:
        text = path.read_text()
        assert not re.search(r"trust_remote_code[\"']?\s*[=:]\s*[\"']?(True|true|yes|1)", text), path


CUSTOM = """
from pathlib import Path
Path({marker!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM
class MyConfig(LlamaConfig):
    pass
class MyModel(LlamaForCausalLM):
    config_class = MyConfig
"""


@pytest.mark.parametrize("model_type", ["llama", "mine"])
def test_custom_code_of_a_model_is_not_run(model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, marker = tmp_path / "base", tmp_path / "executed"
    causal_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "custom.MyConfig", "AutoModelForCausalLM": "custom.MyModel"}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": model_type}))
    (folder / "custom.py").write_text(CUSTOM.format(marker=str(marker)))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *args: "")  # nobody answers the question

    def trainer(**kwargs: Any) -> DiffoRASFTTrainer:
        args = SFTConfig(str(tmp_path / "out"), max_steps=12, use_cpu=True, bf16=False, report_to="none", **kwargs)
        return DiffoRASFTTrainer(
            str(folder), args, train_dataset=lm_dataset(24), peft_config=lora(), diffora_config=search_config()
        )

    if model_type == "mine":
        with pytest.raises(ValueError, match="trust_remote_code"):
            trainer()
    else:  # a type that transformers knows is loaded by its own code
        assert "transformers.models.llama" in type(trainer().model.get_base_model()).__module__
    assert not marker.exists()
    if model_type == "mine" and hasattr(SFTConfig, "trust_remote_code"):  # older TRL cannot load it by its name
        trainer(trust_remote_code=True)
        assert marker.exists()  # the user asked for it
        marker.unlink()
        lm_dataset(24).to_json(tmp_path / "rows.jsonl")
        words = ["sft", "--model_name_or_path", str(folder), "--dataset_name", str(tmp_path / "rows.jsonl")]
        words += ["--max_steps", "8", "--use_cpu", "true", "--report_to", "none", "--save_strategy", "no"]
        words += ["--output_dir", str(tmp_path / "command")]
        assert main(words) == 1 and not marker.exists()
        assert main([*words, "--trust_remote_code", "true"]) == 0
