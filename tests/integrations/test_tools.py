"""
The examples of LLaMA-Factory, ms-swift and unsloth. Where the tool is not installed they run beside a stand-in for its
published interface, which each test names with its version; where it is, beside itself.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial, wraps
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils import checkpoint as torch_checkpoint
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer

from diffora_trainer import DiffoRACallback, Selection
from helpers import ROOT
from helpers.adapted import lora_layers
from helpers.checks import adapter, assert_helpful, assert_same, assert_was_searched
from helpers.data import chat_dataset, lm_dataset, tiny_tokenizer
from helpers.trainers import arguments, causal_model, lora, make_trainer, search_config


yaml = pytest.importorskip("yaml")
RECIPES = ROOT / "recipes" / "integrations"


def installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **contents: Any) -> None:
    """A module of a tool, with its parents."""
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:end]), ModuleType(".".join(parts[:end])))
    vars(sys.modules[name]).update(contents)


def run_tool(*command: str | Path) -> str:
    """A tool in a process of its own: some of them change transformers for all that follows."""
    changed = {"CUDA_VISIBLE_DEVICES": "", "DISABLE_VERSION_CHECK": "1", "HF_HUB_OFFLINE": "1"}
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, **changed, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, *map(str, command)], env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def wrapped() -> Any:
    torch.manual_seed(3)
    return get_peft_model(causal_model(), lora(task_type="CAUSAL_LM"))


def tokenized(count: int = 24) -> list[dict[str, list[int]]]:
    tokenizer = tiny_tokenizer()
    ids = [tokenizer(row["text"])["input_ids"][:16] for row in lm_dataset(count)]
    return [{"input_ids": row, "labels": row} for row in ids]


def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    return {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}


def check_saved(folder: Path) -> None:
    """A choice was made, and a plain PEFT adapter of it is saved."""
    selection = Selection.load(folder)
    loaded = PeftModel.from_pretrained(causal_model(), str(folder))
    assert set(lora_layers(loaded, "default")) == set(selection.selected)
    assert 0 < len(selection.selected) < len(selection.modules)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny model with its tokenizer, and conversations."""
    causal_model(attention_dropout=0.0).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    rows = [row["messages"] for row in chat_dataset(64)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    pairs = [{"instruction": row[-2]["content"], "input": "", "output": row[-1]["content"]} for row in rows]
    (tmp_path / "facts.json").write_text(json.dumps(pairs))
    (tmp_path / "dataset_info.json").write_text(json.dumps({"facts": {"file_name": "facts.json"}}))
    return tmp_path


# LLaMA-Factory


def test_llama_factory(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """
    The script of the recipe. `run_exp(args=None, callbacks=None)` of LLaMA-Factory 0.9.5 (`train/tuner.py`) builds a
    `Seq2SeqTrainer` with the callbacks, trains it and saves; without arguments it reads them from the command line.
    """
    config = yaml.safe_load((RECIPES / "llama_factory" / "config.yaml").read_text())
    assert config["finetuning_type"] == "lora" and config["use_reentrant_gc"] is False
    small = {
        "model_name_or_path": str(folder / "model"),
        "template": "default",
        "dataset_dir": str(folder),
        "dataset": "facts",
        "output_dir": str(folder / "out"),
        "lora_rank": 4,
        "gradient_accumulation_steps": 1,
        "max_steps": 12,
        "learning_rate": 1e-2,
        "use_cpu": True,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump({**config, **small}))

    def run_exp(args: dict[str, Any] | None = None, callbacks: list[Any] | None = None) -> None:
        read = yaml.safe_load(Path(sys.argv[1]).read_text()) if args is None else args
        trainer = Seq2SeqTrainer(
            model=wrapped(),
            args=arguments(read["output_dir"], Seq2SeqTrainingArguments),
            train_dataset=tokenized(),
            data_collator=collate,
            callbacks=callbacks,
        )
        trainer.train()
        trainer.save_model()

    script = RECIPES / "llama_factory" / "train.py"
    if installed("llamafactory"):
        printed = run_tool(script, folder / "config.yaml")
    else:
        stand_in(monkeypatch, "llamafactory.train.tuner", run_exp=run_exp)
        monkeypatch.setattr(sys, "argv", [str(script), str(folder / "config.yaml")])
        runpy.run_path(str(script), run_name="__main__")
        printed = capsys.readouterr().out
    assert "x kept   . removed" in printed
    check_saved(folder / "out")


# ms-swift


class ShuffledBatches:
    """Batches of four indices, in an order that is a function of the epoch."""

    def __init__(self, total: int, skip: int) -> None:
        self.total, self.skip, self.epoch = total, skip, 0

    def __len__(self) -> int:
        return math.ceil(self.total / 4) - self.skip

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(self.total, generator=torch.Generator().manual_seed(self.epoch)).tolist()
        yield from [order[start : start + 4] for start in range(0, self.total, 4)][self.skip :]


class ShuffledLoader(DataLoader):
    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.epoch = epoch


def test_ms_swift(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """
    The plugin of the recipe. In ms-swift 4.6.0 `--external_plugins` imports the file, and a trainer makes its
    callbacks before its parent's constructor, by `callbacks_map[name](args, self)` (`trainers/mixin.py`,
    `_get_callbacks`). It has a data loader of its own, without a sampler (`DataLoaderMixin`), and makes another one
    where a resumed run leaves out the batches that were read (`_patch_skip_first_batches`).
    """
    config = yaml.safe_load((RECIPES / "ms_swift" / "config.yaml").read_text())
    assert config["callbacks"] == ["diffora"] and config["gradient_checkpointing_kwargs"] == {"use_reentrant": False}
    assert [ROOT / name for name in config["external_plugins"]] == [RECIPES / "ms_swift" / "diffora_plugin.py"]
    if installed("swift"):
        small = {
            "model": str(folder / "model"),
            "model_type": "llama",
            "template": "dummy",
            "dataset": str(folder / "chats.jsonl"),
            "external_plugins": str(ROOT / config["external_plugins"][0]),
            "callbacks": "diffora",
            "torch_dtype": "float32",
            "gradient_accumulation_steps": 1,
            "max_steps": 12,
            "split_dataset_ratio": 0,
            "add_version": "false",
            "output_dir": str(folder / "out"),
            "gradient_checkpointing_kwargs": json.dumps(config["gradient_checkpointing_kwargs"]),
        }
        words = [word for name, value in {**config, **small}.items() for word in (f"--{name}", str(value))]
        run_tool("-m", "swift.cli.sft", *words)
        check_saved(folder / "out" / "checkpoint-12")
        return
    callbacks_map: dict[str, Callable[..., Any]] = {}
    stand_in(monkeypatch, "swift.callbacks", callbacks_map=callbacks_map)
    runpy.run_path(str(RECIPES / "ms_swift" / "diffora_plugin.py"))

    class SwiftTrainer(Seq2SeqTrainer):
        def __init__(self, args: Any, callbacks: list[str], **kwargs: Any) -> None:
            made = [callbacks_map[name](args, self) for name in callbacks]
            super().__init__(args=args, callbacks=made, **kwargs)
            self.label_names = ["labels"]

        def train(self, *args: Any, **kwargs: Any) -> Any:
            def another(loader: ShuffledLoader, num_batches: int = 0) -> ShuffledLoader:
                found = self.get_train_dataloader(skip_batches=num_batches)
                found.set_epoch(loader.batch_sampler.epoch)
                return found

            with monkeypatch.context() as patch:
                patch.setattr("transformers.trainer.skip_first_batches", another)
                return super().train(*args, **kwargs)

        def get_train_dataloader(self, skip_batches: int = 0) -> DataLoader:
            batches = ShuffledBatches(len(self.train_dataset), skip_batches)
            return ShuffledLoader(self.train_dataset, batch_sampler=batches, collate_fn=self.data_collator)

    def build(model: Any) -> Any:
        args = arguments(folder / "out", Seq2SeqTrainingArguments, save_strategy="steps", save_steps=2)
        rows = tokenized(40)
        return SwiftTrainer(args, ["diffora"], model=model, train_dataset=rows, data_collator=collate)

    trainer = build(wrapped())
    trainer.train()
    check_saved(folder / "out" / "checkpoint-12")
    for step in (2, 8):  # before the choice and after it, with the model of the checkpoint
        checkpoint = str(folder / "out" / f"checkpoint-{step}")
        resumed = build(PeftModel.from_pretrained(causal_model(), checkpoint, is_trainable=True))
        resumed.train(resume_from_checkpoint=checkpoint)
        assert resumed.selection == trainer.selection
        assert_same(adapter(resumed.model), adapter(trainer.model), f"adapter from step {step}")


# unsloth


def test_unsloth(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """
    The script of the recipe, after a search with ranks that differ. `FastLanguageModel.get_peft_model` of unsloth
    2026.10.9 (`models/llama.py`) takes any list of `target_modules`, and what it does not know goes into the
    `LoraConfig`. It needs a GPU, so it is always stood in for.
    """
    config = search_config(search_only=True, max_trainable_parameters=1500)
    search: Any = make_trainer(folder / "search", "sft", model=causal_model(), diffora_config=config)
    search.train()
    search.save_model()

    class FastLanguageModel:
        @staticmethod
        def from_pretrained(name: str, max_seq_length: int = 2048, load_in_4bit: bool = True) -> Any:
            return AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)

        @staticmethod
        def get_peft_model(
            model: Any, r: int, target_modules: list[str], lora_alpha: int, use_rslora: bool = False, **kwargs: Any
        ) -> Any:
            assert isinstance(target_modules, list)
            arguments = {"r": r, "target_modules": target_modules, "lora_alpha": lora_alpha, "use_rslora": use_rslora}
            return get_peft_model(model, LoraConfig(**arguments, task_type="CAUSAL_LM", **kwargs))

    stand_in(monkeypatch, "unsloth", FastLanguageModel=FastLanguageModel)
    script = runpy.run_path(str(RECIPES / "unsloth" / "train.py"))
    (folder / "data").mkdir()
    (folder / "chats.jsonl").rename(folder / "data" / "train.jsonl")
    small = {"output_dir": str(folder / "out"), "max_steps": 3, "use_cpu": True, "bf16": False, "report_to": "none"}
    trainer = script["main"](str(folder / "search"), str(folder / "model"), str(folder / "data"), **small)
    layers = lora_layers(trainer.model, "default")
    assert {name: layer.r["default"] for name, layer in layers.items()} == {
        name: rank for name, rank in zip(search.selection.modules, search.selection.ranks, strict=True) if rank
    }
    assert (folder / "out" / "adapter_model.safetensors").is_file()


# Checkpointing, which both LLaMA-Factory and ms-swift do in the reentrant way unless told otherwise


def by_llama_factory(model: Any, reentrant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A function around that of transformers (0.9.5, `model/model_utils/checkpointing.py`)."""

    def enable(gradient_checkpointing_kwargs: dict[str, Any]) -> None:
        inner = partial(torch_checkpoint.checkpoint, **gradient_checkpointing_kwargs)

        @wraps(inner, assigned=())
        def around(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            return inner(func, *args, **kwargs)

        model._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=around)

    enable({"use_reentrant": reentrant})


def by_ms_swift(model: Any, reentrant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A function in the place of PyTorch's (4.6.0, `trainers/mixin.py`, `_fix_gradient_checkpointing`)."""
    original = torch_checkpoint.checkpoint

    @wraps(original)
    def replaced(*args: Any, use_reentrant: bool | None = None, **kwargs: Any) -> Any:
        return original(*args, use_reentrant=reentrant, **kwargs)

    monkeypatch.setattr(torch_checkpoint, "checkpoint", replaced)
    monkeypatch.setattr("transformers.modeling_utils.checkpoint", replaced)
    model.gradient_checkpointing_enable({"use_reentrant": False})


@pytest.mark.parametrize("switch_on", [by_llama_factory, by_ms_swift])
def test_checkpointing_of_a_tool(switch_on: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for reentrant in (True, False):
        model: Any = wrapped()
        with monkeypatch.context() as patch:
            switch_on(model.get_base_model(), reentrant, patch)
            assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
            trainer = make_trainer(
                tmp_path, cls=Trainer, model=model, train_dataset=tokenized(), data_collator=collate
            )
            DiffoRACallback(search_config()).attach(trainer)
            if not reentrant:
                trainer.train()
                assert_was_searched(trainer)
                continue
            with pytest.raises(ValueError) as caught:
                trainer.train()
            assert_helpful(str(caught.value), "which here is the reentrant way.*`use_reentrant_gc: false`")
