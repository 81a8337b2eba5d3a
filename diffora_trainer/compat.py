"""
Every private or version-dependent name of transformers, TRL, PEFT, accelerate and torch that this package touches.

Each entry is one small function or constant. Its docstring says which name it reads, in which versions that name is
there or differs, and what would let the entry go. Nothing else of this package may name a version or read a private
name of these libraries. What holds from one version to another is tested with the oldest set of
`constraints-oldest.txt` and the newest one of `constraints.txt`.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from types import CodeType
from typing import Any

from accelerate.utils import is_compiled_module
from peft import LoraConfig, load_peft_weights, set_peft_model_state_dict
from peft.tuners.tuners_utils import _find_minimal_target_modules, _maybe_include_all_linear_layers
from torch import Tensor, nn

from .core.isolation import replaced


convert_peft_config_for_transformers: Any
try:
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
except ImportError:
    convert_peft_config_for_transformers = None


# transformers

TRAINER_METHODS = (
    "_finish_current_push",
    "_get_collator_with_removed_columns",
    "_get_train_sampler",
    "_inner_training_loop",
    "_load_best_model",
    "_load_from_checkpoint",
    "_load_optimizer_and_scheduler",
    "_push_from_checkpoint",
    "_remove_unused_columns",
    "_save",
    "_save_checkpoint",
    "_save_optimizer_and_scheduler",
    "_save_rng_state",
)
"""
Private methods of `Trainer` that the trainers of this package override, in transformers 5.2 to 5.23. A version without
one of them would never call the override: what it does would be missing in silence (see [`check_trainer_methods`]).
They go as `Trainer` gets public hooks for what is saved, loaded, pushed and sampled.
"""


def check_trainer_methods(trainer: type) -> None:
    """
    Raise an `ImportError` if a version of transformers lacks a method that is overridden here.

    Args:
        trainer (`type`): the class of the trainer that is searched with.
    """
    import transformers  # not above: a search without a Trainer need not wait for it

    missing = [name for name in TRAINER_METHODS if not hasattr(transformers.Trainer, name)]
    if missing:
        raise ImportError(
            f"{trainer.__name__} overrides {missing} of `Trainer`, which transformers {transformers.__version__} does "
            "not have, so a part of the search would never run. Please install a version that is older, or update "
            "diffora-trainer."
        )


def activation_checkpointing(args: Any) -> bool:
    """
    Whether training arguments ask for activation checkpointing.

    The name is `activation_checkpointing` since transformers 5.23, where `gradient_checkpointing` is an alias that
    version 6 removes. Before 5.23 there is the latter alone. Goes when 5.23 is the oldest version.
    """
    return bool(getattr(args, "activation_checkpointing", getattr(args, "gradient_checkpointing", False)))


def activation_checkpointing_kwargs(args: Any) -> dict[str, Any]:
    """What training arguments pass to the checkpointing function. Names as in [`activation_checkpointing`]."""
    old = getattr(args, "gradient_checkpointing_kwargs", None)
    return dict(getattr(args, "activation_checkpointing_kwargs", old) or {})


def checkpoints(module: nn.Module) -> bool:
    """
    Whether a module checkpoints activations in training: `gradient_checkpointing` in all versions, which transformers
    5.23 has not renamed here. Goes with a public call that names these modules.
    """
    return getattr(module, "gradient_checkpointing", False)


def checkpoint_function(module: Any) -> Any:
    """
    What a module checkpoints with, if it does: `_gradient_checkpointing_func`, in all versions. Goes as
    [`checkpoints`].
    """
    return getattr(module, "_gradient_checkpointing_func", None)


def set_checkpoint_function(module: Any, function: Callable[..., Any]) -> None:
    """Let a module checkpoint with a function. The name is that of [`checkpoint_function`]."""
    module._gradient_checkpointing_func = function


def checkpoints_without_reentry(block: nn.Module) -> bool:
    """
    Whether a module that [`checkpoints`] is known to do so in the non-reentrant way: transformers keeps
    `partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)` as its [`checkpoint_function`] (5.2 to 5.23,
    where `offload` puts another function into the partial). A module of someone else's may have none, or one of its
    own. Goes with a public record of the arguments on the model.
    """
    function = checkpoint_function(block)
    return isinstance(function, partial) and function.keywords.get("use_reentrant") is False


def is_input_gradient_hook(hook: Callable[..., Any]) -> bool:
    """
    Whether a forward hook is the one that makes the output of the embeddings require a gradient.

    It is a local function in each library, known by its name alone: `make_inputs_require_grads` in
    `PreTrainedModel.enable_input_require_grads` (transformers 5.2 to 5.23), `make_inputs_require_grad` in PEFT (0.18
    to 0.21) and TRL (0.28 to 1.16). `disable_input_require_grads` is not enough: it knows only the last hook of
    transformers, which adds one at each call. Goes with reentrant checkpointing, or when the libraries do not ask for
    the hook where checkpointing is not reentrant.
    """
    return getattr(hook, "__name__", None) in ("make_inputs_require_grads", "make_inputs_require_grad")


def checkpoints_call(layer: nn.Module) -> bool:
    """
    Whether a checkpoint goes around the hooks of a layer, which then run again when the layer is recomputed.

    Until transformers 5.22 `GradientCheckpointingLayer` checkpoints `__call__`, with the hooks, and since 5.23
    `forward`, without them. Goes when 5.23 is the oldest version.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    return isinstance(layer, GradientCheckpointingLayer) and "__call__" in vars(GradientCheckpointingLayer)


