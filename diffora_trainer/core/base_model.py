"""How the base model of a saved adapter is loaded: by which class, and with which classes to predict."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from .files import ADAPTER_CONFIG_NAME, read_json
from .selection import SELECTION_NAME


LABELS_NAME = "id2label.json"
"""The names of the classes that a classifier was trained on, beside its adapter, which has no place for them."""
PROBLEM_NAME = "problem_type.json"
"""What a model with a head was trained to predict, where it is not one class of several, beside its adapter too."""
# What transformers makes of outputs by itself is one class of several.
_PROBLEMS = ("regression", "multi_label_classification")

_AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


def base_class(task_type: Any, auto_mapping: Mapping[str, str] | None = None) -> tuple[str, str] | None:
    """
    The class of a base model, as PEFT says it.

    Args:
        task_type (`str` or `None`): PEFT's name of what is trained.
        auto_mapping (`Mapping[str, str]`, *optional*): what PEFT saves of the class where there is no task type.

    Returns:
        `tuple[str, str]` or `None`: the module to import from, and the name in it; `None` if PEFT does not say it. The
            module of a script is `"__main__"`.
    """
    if (name := _AUTO_CLASSES.get(str(getattr(task_type, "value", task_type)))) is not None:
        return "transformers", name
    name, module = (str((auto_mapping or {}).get(key) or "") for key in ("base_model_class", "parent_library"))
    if not name.isidentifier() or not all(part.isidentifier() for part in module.split(".")):
        return None
    return ("transformers" if module.startswith("transformers.") else module), name


def label_names(config: Any) -> dict[int, str] | None:
    """The names of the classes that the configuration of a model holds, or `None` if they are made of numbers."""
    names = getattr(config, "id2label", None)
    if not isinstance(names, Mapping) or all(str(name) == f"LABEL_{index}" for index, name in names.items()):
        return None
    return {int(index): str(name) for index, name in names.items()}


def problem_type(config: Any) -> str | None:
    """What the outputs of a head are, or `None` for one class of several, as which transformers takes them."""
    found = getattr(config, "problem_type", None)
    return found if found in _PROBLEMS else None


def class_of(model: nn.Module) -> type[nn.Module]:
    """The class of a model. FSDP2 puts one of its own before that, which is of torch."""
    classes = (cls for cls in type(model).__mro__ if cls.__module__.partition(".")[0] != "torch" and cls is not object)
    return next(classes, type(model))


def class_names(model_class: type[nn.Module]) -> list[str]:
    """Of a class and those that it is derived from, such as a user's `WeightedLoss(BertForSequenceClassification)`."""
    return [cls.__name__ for cls in model_class.__mro__ if issubclass(cls, nn.Module)]


def is_own_class(model_class: type[nn.Module]) -> bool:
    """Whether a class is of the user's, and not of transformers, nor of code that came with a model."""
    return model_class.__module__.partition(".")[0] not in ("transformers", "transformers_modules")


def predicts_classes(model_class: type[nn.Module], config: Any = None) -> bool:
    """
    Whether a model has a head whose outputs are counted by `num_labels`.

    Args:
        model_class (`type`): its class.
        config (`PretrainedConfig`, *optional*): that of the model. A class of one's own with any name may count by it.
    """
    if any(name.endswith("Classification") for name in class_names(model_class)):
        return True
    two_by_default = label_names(config) is None and getattr(config, "num_labels", 2) == 2
    return model_class.__module__.partition(".")[0] != "transformers" and not two_by_default


def output_folder(adapter: Path) -> Path:
    """Where a run saved what is beside an adapter: above its folder, if it is not called "default" (see PEFT)."""
    above = adapter.parent
    apart = (above / SELECTION_NAME).is_file() and not (above / ADAPTER_CONFIG_NAME).is_file()
    return above if apart else adapter


def head_files(model: nn.Module | None) -> dict[str, bytes | None]:
    """
    What the head of a base model predicts: the files that are saved beside its adapter by their names, with their
    contents, or `None` for one that it has not.
    """
    names = problem = None
    config = getattr(model, "config", None)
    if model is not None and predicts_classes(class_of(model), config):
        names, problem = label_names(config), problem_type(config)
    return {
        LABELS_NAME: None if names is None else json.dumps(names, ensure_ascii=False, indent=2).encode(),
        PROBLEM_NAME: None if problem is None else json.dumps({"problem_type": problem}).encode(),
    }


def read_head(folder: Path) -> dict[str, Any]:
    """
    What was saved of [`head_files`] beside an adapter, as options of a configuration.

    Raises:
        ValueError: if a file is damaged.
    """
    folder = output_folder(folder)
    options: dict[str, Any] = {}
    if (folder / LABELS_NAME).is_file():
        names = {int(index): str(label) for index, label in read_json(folder / LABELS_NAME).items()}
        options |= {"id2label": names, "label2id": {label: index for index, label in names.items()}}
    if (folder / PROBLEM_NAME).is_file():
        options["problem_type"] = read_json(folder / PROBLEM_NAME).get("problem_type")
    return options
