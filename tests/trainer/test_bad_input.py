"""What is passed wrongly, and the message that each gives: before the first step, by name, and with what to do."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, IterableDataset
from peft import AdaLoraConfig, IA3Config, PromptTuningConfig, get_peft_model
from transformers import DataCollatorForSeq2Seq, Trainer

from diffora_trainer import DiffoRAConfig, DiffoRATrainer
from helpers.checks import assert_helpful, step_logs
from helpers.data import classification_dataset, lm_dataset, tiny_tokenizer
from helpers.trainers import CUT, Probe, causal_model, classifier, lora, make_trainer
from helpers.unfit_models import (
    NoLinear,
    disabled,
    frozen,
    merged,
    on_meta,
    ready_model,
    two_adapters,
    with_lora_fa,
    with_shortcuts_and_a_reference,
    without_layers,
)


ADALORA = AdaLoraConfig(total_step=12, task_type="SEQ_CLS", target_modules=["key"])
IA3 = IA3Config(task_type="SEQ_CLS", target_modules=["key"], feedforward_modules=[])
PROMPT = PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2)
CHECKPOINTING = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
rows = classification_dataset


def stream() -> Any:
    return rows(24).to_iterable_dataset()


def ready(make: Callable[[], Any]) -> Callable[[], dict[str, Any]]:
    """A model that comes with its adapter."""
    return lambda: {"model": make(), "peft_config": None}


# What the trainer is given, the class of the error, and the essential part of its message
TRAINER: dict[str, tuple[Callable[[], dict[str, Any]], type[Exception], str]] = {
    # Models
    "no model": (lambda: {"model": None}, TypeError, "`model` must be a model, got NoneType.*from_pretrained"),
    "model by name": (lambda: {"model": "org/name"}, TypeError, "`model` must be a model, got str.*from_pretrained"),
    "model on meta": (lambda: {"model": on_meta()}, ValueError, "meta device.*load it with its weights"),
    "no linear layer": (lambda: {"model": NoLinear()}, ValueError, "NoLinear has no linear layer.*target_modules"),
    "no LoRA layer": (ready(without_layers), ValueError, "no LoRA layer.*target_modules"),
    "no match": (lambda: {"peft_config": lora(target_modules=["nowhere"])}, ValueError, "target_modules"),
    "AdaLoRA": (lambda: {"peft_config": ADALORA}, TypeError, "AdaLoraConfig.*plain `peft.LoraConfig`"),
    "AdaLoRA model": (
        ready(lambda: get_peft_model(classifier().model, ADALORA)),
        TypeError,
        "AdaLoraConfig.*plain `peft.LoraConfig`",
    ),
    "IA3": (lambda: {"peft_config": IA3}, TypeError, "peft_config.*IA3Config.*LoraConfig"),
    "prompt tuning": (lambda: {"peft_config": PROMPT}, TypeError, "peft_config.*PromptTuningConfig.*LoraConfig"),
    "IA3 model": (ready(lambda: get_peft_model(classifier().model, IA3)), TypeError, "IA3Config.*LoraConfig"),
    "prompt tuning model": (
        ready(lambda: get_peft_model(classifier().model, PROMPT)),
        TypeError,
        "PromptTuningConfig",
    ),
    "LoRA as a dictionary": (lambda: {"peft_config": {"r": 4}}, TypeError, "peft_config.*dict.*LoraConfig"),
    "aLoRA": (
        lambda: {"peft_config": lora(alora_invocation_tokens=[3])},
        ValueError,
        "alora_invocation_tokens.*plain LoRA",
    ),
    "MiCA model": (ready(lambda: ready_model(init_lora_weights="mica")), ValueError, "MiCA.*plain LoRA"),
    "lora_bias": (lambda: {"peft_config": lora(lora_bias=True)}, ValueError, "lora_bias=False"),
    "bias": (lambda: {"peft_config": lora(bias="all")}, ValueError, "bias='all'.*bias='none'"),
    "pissa": (
        lambda: {"peft_config": lora(init_lora_weights="pissa_niter_2")},
        ValueError,
        "init_lora_weights='pissa_niter_2'",
    ),
    "merged": (ready(merged), ValueError, "merged.*unmerge_adapter"),
    "disabled": (ready(disabled), ValueError, "disabled.*enable_adapter_layers"),
    "shortcuts and two adapters": (
        ready(with_shortcuts_and_a_reference),
        ValueError,
        r"2 adapters \(\['default', 'ref'\]\).*leave the shortcuts out",
    ),
    "frozen": (ready(frozen), ValueError, "frozen.*is_trainable=True"),
    "LoRA-FA": (with_lora_fa, ValueError, "`LoraFAOptimizer`.*another optimizer"),
    "frozen in part": (
        lambda: {**with_lora_fa(), "optimizers": (None, None)},
        ValueError,
        r"is frozen, and another is trained.*`AlternateFactors`.*`finish\(model\)`.*create_lorafa.*parent trainer",
    ),
    "LoRA-FA, thawed": (partial(with_lora_fa, thawed=True), ValueError, "`LoraFAOptimizer`.*another optimizer"),
    "two active adapters": (ready(two_adapters), ValueError, "2 active adapters.*set_adapter"),
    "model and configuration": (lambda: {"model": ready_model()}, ValueError, "`PeftModel` together.*peft_config"),
    # Options and training arguments
    "options as a dictionary": (
        lambda: {"diffora_config": {"a": 1}},
        TypeError,
        "diffora_config.*got dict.*DiffoRAConfig",
    ),
    "options as a class": (lambda: {"diffora_config": DiffoRAConfig}, TypeError, "diffora_config.*got type"),
    "tiny cap": (
        lambda: {"search": {"max_trainable_parameters": 10}},
        ValueError,
        "max_trainable_parameters=10.*raise",
    ),
    "late cut": (lambda: {"search": {"discretize_at": 13}}, ValueError, "discretize_at=13.*smaller step"),
    "late cut, in epochs": (
        lambda: {"search": {"discretize_at": 13}, "args": {"max_steps": -1, "num_train_epochs": 2}},
        ValueError,
        "discretize_at=13",
    ),
    "early cut": (lambda: {"search": {"discretize_at": 2}}, ValueError, "discretize_at=2.*larger"),
    "one step": (lambda: {"args": {"max_steps": 1}}, ValueError, "1 optimizer step.*raise `max_steps`"),
    "reentrant": (lambda: {"args": CHECKPOINTING}, ValueError, "use_reentrant.*gradient_checkpointing_kwargs"),
    "whole batches": (
        lambda: {"args": {"train_sampling_strategy": "batch_rebalance"}},
        ValueError,
        "train_sampling_strategy.*arch_dataset",
    ),
    # Data
    "no data": (lambda: {"train_dataset": None}, ValueError, "train_dataset=None.*pass a `train_dataset`"),
    "empty data": (lambda: {"train_dataset": rows(2).select([])}, ValueError, "`train_dataset`.*no rows"),
    "one row": (
        lambda: {"train_dataset": rows(1)},
        ValueError,
        "has one row.*held out and trained on.*more rows.*arch_dataset",
    ),
    "data by name": (lambda: {"train_dataset": "a.jsonl"}, TypeError, "train_dataset='a.jsonl'.*load_dataset"),
    "splits": (
        lambda: {"train_dataset": {"train": rows(8)}},
        TypeError,
        r"'train' as `train_dataset`.*data\['train'\]",
    ),
    "columns of another model": (
        lambda: {"train_dataset": Dataset.from_dict({"a": [1] * 24})},
        ValueError,
        "No columns.*check the dataset",
    ),
    "empty arch_dataset": (lambda: {"arch_dataset": rows(2).select([])}, ValueError, "`arch_dataset`.*no rows"),
    "arch_dataset without rows": (lambda: {"arch_dataset": []}, ValueError, "`arch_dataset`.*no rows"),
    "arch_dataset by name": (lambda: {"arch_dataset": Path("a")}, TypeError, "arch_dataset=.*load_dataset"),
    "arch_dataset of splits": (lambda: {"arch_dataset": {"a": rows(8)}}, TypeError, "'a' as `arch_dataset`"),
    "arch_dataset that is none": (lambda: {"arch_dataset": 3}, TypeError, "arch_dataset=3.*int"),
    "arch_dataset without labels": (
        lambda: {"arch_dataset": rows(8).remove_columns("label")},
        ValueError,
        r"arch_dataset.*\['label'\].*same|form of the training set",
    ),
    "endless stream": (lambda: {"train_dataset": stream(), "args": {"max_steps": -1}}, ValueError, "max_steps"),
    **{
        f"stream of {count} worker(s)": (
            partial(lambda count: {"train_dataset": stream(), "args": {"dataloader_num_workers": count}}, count),
            ValueError,
            f"dataloader_num_workers={count}.*dataloader_num_workers=0.*arch_dataset",
        )
        for count in (1, 2)
    },
    "empty stream": (
        lambda: {"train_dataset": IterableDataset.from_generator(lambda: iter(()))},
        ValueError,
        "stream.*empty",
    ),
    "collator of nothing": (lambda: {"data_collator": lambda batch: None}, TypeError, "data collator made None"),
    "collator of no columns": (lambda: {"data_collator": lambda batch: {}}, TypeError, "data collator made {}"),
}


@pytest.mark.parametrize("name", TRAINER)
def test_the_trainer_names_it_before_the_first_step(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, error, message = TRAINER[name]
    steps: list[int] = []
    plain: Callable[..., Any] = Trainer.training_step
    monkeypatch.setattr(Trainer, "training_step", lambda *args, **kwargs: steps.append(1) or plain(*args, **kwargs))
    with pytest.raises(error) as found:
        make_trainer(tmp_path, **make()).train()
    assert_helpful(str(found.value), message)
    assert not steps


SFT: dict[str, tuple[Callable[[], dict[str, Any]], type[Exception], str]] = {
    **{
        name: TRAINER[name]
        for name in (
            "AdaLoRA",
            "IA3",
            "aLoRA",
            "bias",
            "pissa",
            "tiny cap",
            "late cut",
            "options as a dictionary",
            "model on meta",
        )
        + ("data by name", "splits", "arch_dataset by name", "arch_dataset of splits", "LoRA as a dictionary")
    },
    "no model": (lambda: {"model": None}, TypeError, "`model`.*name or folder.*NoneType.*from_pretrained"),
    "empty data": (lambda: {"train_dataset": lm_dataset(2).select([])}, ValueError, "`train_dataset`.*no rows"),
    "empty arch_dataset": (lambda: {"arch_dataset": lm_dataset(2).select([])}, ValueError, "`arch_dataset`.*no rows"),
    "arch_dataset of other columns": (
        lambda: {"arch_dataset": Dataset.from_dict({"a": ["x"] * 4})},
        ValueError,
        r"arch_dataset.*\['a'\].*same form",
    ),
    "arch_dataset as a list": (
        lambda: {"arch_dataset": lm_dataset(4).to_list()},
        TypeError,
        "`arch_dataset` must be a `Dataset` or `IterableDataset`.*got `list`.*from_list",
    ),
}


@pytest.mark.parametrize("name", SFT)
def test_the_sft_trainer_names_it(name: str, tmp_path: Path) -> None:
    make, error, message = SFT[name]
    with pytest.raises(error) as found:
        make_trainer(tmp_path, "sft", **make())
    assert_helpful(str(found.value), message)


def test_a_loss_that_is_never_finite_is_said_at_the_cut(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Broken(DiffoRATrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return super().compute_loss(*args, **kwargs) * float("nan")

    make_trainer(tmp_path, cls=Broken).train()
    assert "not one of the 5 architecture steps had a finite loss" in caplog.text


def test_there_are_enough_of_them() -> None:
    assert len(TRAINER) + len(SFT) >= 60


def labelled(count: int, masked: Callable[[int], bool]) -> Dataset:
    """Tokenized rows, some without any label."""
    tokenizer = tiny_tokenizer()
    rows = [tokenizer(row["text"])["input_ids"] for row in lm_dataset(count)]
    return Dataset.from_list(
        [{"input_ids": ids, "labels": [-100] * len(ids) if masked(i) else ids} for i, ids in enumerate(rows)]
    )


def causal(folder: Path, **kwargs: Any) -> Any:
    return make_trainer(folder, model=causal_model(), data_collator=DataCollatorForSeq2Seq(tiny_tokenizer()), **kwargs)


@pytest.mark.parametrize("name", ["train_dataset", "arch_dataset"])
@pytest.mark.parametrize("task", ["sft", "plain"])
def test_rows_without_labels_are_named_before_the_first_step(task: str, name: str, tmp_path: Path) -> None:
    """By the trainer or its search; TRL drops such rows from 1.0 on."""
    data = {"train_dataset": labelled(24, lambda i: False), name: labelled(24, lambda i: True)}
    steps = Probe(lambda **kwargs: None)
    with pytest.raises(ValueError) as found:
        if task == "plain":
            causal(tmp_path, **data, callbacks=[steps]).train()
        else:
            make_trainer(tmp_path, "sft", **data, callbacks=[steps]).train()
    assert_helpful(str(found.value), "-100.*assistant_only_loss.*generation.*max_length")
    assert not steps.found


def test_some_rows_without_labels(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A batch of them is passed over with its reason, and the loss around the cut is a number."""
    trainer = causal(
        tmp_path,
        train_dataset=labelled(24, lambda i: False),
        arch_dataset=labelled(8, lambda i: i % 2 == 0),
        search={"arch_batch_size": 1},
    )
    trainer.train()
    assert "no token of the held-out batch has a label; this architecture step is skipped" in caplog.text
    assert math.isfinite(step_logs(trainer)[CUT]["diffora/gap"])


def test_a_loss_of_ones_own_needs_no_labels(tmp_path: Path) -> None:
    class Own(DiffoRATrainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            return model(input_ids=inputs["input_ids"]).logits.square().mean()

    trainer = causal(tmp_path, cls=Own, train_dataset=labelled(24, lambda i: True))
    trainer.train()
    assert math.isfinite(step_logs(trainer)[CUT]["diffora/gap"])