def train_batch_size(trainer: Any) -> int:
    """
    Rows that one process reads at a time. `Trainer._train_batch_size` in all versions: `auto_find_batch_size` makes it
    smaller than the argument. Goes with a public name of the size in use.
    """
    return trainer._train_batch_size


def prepare_inputs(trainer: Any, batch: Any) -> Any:
    """A batch as the trainer gives it to its model: `Trainer._prepare_inputs` in all versions. It has no other."""
    return trainer._prepare_inputs(batch)


def output_dir(trainer: Any, trial: Any) -> str:
    """Where a run writes its checkpoints: `Trainer._get_output_dir` in all versions. It has no other."""
    return trainer._get_output_dir(trial)


def without_unused_columns(trainer: Any, dataset: Any, description: str) -> Any:
    """
    A data set without what the model does not take: `Trainer._remove_unused_columns` in all versions. It has no other.
    """
    return trainer._remove_unused_columns(dataset, description=description)


def collator_without_unused_columns(trainer: Any, collator: Any, description: str) -> Any:
    """
    [`without_unused_columns`] for what has no columns: `Trainer._get_collator_with_removed_columns` in all versions.
    """
    return trainer._get_collator_with_removed_columns(collator, description=description)


def columns_of_model(trainer: Any) -> list[str]:
    """
    Columns that the model takes: `Trainer._set_signature_columns_if_needed` fills `_signature_columns`, in all
    versions. They have no other.
    """
    trainer._set_signature_columns_if_needed()
    return trainer._signature_columns


# TRL


def is_reward_trainer(trainer: Any) -> bool:
    """
    Whether a trainer trains a reward model: the name in `_name`, with which all TRL trainers sign their card, in all
    versions. Goes if the class may be imported, which takes all of TRL.
    """
    return getattr(trainer, "_name", "") == "Reward"


def preparation(trainer: Any) -> Callable[..., Any] | None:
    """
    What a TRL trainer prepares its data sets with, or `None` if it takes them as they are.

    `_prepare_dataset` of the trainers that tokenize, in all versions; its arguments differ. What `SFTTrainer` keeps in
    `_skip_prepare_dataset` since TRL 1.7, its constructor made of these two before. Goes with a public call for one
    more data set.
    """
    asked = bool((getattr(trainer.args, "dataset_kwargs", None) or {}).get("skip_prepare_dataset"))
    skipped = getattr(trainer, "_skip_prepare_dataset", asked or getattr(trainer, "_is_vision_dataset", False))
    return None if skipped else getattr(trainer, "_prepare_dataset", None)


def with_reference_log_probs(trainer: Any, dataset: Any) -> Any:
    """
    A data set with the reference's log-probabilities of its rows, where the trainer computes those of its training set
    ahead (`precompute_ref_log_probs=True`, DPO and KTO).

    Calls `_precompute_ref_logps(dataset, name, batch_size)` of these trainers (seen in TRL 1.16). In TRL 0.28 they
    have no such method, and compute what a batch lacks, so nothing is to be done. It can go when TRL prepares any data
    set that it is given in one public method.
    """
    precompute = getattr(trainer, "_precompute_ref_logps", None)
    if precompute is None or not getattr(trainer.args, "precompute_ref_log_probs", False):
        return dataset
    args = trainer.args
    return precompute(dataset, "arch", args.precompute_ref_batch_size or args.per_device_train_batch_size)


