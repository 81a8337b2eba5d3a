"""What cannot be searched with: trainers, training arguments, options and models that are refused before training."""

from __future__ import annotations

from collections.abc import Container
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import parse_flag_from_env
from torch import nn

from ..adapters.base import extra_sites_of, kinds_of
from ..adapters.optimizer import check_optimizer
from ..compat.sentence_transformers import is_sentence_transformer
from ..compat.torch import knows_fsdp2
from ..compat.transformers import activation_checkpointing, activation_checkpointing_kwargs, check_trainer_methods
from ..compat.trl import generates_in_step, loss_is_of_rows, makes_completions, own_training_loop, uses_vllm
from ..config import DiffoRAConfig
from ..core.costs import STEP_LIMITS
from ..logging import get_logger
from ..methods.build import method_of
from ..search.bilevel import SECOND_ORDER_IN_HALF, in_half_precision
from .compilation import check_compilation, compiles


if TYPE_CHECKING:
    from .types import SearchingTrainer


logger = get_logger(__name__)


def check_options(config: Any) -> None:
    """Raise a `TypeError` if what was passed as the options of a search are none."""
    if config is not None and not isinstance(config, DiffoRAConfig):
        raise TypeError(
            f"`diffora_config` must be a `DiffoRAConfig`, got {type(config).__name__}. "
            "Please make one of your options: `DiffoRAConfig(selection_ratio=0.5)`."
        )


def check_class(trainer: type) -> None:
    """
    Refuse a class of trainers that never calls what a search does in a step.

    Raises:
        ImportError: if a version of transformers lacks a method that is overridden.
        TypeError: if the class has a training loop of its own.
    """
    check_trainer_methods(trainer)
    if (loop := own_training_loop(trainer)) is not None:
        raise TypeError(
            f"`{loop}` is a training loop of its own, in which the steps of a search would never be called. Please "
            "use a trainer that trains in the loop of `transformers.Trainer` (of TRL's online methods GRPO, RLOO or "
            "OnlineDPO), or `ArchitectureSearch` in that loop."
        )


def check_trainer(trainer: SearchingTrainer) -> None:
    """Raise a `ValueError` if the training arguments ask for something that a search cannot run with."""
    args = trainer.args
    _check_sentence_transformer(trainer)
    check_optimizer(trainer.optimizer)
    if activation_checkpointing(args) and activation_checkpointing_kwargs(args).get("use_reentrant"):
        raise ValueError(
            "You passed `use_reentrant=True` for gradient checkpointing. Its backward pass cannot give the gradient "
            "of the gates alone. Please set `gradient_checkpointing_kwargs={'use_reentrant': False}`."
        )
    if (extra := _extra_sites(trainer)) and len(trainer.model.peft_config) > 1:
        raise ValueError(
            f"The model has {len(trainer.model.peft_config)} adapters ({sorted(trainer.model.peft_config)}) and is to "
            f"have {extra}, which are saved with one. Please pass the base model and a `peft_config` (a DPO trainer "
            f"then takes the model without its adapter for the reference), or leave the {extra} out."
        )
    if trainer.is_deepspeed_enabled:
        raise ValueError(
            "DeepSpeed is not supported: it keeps weights and optimizer states in buffers of its own, which modules "
            "cannot be taken out of during a run. Instead of ZeRO-2 please use plain data parallelism, and instead of "
            "ZeRO-3 FSDP2 (`accelerate launch --config_file recipes/accelerate_configs/ddp.yaml` or `fsdp2.yaml`). Or "
            "search in a first run without DeepSpeed, `DiffoRAConfig(search_only=True)`, and train with it in a "
            "second, stock one, whose `LoraConfig` `selected_lora_config` gives."
        )
    if trainer.is_fsdp_enabled:
        _check_fsdp(trainer)
    parallel = getattr(trainer.accelerator, "parallelism_config", None)
    sizes = {name: getattr(parallel, name, None) or 1 for name in ("tp_size", "cp_size", "sp_size")}
    if split := [f"`{name}={size}`" for name, size in sizes.items() if size > 1]:
        raise ValueError(
            f"Tensor, context and sequence parallelism are not supported ({', '.join(split)}): processes that share a "
            "batch would read held-out rows of their own. Please use DDP or FSDP2, or search in a first run on less, "
            "`DiffoRAConfig(search_only=True)`, and train in a second, stock one, whose `LoraConfig` "
            "`selected_lora_config` gives."
        )
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs are visible to one process, and `nn.DataParallel` copies the model without its gates. "
            "Please start the script with `accelerate launch`, or make one GPU visible with `CUDA_VISIBLE_DEVICES`."
        )
    check_compilation(trainer)
    method, options = method_of(trainer.diffora_config)
    if options.arch_order == 2 and args.world_size > 1:
        raise ValueError(
            "`arch_order=2` looks ahead along the gradient of one process, so on several they would disagree. Please "
            "set `arch_order=1`."
        )
    if options.arch_order == 2 and (args.bf16 or args.fp16) and not in_half_precision(trainer.model):
        logger.warning(SECOND_ORDER_IN_HALF)  # the run says so of a model in half precision
    if makes_completions(trainer):
        _check_completions(trainer)
    if generates_in_step(trainer):
        # Held-out rows have completions, which its losses are of: what is compared of these is not touched by it.
        check_generation(trainer, "generates in its `training_step`", only=STEP_LIMITS.values())
    parts = trainer.diffora_config.search_micro_batches
    if parts is None and trainer.diffora_config.max_step_memory is not None and not loss_is_of_rows(trainer):
        logger.warning(
            f"`max_step_memory={trainer.diffora_config.max_step_memory:g}` is kept after the pruning alone: the loss "
            f"of {type(trainer).__name__} compares rows of a batch, which is not split into micro-batches until then."
        )
    if parts is not None and parts > 1 and not loss_is_of_rows(trainer):
        raise ValueError(
            f"You passed `search_micro_batches={parts}` to {type(trainer).__name__}, whose loss compares rows of a "
            "batch with each other. Please leave it out, and use a smaller batch with more "
            "`gradient_accumulation_steps`."
        )


