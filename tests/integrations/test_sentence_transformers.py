"""The trainer of sentence-transformers, whose model holds the transformers model that has the LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import BertForSequenceClassification, BertModel

from diffora_trainer import DiffoRAMixin
from diffora_trainer.adapters.lora import peft_model
from helpers.adapted import lora_layers
from helpers.checks import step_logs
from helpers.data import preference_dataset, tiny_tokenizer, vocabulary
from helpers.marks import mostly_slow
from helpers.models import bert
from helpers.trainers import CUT, arguments, lora, search_config


sentence_transformers = pytest.importorskip("sentence_transformers", minversion="6.0")

from sentence_transformers import (  # noqa: E402
    CrossEncoder,
    CrossEncoderTrainer,
    CrossEncoderTrainingArguments,
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss  # noqa: E402
from sentence_transformers.sentence_transformer.losses import (  # noqa: E402
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)
from sentence_transformers.sentence_transformer.modules import Dense, Pooling, Transformer  # noqa: E402


SENTENCES = ["the fox is red .", "where does the cat live ?"]


class DiffoRASentenceTransformerTrainer(DiffoRAMixin, SentenceTransformerTrainer):
    pass


class DiffoRACrossEncoderTrainer(DiffoRAMixin, CrossEncoderTrainer):
    pass


def pairs(count: int, seed: int = 0) -> Dataset:
    return Dataset.from_list(
        [{"anchor": row["prompt"], "positive": row["chosen"]} for row in preference_dataset(count, seed)]
    )


def build(folder: Path) -> SentenceTransformer:
    """A tiny BERT, the mean of its states, and a layer of its own, which is trained and saved whole."""
    if not folder.exists():
        config = bert().model.config
        config.vocab_size = len(vocabulary())
        torch.manual_seed(0)
        BertModel(config).save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
    transformer = Transformer(str(folder), max_seq_length=32)
    torch.manual_seed(0)
    return SentenceTransformer(modules=[transformer, Pooling(32), Dense(32, 16)], device="cpu")


def make(folder: Path, base: Path, model: Any = None, args: dict[str, Any] | None = None, **kwargs: Any) -> Any:
    search, cls = kwargs.pop("search", {}), kwargs.pop("cls", DiffoRASentenceTransformerTrainer)
    settings = {
        "model": model if model is not None else build(base),
        "args": arguments(folder, SentenceTransformerTrainingArguments, **(args or {})),
        "train_dataset": pairs(40),
        "loss": MultipleNegativesRankingLoss,
        "peft_config": lora(),
        "diffora_config": search_config(**search),
    }
    return cls(**{**settings, **kwargs})


@pytest.mark.parametrize("own", mostly_slow([False, True], True))
def test_search_cut_save_and_load(own: bool, tmp_path: Path) -> None:
    model = build(tmp_path / "base")
    start = {name: tensor.clone() for name, tensor in model[0].auto_model.state_dict().items()}
    plain = model.encode(SENTENCES)
    trainer = make(tmp_path / "out", tmp_path / "base", model, arch_dataset=pairs(8, 1) if own else None)
    trainer.train()
    assert "diffora/gap" in step_logs(trainer)[CUT]
    inner = peft_model(model)
    assert trainer.model is model and 0 < len(trainer.selection.selected) < len(trainer.selection.modules) == 13
    assert set(lora_layers(inner, "default")) == set(trainer.selection.selected)
    after = inner.state_dict()
    base = {name.removeprefix("base_model.model.").replace(".base_layer", ""): t for name, t in after.items()}
    assert all(torch.equal(base[name], tensor) for name, tensor in start.items())

    trainer.save_model(str(tmp_path / "saved"))
    loaded = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    found = model.encode(SENTENCES)
    assert (loaded.encode(SENTENCES) == found).all() and not (plain == found).all()
    assert (tmp_path / "saved" / "diffora_selection.json").is_file()


def test_held_out_rows_are_not_trained_on(tmp_path: Path) -> None:
    """Its trainer draws batches by samplers of its own, so these rows are left out of the data that it is given."""
    words = [word for word in vocabulary() if word.isalpha()][:40]
    numbers = {vocabulary()[word] for word in words}
    rows = Dataset.from_list([{"anchor": f"anna saw {word} .", "positive": word} for word in words])
    trainer = make(tmp_path / "out", tmp_path / "base", train_dataset=rows)
    trained: set[int] = set()
    searched: set[int] = set()

    def note(found: set[int], function: Any) -> Any:
        def noting(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            found.update(numbers & set(inputs["positive_input_ids"].flatten().tolist()))
            return function(model, inputs, *args, **kwargs)

        return noting

    trainer.training_step = note(trained, trainer.training_step)
    trainer.compute_architecture_loss = note(searched, trainer.compute_architecture_loss)
    trainer.train()
    assert len(searched) == 4 and len(trained) == 36 and not searched & trained
    assert len(trainer.train_dataset) == 40


def test_the_prefix_cache(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A step runs the layers for each column, on other texts, so nothing is kept."""
    model = build(tmp_path / "base")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    adapter = lora(target_modules=["query", "value"], layers_to_transform=[1])
    make(tmp_path / "out", tmp_path / "base", model, search={"prefix_cache": "memory"}, peft_config=adapter).train()
    assert "The prefix cache is off: the loss runs the frozen layers 2 times, not always on the same" in caplog.text


