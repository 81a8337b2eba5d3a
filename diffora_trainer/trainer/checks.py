"""What the mixin needs to know of a Trainer: what it cannot search with, and its bookkeeping, data and wrappers."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from accelerate.utils import DynamoBackend, parse_flag_from_env
from datasets import Dataset
from peft import LoraConfig, PeftModel, TaskType
from torch import Tensor, nn
from torch.utils.data import Subset
from transformers.trainer_utils import has_length

from ..compat import (
    activation_checkpointing,
    activation_checkpointing_kwargs,
    calls_backward_itself,
    columns_of_model,
    is_reward_trainer,
    is_sentence_transformer,
    knows_fsdp2,
    makes_completions,
    own_training_loop,
    own_training_step,
    preparation,
    train_batch_size,
    uses_vllm,
    with_reference_log_probs,
)
from ..config import DiffoRAConfig
from ..experimental.shortcuts.shortcuts import ShortcutConfig, add_shortcuts, shortcuts
from ..logging import get_logger
from ..search.messages import NO_LABELS


logger = get_logger(__name__)

# A stream has no length, so its held-out part is what the search will read, up to this many batches.
_MAX_STREAM_BATCHES = 64


def check_loop(trainer: type) -> None:
    """Raise a `TypeError` if a class of trainers never calls what a search does in a step."""
    if (loop := own_training_loop(trainer)) is not None:
        raise TypeError(
            f"`{loop}` is a training loop of its own, in which the steps of a search would never be called. Please "
            "use a trainer that trains in the loop of `transformers.Trainer` (of TRL's online methods GRPO, RLOO or "
            "OnlineDPO), or `ArchitectureSearch` in that loop."
        )


def check_trainer(trainer: Any) -> None:
    """Raise a `ValueError` if the training arguments ask for something that a search cannot run with."""
    args = trainer.args
    _check_sentence_transformer(trainer)
    if activation_checkpointing(args) and activation_checkpointing_kwargs(args).get("use_reentrant"):
        raise ValueError(
            "You passed `use_reentrant=True` for gradient checkpointing. Its backward pass cannot give the gradient "
            "of the gates alone. Please set `gradient_checkpointing_kwargs={'use_reentrant': False}`."
        )
    if (shortcuts(trainer.model) or trainer.diffora_config.shortcuts) and len(trainer.model.peft_config) > 1:
        raise ValueError(
            f"The model has {len(trainer.model.peft_config)} adapters ({sorted(trainer.model.peft_config)}) and is to "
            "have shortcuts, which are saved with one. Please pass the base model and a `peft_config` (a DPO trainer "
            "then takes the model without its adapter for the reference), or leave the shortcuts out."
        )
    if trainer.is_deepspeed_enabled:
        raise ValueError(
            "DeepSpeed is not supported: it keeps weights and optimizer states in buffers of its own, which modules "
            "cannot be taken out of during a run. Instead of ZeRO-2 please use plain data parallelism, and instead of "
            "ZeRO-3 FSDP2 (`accelerate launch --config_file recipes/accelerate_configs/ddp.yaml` or `fsdp2.yaml`)."
        )
    if trainer.is_fsdp_enabled:
        _check_fsdp(trainer)
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs are visible to one process, and `nn.DataParallel` copies the model without its gates. "
            "Please start the script with `accelerate launch`, or make one GPU visible with `CUDA_VISIBLE_DEVICES`."
        )
    if args.torch_compile or trainer.accelerator.state.dynamo_plugin.backend != DynamoBackend.NO:
        raise ValueError(
            "`torch_compile=True` is not supported, and neither is `accelerate launch --dynamo_backend`: the compiled "
            "model would not notice the gates of the search. Please train without it, and compile the finished model: "
            "`model.compile()` after the training."
        )
    if trainer.diffora_config.arch_order == 2 and args.world_size > 1:
        raise ValueError(
            "`arch_order=2` looks ahead along the gradient of one process, so on several they would disagree. Please "
            "set `arch_order=1`."
        )
    if makes_completions(trainer):
        _check_completions(trainer)


def _check_completions(trainer: Any) -> None:
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
    _check_generation(trainer, "makes the completions that it trains on")
    if uses_vllm(trainer) and (config.method == "diffora" or config.reallocate_every is not None):
        logger.warning(
            "`use_vllm=True`: vLLM generates with the LoRA of all modules and without gates. While gates are not open "
            "(with a `relaxation` other than 'budget', in the steps of `arch_closing`, or with modules that are off "
            "under `reallocate_every`) the completions are those of another policy than the one that is trained, for "
            "which TRL's importance sampling can correct."
        )


def check_own_loss(trainer: Any) -> None:
    """Raise a `ValueError` if the loss of a trainer with its own `training_step` cannot be taken from there."""
    step, name = own_training_step(trainer), type(trainer).__name__
    assert step is not None
    out = "Please override `compute_architecture_loss`, so that it gives the loss of a batch"
    if makes_completions(trainer) or calls_backward_itself(step):
        how = "prepares its batches" if makes_completions(trainer) else "calls `backward`"
        raise ValueError(
            f"The loss of {name} is neither in `compute_loss` nor can it be taken from its `training_step`, which "
            f"{how} itself. {out}."
        )
    _check_generation(trainer, "takes its loss in `training_step`")
    if uses_vllm(trainer):
        raise ValueError(
            f"You passed `use_vllm=True` to {name}, whose `training_step` would generate for architecture steps too: "
            f"vLLM does it without the gates that the gradient is taken of, and merges the LoRA into the weights for "
            f"it. {out}, or set `use_vllm=False`."
        )


def _check_generation(trainer: Any, why: str) -> None:
    """Options that compare the loss of several passes, or their times: what is generated is not the same in them."""
    config, name = trainer.diffora_config, type(trainer).__name__
    refused = {
        "arch_order": (2, 1, "looks one training step ahead by differences of losses on held-out and training data"),
        "method": ("alpha_test", "snip", "compares values of the loss, which here say nothing, unlike its gradient"),
        "cost": ("time", "parameters", "reckons with forward and backward passes, where most of a step is generation"),
    }
    for option, (value, instead, reason) in refused.items():
        if getattr(config, option) == value:
            raise ValueError(
                f"You passed `{option}={value!r}` to {name}, which {why}: that option {reason}. Please set "
                f"`{option}={instead!r}`."
            )


def _check_sentence_transformer(trainer: Any) -> None:
    """Refuse what cannot be done where the model with the LoRA is a part of the trainer's model."""
    model, config = trainer.model, trainer.diffora_config
    if not is_sentence_transformer(model):
        return
    if config.shortcuts is not None or shortcuts(model):
        raise ValueError(
            f"You asked for shortcuts in a part of {type(model).__name__}, which could not be saved with it. Please "
            "leave them out."
        )
    if trainer.args.world_size > 1:
        raise ValueError(
            f"{type(model).__name__} holds the model that is searched, and its loss runs the copy that is wrapped for "
            "several processes, without the gates. Please train it on one device."
        )


