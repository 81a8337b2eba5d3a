"""Private and version-dependent names of transformers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import nn

from ..core.base_model import base_class
from ..core.files import ADAPTER_NAME


if TYPE_CHECKING:
    from transformers import PreTrainedModel, Trainer


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
one of them would never call the override: what it does would be silently missing (see [`check_trainer_methods`]).
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


def load_default_adapter(model: Any, folder: Path) -> None:
    """
    Load the adapter `default` of a folder in which others have folders of their own: the `Trainer` of transformers
    5.2 and 5.3 loads those alone when it resumes, that of 5.23 this one as well, and then it is loaded twice. Goes
    when no version that is supported leaves it out.

    Args:
        model (`PeftModel`): the model.
        folder (`Path`): the checkpoint.
    """
    if not (folder / ADAPTER_NAME).is_file() or not any(folder.glob(f"*/{ADAPTER_NAME}")):
        return
    active = model.active_adapters[0]
    model.load_adapter(str(folder), "default", is_trainable=active == "default")
    model.set_adapter(active)


def own_input_embeddings(module: Any) -> nn.Module | None:
    """
    The input embeddings of a module, or `None`: `get_input_embeddings` of transformers 5.2 to 5.23 raises
    `NotImplementedError` where a model has none, as one of audio, and other modules have no such method.
    """
    try:
        found = module.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return found if isinstance(found, nn.Module) else None


def loading_class(task_type: Any, auto_mapping: Mapping[str, str] | None, config: Any) -> tuple[str, str]:
    """
    Module and name of the class that loads a base model: as PEFT says it, or where that is an auto class which does
    not load models of this configuration, another one of transformers. What "CAUSAL_LM" stands for loads no
    vision-language model, and "SEQ_2_SEQ_LM" none of speech.

    An auto class loads a configuration that is a key of its `_model_mapping`, or that names the class in its own code
    (`auto_map`), in all versions. A public function that says it would let it go.

    Args:
        task_type (`str` or `None`): PEFT's name of what is trained.
        auto_mapping (`Mapping[str, str]`, *optional*): what PEFT saves of the class where there is no task type.
        config (`PretrainedConfig`, *optional*): the model's configuration.
    """
    import transformers

    def loads(auto_class: str) -> bool:
        mapping = getattr(getattr(transformers, auto_class, None), "_model_mapping", None)
        return mapping is None or auto_class in (getattr(config, "auto_map", None) or {}) or type(config) in mapping

    module, name = base_class(task_type, auto_mapping) or ("transformers", "")
    if module != "transformers" or (name and (config is None or loads(name))):
        return module, name
    others = [*(getattr(config, "architectures", None) or ()), *(["AutoModelForImageTextToText"] if name else [])]
    default = name or "AutoModel"
    return module, next((other for other in others if hasattr(transformers, other) and loads(other)), default)


def trainer_of_callback(callback: Any) -> Any:
    """
    The trainer that is calling a callback now, or `None`.

    A callback is told of the model, the optimizer and the data, but not of its trainer: `CallbackHandler.call_event`
    (transformers 5.2 to 5.23) passes none, and `Trainer.__init__` calls `on_init_end` itself, so the trainer is `self`
    in one of the frames above. It can go when a callback is passed the trainer.
    """
    from transformers import Trainer

    frame = inspect.currentframe()
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, Trainer) and callback in owner.callback_handler.callbacks:
            return owner
        frame = frame.f_back
    return None


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
    where `offload` puts another function into the partial). A tool may have put a function around it that says what
    it wraps (LLaMA-Factory); a module of someone else's may have none, or one of its own. Goes with a public record of
    the arguments on the model.
    """
    function = inspect.unwrap(checkpoint_function(block))
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


def asks_for_input_gradients(module: nn.Module) -> bool:
    """
    Whether a module makes its own input require a gradient in training: the feature extractors of Wav2Vec2 and its kin
    do, where their `_requires_grad` is set (5.2 to 5.23), unless `freeze_feature_encoder()` was called. It goes as
    [`is_input_gradient_hook`].
    """
    return vars(module).get("_requires_grad") is True


def ask_for_input_gradients(module: Any, on: bool) -> None:
    """Set what [`asks_for_input_gradients`] reads."""
    module._requires_grad = on


