"""The LoRA configuration of a model that comes without one, and the head that must be trained with it."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from ..compat.peft import all_linear_modules, converted_to_parameters, refused_modules, rewrites_all_linear
from ..compat.sentence_transformers import backbone_of_sentence_transformer
from ..logging import get_logger
from .heads import HEADS, new_heads, takes_input_ids, task_type_of_model
from .lora import check_lora_config, peft_model, searchable


logger = get_logger(__name__)

# Tasks whose class in PEFT passes `input_ids` by position, whatever the model takes.
_PASSES_INPUT_IDS = (TaskType.SEQ_2_SEQ_LM, TaskType.CAUSAL_LM)


def complete_lora_config(
    config: Any,
    model: nn.Module | str | Path | None,
    task_type: TaskType | None,
    model_options: Mapping[str, Any] | None = None,
) -> Any:
    """
    A copy of the user's LoRA configuration with what a model needs filled in: all linear layers if there is none, the
    task type (by which PEFT trains and saves a new classification head), and the head itself where PEFT has no type.

    Args:
        config (`LoraConfig`, *optional*): the user's; it is not changed.
        model (`nn.Module` or `str`, *optional*): the base model, or its name or folder if it is not loaded yet.
        task_type (`TaskType`, *optional*): task type of a model that is not loaded yet.
        model_options (`dict`, *optional*): how a model that is not loaded yet will be.

    Raises:
        TypeError: if the configuration is not a `LoraConfig`, or another one for which there are sites.
        ValueError: if it asks for a variant of LoRA that cannot be searched, or for frozen weights.
    """
    if config is None:
        config = LoraConfig(target_modules="all-linear")
    elif not isinstance(config, LoraConfig) and not searchable(config):
        raise TypeError(
            f"You passed a `peft_config` of type {type(config).__name__}. The search chooses among LoRA modules, so "
            "it must be a `peft.LoraConfig`, or one of LoHa, LoKr or VeRA."
        )
    if config.inference_mode:
        raise ValueError(
            f"You passed a `{type(config).__name__}` with `inference_mode=True`, as that of a saved adapter has it, "
            "so the new adapter would be frozen. Please set `config.inference_mode = False`."
        )
    check_lora_config(config)
    name, model = (None, model) if isinstance(model, nn.Module) else (model, None)
    all_linear = isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear"
    linear = model is None or any(isinstance(module, (nn.Linear, Conv1D)) for module in model.modules())
    if all_linear and not linear:
        raise ValueError(
            f"{type(model).__name__} has no linear layer, so nothing in it can have a LoRA with "
            "`target_modules='all-linear'`. Please name its layers in `LoraConfig(target_modules=...)`, or use "
            "another model."
        )
    config = copy.deepcopy(config)  # PEFT and the pruning write into it
    if name is not None and (revision := (model_options or {}).get("revision")) not in (None, "main"):
        config.revision = revision  # by which the base model of the saved adapter is found again
    natural = task_type if model is None else task_type_of_model(model)
    if config.task_type is None:
        config.task_type = natural
    elif task_type == natural == TaskType.SEQ_CLS and config.task_type == TaskType.CAUSAL_LM:
        # A reward trainer with the task type that TRL's `ModelConfig` has unless told otherwise.
        logger.info("The task type of the LoRA is CAUSAL_LM, but this trainer's is SEQ_CLS, which is used.")
        config.task_type = natural
    elif natural in HEADS and config.task_type != natural and not config.modules_to_save:
        raise ValueError(
            f"You passed a `LoraConfig` with `task_type={getattr(config.task_type, 'value', config.task_type)!r}` for "
            f"{type(model).__name__}, so its new head would be neither trained nor saved. Please set "
            f"`task_type={getattr(natural, 'value', None)!r}`, or leave it out."
        )
    if model is not None and config.task_type in _PASSES_INPUT_IDS and not takes_input_ids(model):
        raise ValueError(
            f"You passed a `LoraConfig` with `task_type={getattr(config.task_type, 'value', config.task_type)!r}` for "
            f"{type(model).__name__}, which takes {getattr(model, 'main_input_name', 'other inputs')!r} and no "
            "`input_ids`, but PEFT's class of this task passes them. Please leave `task_type` out."
        )
    if model is not None:
        heads = new_heads(model, config.task_type, named_by_user=config.modules_to_save is not None)
        saved_by_peft = tuple(HEADS.get(config.task_type, ()))
        if others := [name for name in heads if not name.endswith(saved_by_peft)]:
            config.modules_to_save = sorted({*(config.modules_to_save or ()), *others})
        if all_linear:
            _spell_out(config, model, [*heads, *(config.modules_to_save or ())])
    elif name is not None and all_linear and (empty := _empty_model(name, model_options or {})) is not None:
        _spell_out(config, empty, [])
    return config


def wrap_model(model: nn.Module, config: PeftConfig | None, gradient_checkpointing: bool = False) -> Any:
    """
    A model with LoRA, for trainers that take no `peft_config` themselves. A model of sentence-transformers gets it on
    the transformers model inside.

    Raises:
        ValueError: if the model is a `PeftModel` and a configuration is given too, or if it has an
            adapter without being one.
    """
    slot = backbone_of_sentence_transformer(model)
    if isinstance(peft_model(model), PeftModel):
        if config is not None:
            raise ValueError(
                "You passed a `PeftModel` together with a `peft_config`. The model has its LoRA already; please pass "
                "either the base model and the `peft_config`, or the `PeftModel` alone."
            )
        return model
    base = model if slot is None else getattr(*slot)
    check_no_adapter(base)
    wrapped = get_peft_model(base, complete_lora_config(config, base, None))
    if slot is not None:
        setattr(*slot, wrapped)
    if gradient_checkpointing:
        # Checkpointed blocks need an input that requires a gradient, and with frozen embeddings none does.
        wrapped.enable_input_require_grads()
    return wrapped if slot is None else model


def read_base_config(name: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """
    What stands in the `config.json` of a model: its architecture, among the rest. No code of the model's own is run.

    Args:
        name (`str` or `os.PathLike`): folder or Hub id.
        options (`Mapping[str, Any]`): how the model is loaded; what finds the file is taken of it.

    Raises:
        OSError: if there is no such file.
    """
    wanted = ("revision", "subfolder", "token", "cache_dir", "local_files_only")
    return PreTrainedConfig.get_config_dict(name, **{key: options[key] for key in wanted if key in options})[0]


def has_adapter(model: nn.Module) -> bool:
    """Whether PEFT has put an adapter into a model, which need not be a `PeftModel`."""
    return any(isinstance(module, BaseTunerLayer) for module in model.modules())


def check_no_adapter(model: nn.Module) -> None:
    """Raise a `ValueError` if a model that is to get a LoRA has an adapter: PEFT would put another in its place."""
    if has_adapter(model):
        raise ValueError(
            f"The {type(model).__name__} that you passed has an adapter already, put in by `load_adapter`, "
            "`add_adapter`, PEFT's injection, or a trainer that was built of it before, which is not a `PeftModel`. "
            "To train it further, please pass `PeftModel.from_pretrained(base_model, folder, is_trainable=True)`; to "
            "begin anew, load the base model again, and pass the configuration as `peft_config` to the trainer."
        )


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


def _spell_out(config: LoraConfig, model: nn.Module, saved: list[str]) -> None:
    """Put names in the place of "all-linear" where it stands for more than can be adapted."""
    linear = all_linear_modules(config, model)
    heads, experts = _inside(linear, model, saved) | _refused(config, linear, model), _experts(linear, model)
    targets = linear - heads - (experts or set())
    # PEFT adapts all that ends with a name: what has no linear layer for an end would stop it.
    ends = tuple(f".{name}" for name in targets)
    others = {name for name, _ in model.named_modules() if name not in linear and name.endswith(ends)}
    if (heads or others) and hasattr(config, "exclude_modules"):  # a shorter name may be the end of one of these too
        excluded = config.exclude_modules
        if isinstance(excluded, str):
            config.exclude_modules = "|".join([f"(?:{excluded})", *map(re.escape, sorted(heads | others))])
        else:
            config.exclude_modules = sorted({*(excluded or ()), *heads, *others})
    if heads or experts is not None or others:
        config.target_modules = sorted(targets)


def _inside(linear: set[str], model: nn.Module, saved: list[str]) -> set[str]:
    """
    What is trained and saved whole, and so has no LoRA: PEFT would adapt some of it first. It saves what *ends* with a
    name, and everything in it.
    """
    roots = [name for name, _ in model.named_modules() if name and name.endswith(tuple(saved))]
    return {name for name in linear if any(name == root or name.startswith(f"{root}.") for root in roots)}


def _refused(config: PeftConfig, linear: set[str], model: nn.Module) -> set[str]:
    """What PEFT refuses to adapt, which would end the run though nobody has asked for it by name."""
    refused = refused_modules(config, model, linear)
    if refused:
        kinds = sorted({re.sub(r"^.*?\.\d+\.", "", name) for name in refused})
        logger.info(
            f"{', '.join(kinds)} of {type(model).__name__} have no LoRA: PEFT refuses it there, since a fused kernel "
            "reads their weights past an adapter. All other linear layers have one."
        )
    return refused


def _experts(linear: set[str], model: nn.Module) -> set[str] | None:
    """
    The modules of a mixture of experts in whose place PEFT would adapt the parameters of the fused experts; `None` if
    it would not adapt these. A LoRA for each expert is many times that of all other layers, so it has to be asked for.
    """
    if not rewrites_all_linear(model):
        return None
    parameters = converted_to_parameters("all-linear", model) or ("of its fused experts",)
    leaves = {name.rpartition(".")[2] for name in linear}
    experts = {leaf for leaf in leaves if converted_to_parameters([leaf], model) != set()}
    left_out = {name for name in linear if name.rpartition(".")[2] in experts}
    text = f"{type(model).__name__} is a mixture of experts. Its linear layers have a LoRA, but not the parameters "
    text += f"{', '.join(sorted(parameters))}, unless they are named in `LoraConfig(target_parameters=...)`"
    if left_out:
        kinds = sorted({re.sub(r"^.*?\.\d+\.", "", name) for name in left_out})
        text += f"; nor {', '.join(kinds)}, which PEFT takes for parts of the experts by their names"
    logger.info(f"{text}.")
    return left_out


def _empty_model(name: Any, options: Mapping[str, Any]) -> nn.Module | None:
    """A model without weights, if a name or folder is that of one of which PEFT does not adapt all linear layers."""
    try:
        found = read_base_config(name, options)
        named: Any = nn.Module()
        named.config = SimpleNamespace(model_type=found.get("model_type"))
        if converted_to_parameters(["gate"], named) == set() and not refused_modules(
            LoraConfig(), named, ["out_proj"]
        ):
            return None
        settings = {key: value for key, value in found.items() if key not in ("model_type", "auto_map")}
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(AutoConfig.for_model(found["model_type"], **settings))
    except (OSError, ValueError):  # who loads the model will say what is wrong, or the grid that experts are adapted
        return None
