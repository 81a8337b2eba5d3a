"""How the base model of a saved adapter is loaded: by which class, and with which classes to predict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


LABELS_NAME = "id2label.json"
"""The names of the classes that a classifier was trained on, beside its adapter, which has no place for them."""

_AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}


def base_class(task_type: Any, auto_mapping: Mapping[str, str] | None = None) -> tuple[str, str] | None:
    """
    The class of a base model, as PEFT says it.

    Args:
        task_type (`str` or `None`): PEFT's name of what is trained.
        auto_mapping (`Mapping[str, str]`, *optional*): what PEFT saves of the class where there is no task type.

    Returns:
        `tuple[str, str]` or `None`: the module to import from, and the name in it; `None` if PEFT does not say it.
    """
    if (name := _AUTO_CLASSES.get(str(getattr(task_type, "value", task_type)))) is not None:
        return "transformers", name
    name, module = (str((auto_mapping or {}).get(key) or "") for key in ("base_model_class", "parent_library"))
    if not name.isidentifier() or not all(part.isidentifier() for part in module.split(".")) or module == "__main__":
        return None
    return ("transformers" if module.startswith("transformers.") else module), name


def label_names(config: Any) -> dict[int, str] | None:
    """The names of the classes that the configuration of a model holds, or `None` if they are made of numbers."""
    names = getattr(config, "id2label", None)
    if not isinstance(names, Mapping) or all(str(name) == f"LABEL_{index}" for index, name in names.items()):
        return None
    return {int(index): str(name) for index, name in names.items()}


def predicts_classes(class_name: str) -> bool:
    """Whether a model of this class has a head whose outputs are counted by `num_labels`."""
    return class_name.endswith("Classification")