def checkpoints_call(layer: nn.Module) -> bool:
    """
    Whether a checkpoint goes around the hooks of a layer, which then run again when the layer is recomputed.

    Until transformers 5.22 `GradientCheckpointingLayer` checkpoints `__call__`, with the hooks, and since 5.23
    `forward`, without them. Goes when 5.23 is the oldest version.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    return isinstance(layer, GradientCheckpointingLayer) and "__call__" in vars(GradientCheckpointingLayer)


def train_batch_size(trainer: Trainer) -> int:
    """
    Rows that one process reads at a time. `Trainer._train_batch_size` in all versions: `auto_find_batch_size` makes it
    smaller than the argument. Goes with a public name of the size in use.
    """
    return trainer._train_batch_size


def prepare_inputs(trainer: Trainer, batch: Any) -> Any:
    """A batch as the trainer gives it to its model: `Trainer._prepare_inputs` in all versions. It has no other."""
    return trainer._prepare_inputs(batch)


def items_in_batch(trainer: Trainer, inputs: Any) -> Any:
    """
    What a `compute_loss_func` divides the loss of a batch by: `Trainer._get_num_items_in_batch` in all versions. It
    has no other.
    """
    return trainer._get_num_items_in_batch([inputs], trainer.args.device)


def output_dir(trainer: Trainer, trial: Any) -> str:
    """Where a run writes its checkpoints: `Trainer._get_output_dir` in all versions. It has no other."""
    return trainer._get_output_dir(trial)


def without_unused_columns(trainer: Trainer, dataset: Any, description: str) -> Any:
    """
    A data set without what the model does not take: `Trainer._remove_unused_columns` in all versions. It has no other.
    """
    return trainer._remove_unused_columns(dataset, description=description)


def collator_without_unused_columns(trainer: Trainer, collator: Any, description: str) -> Any:
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


def is_pretrained(module: Any) -> TypeGuard[PreTrainedModel]:
    """Whether a module is a model of transformers, whose `attention_mask` means what it does in all of these."""
    from transformers import PreTrainedModel  # not above, as in [`check_trainer_methods`]

    return isinstance(module, PreTrainedModel)


_AUXILIARY_LOSSES = ("aux_loss", "encoder_aux_loss", "decoder_aux_loss")


@contextmanager
def noted_auxiliary_losses(model: Any) -> Iterator[set[str]]:
    """
    For a while, note by their names which auxiliary losses of its routers a model returns: `aux_loss`, of an
    encoder-decoder `encoder_aux_loss` and `decoder_aux_loss`, in all versions. Mixtures of experts return them, and
    take them into their loss, with `output_router_logits=True`, which TRL's `SFTTrainer` sets by itself (seen in 1.16,
    not in 0.28) unless their weight `router_aux_loss_coef` is 0; then none is noted. It goes when a loss says of what
    it is made.
    """
    found: set[str] = set()

    def note(module: Any, args: Any, output: Any) -> None:
        found.update(name for name in _AUXILIARY_LOSSES if isinstance(getattr(output, name, None), torch.Tensor))

    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    if model is None or getattr(config, "router_aux_loss_coef", None) == 0:
        yield found
        return
    # A `PeftModel` calls the `forward` of its base model around the hooks of that.
    called = {model, model.get_base_model()} if hasattr(model, "get_base_model") else {model}
    hooks = [module.register_forward_hook(note) for module in called]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def feature_mask(model: Any, mask: Any, length: int) -> Any:
    """
    The mask of the states that a model of speech makes of samples, `(batch, length)` bools, by its mask of samples;
    `None` where a model does not make so many states of them, or none of samples.

    `_get_feature_vector_attention_mask` and `_get_feat_extract_output_lengths` in all versions, in Wav2Vec2 and its
    kin, in some of them with `add_adapter` for the states before the adapter. They have no other.
    """
    lengths = getattr(model, "_get_feat_extract_output_lengths", None)
    masks = getattr(model, "_get_feature_vector_attention_mask", None)
    if lengths is None or masks is None:
        return None
    adapters = "add_adapter" in inspect.signature(masks).parameters
    for options in [{}, {"add_adapter": False}] if adapters else [{}]:
        if int(lengths(torch.tensor(mask.shape[1]), **options)) == length:
            return masks(length, mask, **options).bool()
    return None


def readable_help(parser: Any) -> None:
    """
    Let a parser show its help. argparse formats each text by `%`, and one of transformers 5.2 holds a percent sign
    that is none of a format (`use_liger_kernel`). Goes with the versions in which it does.
    """
    for action in parser._actions:
        try:
            _ = (action.help or "") % {**vars(action), "prog": parser.prog}
        except (TypeError, ValueError, KeyError):
            action.help = action.help.replace("%", "%%")
