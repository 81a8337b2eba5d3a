"""Every trainer and task of `docs/trainers.md`: it is searched with and cut, and plain PEFT loads what it saves."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    CUT,
    VOCABULARY,
    Probe,
    adapter,
    arguments,
    causal_model,
    classifier,
    lora,
    rows_of,
    search_config,
    step_logs,
)
from datasets import Dataset
from models import HIDDEN, TinyModel, bert, llama, llama_classifier, speech_to_text, t5, vit, whisper
from peft import PeftModel
from test_trainer import base_weights
from test_wrapping import Rows, build, rows_for
from tokenizer import chat_dataset, lm_dataset, preference_dataset, tiny_tokenizer
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import (
    BertForMaskedLM,
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
    Wav2Vec2ForSequenceClassification,
)
from trl import ModelConfig, RewardConfig, RewardTrainer, ScriptArguments, TrlParser, get_peft_config

from diffora_trainer import DiffoRAConfig, DiffoRAMixin
from diffora_trainer.adapters.grid import lora_layers


os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")


def of_trl(name: str) -> tuple[type[Trainer], type[TrainingArguments]]:
    """A trainer of TRL and its arguments. Where it stands depends on the version: the newest have some in
    `trl.experimental`, and another set of them than older ones."""
    for module in (f"trl.experimental.{name.lower()}", "trl"):
        try:
            found = import_module(module)
            trainer, args = getattr(found, f"{name}Trainer"), getattr(found, f"{name}Config")
        except (ImportError, AttributeError):
            continue
        return _real(trainer), _real(args)
    pytest.skip(f"this version of TRL has no {name}Trainer")


def _real(cls: type[Any]) -> type[Any]:
    """What a class that only warns of its deprecation is derived from."""
    while cls.__bases__[0].__name__ == cls.__name__:
        cls = cls.__bases__[0]
    return cls


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


TOKENS = {"input_ids": torch.arange(5, 17).reshape(2, 6)}


def kto_dataset(count: int, seed: int = 0) -> Dataset:
    """Right answers, which are wanted, and wrong ones in turn."""
    rows = [
        {"prompt": row["prompt"], "completion": row["rejected" if index % 2 else "chosen"], "label": index % 2 == 0}
        for index, row in enumerate(preference_dataset(count, seed))
    ]
    return Dataset.from_list(rows)


def reward_dataset(count: int) -> Dataset:
    """Preferences as conversations."""

    def talk(row: dict[str, str], which: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[which]}]

    return Dataset.from_list(
        [{which: talk(row, which) for which in ("chosen", "rejected")} for row in preference_dataset(count)]
    )


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
    return Row(Trainer, build(kind, task), TrainingArguments, data, batch)


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


def searching(parent: type[Trainer]) -> type[Any]:
    """The two lines of the README."""
    return type(f"DiffoRA{parent.__name__}", (DiffoRAMixin, parent), {})


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


@pytest.mark.parametrize(("name", "data"), [("DPO", preference_dataset), ("KTO", kto_dataset)])
def test_precomputed_reference_and_own_held_out_data(name: str, data: Any, tmp_path: Path) -> None:
    """The reference's log-probabilities of the held-out rows are those that are computed in each step otherwise."""
    parent, args = of_trl(name)
    if name == "KTO" and not hasattr(parent, "_prepare_dataset"):
        pytest.skip("this version of KTO prepares its training set in its constructor")
    scores = []
    for ahead in (False, True):
        trainer = searching(parent)(
            model=causal_model(attention_dropout=0.0),
            args=arguments(tmp_path / str(ahead), args, precompute_ref_log_probs=ahead),
            train_dataset=data(24),
            arch_dataset=data(8, 1),
            processing_class=tiny_tokenizer(),
            peft_config=lora(),
            diffora_config=search_config(),
        )
        trainer.train()
        scores.append(trainer.selection.scores)
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)


