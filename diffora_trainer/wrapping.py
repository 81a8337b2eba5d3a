"""The LoRA configuration of a model that comes without one, and the head that must be trained with it."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel, TaskType, get_peft_model
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from torch import nn
from transformers.pytorch_utils import Conv1D

from .grid import check_lora_config


_TASKS = {
    "ForSequenceClassification": TaskType.SEQ_CLS,
    "ForTokenClassification": TaskType.TOKEN_CLS,
    "ForQuestionAnswering": TaskType.QUESTION_ANS,
    "ForCausalLM": TaskType.CAUSAL_LM,
    "LMHeadModel": TaskType.CAUSAL_LM,
}


_WITH_HEAD = (TaskType.SEQ_CLS, TaskType.TOKEN_CLS, TaskType.QUESTION_ANS)


def complete_lora_config(config: PeftConfig | None, model: nn.Module | None, task_type: TaskType | None) -> LoraConfig:
    """
    A copy of the user's LoRA configuration with what a model needs filled in: all linear layers if there is none, the
    task type (by which PEFT trains and saves a new classification head), and the head itself where PEFT has no type.

    Args:
        config (`LoraConfig`, *optional*): the user's; it is not changed.
        model (`nn.Module`, *optional*): the base model, if it is already loaded.
        task_type (`TaskType`, *optional*): task type of a model that is not loaded yet.

    Raises:
        TypeError: if the configuration is not a `LoraConfig`.
        ValueError: if it asks for a variant of LoRA that cannot be searched.
    """
    if config is None:
        config = LoraConfig(target_modules="all-linear")
    elif not isinstance(config, LoraConfig):
        raise TypeError(
            f"You passed a `peft_config` of type {type(config).__name__}. The search chooses among LoRA modules, so "
            "it must be a `peft.LoraConfig`."
        )
    check_lora_config(config)
    linear = model is None or any(isinstance(module, (nn.Linear, Conv1D)) for module in model.modules())
    if config.target_modules == "all-linear" and not linear:
        raise ValueError(
            f"{type(model).__name__} has no linear layer, so nothing in it can have a LoRA with "
            "`target_modules='all-linear'`. Please name its layers in `LoraConfig(target_modules=...)`, or use "
            "another model."
        )
    config = copy.deepcopy(config)  # PEFT and the cut write into it
    natural = task_type if model is None else _task_type(model)
    if config.task_type is None:
        config.task_type = natural
    elif natural in _WITH_HEAD and config.task_type != natural and not config.modules_to_save:
        raise ValueError(
            f"You passed a `LoraConfig` with `task_type={getattr(config.task_type, 'value', config.task_type)!r}` for "
            f"{type(model).__name__}, so its new head would be neither trained nor saved. Please set "
            f"`task_type={getattr(natural, 'value', None)!r}`, or leave it out."
        )
    chooses_label = type(model).__name__.endswith(("Classification", "MultipleChoice"))
    if config.task_type is None and model is not None and chooses_label:
        # Image, audio and video classifiers: PEFT has no task type that trains and saves their new head.
        heads = [name for name in SEQ_CLS_HEAD_NAMES if isinstance(getattr(model, name, None), nn.Module)]
        config.modules_to_save = sorted({*(config.modules_to_save or ()), *heads}) or None
    return config


def wrap_model(model: nn.Module, config: PeftConfig | None, gradient_checkpointing: bool = False) -> PeftModel:
    """
    A model with LoRA, for trainers that take no `peft_config` themselves.

    Raises:
        ValueError: if the model is a `PeftModel` and a configuration is given too.
    """
    if isinstance(model, PeftModel):
        if config is not None:
            raise ValueError(
                "You passed a `PeftModel` together with a `peft_config`. The model has its LoRA already; please pass "
                "either the base model and the `peft_config`, or the `PeftModel` alone."
            )
        return model
    wrapped = get_peft_model(model, complete_lora_config(config, model, None))
    if gradient_checkpointing:
        # Checkpointed blocks need an input that requires a gradient, and with frozen embeddings none does.
        wrapped.enable_input_require_grads()
    return wrapped


def wrap_model_init(
    init: Callable[..., nn.Module], config: PeftConfig | None, gradient_checkpointing: bool = False
) -> Callable[..., PeftModel]:
    """
    A `model_init` whose models have LoRA. It takes a trial if the user's own does: the Trainer counts
    parameters.
    """

    def plain() -> PeftModel:
        return wrap_model(init(), config, gradient_checkpointing)

    def with_trial(trial: Any) -> PeftModel:
        return wrap_model(init(trial), config, gradient_checkpointing)

    return with_trial if inspect.signature(init).parameters else plain


def _task_type(model: nn.Module) -> TaskType | None:
    name = type(model).__name__
    if name.endswith("ForConditionalGeneration") and getattr(model.config, "is_encoder_decoder", False):
        return TaskType.SEQ_2_SEQ_LM
    return next((task for suffix, task in _TASKS.items() if name.endswith(suffix)), None)