def _check_completions(trainer: SearchingTrainer) -> None:
    """What a trainer that makes its own completions cannot search with."""
    config, name = trainer.diffora_config, type(trainer).__name__
    if trainer.arch_dataset is not None:
        raise ValueError(
            f"You passed `arch_dataset=` to {name}, which makes the completions that it trains on. The gradient of "
            "the gates is taken on those of the training steps, since to each row of yours completions and rewards "
            "would have to be made in every architecture step. Please leave `arch_dataset` out."
        )
    if config.arch_batch_size is not None:
        raise ValueError(
            f"You passed `arch_batch_size={config.arch_batch_size}` to {name}, whose architecture steps take the "
            "gradient of the gates on the micro-batches of its training steps. Please leave `arch_batch_size` out."
        )
    if config.discretize_at == 0:
        raise ValueError(
            f"You passed `discretize_at=0` to {name}, which has made no completions before its first step that the "
            "modules could be scored on. Please set `discretize_at=1` or later."
        )
    check_generation(trainer, "makes the completions that it trains on")
    method, options = method_of(config)
    closes_gates = method.searches or method.trains_gates or options.reallocate_every is not None
    if uses_vllm(trainer) and closes_gates:
        logger.warning(
            "`use_vllm=True`: vLLM generates with the LoRA of all modules and without gates. While gates are not open "
            "(with a method whose weights train under gates, in the steps of `fade_out`, or with modules that are off "
            "under `reallocate_every`) the completions are those of another policy than the one that is trained, for "
            "which TRL's importance sampling can correct."
        )


def check_generation(trainer: SearchingTrainer, why: str, only: Container[str] | None = None) -> None:
    """
    Options that compare the loss of several passes, or their times: what is generated is not the same in them.

    Args:
        trainer (`Trainer`): the trainer.
        why (`str`): what it does, as the end of a sentence.
        only (`Container[str]`, *optional*): names of the options that this concerns; all of them by default.

    Raises:
        ValueError: if one of them was set.
    """
    config, name = trainer.diffora_config, type(trainer).__name__
    method, options = method_of(config)
    refused = {
        "arch_order": (
            *(options.arch_order, 1),
            "looks one training step ahead by differences of losses on held-out and training data",
        ),
        "method": (
            *(config.method, "snip" if method.compares_losses else config.method),
            "compares values of the loss, which here say nothing, unlike its gradient",
        ),
        "max_step_time": (
            *(config.max_step_time, None),
            "reckons with forward and backward passes, where most of a step is generation",
        ),
        "max_step_memory": (
            *(config.max_step_memory, None),
            "counts forward and backward passes, where generation needs memory too",
        ),
        "search_micro_batches": (
            *(config.search_micro_batches, None),
            "splits batches whose rows have a loss of their own",
        ),
    }
    for option, (value, instead, reason) in refused.items():
        if value != instead and (only is None or option in only):
            raise ValueError(
                f"You passed `{option}={value!r}` to {name}, which {why}: that option {reason}. Please set "
                f"`{option}={instead!r}`."
            )


def _extra_sites(trainer: SearchingTrainer) -> str:
    """Names of the kinds of site beside LoRA that a trainer's model has or is to have; nothing without any."""
    named = [*extra_sites_of(trainer.diffora_config), *(kind.name for kind in kinds_of(trainer.model))]
    return " and ".join(dict.fromkeys(named))