@pytest.mark.parametrize("task_type", ["the default", "SEQ_CLS"])
def test_reward_script_with_use_peft(task_type: str, tmp_path: Path) -> None:
    """`trl/scripts/reward.py` with `--use_peft`, one import changed. TRL's default task type is a causal LM's."""
    causal_model().save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    command = ["--dataset_name", "none", "--model_name_or_path", str(tmp_path / "base"), "--use_peft"]
    command += ["--lora_target_modules", "all-linear", "--output_dir", str(tmp_path / "out"), "--max_steps", "6"]
    command += [
        "--use_cpu",
        "--bf16",
        "false",
        "--report_to",
        "none",
        "--save_strategy",
        "no",
        "--disable_tqdm",
        "true",
    ]
    command += ["--arch_warmup", "1", "--discretize_at", "4", "--arch_every", "1", "--arch_closing", "0"]
    if task_type == "SEQ_CLS":
        command += ["--lora_task_type", "SEQ_CLS", "--lora_modules_to_save", "score"]
    parser = TrlParser((ScriptArguments, RewardConfig, ModelConfig, DiffoRAConfig))
    _, training_args, model_args, diffora_config = parser.parse_args_and_config(command)
    trainer = searching(RewardTrainer)(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=reward_dataset(24),
        peft_config=get_peft_config(model_args),
        diffora_config=diffora_config,
    )
    start = trainer.model.base_model.model.score.modules_to_save["default"].weight.clone()
    trainer.train()
    trainer.save_model(training_args.output_dir)
    assert len(trainer.selection.selected) == 8
    torch.manual_seed(1)  # another new head
    base = trainer.model.get_base_model()
    plain = type(base).from_pretrained(tmp_path / "base", num_labels=base.config.num_labels, dtype="float32")
    loaded: Any = PeftModel.from_pretrained(plain, training_args.output_dir).eval()
    trainer.model.eval()
    assert not torch.equal(start, loaded.base_model.model.score.modules_to_save["default"].weight)
    with torch.no_grad():
        assert torch.equal(loaded(**TOKENS).logits, trainer.model(**TOKENS).logits)


@pytest.mark.parametrize("own_data", [False, True])
def test_parent_with_a_data_loader_of_its_own(own_data: bool, tmp_path: Path) -> None:
    """Its rows are held out of its data, and keep the columns that its own collator needs."""
    trained: set[int] = set()
    searched: set[int] = set()

    class Parent(Trainer):
        def get_train_dataloader(self) -> DataLoader:
            return DataLoader(self.train_dataset, batch_size=4, shuffle=True, collate_fn=self.data_collator)

        def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            (trained if model.training and not self.in_search else searched).update(inputs.pop("row").tolist())
            return super().compute_loss(model, inputs, *args, **kwargs)

    class DiffoRAParent(DiffoRAMixin, Parent):
        in_search = False

        def compute_architecture_loss(self, model: Any, inputs: Any) -> Any:
            self.in_search = True
            try:
                return super().compute_architecture_loss(model, inputs)
            finally:
                self.in_search = False

    trainer = DiffoRAParent(
        model=classifier().model,
        args=arguments(tmp_path),
        train_dataset=rows_of(24),
        arch_dataset=rows_of(4, start=100) if own_data else None,
        data_collator=DataCollatorWithPadding(tiny_tokenizer()),
        diffora_config=search_config(),
    )
    trainer.train()
    assert "diffora/gap" in step_logs(trainer)[CUT]
    assert not trained & searched and len(trained) == (24 if own_data else 21)
    assert searched == set(range(100, 104)) if own_data else len(searched) == 3


def test_iterable_with_a_length_needs_held_out_data(tmp_path: Path) -> None:
    class Sized(IterableDataset):
        def __len__(self) -> int:
            return 24

        def __iter__(self) -> Any:
            return iter(rows_of(24))

    def trainer(**kwargs: Any) -> Any:
        collator = DataCollatorWithPadding(tiny_tokenizer())
        return searching(Trainer)(
            classifier().model,
            arguments(tmp_path),
            train_dataset=Sized(),
            data_collator=collator,
            diffora_config=search_config(),
            **kwargs,
        )

    with pytest.raises(ValueError, match=r"Sized.*in its order.*arch_dataset"):
        trainer().train()
    given = trainer(arch_dataset=rows_of(8))
    given.train()
    assert given.selection is not None
