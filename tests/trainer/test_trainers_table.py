"""Every trainer and task of `docs/trainers.md`: it is searched with and cut, and plain PEFT loads what it saves."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from torch import nn
from transformers import (
    BertForMaskedLM,
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
    Wav2Vec2ForSequenceClassification,
)

from helpers.adapted import base_weights, lora_layers
from helpers.checks import adapter, step_logs
from helpers.data import chat_dataset, lm_dataset, preference_dataset, tiny_tokenizer
from helpers.models import bert, llama, llama_classifier, t5, vit
from helpers.parents import TOKENS, kto_dataset, of_trl, reward_dataset, searching
from helpers.speech_models import speech_to_text, whisper
from helpers.tasks import Rows, model_for, rows_for
from helpers.tiny_model import HIDDEN, TinyModel
from helpers.trainers import CUT, VOCABULARY, Probe, arguments, causal_model, search_config


os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")


@dataclass
class Row:
    """What a trainer is built with, and a batch to compare models on."""

    parent: type[Trainer]
    model: nn.Module
    args: type[TrainingArguments]
    data: Any
    batch: dict[str, torch.Tensor]
    more: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)


def with_trl(name: str, model: nn.Module, data: Any, **kwargs: Any) -> Row:
    parent, args = of_trl(name)
    options = kwargs.pop("options", {})
    return Row(parent, model, args, data, TOKENS, {"processing_class": tiny_tokenizer(), **kwargs}, options)


def gkd() -> Row:
    torch.manual_seed(1)
    return with_trl(
        "GKD",
        causal_model(),
        chat_dataset(24),
        teacher_model=causal_model(num_hidden_layers=1).eval(),
        options={"max_new_tokens": 4, "lmbda": 0.5, "max_length": 64},
    )


def tiny_row(tiny: TinyModel, parent: type[Trainer] = Trainer) -> Row:
    """Rows of the model's own batch, which are of equal length."""
    data = Rows([{name: value[index % 4] for name, value in tiny.batch.items()} for index in range(24)])
    args = Seq2SeqTrainingArguments if parent is Seq2SeqTrainer else TrainingArguments
    return Row(parent, tiny.model, args, data, tiny.batch)


def task_row(kind: str, task: str) -> Row:
    data = rows_for(task)
    inputs = ("input_ids", "pixel_values")
    batch = {name: torch.stack([data[0][name], data[1][name]]) for name in data[0] if name in inputs}
    return Row(Trainer, model_for(kind, task), TrainingArguments, data, batch)


def speech_row(cls: type[nn.Module]) -> Row:
    torch.manual_seed(0)
    config = Wav2Vec2Config(
        vocab_size=32,
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=2 * HIDDEN,
        conv_dim=(32, 32),
        conv_stride=(5, 4),
        conv_kernel=(10, 4),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        mask_time_prob=0.0,
        classifier_proj_size=16,
        ctc_loss_reduction="mean",
        pad_token_id=0,
    )
    generator = torch.Generator().manual_seed(0)
    rows: list[dict[str, torch.Tensor]] = []
    for index in range(24):
        label = torch.randint(3, 30, (4,), generator=generator) if cls is Wav2Vec2ForCTC else torch.tensor(index % 2)
        rows.append({"input_values": torch.randn(800, generator=generator), "labels": label})
    batch = {"input_values": torch.stack([row["input_values"] for row in rows[:2]])}
    return Row(Trainer, cls(config), TrainingArguments, Rows(rows), batch)


def text_row(model: nn.Module, collator: Any) -> Row:
    tokenizer = tiny_tokenizer()
    rows = [{"input_ids": tokenizer(row["text"])["input_ids"]} for row in lm_dataset(24)]
    data = Dataset.from_list(rows)
    return Row(Trainer, model, TrainingArguments, data, TOKENS, {"data_collator": collator})


def masked_lm() -> Row:
    config = bert().model.config
    config.vocab_size = VOCABULARY
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    tokenizer.mask_token = tokenizer.unk_token
    return text_row(BertForMaskedLM(config), DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.3))


