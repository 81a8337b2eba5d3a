"""Merged models: nothing of the adapter is lost, and what belongs to the model beside its weights is there."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForSequenceClassification,
    LlamaForCausalLM,
    ViTImageProcessor,
    WhisperFeatureExtractor,
    pipeline,
)

from diffora_trainer import DiffoRATrainer
from diffora_trainer.cli import main
from diffora_trainer.serving import export
from diffora_trainer.serving.loading import load
from helpers.data import classification_dataset, tiny_tokenizer
from helpers.models import bert, llama_config, vit
from helpers.speech_models import whisper
from helpers.trainers import make_trainer


class WithTopic(BertForSequenceClassification):
    """A stock class with one more head, as a script defines it."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.topic = torch.nn.Linear(config.hidden_size, 5)
        self.post_init()


class OfStates(DiffoRATrainer):
    """Trains a model that has no head."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **options: Any) -> Any:
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        loss = (outputs.last_hidden_state[:, 0].mean(-1) - inputs["labels"]).square().mean()
        return (loss, outputs) if return_outputs else loss


def randomized(model: Any) -> Any:
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.requires_grad and "lora_A" not in name:
                weight.normal_(std=0.3)
    return model.eval()


def adapted(folder: Path, model: Any, name: str = "default", **options: Any) -> Any:
    """A base model and an adapter on it, saved; the model with both."""
    model.save_pretrained(folder / "base")
    model.name_or_path = str(folder / "base")
    found = randomized(get_peft_model(model, LoraConfig(**{"r": 2, **options}), adapter_name=name))
    found.save_pretrained(folder / "adapter")
    return found


def snippet_of(folder: Path, base: Path) -> Any:
    """The model that the card's snippet loads, with folders in the place of the names."""
    card = (folder / "README.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"### Load it with plain PEFT\n\n```python\n(.*?)```", card, re.DOTALL)
    scope: dict[str, Any] = {}
    exec(snippet.replace("<the base model>", str(base)).replace(f'"{folder.name}"', repr(str(folder))), scope)
    return scope["model"]


def llama(**options: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(llama_config(len(tiny_tokenizer()), **options))


@pytest.mark.parametrize("task", [None, "SEQ_CLS"])
def test_a_head_that_the_class_has_no_place_for_is_not_lost(
    task: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """PEFT saves the name of a class where it knows no task, and of a script's class a module that is none."""
    monkeypatch.setattr(WithTopic, "__module__", "__main__")
    heads = {"target_modules": ["query"], "modules_to_save": ["classifier", "topic"], "task_type": task}
    adapted(tmp_path, WithTopic(bert().model.config), **heads)
    bert().model.save_pretrained(tmp_path / "base")
    words = ["export", str(tmp_path / "adapter"), "--for", "merged", "--output", str(tmp_path / "out")]
    assert main(words) == 1
    said = capsys.readouterr().err
    assert "'topic.bias' and 1 more weights" in said and "merge_and_unload" in said
    assert ("WithTopic.from_pretrained(base)" in said) == (task is None)
    assert not (tmp_path / "out").exists()
    # Where the script defines the class, it is found.
    monkeypatch.setattr(sys.modules["__main__"], "WithTopic", WithTopic, raising=False)
    if task is None:
        assert export(tmp_path / "adapter", "merged", tmp_path / "out").is_dir()


@pytest.mark.parametrize("task", [None, "SEQ_CLS"])
def test_a_stock_class_that_lacks_the_modules(
    task: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(WithTopic, "__module__", "__main__")
    adapted(tmp_path, WithTopic(bert().model.config), target_modules=["topic"], task_type=task)
    bert().model.save_pretrained(tmp_path / "base")
    words = ["export", str(tmp_path / "adapter"), "--for", "merged", "--output", str(tmp_path / "out")]
    assert main(words) == 1
    said = capsys.readouterr().err
    assert "does not fit a BertForSequenceClassification" in said
    assert ("a class of the script" if task is None else "one of a script") in said
    assert f"{'WithTopic' if task is None else 'TheClass'}.from_pretrained(base)" in said
    assert not (tmp_path / "out").exists()


def labels(kind: str, index: int) -> Any:
    return float(index % 3) if kind == "regression" else [float(index % 2), float(index % 3 == 0), 1.0]


@pytest.mark.parametrize("kind", ["regression", "multi_label_classification"])
def test_what_the_outputs_of_a_head_are_is_kept(kind: str, tmp_path: Path) -> None:
    tiny = bert()
    tiny.model.resize_token_embeddings(len(tiny_tokenizer()))
    base = BertForSequenceClassification(tiny.model.config).bert
    base.save_pretrained(tmp_path / "base")
    numbers = {"num_labels": 1 if kind == "regression" else 3}
    model = BertForSequenceClassification.from_pretrained(tmp_path / "base", **numbers)
    if kind != "regression":
        model.config.problem_type = kind
    columns = ["input_ids", "attention_mask"]
    rows = [
        {**{name: row[name] for name in columns}, "labels": labels(kind, index)}
        for index, row in enumerate(classification_dataset(16))
    ]
    folder = tmp_path / "out"
    trainer = make_trainer(folder, model=model, train_dataset=rows)
    trainer.train()
    trainer.save_model(str(folder))
    merged = export(folder, "merged", tmp_path / "merged")
    found = AutoModelForSequenceClassification.from_pretrained(merged)
    assert found.config.problem_type == trainer.model.config.problem_type == kind
    snippet = snippet_of(folder, tmp_path / "base")
    assert snippet.config.problem_type == kind and snippet.config.num_labels == numbers["num_labels"]
    tokenizer = tiny_tokenizer()
    (said,) = pipeline("text-classification", model=found, tokenizer=tokenizer)("the cat", top_k=None)[:1]
    with torch.no_grad():
        raw = found.eval()(**tokenizer("the cat", return_tensors="pt")).logits
    wanted = raw if kind == "regression" else raw.sigmoid()
    assert said["score"] == pytest.approx(float(wanted.max()), abs=1e-4)
    (folder / "problem_type.json").unlink()  # as one of before
    assert export(folder, "merged", tmp_path / "again").is_dir()


def test_a_head_in_the_place_of_one_of_another_size(tmp_path: Path) -> None:
    """The base model is a classifier itself, of three classes that exclude each other or not."""
    config = bert().model.config
    config.num_labels, config.problem_type = 3, "multi_label_classification"
    BertForSequenceClassification(config).save_pretrained(tmp_path / "base")
    options = {"num_labels": 5, "problem_type": None, "ignore_mismatched_sizes": True}
    model = BertForSequenceClassification.from_pretrained(tmp_path / "base", **options)
    lora = LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    found = randomized(get_peft_model(model, lora))
    found.save_pretrained(tmp_path / "adapter")
    folder = export(tmp_path / "adapter", "merged", tmp_path / "merged")
    merged = AutoModelForSequenceClassification.from_pretrained(folder)
    batch = {"input_ids": torch.arange(3, 13).view(1, 10)}
    with torch.no_grad():
        torch.testing.assert_close(merged.eval()(**batch).logits, found(**batch).logits, rtol=1e-4, atol=1e-4)
    assert merged.config.num_labels == 5 and merged.config.problem_type is None
    # What has another shape and is of no head is not drawn in silence.
    path = tmp_path / "base" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "max_position_embeddings": 99}))
    with pytest.raises(ValueError, match="position_embeddings.weight' in another shape than its configuration says"):
        export(tmp_path / "adapter", "merged", tmp_path / "out")


def test_a_model_without_a_head(tmp_path: Path) -> None:
    """PEFT's task "FEATURE_EXTRACTION": the class is `AutoModel`, whatever was saved with the weights."""
    tiny = bert()
    tiny.model.resize_token_embeddings(len(tiny_tokenizer()))
    tiny.model.save_pretrained(tmp_path / "base")
    base = AutoModel.from_pretrained(tmp_path / "base")
    config = LoraConfig(r=2, target_modules=["query", "value"], task_type="FEATURE_EXTRACTION")
    folder = tmp_path / "out"
    trainer = make_trainer(folder, model=base, peft_config=config, cls=OfStates)
    trainer.train()
    trainer.save_model(str(folder))
    batch = {"input_ids": torch.arange(3, 13).view(1, 10)}
    with torch.no_grad():
        wanted = trainer.model.eval()(**batch).last_hidden_state
        assert snippet_of(folder, tmp_path / "base").eval()(**batch).last_hidden_state.equal(wanted)
        merged = AutoModel.from_pretrained(export(folder, "merged", tmp_path / "merged"))
        torch.testing.assert_close(merged.eval()(**batch).last_hidden_state, wanted, rtol=1e-4, atol=1e-4)
        for server in ("vllm", "sglang", "lorax"):
            exported = export(folder, server, tmp_path / server)
            found = PeftModel.from_pretrained(AutoModel.from_pretrained(tmp_path / "base"), exported)
            torch.testing.assert_close(found.eval()(**batch).last_hidden_state, wanted, rtol=1e-4, atol=1e-4)


def test_the_vocabulary_of_a_base_model_grows_with_that_of_its_adapter(tmp_path: Path) -> None:
    """PEFT saves embeddings that have grown; in the card of a run the snippet makes room for them."""
    size = len(tiny_tokenizer())
    rows = {
        "beside": {},
        "trained whole": {"modules_to_save": ["embed_tokens", "lm_head"]},
        "new tokens": {"trainable_token_indices": {"embed_tokens": [size, size + 2]}, "modules_to_save": ["lm_head"]},
    }
    for name, options in rows.items():
        folder = tmp_path / name
        llama().save_pretrained(folder / "base")
        model = AutoModelForCausalLM.from_pretrained(folder / "base")
        model.resize_token_embeddings(size + 3)
        config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **options)
        found = randomized(get_peft_model(model, config))
        found.save_pretrained(folder / "adapter")
        merged = AutoModelForCausalLM.from_pretrained(export(folder / "adapter", "merged", folder / "merged"))
        batch = {"input_ids": torch.tensor([[4, 5, size, size + 1, size + 2, 7]])}
        with torch.no_grad():
            torch.testing.assert_close(merged.eval()(**batch).logits, found(**batch).logits, rtol=1e-4, atol=1e-4)
        assert merged.config.vocab_size == size + 3
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    model.resize_token_embeddings(size + 3)
    trainer = make_trainer(tmp_path / "out", "sft", model=model)
    trainer.train()
    trainer.save_model(str(tmp_path / "out"))
    with torch.no_grad():
        found = snippet_of(tmp_path / "out", folder / "base").eval()(**batch).logits
        assert found.equal(trainer.model.eval()(**batch).logits)