def _check_fsdp(trainer: Any) -> None:
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
    if config.method in ("grad_norm", "snip", "synflow", "custom"):
        raise ValueError(
            f"You passed `method={config.method!r}` with FSDP, which holds each parameter in shards, whose gradients "
            "cannot be taken apart from those of training. Please use plain data parallelism, or another method."
        )
    if config.shortcuts is not None or shortcuts(trainer.model):
        raise ValueError(
            "You asked for shortcuts with FSDP, which gathers the parameters of a layer for the calls of its own "
            "modules, and not for what is added between them. Please use plain data parallelism (`accelerate launch "
            "--config_file recipes/accelerate_configs/ddp.yaml`), or leave them out."
        )
    if config.reallocate_every is not None:
        raise ValueError(
            f"You passed `reallocate_every={config.reallocate_every}` with FSDP, which gathers and scatters the "
            "parameters of all modules, also of those that are off. Please use plain data parallelism (`accelerate "
            "launch --config_file recipes/accelerate_configs/ddp.yaml`), or leave it out to score once."
        )
    for name, value in (("weight_sharing", "none"), ("cost", "parameters")):
        if getattr(config, name) != value:
            raise ValueError(
                f"You passed `{name}={getattr(config, name)!r}` with FSDP, which holds each parameter in the shards "
                f"of its own module. Please set `{name}={value!r}`, or use plain data parallelism."
            )