# TRL: trainers whose training step is not "prepare the batch, take `compute_loss` of it"


def makes_completions(trainer: Any) -> bool:
    """
    Whether a trainer makes the completions that it trains on while it prepares a batch, so that a row of its training
    set is only a prompt.

    Told by its structure, since TRL has no mark for it: a class before [`~transformers.Trainer`] overrides
    `_prepare_inputs`, in which TRL 0.28 to 1.16 generate, and the trainer has `_buffered_inputs`, `num_generations` or
    `reward_funcs`. That holds for GRPO, RLOO and distillation, and in TRL's `experimental` for what is derived from
    them, SDPO, SDFT, A2PO and GOLD. A public hook of TRL that is given each training batch would let it go.
    """
    from transformers import Trainer

    classes = type(trainer).__mro__
    overridden = any("_prepare_inputs" in vars(cls) for cls in classes[: classes.index(Trainer)] if not _is_ours(cls))
    return overridden and any(
        hasattr(trainer, name) for name in ("_buffered_inputs", "num_generations", "reward_funcs")
    )


def noted_preparation(trainer: Any, note: Callable[[Any], None]) -> AbstractContextManager[None]:
    """
    For a while, hand what a trainer's `_prepare_inputs` returns to a function as well, with all that subclasses do to
    it. `Trainer.training_step` calls it in transformers 5.2 to 5.23. See [`makes_completions`] for what would let it
    go.
    """
    prepare = trainer._prepare_inputs

    def prepare_and_note(inputs: Any) -> Any:
        prepared = prepare(inputs)
        note(prepared)
        return prepared

    return replaced(trainer, "_prepare_inputs", prepare_and_note)


def uses_vllm(trainer: Any) -> bool:
    """Whether a trainer generates with vLLM (`use_vllm`, in TRL 0.28 to 1.16)."""
    return bool(getattr(trainer.args, "use_vllm", False))


def own_training_step(trainer: Any) -> Callable[..., Any] | None:
    """
    The `training_step` of a trainer that takes its loss there and not in `compute_loss`, or `None`.

    Read from the names that the function uses, since nothing else tells: neither `compute_loss` nor the parent's
    `training_step`. In TRL 0.28 to 1.16 that is OnlineDPO, in 0.28 also XPO and NashMD. A method for the loss in these
    trainers would let it go.
    """
    from transformers import Trainer

    for cls in type(trainer).__mro__:
        step = vars(cls).get("training_step")
        if cls is Trainer:
            return None
        if step is None or _is_ours(cls):
            continue
        names = _names(inspect.unwrap(step))
        if "compute_loss" in names:
            return None
        if "training_step" not in names:
            return step
    return None


def own_training_loop(trainer: type) -> str | None:
    """
    The method by which a class of trainers trains in a loop of its own and not in that of
    [`~transformers.Trainer`], or `None`. Read from the names that it uses: it does not go back to the parent's.
    In TRL 0.28 that is PPO. A way to ask a trainer for its loop would let it go.
    """
    from transformers import Trainer

    for cls in trainer.__mro__[: trainer.__mro__.index(Trainer)]:
        for name in ("train", "_inner_training_loop"):
            method = vars(cls).get(name)
            if method is not None and not _is_ours(cls) and not {"super", "Trainer"} & _names(inspect.unwrap(method)):
                return f"{cls.__name__}.{name}"
    return None


def calls_backward_itself(step: Callable[..., Any]) -> bool:
    """Whether a `training_step` takes its gradient without [`~accelerate.Accelerator`]'s `backward`."""
    names = _names(inspect.unwrap(step))
    return "backward" in names and "accelerator" not in names


def loss_of_training_step(trainer: Any, model: nn.Module, inputs: Any) -> Tensor | None:
    """
    The loss that a trainer's `training_step` hands to `accelerator.backward`, whose place this takes for the call; of
    several the sum, of none `None`. The model stays in the mode that it is in, whatever the step sets.

    All Trainers of transformers 5.2 to 5.23 and TRL 0.28 to 1.16 take their gradient so. See [`own_training_step`] for
    what would let it go.
    """
    losses: list[Tensor] = []
    with (
        replaced(trainer.accelerator, "backward", lambda loss, **kwargs: losses.append(loss)),
        replaced(model, "train", lambda mode=True: model),
    ):
        trainer.training_step(model, inputs, None)
    return None if not losses else sum(losses[1:], losses[0])


def _is_ours(cls: type) -> bool:
    return cls.__module__.partition(".")[0] == __name__.partition(".")[0]


