"""The arguments with which a searching trainer builds its parent: LoRA is on the model or among them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import PeftConfig, PeftModel, TaskType
from torch import nn
from transformers import TrainingArguments, set_seed

from ..adapters.base import extra_kinds
from ..adapters.compiled import check_not_compiled
from ..adapters.unwrapping import taken_out_on_error
from ..adapters.wrapping import check_no_adapter, complete_lora_config, wrap_model, wrap_model_init
from ..compat.transformers import activation_checkpointing
from ..compat.trl import is_reward_trainer
from .checks import check_loaded
from .datasets import check_dataset


if TYPE_CHECKING:
    from .types import SearchingTrainer


@contextmanager
def parent_arguments(
    trainer: SearchingTrainer,
    mixin: type,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    peft_config: PeftConfig | None,
) -> Iterator[dict[str, Any]]:
    """
    What the constructor of a trainer's parent is given: what the user passed, by name, and LoRA. If the trainer cannot
    be built of it, the model that the user passed is as it was, and can be passed again.

    Args:
        trainer (`Trainer`): the trainer, not yet built.
        mixin (`type`): the class after which its parents stand.
        args (`tuple`): what was passed by position.
        kwargs (`dict`): what was passed by name.
        peft_config (`LoraConfig`, *optional*): the LoRA that was asked for by name.

    Raises:
        TypeError: if there are too many arguments, or one was passed twice.
    """
    names = parent_parameters(type(trainer), mixin)
    if peft_config is not None:  # some parents take it by position
        kwargs = {**kwargs, "peft_config": peft_config}
    named = arguments_by_name(type(trainer), names, args, kwargs)
    peft_config = named.pop("peft_config", None)
    with taken_out_on_error(named.get("model"), peft_config):
        yield with_lora(named, peft_config, "peft_config" in names, task_type_of_trainer(trainer))


def parent_parameters(trainer: type, mixin: type) -> list[str]:
    """
    Names of what a parent's constructor takes, in order.

    Args:
        trainer (`type`): the class of a trainer.
        mixin (`type`): the class after which its parents stand.
    """
    names: list[str] = []
    mro = trainer.__mro__
    for parent in mro[mro.index(mixin) + 1 :]:
        if "__init__" in vars(parent):
            found = inspect.signature(vars(parent)["__init__"]).parameters.values()
            names += [p.name for p in found if p.kind is p.POSITIONAL_OR_KEYWORD]
            if not any(p.kind is p.VAR_KEYWORD for p in found):
                break
    return [name for name in dict.fromkeys(names) if name != "self"]


def arguments_by_name(
    trainer: type, names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """
    The arguments of a constructor by name.

    Args:
        trainer (`type`): the class of the trainer.
        names (`list[str]`): what it takes, in order.
        args (`tuple`): what was passed by position.
        kwargs (`dict`): what was passed by name.

    Raises:
        TypeError: if there are too many, or one was passed twice.
    """
    if len(args) > len(names):
        raise TypeError(f"{trainer.__name__} takes {len(names)} positional arguments, but {len(args)} were given.")
    named = dict(zip(names, args, strict=False))
    if twice := sorted(named.keys() & kwargs.keys()):
        raise TypeError(f"{trainer.__name__} got {', '.join(twice)} both by position and by name.")
    return {**named, **kwargs}


def with_lora(
    arguments: dict[str, Any], peft_config: PeftConfig | None, passed_on: bool, task_type: TaskType
) -> dict[str, Any]:
    """
    The arguments of a parent's constructor, with LoRA on the model or its configuration among them.

    Args:
        arguments (`dict`): what the user passed.
        peft_config (`LoraConfig`, *optional*): the LoRA that the user asked for.
        passed_on (`bool`): whether the parent takes a `peft_config` itself.
        task_type (`TaskType`): that of a model which the parent loads by its name.

    Raises:
        TypeError: if the model, the data or the training arguments are of a type that the trainer cannot take.
        ValueError: if the model cannot be searched.
    """
    for kind in extra_kinds():  # as its loader gave the model, to be trained on
        if "model" in arguments:
            arguments = {**arguments, "model": kind.unwrap(arguments["model"])}
    model, args = arguments.get("model"), arguments.get("args")
    if args is not None and not isinstance(args, TrainingArguments):
        raise TypeError(
            f"`args` must be training arguments, got {type(args).__name__}. Please pass a `TrainingArguments`, or "
            "what belongs to the trainer, such as `SFTConfig`."
        )
    check_loaded(model)
    check_dataset("train_dataset", arguments.get("train_dataset"))
    if isinstance(model, nn.Module):
        check_not_compiled(model)  # before it is changed
    if passed_on:
        if not isinstance(model, (nn.Module, str, Path)) and arguments.get("model_init") is None:
            raise TypeError(
                f"`model` must be a model, or the name or folder of one, got {type(model).__name__}. Please load "
                "it, for example with `AutoModelForCausalLM.from_pretrained`."
            )
        if not isinstance(model, PeftModel):
            if isinstance(model, nn.Module):
                check_no_adapter(model)
            options = getattr(args, "model_init_kwargs", None) or {}
            peft_config = complete_lora_config(peft_config, model, task_type, options)
        return {**arguments, "peft_config": peft_config}
    checkpointing = activation_checkpointing(args)
    if arguments.get("model_init") is not None:
        return {**arguments, "model_init": wrap_model_init(arguments["model_init"], peft_config, checkpointing)}
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"`model` must be a model, got {type(model).__name__}. Please load it first, for example with "
            "`AutoModelForSequenceClassification.from_pretrained`."
        )
    if args is not None:
        set_seed(args.seed)  # LoRA weights are drawn here, before the parent sets the seed
    return {**arguments, "model": wrap_model(model, peft_config, checkpointing)}


def task_type_of_trainer(trainer: SearchingTrainer) -> TaskType:
    """Task type of the model that a TRL trainer loads when it is given a name."""
    return TaskType.SEQ_CLS if is_reward_trainer(trainer) else TaskType.CAUSAL_LM