def give_shortcuts(model: Any, config: DiffoRAConfig) -> Any:
    """The model with the shortcuts that a configuration asks for, like its LoRA, unless it has some already."""
    lora = model.peft_config[model.active_adapters[0]] if isinstance(model, PeftModel) else None
    # What is not LoRA is refused by the search.
    if config.shortcuts is not None and not shortcuts(model) and isinstance(lora, LoraConfig):
        add_shortcuts(model, ShortcutConfig.like(lora, config.shortcuts))
    return model


def task_type_of_trainer(trainer: Any) -> TaskType:
    """Task type of the model that a TRL trainer loads when it is given a name."""
    return TaskType.SEQ_CLS if is_reward_trainer(trainer) else TaskType.CAUSAL_LM


@contextmanager
def preserved_bookkeeping(trainer: Any) -> Iterator[None]:
    """
    Put a trainer's counters and metrics back as they were. TRL's `compute_loss` appends to `_metrics`, counts tokens
    in `_total_train_tokens`, and keeps texts to log, its OnlineDPO appends to `stats`; an architecture step must not
    show in any of them.
    """
    plain = (int, float, bool, str, type(None), Tensor)
    kept = {name: value for name, value in vars(trainer).items() if isinstance(value, plain)}
    records = {
        name: value
        for name, value in vars(trainer).items()
        if isinstance(value, dict) and any(part in name for part in ("metrics", "logs", "stats"))
    }
    try:
        vars(trainer).update(copy.deepcopy(records))
        yield
    finally:
        vars(trainer).update(kept, **records)


def read_head(trainer: Any, stream: Any) -> list[Any]:
    """
    The first rows of a stream: as many as the search will read, up to a limit. Of the training stream never more than
    `arch_split` of it or of what the run reads of it, but one at least; to know how long a short stream is, it is read
    on without keeping the rows.

    Raises:
        ValueError: if the stream is read by several workers, has no rows, or only one that should be held out.
    """
    args, config = trainer.args, trainer.diffora_config
    training = stream is trainer.train_dataset
    if args.dataloader_num_workers > 1 and training:
        raise ValueError(
            f"`dataloader_num_workers={args.dataloader_num_workers}` reads the training stream in an order that "
            "depends on the workers, so its first rows cannot be held out. Please use at most one worker, or pass "
            "`arch_dataset=` to the trainer."
        )
    warmup, decision = config.schedule(args.max_steps)[0], config.decision(args.max_steps)
    batches = min(math.ceil((decision - warmup) / config.arch_every), _MAX_STREAM_BATCHES)
    if config.method != "diffora":
        moments = max(1, len(config.reallocations(args.max_steps)))
        batches = max(config.score_batches, min(moments * config.score_batches, _MAX_STREAM_BATCHES))
    rows_a_batch = (config.arch_batch_size or args.per_device_train_batch_size) * args.world_size
    needed, source = batches * rows_a_batch, iter(stream)
    if training:
        rows_a_step = args.per_device_train_batch_size * args.world_size * args.gradient_accumulation_steps
        needed = max(1, min(needed, _part(config.arch_split, args.max_steps * rows_a_step)))
    rows = list(islice(source, needed))
    if not rows:
        raise ValueError(
            "The stream that held-out rows should be read from is empty. Please check its source and its filters."
        )
    if training:
        enough = max(2, math.ceil(len(rows) / config.arch_split))
        found = len(rows) + sum(1 for _ in islice(source, enough - len(rows)))
        if found == 1:
            raise ValueError(
                "The training stream has 1 row, so nothing is left to train on if it is held out. Please pass a "
                "longer stream, or `arch_dataset=` to the trainer."
            )
        if found < enough:  # that was all of it
            rows = rows[: max(1, _part(config.arch_split, found))]
    return rows


