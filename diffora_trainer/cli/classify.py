"""Train a sequence classifier, or a model that predicts a number, with `DiffoRATrainer`."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ..logging import get_logger
from . import train
from .data import DataArguments, check_texts, load_splits


if TYPE_CHECKING:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase


logger = get_logger(__name__)


@dataclass
class LabelledDataArguments(DataArguments):
    """
    Which rows are trained on and evaluated on, and what is in them.

    Args:
        text_columns (`list[str]`, *optional*, defaults to `["text"]`):
            The column with the text, or the two columns of a pair of texts.
        label_column (`str`, *optional*, defaults to `"label"`):
            The column with the class (a name or a whole number) or the number to predict.
        regression (`bool`, *optional*):
            Whether the label is a number to predict. By default it is, if the column holds floats.
        max_length (`int`, *optional*, defaults to `128`):
            Longer texts are cut to this many tokens.
    """

    dataset_test_split: str = field(
        default="validation",
        metadata={"help": "Split to evaluate on. If missing, `eval_fraction` of the training split is used."},
    )
    text_columns: list[str] = field(
        default_factory=lambda: ["text"], metadata={"help": "The column with the text, or two columns for a pair."}
    )
    label_column: str = field(
        default="label", metadata={"help": "The column with the class, or with the number to predict."}
    )
    regression: bool | None = field(
        default=None, metadata={"help": "Whether the label is a number to predict: by default, if it is a float."}
    )
    max_length: int = field(default=128, metadata={"help": "Longer texts are cut to this many tokens."})

    def __post_init__(self) -> None:
        columns: Any = self.text_columns
        if isinstance(columns, str):  # as a YAML file may name a single one
            self.text_columns = [columns]
        if self.max_length < 1:
            raise ValueError(f"You passed `max_length={self.max_length}`, but a text has at least one token.")


@dataclass(frozen=True)
class Labels:
    """
    What is to be predicted.

    Args:
        names (`list[str]`): names of the classes, by their numbers; nothing of a regression.
        numbers (`dict`, *optional*): the number of each class, by what stands in the data; `None` for a regression.
    """

    names: list[str]
    numbers: dict[Any, int] | None = None

    def of(self, values: Sequence[Any]) -> list[float]:
        """
        The labels of rows, as the model takes them.

        Raises:
            ValueError: if one is of a class that the training set does not have, or no finite number.
        """
        if self.numbers is None:
            wrong = [v for v in values if not isinstance(v, (int, float)) or not math.isfinite(v)]
            if wrong:
                raise ValueError(
                    f"A label is {wrong[0]!r}, but a regression needs finite numbers. Please drop the row."
                )
            return [float(value) for value in values]
        unknown = {repr(v) for v in values if isinstance(v, (list, dict)) or v not in self.numbers}
        if unknown:
            raise ValueError(
                "The evaluation set has labels that the training set does not have: "
                f"{', '.join(sorted(unknown))}. (In some data sets -1 marks rows whose label is not public; choose "
                "another `--dataset_test_split` then.)"
            )
        return [self.numbers[value] for value in values]

    def metrics(self) -> Callable[[EvalPrediction], dict[str, float]]:
        """What an evaluation reports beside the loss: accuracy, or Pearson's correlation and mean squared error."""

        def compute(prediction: EvalPrediction) -> dict[str, float]:
            found = prediction.predictions
            logits = np.asarray(found[0] if isinstance(found, tuple) else found)
            truth: Any = prediction.label_ids
            if self.numbers is not None:
                return {"accuracy": float((logits.argmax(axis=-1) == truth).mean())}
            values, truth = logits.reshape(-1).astype(np.float64), np.asarray(truth, np.float64).reshape(-1)
            varies = values.std() > 0 and truth.std() > 0
            pearson = float(np.corrcoef(values, truth)[0, 1]) if varies else math.nan
            return {"pearson": pearson, "mse": float(((values - truth) ** 2).mean())}

        return compute


def check_columns(splits: tuple[Dataset, Dataset], args: LabelledDataArguments) -> None:
    """
    Check that the training and the evaluation set have the columns that are read.

    Raises:
        ValueError: if a column is missing, or one of texts holds something else.
    """
    for data in splits:
        if missing := [n for n in (*args.text_columns, args.label_column) if n not in data.column_names]:
            raise ValueError(
                f"The data set has no column {', '.join(map(repr, missing))}; it has {', '.join(data.column_names)}. "
                "Choose with `--text_columns` and `--label_column`."
            )
    if len(args.text_columns) not in (1, 2):
        raise ValueError(f"You passed {len(args.text_columns)} `text_columns`; a row has one text or a pair of two.")
    check_texts(splits, args.text_columns)


def find_labels(data: Dataset, args: LabelledDataArguments) -> Labels:
    """
    What is to be predicted, from the training set.

    Raises:
        ValueError: if the column holds neither classes nor numbers, or one class alone.
    """
    from datasets import ClassLabel

    feature = data.features[args.label_column]
    if isinstance(feature, ClassLabel) and not args.regression:
        return Labels(list(feature.names), {index: index for index in range(feature.num_classes)})
    values = list(data[args.label_column])
    floats = any(isinstance(value, float) for value in values)
    if args.regression or (floats and args.regression is None):
        return Labels([])
    if not all(isinstance(value, (bool, int, str)) for value in values):
        other = next(value for value in values if not isinstance(value, (bool, int, str)))
        raise ValueError(
            f"The column {args.label_column!r} holds values such as {other!r}. A class must be a name or a whole "
            "number. (To predict a number, pass `--regression true`.)"
        )
    ordered = sorted(set(values))
    if len(ordered) == 1:
        raise ValueError(
            f"All rows of the training set have {ordered[0]!r} in the column {args.label_column!r}, so that there is "
            "nothing to tell apart. Please name another column with `--label_column`, or check how the file was made."
        )
    return Labels([str(value) for value in ordered], {value: index for index, value in enumerate(ordered)})


