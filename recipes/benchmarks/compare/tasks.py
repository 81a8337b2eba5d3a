"""A model and a data set as something to train: what is the same for every method of the comparison."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any


sys.path += [str(Path(__file__).resolve().parents[i]) for i in (1, 2)]  # for `adalora`, `splits` and `embedded`

from splits import DataArguments, load_splits  # noqa: E402


if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftModel
    from torch import nn
    from transformers import EvalPrediction, Trainer

CLASSIFIER_METRICS = ("accuracy", "f1", "macro_f1", "matthews_correlation")
METRICS = (*CLASSIFIER_METRICS, "pearson", "token_accuracy")
"""What can be measured beside the loss: of a classifier (`f1` of one with two classes), of a regression (`pearson`),
and of a language model (`token_accuracy`)."""


@dataclass
class TaskConfig(DataArguments):
    """
    A model, a data set, and how they are trained.

    A data set with a `label_column` is classified (or, if its labels are fractions, regressed); any other one trains a
    language model on `prompt_column` and `completion_column`, or on what [`~trl.SFTTrainer`] takes (`messages`,
    `prompt` and `completion`, `text`).

    Args:
        model (`str`, *optional*, defaults to `"minilm"`):
            Hub id or local folder; `"minilm"` and `"smollm2"` are models from Python packages.
        task (`str`, *optional*):
            Name in the results; defaults to the data set's name.
        text_columns (`list[str]`, *optional*):
            The column with the text to classify, or the two of a pair. Defaults to the columns of strings, if there
            are one or two.
        label_column (`str`, *optional*):
            The column with the class (a name or a whole number) or the value.
        prompt_column, completion_column (`str`, *optional*):
            What a language model is given, and what it learns to answer.
        metric (`str`, *optional*):
            One of `METRICS` that fits the task; defaults to accuracy, or Pearson's r for a regression.
        max_length (`int`, *optional*, defaults to `128`):
            Longer texts are cut to this many tokens.
        data_seed (`int`, *optional*, defaults to `0`):
            Seed by which rows are drawn where `max_train_samples` or `max_eval_samples` is less than there are, so
            that all runs train and are measured on the same rows.
        rank (`int`, *optional*, defaults to `8`):
            LoRA rank of the methods that choose modules. The budgets are parts of the parameters of LoRA of this rank
            on all linear layers.
        alpha (`float`, *optional*, defaults to `2.0`):
            LoRA's scale `lora_alpha / r`, the same for every rank.
        lora_dropout (`float`, *optional*, defaults to `0.0`):
            Dropout on the input of each LoRA.
        dtype (`str`, *optional*):
            Precision of the base model, `"float32"` or `"bfloat16"`. Defaults to bfloat16 on a GPU that has it.
        dropout (`float`, *optional*):
            Dropout of the base model, wherever it has one; by default its own.
        training (`dict`, *optional*):
            Any [`~transformers.TrainingArguments`] (or [`~trl.SFTConfig`]): `max_steps`, `learning_rate`, ...
    """

    dataset_test_split: str = "validation"
    model: str = "minilm"
    task: str | None = None
    text_columns: list[str] | None = None
    label_column: str | None = None
    prompt_column: str | None = None
    completion_column: str | None = None
    metric: str | None = None
    max_length: int = 128
    data_seed: int = 0
    rank: int = 8
    alpha: float = 2.0
    lora_dropout: float = 0.0
    dtype: str | None = None
    dropout: float | None = None
    training: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.metric is not None and self.metric not in METRICS:
            raise ValueError(f"`metric` must be one of {list(METRICS)}, got {self.metric!r}.")
        if (self.prompt_column is None) != (self.completion_column is None):
            raise ValueError("`prompt_column` and `completion_column` belong together: name both, or none.")
        if self.dtype not in (None, "float32", "bfloat16"):
            raise ValueError(f"`dtype` must be 'float32' or 'bfloat16', got {self.dtype!r}.")
        if self.rank < 1 or self.alpha <= 0:
            raise ValueError(f"`rank` and `alpha` must be positive, got {self.rank} and {self.alpha}.")


class Task:
    """
    A task with its data loaded and encoded once.

    Args:
        config ([`TaskConfig`]): what to train.

    Raises:
        ValueError: if the data set lacks a named column, or has labels that cannot be learned, or the metric is not
            one of such a task.
    """

    def __init__(self, config: TaskConfig) -> None:
        from transformers import AutoTokenizer

        self.config = config = copy(config)  # what is found out below is not part of what was passed
        self.path = _model_path(config.model)
        self.tokenizer = AutoTokenizer.from_pretrained(self.path)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        train, test = load_splits(config, seed=config.data_seed)
        self.is_classifier = config.label_column is not None
        if self.is_classifier:
            self._set_labels(train, test)
        self._check_metric()
        if self.is_classifier:
            self.train_data, self.eval_data = self._encode(train), self._encode(test)
        else:
            self.train_data, self.eval_data = self._as_dialogue(train), self._as_dialogue(test)

    @property
    def name(self) -> str:
        """Name in the results."""
        source = Path(self.config.dataset_name or "data")
        return self.config.task or (source.stem if source.suffix else source.name)

    def trained_on(self) -> dict[str, str]:
        """A hash of the rows of training and evaluation, the precision of the model, and the kind of device."""
        import torch

        digest = hashlib.sha256()
        for data in (self.train_data, self.eval_data):
            digest.update(f"{len(data)} rows".encode())
            for table in data.with_format("arrow").iter(1000):  # as they are stored: nothing is decoded
                digest.update(json.dumps(table.to_pydict(), sort_keys=True, default=str).encode())
        device = "cpu"
        if torch.accelerator.is_available() and not self.config.training.get("use_cpu"):
            device = torch.accelerator.current_accelerator().type
        precision = "bfloat16" if self._is_bf16() else "float32"
        return {"data": digest.hexdigest()[:12], "precision": precision, "device": device}

    def at(self, learning_rate: float) -> Task:
        """The same task, whose runs have another learning rate."""
        other = copy(self)
        other.config = replace(self.config, training={**self.config.training, "learning_rate": learning_rate})
        return other

    def lasting(self, part: float) -> Task:
        """The same task, whose runs make a part of its `max_steps`, or more than these."""
        if part == 1:
            return self
        if (steps := self.config.training.get("max_steps", 0)) <= 0:
            raise ValueError("`steps` is a part of `max_steps`, so please set it in `training`.")
        other, training = copy(self), {**self.config.training, "max_steps": max(1, round(part * steps))}
        other.config = replace(self.config, training=training)
        return other

    def make_model(self, seed: int) -> nn.Module:
        """The pre-trained model, with a new head for a classifier; the head depends on the seed only."""
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, set_seed

        options: dict[str, Any] = {"dtype": torch.bfloat16 if self._is_bf16() else torch.float32}
        if (dropout := self.config.dropout) is not None:
            own = AutoConfig.from_pretrained(self.path).to_dict()
            options.update({name: dropout for name, rate in own.items() if _is_dropout(name, rate)})
        if not self.is_classifier:
            return AutoModelForCausalLM.from_pretrained(self.path, **options)
        set_seed(seed)
        count = 1 if self.labels is None else len(self.labels)
        model = AutoModelForSequenceClassification.from_pretrained(
            self.path, num_labels=count, problem_type="regression" if self.labels is None else None, **options
        )
        model.config.pad_token_id = self.tokenizer.pad_token_id
        return model

    def make_trainer(
        self,
        model: nn.Module | PeftModel,
        seed: int,
        search: bool = False,
        training: dict[str, Any] | None = None,
        held_out_order: bool = False,
        **arguments: Any,
    ) -> Trainer:
        """
        A stock trainer, or with `search` the one of `diffora_trainer`.

        Args:
            model: the model, a `PeftModel` for a stock trainer.
            seed (`int`): of the training.
            search (`bool`, *optional*, defaults to `False`): whether to search for modules.
            training (`dict`, *optional*): training arguments that differ from the task's.
            held_out_order (`bool`, *optional*, defaults to `False`): whether a stock trainer of a classifier reads
                the rows in the order of the search.
            **arguments: for the trainer's constructor.
        """
        from transformers import DataCollatorWithPadding, Trainer, TrainingArguments
        from transformers.utils import logging
        from trl import SFTConfig, SFTTrainer

        from diffora_trainer import DiffoRASFTTrainer, DiffoRATrainer

        if held_out_order and not self.is_classifier:
            raise ValueError(
                "The order of the search is there for classifiers alone. Please leave `held_out_order` out."
            )
        logging.disable_progress_bar()
        settings: dict[str, Any] = {
            "output_dir": "compare-unused",
            "report_to": "none",
            "save_strategy": "no",
            "eval_strategy": "no",
            "logging_strategy": "no",
            "disable_tqdm": True,
            "bf16": self._is_bf16(),
            "seed": seed,
            "data_seed": seed,
            **self.config.training,
            **(training or {}),
        }
        arguments.update(train_dataset=self.train_data, eval_dataset=self.eval_data, processing_class=self.tokenizer)
        if self.is_classifier:
            stock = Trainer
            if held_out_order:
                from held_out_order import HeldOutOrderTrainer as stock
            return (DiffoRATrainer if search else stock)(
                model=model,
                args=TrainingArguments(**settings),
                data_collator=DataCollatorWithPadding(self.tokenizer),
                compute_metrics=self._measure,
                **arguments,
            )
        args = SFTConfig(max_length=self.config.max_length, **settings)
        return (DiffoRASFTTrainer if search else SFTTrainer)(model=model, args=args, **arguments)

    def measure(self, trainer: Trainer) -> dict[str, float]:
        """Loss and metric on the data that nothing was decided by."""
        found = trainer.evaluate()
        result = {"loss": float(found["eval_loss"])}
        for name in (*METRICS, "mean_token_accuracy"):
            if f"eval_{name}" in found:
                result["metric"] = float(found[f"eval_{name}"])
        return result

    def _is_bf16(self) -> bool:
        from transformers.utils import is_torch_bf16_gpu_available

        return is_torch_bf16_gpu_available() if self.config.dtype is None else self.config.dtype == "bfloat16"

    # Data

    def _set_labels(self, train: Dataset, test: Dataset) -> None:
        column, config = self.config.label_column, self.config
        assert column is not None
        if config.text_columns is None:
            texts = [name for name, kind in train.features.items() if getattr(kind, "dtype", None) == "string"]
            config.text_columns = [name for name in texts if name != column]
            if len(config.text_columns) not in (1, 2):
                raise ValueError(
                    f"The data set has the string columns {config.text_columns}; name the one or two with the text "
                    "in `text_columns`."
                )
        for data in (train, test):
            if missing := [name for name in (*config.text_columns, column) if name not in data.column_names]:
                raise ValueError(f"The data set has no column {missing}; it has {data.column_names}.")
        for which, data in (("training", train), ("evaluation", test)):
            if missing := sum(value is None or value != value for value in data[column]):
                raise ValueError(
                    f"{missing:,} of the {len(data):,} rows of the {which} set have no label (null) in the column "
                    f"{column!r}. Please drop them, or write a label there."
                )
        values = sorted(set(train[column]), key=lambda value: (str(type(value)), value))
        self.labels: list[Any] | None = values
        if any(isinstance(value, float) for value in values):
            self.labels = None
        elif len(values) == 1:  # for which `transformers` would train a regression
            raise ValueError(
                f"All {len(train):,} rows of the training set have the label {values[0]!r} in the column {column!r}, "
                "so there is nothing to learn. Please name another `label_column`, or add rows of other classes."
            )
        elif unknown := set(test[column]) - set(values):
            raise ValueError(f"Labels {sorted(unknown, key=str)} of the evaluation set are not in the training set.")

    def _check_metric(self) -> None:
        metric = self.config.metric
        if not self.is_classifier:
            kind, known = "a language model", ("token_accuracy",)
        elif self.labels is None:
            kind, known = "a regression, since its labels are fractions", ("pearson",)
        else:
            kind, known = f"a classifier of {len(self.labels)} classes", CLASSIFIER_METRICS
            if len(self.labels) > 2:  # of which none is the positive one
                known = tuple(name for name in known if name != "f1")
        if metric is not None and metric not in known:
            raise ValueError(
                f"You passed `metric={metric!r}`, but what is trained is {kind}. Please pass one of {list(known)}, or "
                "leave it out."
            )

    def _encode(self, data: Dataset) -> Dataset:
        columns, label = self.config.text_columns, self.config.label_column
        assert columns is not None

        def encode(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
            encoded = self.tokenizer(
                *(batch[name] for name in columns), truncation=True, max_length=self.config.max_length
            )
            values = batch[label]
            encoded["labels"] = (
                [float(value) for value in values]
                if self.labels is None
                else [self.labels.index(value) for value in values]
            )
            encoded["length"] = [len(ids) for ids in encoded["input_ids"]]
            return dict(encoded)

        return data.map(encode, batched=True, remove_columns=data.column_names)

    def _as_dialogue(self, data: Dataset) -> Dataset:
        prompt, completion = self.config.prompt_column, self.config.completion_column
        if prompt is None:
            return data
        if missing := [name for name in (prompt, completion) if name not in data.column_names]:
            raise ValueError(f"The data set has no column {missing}; it has {data.column_names}.")
        chat = bool(self.tokenizer.chat_template)

        def turn(row: dict[str, Any]) -> dict[str, Any]:
            question, answer = str(row[prompt]), str(row[completion])
            if not chat:
                return {"prompt": question + "\n", "completion": answer}
            return {
                "prompt": [{"role": "user", "content": question}],
                "completion": [{"role": "assistant", "content": answer}],
            }

        return data.map(turn, remove_columns=data.column_names)

    def _measure(self, prediction: EvalPrediction) -> dict[str, float]:
        import numpy as np
        from sklearn import metrics

        scores = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
        truth = prediction.label_ids
        if self.labels is None:
            return {"pearson": float(np.corrcoef(scores.reshape(-1), truth)[0, 1])}
        guess = scores.argmax(-1)
        measures: dict[str, Callable[[], float]] = {
            "accuracy": lambda: metrics.accuracy_score(truth, guess),
            "f1": lambda: metrics.f1_score(truth, guess),
            "macro_f1": lambda: metrics.f1_score(truth, guess, average="macro"),
            "matthews_correlation": lambda: metrics.matthews_corrcoef(truth, guess),
        }
        name = self.config.metric or "accuracy"
        return {name: float(measures[name]())}


def _is_dropout(name: str, rate: Any) -> bool:
    return isinstance(rate, (int, float)) and ("dropout" in name or name.endswith("_pdrop"))


def _model_path(name: str) -> str:
    from embedded import minilm_folder, smollm2_folder

    packaged = {"minilm": minilm_folder, "smollm2": smollm2_folder}
    return packaged[name]() if name in packaged else name