def causal_lm() -> Row:
    return text_row(causal_model(), DataCollatorForLanguageModeling(tiny_tokenizer(), mlm=False))


def seq2seq() -> Row:
    row = tiny_row(t5(), Seq2SeqTrainer)
    row.more["data_collator"] = DataCollatorForSeq2Seq(tiny_tokenizer())
    return row


TABLE: dict[str, Callable[[], Row]] = {
    "SFT": lambda: with_trl("SFT", causal_model(), lm_dataset(24)),
    "DPO": lambda: with_trl("DPO", causal_model(), preference_dataset(24)),
    "Reward": lambda: with_trl("Reward", llama_classifier(VOCABULARY, num_labels=1).model, reward_dataset(24)),
    "KTO": lambda: with_trl("KTO", causal_model(), kto_dataset(24)),
    "ORPO": lambda: with_trl("ORPO", causal_model(), preference_dataset(24)),
    "CPO": lambda: with_trl("CPO", causal_model(), preference_dataset(24)),
    "GKD": gkd,
    "Seq2Seq": seq2seq,
    "speech-seq2seq-whisper": lambda: tiny_row(whisper(), Seq2SeqTrainer),
    "speech-seq2seq": lambda: tiny_row(speech_to_text(), Seq2SeqTrainer),
    "speech-ctc": lambda: speech_row(Wav2Vec2ForCTC),
    "audio-classification": lambda: speech_row(Wav2Vec2ForSequenceClassification),
    "image-classification": lambda: tiny_row(vit()),
    "sequence-classification": lambda: tiny_row(bert()),
    "sequence-classification-decoder": lambda: tiny_row(llama_classifier()),
    "token-classification": lambda: task_row("DebertaV2", "ForTokenClassification"),
    "question-answering": lambda: task_row("Roberta", "ForQuestionAnswering"),
    "multiple-choice": lambda: task_row("Bert", "ForMultipleChoice"),
    "causal-lm": causal_lm,
    "causal-lm-labels": lambda: tiny_row(llama()),
    "masked-lm": masked_lm,
}


@pytest.mark.parametrize("name", TABLE)
def test_trainer(name: str, tmp_path: Path) -> None:
    row = TABLE[name]()
    start = {key: tensor.clone() for key, tensor in row.model.state_dict().items()}
    model_class, config = type(row.model), row.model.config
    first = Probe(lambda model, **kwargs: adapter(model), 1)
    trainer = searching(row.parent)(
        model=row.model,
        args=arguments(tmp_path, row.args, **row.options),
        train_dataset=row.data,
        diffora_config=search_config(),
        callbacks=[first],
        **row.more,
    )
    trainer.train()

    selection = trainer.selection
    assert "diffora/gap" in step_logs(trainer)[CUT]
    assert 0 < len(selection.selected) < len(selection.modules)
    assert set(lora_layers(trainer.model, "default")) == set(selection.selected)
    end, base = adapter(trainer.model), base_weights(trainer.model)
    changed = [key for key, tensor in end.items() if not torch.equal(tensor, first.found[1][key])]
    assert all(torch.equal(base[key], tensor) for key, tensor in start.items() if key in base)
    assert len(base) >= len({tensor.data_ptr() for tensor in start.values()})
    assert len([key for key in changed if "lora_B" in key]) > len(selection.selected) // 2

    trainer.save_model(str(tmp_path / "saved"))
    plain: Any = model_class(config)
    plain.load_state_dict(start)
    loaded: Any = PeftModel.from_pretrained(plain, str(tmp_path / "saved")).eval()
    assert set(lora_layers(loaded, "default")) == set(selection.selected)
    trainer.model.eval()
    with torch.no_grad():
        expected, found = trainer.model(**row.batch), loaded(**row.batch)
    for key in ("start_logits", "end_logits") if name == "question-answering" else ("logits",):
        assert torch.allclose(found[key], expected[key], atol=1e-6), key
