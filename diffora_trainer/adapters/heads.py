"""The parts of a model that are new with its task, so that they must be trained and saved whole."""

from __future__ import annotations

import inspect
from typing import Any

from peft import TaskType
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from torch import nn

from ..compat.transformers import is_pretrained
from ..core.base_model import class_names
from ..logging import get_logger


logger = get_logger(__name__)

_TASKS = {
    "ForSequenceClassification": TaskType.SEQ_CLS,
    "ForTokenClassification": TaskType.TOKEN_CLS,
    "ForQuestionAnswering": TaskType.QUESTION_ANS,
    "ForQuestionAnsweringSimple": TaskType.QUESTION_ANS,
    "ForCausalLM": TaskType.CAUSAL_LM,
    "LMHeadModel": TaskType.CAUSAL_LM,
}
# The new heads that PEFT trains and saves with a task type, wherever the name of a module ends so.
HEADS: dict[Any, list[str]] = {
    TaskType.SEQ_CLS: SEQ_CLS_HEAD_NAMES,
    TaskType.TOKEN_CLS: SEQ_CLS_HEAD_NAMES,
    TaskType.QUESTION_ANS: ["qa_outputs"],
}
# Classes of transformers whose head is new with each task, beside those that PEFT has a task type for.
_NEW_HEAD = ("Classification", "MultipleChoice", "ForCTC", "Segmentation", "ObjectDetection", "XVector", "Regression")
# PEFT cannot save these whole, because they are not called.
_LISTS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


def task_type_of_model(model: nn.Module) -> TaskType | None:
    """The task type by which PEFT knows what a model is trained for; `None` if it has none for it."""
    if not takes_input_ids(model):  # PEFT's classes of the tasks pass them on, also to a speech model
        return None
    for name in class_names(type(model)):
        if name.endswith("ForConditionalGeneration") and getattr(model.config, "is_encoder_decoder", False):
            return TaskType.SEQ_2_SEQ_LM
        for suffix, task in _TASKS.items():
            if name.endswith(suffix):
                return task
    return None


def takes_input_ids(model: nn.Module) -> bool:
    """Whether the `input_ids` that PEFT's class of a task passes are an argument of the model."""
    named = getattr(model, "main_input_name", "input_ids") == "input_ids"
    return named or "input_ids" in inspect.signature(model.forward).parameters


def new_heads(model: nn.Module, task_type: TaskType | str | None, *, named_by_user: bool) -> list[str]:
    """
    Names of the parts of a model that are new with its task, under whatever name: what has weights and stands beside
    the backbone. In a class of transformers they are new if the name of the class says so; in a class of the user's
    own, always but for the output embeddings, and the log names them. What looks like a part that ought to be trained
    and cannot be gives a warning.

    Args:
        model (`nn.Module`): the base model, without LoRA.
        task_type (`TaskType`, *optional*): the task type of its configuration.
        named_by_user (`bool`): whether the configuration has `modules_to_save`, empty or not. It is taken at its word
            for a class of the user's own.
    """
    library, names = _is_of_a_library(model), class_names(type(model))
    by_task = task_type in HEADS or any(name.endswith(_NEW_HEAD) for name in names)
    if not by_task and (library or named_by_user):
        return []
    heads, left = _beside_the_backbone(model, tuple(HEADS.get(task_type, SEQ_CLS_HEAD_NAMES if by_task else ())))
    kind = type(model).__name__
    if heads and not by_task:
        logger.info(
            f"{', '.join(heads)} of {kind} stand beside its pre-trained model and are taken for new heads: they are "
            "trained and saved whole, without LoRA. Name others, or none, in `LoraConfig(modules_to_save=[...])`."
        )
    if left and not named_by_user:
        logger.warning(
            f"{', '.join(left)} of {kind} stand beside its pre-trained model and stay as they are: PEFT saves a "
            "module whole only if it is called, is in one place, and no other name ends with its. If they are new, "
            "their weights stay those that were drawn; please put them into a module of their own, and name it in "
            "`LoraConfig(modules_to_save=[...])`."
        )
    elif by_task and not heads and not named_by_user:
        logger.warning(
            f"No new head of {kind} was found beside a backbone. If a part of it is new with the task, please name it "
            "in `LoraConfig(modules_to_save=[...])`, or it stays as it was drawn."
        )
    return heads


def _is_of_a_library(model: nn.Module) -> bool:
    """Whether the class was published with weights for all of it: of transformers, or code that came with a model."""
    return type(model).__module__.partition(".")[0] in ("transformers", "transformers_modules", "trl")


def _backbones(model: nn.Module) -> list[nn.Module]:
    """The pre-trained models inside: the one that the class names, or the children that are such, or hold one."""
    named = getattr(model, "base_model", model)
    if named is not model:
        return [named]
    return [child for child in model.children() if _holds_pretrained(child)]


def _holds_pretrained(module: nn.Module) -> bool:
    return any(map(is_pretrained, module.modules()))


def _beside_the_backbone(model: nn.Module, known: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """What stands beside the backbone with weights of its own: what PEFT can save whole, and what it cannot."""
    backbones = _backbones(model)
    inside = [f".{name}" for backbone in backbones for name, _ in backbone.named_modules()]
    places = [id(module) for _, module in model.named_modules(remove_duplicate=False)]
    output = model.get_output_embeddings() if is_pretrained(model) else None
    heads: list[str] = []
    left = [name for name, _ in model.named_parameters(recurse=False)] if backbones else []

    def sort_in(name: str, child: nn.Module) -> None:
        beside = bool(backbones) and not any(child is backbone for backbone in backbones)
        if known and name.endswith(known):
            heads.append(name)
        elif not beside or not list(child.parameters()) or any(module is output for module in child.modules()):
            return
        elif _holds_pretrained(child):
            return  # a second one, which is not a head
        elif isinstance(child, _LISTS):
            for part, module in child.named_children():
                sort_in(f"{name}.{part}", module)
            left.extend(f"{name}.{part}" for part, _ in child.named_parameters(recurse=False))
        elif any(other.endswith(name) for other in inside) or places.count(id(child)) > 1:
            left.append(name)  # PEFT saves all that ends with the name
        else:
            heads.append(name)

    for name, child in model.named_children():
        sort_in(name, child)
    return heads, left