def _names(function: Any) -> set[str]:
    """Names of attributes and globals that a function uses, with the functions defined in it."""
    codes: list[Any] = [getattr(function, "__code__", None)]
    names: set[str] = set()
    while codes:
        code = codes.pop()
        if isinstance(code, CodeType):
            names.update(code.co_names)
            codes.extend(code.co_consts)
    return names


# PEFT


def adapters_disabled(model: Any) -> bool:
    """
    Whether a model is inside `disable_adapter()`: `PeftModel._adapters_disabled` in all versions. Goes with
    a public property of the model.
    """
    return getattr(model, "_adapters_disabled", False) is True


def disable_layer(layer: Any, disabled: bool) -> None:
    """
    Switch the adapters of one layer off or on: `_disable_adapters` in all versions. The public `enable_adapters` also
    changes what is trainable in other adapters of the layer; goes when it leaves that alone.
    """
    layer._disable_adapters = disabled


def shortened_targets(targets: Collection[str], others: Collection[str]) -> set[str]:
    """
    The suffixes by which PEFT finds many target modules: `_find_minimal_target_modules` in all versions. Goes when
    PEFT no longer shortens a list that it is given.
    """
    return _find_minimal_target_modules(targets, others)  # type: ignore[arg-type]


def all_linear_modules(config: LoraConfig, model: nn.Module) -> set[str]:
    """
    Names of the modules that `target_modules="all-linear"` stands for in a base model, without the output embeddings.

    Reads `peft.tuners.tuners_utils._maybe_include_all_linear_layers`, the same in PEFT 0.18 to 0.21. A public function
    that resolves the short form would let it go.
    """
    probe: Any = LoraConfig(target_modules="all-linear", task_type=config.task_type)
    _maybe_include_all_linear_layers(probe, model)
    return set(probe.target_modules)


def converted_to_parameters(target_modules: str | list[str], model: nn.Module) -> set[str] | None:
    """
    The parameters of fused experts that PEFT adapts when these target modules are asked for, because it takes them for
    experts by their names; `None` if it refuses them, being a part of fused ones. Only the configuration of the model
    is read, unless a string has to be resolved.

    Reads `peft.utils.transformers_weight_conversion.convert_peft_config_for_transformers`, which newer versions of
    PEFT call on every configuration (seen in 0.21); PEFT 0.18 has none and adapts the modules as named. It can go when
    gates can act on adapted parameters.
    """
    if convert_peft_config_for_transformers is None:
        return set()
    probe = LoraConfig(target_modules=target_modules)
    try:
        convert_peft_config_for_transformers(probe, model=model, conversions=None)
    except ValueError:
        return None
    return set(probe.target_parameters or ())


def rewrites_all_linear(model: nn.Module) -> bool:
    """
    Whether PEFT puts something else in the place of `target_modules="all-linear"` for a model, because it knows it as
    a mixture of experts: PEFT 0.21 the modules and the parameters of fused experts, PEFT 0.19 the letters of the word,
    with which it then finds nothing. Reads and goes as [`converted_to_parameters`].
    """
    if convert_peft_config_for_transformers is None:
        return False
    probe = LoraConfig(target_modules="all-linear")
    convert_peft_config_for_transformers(probe, model=model, conversions=None)
    return probe.target_modules != "all-linear" or bool(probe.target_parameters)


# sentence-transformers


def is_sentence_transformer(model: Any) -> bool:
    """
    Whether a model is one of sentence-transformers, which holds a transformers model among modules of its own.

    Looks for the property `transformers_model` of its class (sentence-transformers 5 and 6), so that the package need
    not be there. It can go when there is a name for such models in transformers or PEFT.
    """
    return hasattr(type(model), "transformers_model")


def load_sentence_transformer(model: Any, adapted: Any, folder: str) -> None:
    """
    Put what a checkpoint holds into a model of sentence-transformers whose transformers model is a `PeftModel`.

    Its trainer loads a whole model and copies the state by names (`BaseTrainer._load_from_checkpoint`, 6.2), and what
    it loads has an adapter without a `PeftModel`, so other names. It can go when it loads adapters with PEFT.
    """
    set_peft_model_state_dict(adapted, load_peft_weights(folder, device="cpu"))
    for entry in json.loads(Path(folder, "modules.json").read_text()):
        part = model.get_submodule(entry["name"])
        if adapted not in part.modules() and list(part.parameters()):
            part.load_state_dict(type(part).load(folder, subfolder=entry["path"]).state_dict())