def encode(data: Dataset, tokenizer: PreTrainedTokenizerBase, args: LabelledDataArguments, labels: Labels) -> Dataset:
    """
    Token ids and labels, nothing else.

    Raises:
        ValueError: if a text has no token, as an empty one of a decoder.
    """

    def encode_batch(batch: dict[str, list[Any]]) -> dict[str, Any]:
        encoded = tokenizer(*(batch[name] for name in args.text_columns), truncation=True, max_length=args.max_length)
        if empty := [row for row, ids in enumerate(encoded["input_ids"]) if not ids]:
            texts = [batch[name][empty[0]] for name in args.text_columns]
            raise ValueError(
                f"{', '.join(map(repr, args.text_columns))} of a row is {', '.join(map(repr, texts))}, of which the "
                "tokenizer makes no token, so there is nothing to classify. Please drop such rows."
            )
        return {**encoded, "labels": labels.of(batch[args.label_column])}

    return data.map(encode_batch, batched=True, remove_columns=data.column_names)


def load_model(
    name: str, model_args: Any, labels: Labels, seed: int
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, LoraConfig]:
    """
    A model with a new head, its tokenizer, and the LoRA that it begins with.

    Args:
        name (`str`): Hub id or local folder.
        model_args ([`~trl.ModelConfig`]): how it is loaded, and the LoRA. A parser has just made it.
        labels ([`Labels`]): what the head predicts.
        seed (`int`): by which the head is drawn.

    Raises:
        ValueError: if weights of the model beside its head are of other shapes than its configuration says.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed

    options, peft_config = train.model_options(model_args, "SEQ_CLS")  # the new head is trained and saved too
    tokenizer = AutoTokenizer.from_pretrained(name, revision=model_args.model_revision)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    head: dict[str, Any] = {"num_labels": 1, "problem_type": "regression"}
    if labels.names:
        head = {"num_labels": len(labels.names), "id2label": dict(enumerate(labels.names)), "problem_type": None}
        head["label2id"] = {label: index for index, label in enumerate(labels.names)}
    set_seed(seed)
    options |= {"ignore_mismatched_sizes": True, "output_loading_info": True}
    model, info = AutoModelForSequenceClassification.from_pretrained(name, **options, **head)
    _check_replaced(name, model, sorted(key for key, *_ in info["mismatched_keys"]))
    model.config.pad_token_id = tokenizer.pad_token_id  # by which a decoder finds the last token of a text
    return model, tokenizer, peft_config


def _check_replaced(name: str, model: PreTrainedModel, drawn: list[str]) -> None:
    """Say which weights of a model had another shape and are new, and refuse those that are of no head."""
    from ..adapters.heads import new_heads

    if not drawn:
        return
    heads = tuple(f"{head}." for head in new_heads(model, "SEQ_CLS", named_by_user=True))
    if others := [key for key in drawn if not key.startswith(heads)]:
        raise ValueError(
            f"`model_name_or_path={name!r}` holds {others[0]!r} in another shape than its configuration says. Please "
            "check how it was saved."
        )
    logger.info(
        f"{name} has a classifier with another number of outputs. It is replaced by a new one: {', '.join(drawn)}."
    )


def trainer_arguments(
    training_args: Any, args: LabelledDataArguments, splits: tuple[Dataset, Dataset], model_args: Any, name: str
) -> tuple[dict[str, Any], LoraConfig]:
    """
    What a trainer of a classifier is built with: all but the LoRA, and the LoRA.

    Args:
        training_args ([`~transformers.TrainingArguments`]): of the trainer.
        args ([`LabelledDataArguments`]): what is in the rows.
        splits (`tuple`): the training and the evaluation set.
        model_args ([`~trl.ModelConfig`]): how the model is loaded, and the LoRA.
        name (`str`): Hub id or local folder of the model.
    """
    from transformers import DataCollatorWithPadding

    check_columns(splits, args)
    labels = find_labels(splits[0], args)
    model, tokenizer, peft_config = load_model(name, model_args, labels, training_args.seed)
    with training_args.main_process_first(desc="tokenizing"):
        rows, test = (encode(data, tokenizer, args, labels) for data in splits)
    arguments = {
        "model": model,
        "args": training_args,
        "train_dataset": rows,
        "eval_dataset": test,
        "processing_class": tokenizer,
        "data_collator": DataCollatorWithPadding(tokenizer),
        "compute_metrics": labels.metrics(),
    }
    return arguments, peft_config


def run(words: argparse.Namespace) -> None:
    """Train, with all arguments of `TrainingArguments`, `ModelConfig` and `DiffoRAConfig`."""
    from transformers import TrainingArguments

    from ..trainer.trainers import DiffoRATrainer

    parser = train.make_parser(TrainingArguments, "diffora classify", LabelledDataArguments)
    data_args, training_args, model_args, config = train.read_arguments(parser, words.options)
    name = train.checked_model_name(model_args.model_name_or_path)
    splits = load_splits(data_args, seed=training_args.seed)
    arguments, peft_config = trainer_arguments(training_args, data_args, splits, model_args, name)
    trainer = DiffoRATrainer(peft_config=peft_config, diffora_config=config, **arguments)
    train.train_and_save(trainer, data_args.dataset_name)
