"""A base model at another revision than "main": what is saved names it, and what is loaded of it is of it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from diffora_trainer.cli import main
from diffora_trainer.serving import export
from helpers.data import lm_dataset, tiny_tokenizer
from helpers.trainers import causal_model, lora, make_trainer


BATCH = {"input_ids": torch.arange(3, 23).view(2, 10)}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the Hub with a model of two revisions, of which one has a layer and a token more."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    repo = tmp_path / "cache" / "models--me--tiny"
    (repo / "refs").mkdir(parents=True)
    for name, commit, layers in (("main", "a" * 40, 1), ("v1", "b" * 40, 2)):
        snapshot = repo / "snapshots" / commit
        causal_model(num_hidden_layers=layers).save_pretrained(snapshot)
        tokenizer = tiny_tokenizer()
        if name == "v1":
            tokenizer.add_tokens(["<new>"], special_tokens=True)
        tokenizer.save_pretrained(snapshot)
        (repo / "refs" / name).write_text(commit)
    return tmp_path / "cache"


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**BATCH).logits


def snippet_of(folder: Path) -> tuple[str, Any]:
    """The snippet of a card and the model that it loads, with the folder in the place of the adapter's name."""
    card = (folder / "README.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"### Load it with plain PEFT\n\n```python\n(.*?)```", card, re.DOTALL)
    scope: dict[str, Any] = {}
    exec(snippet.replace(f'"{folder.name}"', repr(str(folder))), scope)
    return snippet, scope["model"]


def test_exports_are_of_the_revision_that_an_adapter_names(cache: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained("me/tiny", revision="v1")
    config = LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[1], task_type="CAUSAL_LM")
    model = get_peft_model(model, config, revision="v1")
    torch.nn.init.normal_(
        model.get_parameter("base_model.model.model.layers.1.self_attn.q_proj.lora_B.default.weight")
    )
    model.save_pretrained(tmp_path / "adapter")
    wanted = logits(model)
    merged = export(tmp_path / "adapter", "merged", tmp_path / "merged")
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(merged)), wanted, rtol=1e-4, atol=1e-4)
    assert len(AutoTokenizer.from_pretrained(merged)) == len(tiny_tokenizer()) + 1
    for server in ("vllm", "lorax"):  # of which the second reads the shapes of the base model
        assert PeftConfig.from_pretrained(export(tmp_path / "adapter", server, tmp_path / server)).revision == "v1"
    # A revision is of the model that it was said with.
    same = export(tmp_path / "adapter", "vllm", tmp_path / "same", base_model="me/tiny")
    assert PeftConfig.from_pretrained(same).revision == "v1"
    other = tmp_path / "other"
    causal_model(num_hidden_layers=2).save_pretrained(other)
    found = PeftConfig.from_pretrained(export(tmp_path / "adapter", "vllm", tmp_path / "of_other", base_model=other))
    assert found.revision is None and found.base_model_name_or_path == str(other)


def test_a_trainer_that_loads_a_revision_saves_its_name(cache: Path, tmp_path: Path) -> None:
    mine, folder = lora(), tmp_path / "out"
    trainer = make_trainer(
        folder, "sft", model="me/tiny", args={"model_init_kwargs": {"revision": "v1"}}, peft_config=mine
    )
    trainer.train()
    trainer.save_model(str(folder))
    assert PeftConfig.from_pretrained(folder).revision == "v1" and mine.revision is None
    snippet, model = snippet_of(folder)
    assert 'from_pretrained("me/tiny", revision="v1")' in snippet
    assert logits(model).equal(logits(trainer.model))


@pytest.mark.parametrize("command", ["sft", "classify"])
def test_a_command_that_loads_a_revision_saves_its_name(command: str, cache: Path, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    if command == "sft":
        lm_dataset(24).to_json(data)
    else:
        rows = [{"text": ("who", "what")[index % 2], "label": index % 2} for index in range(24)]
        data.write_text("\n".join(map(json.dumps, rows)))
    words = [command, "--model_name_or_path", "me/tiny", "--dataset_name", str(data), "--max_steps", "8"]
    words += ["--use_cpu", "true", "--report_to", "none", "--save_strategy", "no", "--discretize_at", "6"]
    for revision, layers in (("v1", 2), ("main", 1)):
        folder = tmp_path / f"out_{revision}"
        assert main([*words, "--output_dir", str(folder), "--model_revision", revision]) == 0
        assert PeftConfig.from_pretrained(folder).revision == (revision if revision == "v1" else None)
        snippet, model = snippet_of(folder)
        assert ('revision="v1"' in snippet) == (revision == "v1") and model.config.num_hidden_layers == layers
        merged = export(folder, "merged", tmp_path / f"merged_{revision}")
        cls = AutoModelForCausalLM if command == "sft" else AutoModelForSequenceClassification
        torch.testing.assert_close(logits(cls.from_pretrained(merged)), logits(model), rtol=1e-4, atol=1e-4)