def backbone_of_sentence_transformer(model: nn.Module) -> tuple[nn.Module, str] | None:
    """
    The module and the name under which a model of sentence-transformers holds its transformers model, which is what
    can have LoRA; `None` for any other model.

    Reads their property `transformers_model` (see above), and looks for its value among their modules: it has no
    setter. A way to put a `PeftModel` in its place would let it go.
    """
    backbone = getattr(model, "transformers_model", None) if is_sentence_transformer(model) else None
    for parent in model.modules() if isinstance(backbone, nn.Module) else ():
        for name, child in parent.named_children():
            if child is backbone:
                return parent, name
    return None


# torch

SCHEDULER_LISTS = ("base_lrs", "lr_lambdas", "_last_lr", "min_lrs", "max_lrs", "base_momentums", "max_momentums")
"""
What PyTorch's schedulers hold in lists with one entry for each group of the optimizer. Goes with a public call that
takes a group out of an optimizer.
"""


def inner_schedulers(scheduler: Any) -> tuple[Any, ...]:
    """The schedulers of a `SequentialLR` or `ChainedScheduler`: `_schedulers`, which has no other name."""
    return tuple(getattr(scheduler, "_schedulers", ()))


def forward_hooks(module: nn.Module) -> dict[int, Callable[..., Any]]:
    """
    The forward hooks of a module by the number in their handles, to be exchanged in place: `Module._forward_hooks`, in
    all versions. Goes with a way for a `RemovableHandle` to be switched off for a while, or one for transformers to
    tell and forget its hook (see [`is_input_gradient_hook`]).
    """
    return module._forward_hooks


def saved_buffers(module: nn.Module) -> list[tuple[str, Tensor]]:
    """
    Those of a module's own buffers that are saved, with their names: what stands in `_buffers`, but not in
    `_non_persistent_buffers_set`. Goes when `named_buffers` tells them apart.
    """
    hidden = module._non_persistent_buffers_set
    return [(name, buffer) for name, buffer in module._buffers.items() if buffer is not None and name not in hidden]


def is_compiled(module: nn.Module) -> bool:
    """
    Whether a module is compiled: made by `torch.compile`, or by its own `compile()`, which leaves
    `_compiled_call_impl`. Goes with a public property.
    """
    return is_compiled_module(module) or module._compiled_call_impl is not None


def is_replica(module: nn.Module) -> bool:
    """Whether `nn.DataParallel` made a module: it sets `_is_replica`. Goes with `nn.DataParallel`."""
    return getattr(module, "_is_replica", False)


FSDP_GROUPS = ("_fsdp_param_groups", "_fsdp_param_group")
"""Where FSDP2 keeps what it gathers for a module: several groups in torch 2.13, one in 2.6. Goes with
[`remove_fsdp_parameters`]."""


def knows_fsdp2() -> bool:
    """Whether the FSDP2 of this torch has the names that [`remove_fsdp_parameters`] touches."""
    try:
        from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState
    except ImportError:
        return False
    state = FSDPState()
    return hasattr(getattr(state, "_state_ctx", None), "all_states") and any(hasattr(state, n) for n in FSDP_GROUPS)


def remove_fsdp_parameters(module: Any, gone: Collection[nn.Parameter], present: Collection[nn.Module]) -> None:
    """
    Take parameters that have left a model out of what FSDP2 gathers and scatters for one of its modules.

    FSDP2 collects them once, and has no public call for this; the names were run with torch 2.13 and read in torch
    2.6, for whose FSDP2 accelerate is too new (see [`knows_fsdp2`]). Goes with such a call.

    Args:
        module (`FSDPModule`): a module that was wrapped itself.
        gone (`Collection`): the sharded parameters that left the model.
        present (`Collection`): all modules of the model.
    """
    state = module._get_fsdp_state()
    found = next(getattr(state, name) for name in FSDP_GROUPS if hasattr(state, name))
    for group in found if isinstance(found, (list, tuple)) else [] if found is None else [found]:
        group.fsdp_params = [p for p in group.fsdp_params if p.sharded_param not in gone]
        for handles in (
            group._module_to_pre_save_state_dict_hook_handle,
            group._module_to_pre_load_state_dict_hook_handle,
        ):
            for other in [other for other in handles if other not in present]:
                handles.pop(other).remove()
    # A removed module may have been wrapped itself.
    states = state._state_ctx.all_states
    states[:] = [other for other in states if any(inner in present for inner in other._modules)]