def test_resume(tmp_path: Path) -> None:
    whole = make(tmp_path / "whole", tmp_path / "base", args={"save_strategy": "steps", "save_steps": 1})
    whole.train()
    for step in (5, CUT, 10):
        resumed = make(tmp_path / f"resumed-{step}", tmp_path / "base")
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert resumed.selection == whole.selection, step
        assert (resumed.model.encode(SENTENCES) == whole.model.encode(SENTENCES)).all(), step


def test_what_is_refused(tmp_path: Path) -> None:
    model = build(tmp_path / "base")
    model.add_adapter(lora(target_modules=["query"]))
    with pytest.raises(ValueError, match=r"BertModel.*add_adapter.*peft_config"):
        make(tmp_path, tmp_path / "base", model)
    with pytest.raises(ValueError, match=r"shortcuts.*SentenceTransformer"):
        make(tmp_path, tmp_path / "base", search={"shortcuts": ["residual1"]})


def test_loss_that_runs_the_model_in_its_backward_pass(tmp_path: Path) -> None:
    """GradCache's losses have no gradient of the gates. The hook gives an architecture step the plain loss."""

    class Plain(DiffoRASentenceTransformerTrainer):
        def compute_architecture_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
            return MultipleNegativesRankingLoss(model)(*self.collect_features(inputs))

    def trainer(cls: type[Any]) -> Any:
        return make(tmp_path / "out", tmp_path / "base", cls=cls, loss=CachedMultipleNegativesRankingLoss)

    with pytest.raises(ValueError, match="does not depend on any gate.*compute_architecture_loss"):
        trainer(DiffoRASentenceTransformerTrainer).train()
    searched = trainer(Plain)
    searched.train()
    assert len(set(searched.selection.scores)) > 2


def test_cross_encoder(tmp_path: Path) -> None:
    config = bert().model.config
    config.vocab_size, config.num_labels = len(vocabulary()), 1
    torch.manual_seed(0)
    BertForSequenceClassification(config).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    rows = [
        {"question": row["prompt"], "answer": row["rejected" if index % 2 else "chosen"], "label": float(index % 2)}
        for index, row in enumerate(preference_dataset(40))
    ]
    model = CrossEncoder(str(tmp_path / "base"), num_labels=1, device="cpu")
    trainer = DiffoRACrossEncoderTrainer(
        model=model,
        args=arguments(tmp_path / "out", CrossEncoderTrainingArguments),
        train_dataset=Dataset.from_list(rows),
        loss=BinaryCrossEntropyLoss,
        diffora_config=search_config(),
    )
    trainer.train()
    assert 0 < len(trainer.selection.selected) < len(trainer.selection.modules)
    trainer.save_model(str(tmp_path / "saved"))
    loaded = CrossEncoder(str(tmp_path / "saved"), num_labels=1, device="cpu")
    questions = [("what colour is the fox ?", "red"), ("where does the cat live ?", "garden")]
    # Whether equal sums are added up alike depends on the processor.
    assert loaded.predict(questions) == pytest.approx(model.predict(questions), abs=1e-6)
