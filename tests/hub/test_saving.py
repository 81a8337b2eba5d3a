"""What a run leaves behind: a plain PEFT adapter, its card, and the way to the Hub."""

from __future__ import annotations

import dataclasses
import inspect
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from matplotlib.image import imread
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from transformers import BertForSequenceClassification, DataCollatorWithPadding, LlamaForCausalLM, TrainingArguments
from trl import SFTConfig
from trl.trainer.utils import generate_model_card

from diffora_trainer import DiffoRAConfig, DiffoRASFTTrainer, DiffoRATrainer, Selection
from diffora_trainer.hub.card import write_card
from diffora_trainer.hub.redact import public_model_id
from helpers import IMPORT_PATH
from helpers.data import classification_dataset, lm_dataset, tiny_tokenizer
from helpers.hub import HubServer, check_card
from helpers.models import bert, llama_config, vit
from helpers.processes import elsewhere


QUIET = {"use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "logging_steps": 100}

PLAIN = """
import torch, transformers
from peft import PeftModel
from peft.tuners.lora import LoraLayer

report = []
for job in jobs:
    base = getattr(transformers, job["auto_class"]).from_pretrained(job["base"])
    model = PeftModel.from_pretrained(base, job["adapter"]).eval()
    names = [n.removeprefix("base_model.model.") for n, m in model.named_modules() if isinstance(m, LoraLayer)]
    known = torch.load(job["known"])
    with torch.no_grad():
        same = bool(model(**known["batch"]).logits.equal(known["logits"]))
        merged = model.merge_and_unload()
        gap = float((merged(**known["batch"]).logits - known["logits"]).abs().max())
    plain = type(merged).__name__ == type(base).__name__ and not any("lora" in n for n, _ in merged.named_parameters())
    report.append({"names": sorted(names), "same": same, "gap": gap, "plain": plain})
"""


@pytest.fixture(scope="module", autouse=True)
def offline() -> Iterator[None]:
    """PEFT asks the Hub about the base model when it saves; here nobody answers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        yield


class Run:
    """A finished run with its folders."""

    def __init__(self, trainer: Any, base: Path, auto_class: str, batch: dict[str, torch.Tensor]) -> None:
        self.trainer, self.base, self.auto_class = trainer, base, auto_class
        trainer.train()
        trainer.save_model()
        trainer.create_model_card()
        self.out = Path(trainer.args.output_dir)
        self.selection: Selection = trainer.selection
        self.known = base.parent / "known.pt"
        with torch.no_grad():
            logits = trainer.model.eval()(**batch).logits
        torch.save({"batch": batch, "logits": logits}, self.known)

    def job(self) -> dict[str, str]:
        return {
            "base": str(self.base), "adapter": str(self.out), "known": str(self.known), "auto_class": self.auto_class
        }  # fmt: skip


@pytest.fixture(scope="module")
def sft(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("sft")
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    LlamaForCausalLM(llama_config(len(tokenizer))).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    trainer = DiffoRASFTTrainer(
        model=str(folder / "base"),
        args=SFTConfig(str(folder / "out"), max_steps=10, learning_rate=0.01, bf16=False, **QUIET),
        train_dataset=lm_dataset(40),
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
        diffora_config=DiffoRAConfig(0.3, "model", discretize_at=6, arch_warmup=2, weight_sharing="layer"),
    )
    return Run(trainer, folder / "base", "AutoModelForCausalLM", {"input_ids": torch.arange(3, 35).reshape(2, 16)})


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("classifier")
    tokenizer = tiny_tokenizer()
    config = bert().model.config
    config.vocab_size = len(tokenizer)
    torch.manual_seed(0)
    BertForSequenceClassification(config).save_pretrained(folder / "base")
    trainer = DiffoRATrainer(
        model=BertForSequenceClassification.from_pretrained(folder / "base"),
        args=TrainingArguments(str(folder / "out"), max_steps=10, learning_rate=0.01, **QUIET),
        train_dataset=classification_dataset(40),
        data_collator=DataCollatorWithPadding(tokenizer),
        diffora_config=DiffoRAConfig(discretize_at=6, arch_warmup=2, base_model_id="org/tiny-bert"),
    )
    batch = {"input_ids": torch.arange(3, 35).reshape(2, 16), "attention_mask": torch.ones(2, 16, dtype=torch.long)}
    return Run(trainer, folder / "base", "AutoModelForSequenceClassification", batch)


def test_plain_peft_loads_it_where_this_package_is_missing(sft: Run, classifier: Run, tmp_path: Path) -> None:
    report = elsewhere(PLAIN, [sft.job(), classifier.job()], tmp_path)
    for run, found in zip((sft, classifier), report, strict=True):
        assert found["names"] == sorted(run.selection.adapted)
        assert found["same"] and found["plain"] and found["gap"] < 1e-4


def test_live_model_holds_the_chosen_modules_alone(sft: Run, classifier: Run) -> None:
    assert sft.selection.shared and len(sft.selection.selected) == 4  # 0.3 * 14, rounded
    for run in (sft, classifier):
        model = run.trainer.model
        live = {n.removeprefix("base_model.model.") for n, m in model.named_modules() if isinstance(m, LoraLayer)}
        assert live == set(run.selection.adapted) < set(run.selection.modules)
        lora = {p for n, p in model.named_parameters() if p.requires_grad and "lora_" in n}
        assert sum(p.numel() for p in lora) == run.selection.trainable_parameters


def test_output_folder(sft: Run, classifier: Run) -> None:
    for run in (sft, classifier):
        files = {path.name for path in run.out.iterdir()}
        assert {"adapter_config.json", "adapter_model.safetensors", "diffora_selection.json", "dam.png"} <= files
        assert {"README.md", "diffora_report.html"} <= files and not [name for name in files if name.startswith(".")]
        assert Selection.load(run.out) == run.selection
        picture = imread(run.out / "dam.png")
        assert min(picture.shape[:2]) > 100 and picture.std() > 0.05

        with safe_open(run.out / "adapter_model.safetensors", "pt") as file:
            keys = set(file.keys())
        expected = {f"base_model.model.{n}.lora_{x}.weight" for n in run.selection.adapted for x in "AB"}
        heads = {"base_model.model.classifier.weight", "base_model.model.classifier.bias"}
        assert keys == expected | (heads if run is classifier else set())

        config = json.loads((run.out / "adapter_config.json").read_text())
        assert set(config["target_modules"]) == set(run.selection.adapted)
        assert config["task_type"] == ("SEQ_CLS" if run is classifier else "CAUSAL_LM")
    assert config["base_model_name_or_path"] == "org/tiny-bert"


def test_card(sft: Run, classifier: Run) -> None:
    for run in (sft, classifier):
        text = (run.out / "README.md").read_text()
        _, errors, _ = check_card(text)
        assert not errors
        card: Any = ModelCard.load(run.out / "README.md")
        assert card.data.library_name == "peft"
        assert {"lora", "diffora", "diffora-trainer"} <= set(card.data.tags)
        assert run.selection.table(markdown=True) in text and run.selection.summary() in text
        assert text.count("## Chosen modules") == 1 and "(dam.png)" in text and "after step 6" in text
        assert f"{run.auto_class}.from_pretrained(" in text and 'PeftModel.from_pretrained(model, "out")' in text
        assert "| `discretize_at` | 6.0 |" in text
        for path in (str(run.base.parent), "/tmp", str(Path.home()), os.getcwd()):
            assert path not in text, path
    assert {"sft", "trl"} <= {*(ModelCard.load(sft.out / "README.md").data.tags or ())}
    assert ModelCard.load(sft.out / "README.md").data.base_model is None  # a folder: not to be published
    assert "🔗 shares" in (sft.out / "README.md").read_text()
    assert card.data.base_model == "org/tiny-bert" and "base_model:adapter:org/tiny-bert" in card.data.tags


def test_writing_the_card_again_changes_nothing(sft: Run, classifier: Run) -> None:
    for run in (sft, classifier):
        path = run.out / "README.md"
        config = run.trainer.model.peft_config["default"]
        write_card(run.out, run.selection, config)
        text = path.read_text()
        for _ in range(2):
            write_card(run.out, run.selection, config)
            assert path.read_text() == text
        path.write_text(text.replace("## Chosen modules", "## Old words").replace("---\n\n", "---\n\nBy hand.\n", 1))
        write_card(run.out, run.selection, config)
        again = path.read_text()
        assert "By hand." in again and "Old words" not in again and again.count("## Chosen modules") == 1
        run.trainer.save_model()
        run.trainer.create_model_card()
        run.trainer.save_model()
        assert path.read_text().count("## Chosen modules") == 1


def test_a_run_is_saved_without_matplotlib(
    sft: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    missing = {name for name in sys.modules if name.split(".")[0] == "matplotlib"} | {"matplotlib"}
    for name in missing:
        monkeypatch.setitem(sys.modules, name, None)
    with caplog.at_level(logging.WARNING, "diffora_trainer"):
        sft.trainer.save_model(str(tmp_path / "copy"))
    assert [r for r in caplog.records if "without Matplotlib" in r.message and "[plots]" in r.message]
    files = {path.name for path in (tmp_path / "copy").iterdir()}
    assert "dam.png" not in files
    assert {"adapter_model.safetensors", "diffora_selection.json", "diffora_report.html"} <= files
    text = (tmp_path / "copy" / "README.md").read_text()
    assert "## Chosen modules" in text and "dam.png" not in text
    assert str(tmp_path) not in text


def test_a_folder_without_a_name(classifier: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my-adapter").mkdir()
    monkeypatch.chdir(tmp_path / "my-adapter")  # output_dir="." is a folder without a name
    config = LoraConfig(task_type="SEQ_CLS")
    text = write_card(".", classifier.selection, config).read_text()
    assert 'PeftModel.from_pretrained(model, "my-adapter")' in text


def test_local_folders_are_no_public_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "local").mkdir()
    monkeypatch.chdir(tmp_path)
    assert public_model_id("gpt2") == "gpt2" and public_model_id("org/name-1.5_b") == "org/name-1.5_b"
    for name in (None, "", "local", "/gone/model", "./gone", "../gone", "a/b/c", "C:\\\\model", "gone/"):
        assert public_model_id(name) is None, name


def snippet_of(folder: Path, base: Path) -> dict[str, Any]:
    """What the card's snippet leaves behind, with the folders in the place of the names."""
    card = (folder / "README.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"### Load it with plain PEFT\n\n```python\n(.*?)```", card, re.DOTALL)
    scope: dict[str, Any] = {}
    exec(snippet.replace("<the base model>", str(base)).replace(f'"{folder.name}"', repr(str(folder))), scope)
    return scope


def test_the_snippet_of_the_card_loads_a_head_of_any_size_on_its_base(tmp_path: Path) -> None:
    """Neither the number of classes nor, without a task type of PEFT's, the class of the model is in the adapter."""
    names = {0: "bad", 1: "so-so", 2: 'gut "ü"'}
    torch.manual_seed(0)
    config = bert().model.config
    config.vocab_size, config.id2label, config.label2id = (
        len(tiny_tokenizer()),
        names,
        {n: i for i, n in names.items()},
    )
    rows = classification_dataset(40).map(lambda row, index: {"labels": index % 3}, with_indices=True)
    images = vit()
    head = LoraConfig(r=4, target_modules="all-linear", modules_to_save=["classifier"])
    images_rows = [{name: value[index % 4] for name, value in images.batch.items()} for index in range(24)]
    for model, data, options in (
        (BertForSequenceClassification(config), rows, {"data_collator": DataCollatorWithPadding(tiny_tokenizer())}),
        (images.model, images_rows, {"peft_config": head}),
    ):
        model.base_model.save_pretrained(tmp_path / "base")  # as pre-trained models come: without the head
        folder = tmp_path / type(model).__name__
        trainer = DiffoRATrainer(
            model=model,
            args=TrainingArguments(str(folder), max_steps=8, learning_rate=0.01, **QUIET),
            train_dataset=data,
            diffora_config=DiffoRAConfig(discretize_at=6, arch_warmup=2),
            **options,
        )
        trainer.train()
        trainer.save_model()
        loaded = snippet_of(folder, tmp_path / "base")["model"]
        batch = images.batch if model is images.model else {"input_ids": torch.arange(3, 35).reshape(2, 16)}
        with torch.no_grad():
            assert loaded.eval()(**batch).logits.equal(trainer.model.eval()(**batch).logits)
        if model is not images.model:
            assert loaded.config.id2label == names
            assert json.loads((folder / "id2label.json").read_text(encoding="utf-8")) == {
                str(i): n for i, n in names.items()
            }
        assert (folder / "id2label.json").exists() == (model is not images.model)


PUSH = """
import re, sys
from pathlib import Path
import torch
from helpers.data import lm_dataset
from trl import SFTConfig
from diffora_trainer import DiffoRAConfig, DiffoRASFTTrainer

trainer = DiffoRASFTTrainer(
    model="user/base",
    args=SFTConfig("work/out", max_steps=6, learning_rate=0.01, use_cpu=True, bf16=False, report_to="none",
                   save_strategy="no", push_to_hub=True, hub_model_id="user/adapter", disable_tqdm=True),
    train_dataset=lm_dataset(40),
    diffora_config=DiffoRAConfig(discretize_at=4, arch_warmup=1),
)
trainer.train()
trainer.push_to_hub(commit_message="the end")
batch = {"input_ids": torch.arange(3, 35).reshape(2, 16)}
with torch.no_grad():
    expected = trainer.model.eval()(**batch).logits

from huggingface_hub import hf_hub_download
card = Path(hf_hub_download("user/adapter", "README.md")).read_text()
(snippet,) = re.findall(r"### Load it with plain PEFT\\n\\n```python\\n(.*?)```", card, re.DOTALL)
scope = {}
exec(snippet, scope)
with torch.no_grad():
    assert scope["model"].eval()(**batch).logits.equal(expected)
names = {n.split(".lora_A")[0].removeprefix("base_model.model.")
         for n, _ in scope["model"].named_parameters() if ".lora_A." in n}
assert names == set(trainer.selection.selected)
"""


def test_push_to_hub(sft: Run, tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    with HubServer() as hub:
        hub.add_repo("user/base", {path.name: path.read_bytes() for path in sft.base.iterdir()})
        done = subprocess.run(
            [sys.executable, "-c", PUSH],
            env=hub.env(tmp_path / "hf_home", PYTHONPATH=IMPORT_PATH),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=150,
        )
        assert done.returncode == 0, done.stderr
        repo = hub.repos["user/adapter"]
        files = repo.files
        assert {"adapter_config.json", "adapter_model.safetensors", "diffora_selection.json", "dam.png"} <= set(files)
        assert b"mean training loss" in files["diffora_report.html"]
        assert repo.commits[-1] == "the end" and {"dam.png", "adapter_model.safetensors"} <= repo.lfs_files
    card = files["README.md"].decode()
    data, errors, _ = check_card(card)
    assert not errors
    assert data["base_model"] == "user/base" and data["library_name"] == "peft"
    assert {"trl", "sft", "diffora", "base_model:adapter:user/base"} <= set(data["tags"])
    selection = Selection.from_json(files["diffora_selection.json"].decode())
    assert selection.table(markdown=True) in card
    config = json.loads(files["adapter_config.json"])
    assert set(config["target_modules"]) == set(selection.selected)
    assert config["base_model_name_or_path"] == "user/base"
    for text in (card, files["adapter_config.json"].decode(), files["diffora_selection.json"].decode()):
        assert str(tmp_path) not in text and not re.search(r"/(home|tmp|root|work)/", text)


def test_no_template_and_no_none_in_a_card(sft: Run, classifier: Run, tmp_path: Path) -> None:
    """PEFT's template of placeholders goes, TRL's links to a base model called "None" get words, and facts stay."""
    for name, run in (("peft", classifier), ("trl", sft)):
        run.trainer.model.save_pretrained(tmp_path / name)
        if name == "trl":
            unknown = dict.fromkeys(inspect.signature(generate_model_card).parameters)
            facts = {**unknown, "model_name": "m", "tags": [], "trainer_name": "SFT"}
            generate_model_card(**facts).save(tmp_path / name / "README.md")
        before = (tmp_path / name / "README.md").read_text()
        assert ("[More Information Needed]" if name == "peft" else "[None]") in before
        config = run.trainer.model.peft_config["default"]
        config = dataclasses.replace(config, base_model_name_or_path=str(tmp_path))
        text = write_card(tmp_path / name, run.selection, config).read_text()
        assert "[More Information Needed]" not in text and "None" not in text and str(tmp_path) not in text
        assert "## Chosen modules" in text and "### Framework versions" in text