def test_a_merged_model_has_its_processor(tmp_path: Path) -> None:
    speech, images = whisper().model, vit().model
    for name, model, own in (
        ("speech", speech, WhisperFeatureExtractor(feature_size=8)),
        ("images", images, ViTImageProcessor(size={"height": 8, "width": 8})),
    ):
        targets = [layer for layer, _ in model.named_modules() if layer.endswith(("q_proj", "query"))]
        adapted(tmp_path / name, model, target_modules=targets)
        own.save_pretrained(tmp_path / name / "base")
        folder = export(tmp_path / name / "adapter", "merged", tmp_path / name / "merged")
        assert type(own).from_pretrained(folder).to_dict() == own.to_dict()
        assert not (folder / "tokenizer.json").exists()


def test_a_tokenizer_beside_the_adapter_is_that_of_the_merged_model(tmp_path: Path) -> None:
    adapted(tmp_path, llama(), target_modules=["q_proj"])
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path / "base")
    tokenizer.add_tokens(["<new>"], special_tokens=True)
    tokenizer.save_pretrained(tmp_path / "adapter")
    folder = export(tmp_path / "adapter", "merged", tmp_path / "merged")
    assert len(AutoTokenizer.from_pretrained(folder)) == len(tokenizer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alora_invocation_tokens": [5, 6], "task_type": "CAUSAL_LM"}, "an activated LoRA"),
        ({"layer_replication": [[0, 2], [0, 2]]}, "repeats layers of its base model"),
    ],
)
def test_what_no_weights_hold_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    adapted(tmp_path, llama(), target_modules=["q_proj"], **options)
    with pytest.raises(ValueError, match=f"{message}.*load it with PEFT"):
        export(tmp_path / "adapter", "merged", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_weight_of_two_layers_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which one has an adapter, or both; as in the shared blocks of Zamba2."""

    def tied(*args: Any) -> Any:
        model = load(*args)
        first, second = (layer.mlp.down_proj for layer in model.get_base_model().model.layers[:2])
        first.base_layer.weight = getattr(second, "base_layer", second).weight
        return model

    monkeypatch.setattr("diffora_trainer.serving.merged.load", tied)
    for number, targets in enumerate((["down_proj"], ["layers.0.mlp.down_proj"])):
        adapted(tmp_path / str(number), llama(), target_modules=targets)
        message = "'model.layers.0.mlp.down_proj', which shares its weight with 'model.layers.1.mlp.down_proj'"
        with pytest.raises(ValueError, match=f"{message}.*load it with PEFT"):
            export(tmp_path / str(number) / "adapter", "merged", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_class_in_a_module_that_is_not_found_here(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    adapted(tmp_path, llama(), target_modules=["q_proj"])
    path = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text())
    mapping = {"base_model_class": "Mine", "parent_library": "my_models.mine"}
    path.write_text(json.dumps({**config, "auto_mapping": mapping}))
    for server in ("merged", "lorax"):
        words = ["export", str(tmp_path / "adapter"), "--for", server, "--output", str(tmp_path / "out")]
        assert main(words) == 1
        said = capsys.readouterr().err
        assert "class Mine from 'my_models.mine'" in said and "PYTHONPATH" in said and "Mine.from_pretrained" in said


def test_an_adapter_by_another_name_is_in_a_folder_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    llama().save_pretrained(tmp_path / "base")
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    out = tmp_path / "out"
    trainer = make_trainer(out, "sft", model=get_peft_model(base, config, adapter_name="mine"), peft_config=None)
    trainer.train()
    trainer.save_model(str(out))
    batch = {"input_ids": torch.arange(3, 13).view(1, 10)}
    with torch.no_grad():
        found = snippet_of(out, tmp_path / "base").eval()(**batch).logits
        assert found.equal(trainer.model.eval()(**batch).logits)
    assert main(["export", str(out), "--for", "vllm", "--output", str(tmp_path / "vllm")]) == 1
    assert str(out / "mine") in capsys.readouterr().err
    assert main(["export", str(out / "mine"), "--for", "vllm", "--output", str(tmp_path / "vllm")]) == 0
    assert main(["show", str(out), "--lora_config", str(tmp_path / "config.json")]) == 0
    merged = export(out / "mine", "merged", tmp_path / "merged")
    assert len(AutoTokenizer.from_pretrained(merged)) == len(tiny_tokenizer())  # of the output folder
    assert set(json.loads((tmp_path / "config.json").read_text())["target_modules"]) == set(trainer.selection.selected)
    trainer.model.add_adapter("second", config)
    trainer.model.save_pretrained(out)
    assert main(["show", str(out), "--lora_config", str(tmp_path / "config.json")]) == 1
    assert "['mine', 'second']" in capsys.readouterr().err