def _part(share: float, size: int) -> int:
    """So many of `size` rows as make at most a share of them, whatever the product is rounded to."""
    return math.floor(share * size + 1e-9)


def prepare_dataset(trainer: Any, dataset: Any, formatting_func: Any = None) -> Any:
    """
    A held-out data set of the user's own, prepared as the trainer prepared its training set. TRL's trainers tokenize
    it, and leave a tokenized data set as it is; what they take for that differs from one trainer to another.
    """
    prepare = preparation(trainer)
    if prepare is None:
        return dataset
    known = {
        "dataset": dataset,
        "processing_class": trainer.processing_class,
        "args": trainer.args,
        "packing": getattr(trainer.args, "packing", False),
        "formatting_func": formatting_func,
        "dataset_name": "arch",
    }
    try:
        dataset = prepare(**{name: known[name] for name in inspect.signature(prepare).parameters if name in known})
        return with_reference_log_probs(trainer, dataset)
    except (AttributeError, KeyError, StopIteration) as error:
        raise ValueError(
            f"The `arch_dataset` with the columns {getattr(dataset, 'column_names', None)} could not be prepared as "
            f"the training set was ({type(error).__name__}: {error}). Please pass rows in the same form."
        ) from error


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


def check_rows_left(trainer: Any) -> None:
    """Raise a `ValueError` if preparing a data set has left nothing of it. TRL drops rows without any label."""
    for name in ("train_dataset", "arch_dataset"):
        dataset = getattr(trainer, name)
        if dataset is not None and has_length(dataset) and len(dataset) == 0:
            raise ValueError(
                f"All rows of the `{name}` that you passed were dropped when the trainer prepared it. {NO_LABELS}"
            )


def check_arch_columns(trainer: Any, given: list[str] | None) -> None:
    """
    Raise a `ValueError` if the user's held-out data lacks what the model is given of the training data, or what the
    trainer has added to the columns of the training set that it was given.
    """
    train, held_out = (getattr(data, "column_names", None) for data in (trainer.train_dataset, trainer.arch_dataset))
    if not train or not held_out:
        return
    needed = set() if given is None else set(train) - set(given)
    if trainer.args.remove_unused_columns:
        needed = set(columns_of_model(trainer))
    missing = [name for name in train if name in needed and name not in held_out]
    if missing:
        raise ValueError(
            f"The `arch_dataset` has the columns {held_out}, but the model is trained with {missing} too, which it "
            "lacks. Please pass rows in the form of the training set, or leave `arch_dataset` out, to hold out a part "
            "of the training set."
        )


def subset(dataset: Any, indices: list[int]) -> Any:
    """Some rows of a map-style data set."""
    return dataset.select(indices) if isinstance(dataset, Dataset) else Subset(dataset, indices)


def steps_of_epoch(trainer: Any) -> tuple[int, int]:
    """Optimizer steps in an epoch, and the rows that all processes together read for one of them."""
    args = trainer.args
    rows_a_step = train_batch_size(trainer) * args.gradient_accumulation_steps * args.world_size
    if not hasattr(trainer.train_dataset, "__len__"):
        return args.max_steps, rows_a_step
    batches = len(trainer.callback_handler.train_dataloader)
    return max(math.ceil(batches / args.gradient_accumulation_steps), 1), rows_a_step