def _check_sentence_transformer(trainer: SearchingTrainer) -> None:
    """Refuse what cannot be done where the model with the LoRA is a part of the trainer's model."""
    model = trainer.model
    if not is_sentence_transformer(model):
        return
    if extra := _extra_sites(trainer):
        raise ValueError(
            f"You asked for {extra} in a part of {type(model).__name__}, which could not be saved with it. Please "
            "leave them out."
        )
    if trainer.args.world_size > 1 or compiles(trainer):
        raise ValueError(
            f"{type(model).__name__} holds the model that is searched, and its loss runs the copy that is wrapped for "
            "several processes or compiled, without the gates. Please train it on one device, and without "
            "`torch_compile`."
        )


def _check_fsdp(trainer: SearchingTrainer) -> None:
    plugin = trainer.accelerator.state.fsdp_plugin
    version = getattr(plugin, "fsdp_version", 1)
    if version != 2:
        raise ValueError(
            f"FSDP{version} is not supported: it flattens parameters together, so that modules cannot be taken out of "
            "them during a run. Please use FSDP2: set `fsdp_version: 2` in the configuration of accelerate."
        )
    if not knows_fsdp2():
        raise ValueError(
            f"The FSDP2 of torch {torch.__version__} does not keep what it gathers where this package takes modules "
            "out of it. Please use another version of torch, or plain data parallelism (`accelerate launch "
            "--config_file recipes/accelerate_configs/ddp.yaml`)."
        )
    if plugin.activation_checkpointing:
        raise ValueError(
            "You set `fsdp_activation_checkpointing: true`. It renames the modules of the model, with which PEFT "
            "saves an adapter without any weights. Please set it to false, and `gradient_checkpointing=True` in the "
            "training arguments."
        )
    if "FULL_STATE_DICT" not in str(plugin.state_dict_type):
        raise ValueError(
            f"FSDP is configured with {plugin.state_dict_type}, with which the Trainer writes no adapter. Please set "
            "`fsdp_state_dict_type: FULL_STATE_DICT`; of an adapter it is small."
        )
    config = trainer.diffora_config
    method, options = method_of(config)
    if not method.shardable:
        raise ValueError(
            f"You passed `method={config.method!r}` with FSDP, which holds each parameter in shards, but this method "
            "needs whole ones: their gradients apart from those of training, or to give them ranks. Please use plain "
            "data parallelism, or another method."
        )
    if extra := _extra_sites(trainer):
        raise ValueError(
            f"You asked for {extra} with FSDP, which gathers the parameters of a layer for the calls of its own "
            "modules, and not for what is added between them. Please use plain data parallelism (`accelerate launch "
            "--config_file recipes/accelerate_configs/ddp.yaml`), or leave them out."
        )
    if (every := options.reallocate_every) is not None:
        raise ValueError(
            f"You passed `reallocate_every={every}` with FSDP, which gathers and scatters the "
            "parameters of all modules, also of those that are off. Please use plain data parallelism (`accelerate "
            "launch --config_file recipes/accelerate_configs/ddp.yaml`), or leave it out to score once."
        )
    alone = (*STEP_LIMITS.values(), "search_micro_batches")
    for name, value in (("weight_sharing", "none"), *((name, None) for name in alone)):
        if getattr(config, name) != value:
            raise ValueError(
                f"You passed `{name}={getattr(config, name)!r}` with FSDP, which holds each parameter in the shards "
                f"of its own module. Please set `{name}={value!r}`, or use plain data parallelism."
            )


def check_loaded(model: Any) -> None:
    """Raise a `ValueError` if a model has no weights. With offloading or FSDP they may be elsewhere."""
    elsewhere = hasattr(model, "hf_device_map") or parse_flag_from_env("ACCELERATE_USE_FSDP")
    if isinstance(model, nn.Module) and not elsewhere:
        empty = [name for name, parameter in model.named_parameters() if parameter.is_meta]
        if empty:
            raise ValueError(
                f"You passed a model on the meta device: {len(empty)} of its parameters, such as {empty[0]!r}, have "
                "no values. Please load it with its weights, outside of `torch.device('meta')`."
            )


def check_can_train(trainer: SearchingTrainer) -> None:
    """Raise a `ValueError` if a trainer has lost what a run needs since it was built, or never had it."""
    if trainer._callback not in trainer.callback_handler.callbacks:
        raise ValueError(
            "The `SessionCallback` was removed from this trainer, so no module would ever be chosen. Please leave "
            "it in, or use the parent trainer."
        )
    if trainer.train_dataset is None:
        raise ValueError(
            "This trainer has `train_dataset=None`, so it can evaluate and predict but not train. Please pass a "
            "`train_dataset`."
        )
