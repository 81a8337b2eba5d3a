"""
Every private or version-dependent name of transformers, TRL, PEFT, accelerate and torch that this package touches, in
a file for each library.

Each entry is one small function or constant. Its docstring says which name it reads, in which versions that name is
there or differs, and what would let the entry go. Nothing else of this package may name a version or read a private
name of these libraries. What holds from one version to another is tested with the oldest set of
`constraints-oldest.txt` and the newest one of `constraints.txt`.
"""

from .accelerate import beside_the_training_loader
from .kernels import fused_lora
from .peft import (
    LOADS_VERA_MATRICES,
    adapters_disabled,
    all_linear_modules,
    converted_to_parameters,
    disable_layer,
    frozen_adapters,
    hook_lookup,
    keep_frozen,
    rewrites_all_linear,
    shortened_targets,
)
from .sentence_transformers import (
    backbone_of_sentence_transformer,
    is_sentence_transformer,
    load_sentence_transformer,
)
from .torch import (
    SCHEDULER_LISTS,
    LiveBytes,
    convolved,
    forward_hooks,
    inner_schedulers,
    is_compiled,
    is_replica,
    knows_fsdp2,
    remove_fsdp_parameters,
    saved_buffers,
    uncompiled,
)
from .trackers import image_writers, training_bar
from .transformers import (
    TRAINER_METHODS,
    activation_checkpointing,
    activation_checkpointing_kwargs,
    check_trainer_methods,
    checkpoint_function,
    checkpoints,
    checkpoints_call,
    checkpoints_without_reentry,
    collator_without_unused_columns,
    columns_of_model,
    is_input_gradient_hook,
    items_in_batch,
    output_dir,
    own_input_embeddings,
    prepare_inputs,
    set_checkpoint_function,
    train_batch_size,
    trainer_of_callback,
    without_unused_columns,
)
from .trl import (
    calls_backward_itself,
    is_reward_trainer,
    loss_is_of_rows,
    loss_of_training_step,
    makes_completions,
    noted_preparation,
    own_training_loop,
    own_training_step,
    preparation,
    uses_vllm,
    with_reference_log_probs,
)


__all__ = [
    "LOADS_VERA_MATRICES",
    "SCHEDULER_LISTS",
    "LiveBytes",
    "TRAINER_METHODS",
    "activation_checkpointing",
    "activation_checkpointing_kwargs",
    "adapters_disabled",
    "all_linear_modules",
    "beside_the_training_loader",
    "backbone_of_sentence_transformer",
    "calls_backward_itself",
    "check_trainer_methods",
    "checkpoint_function",
    "checkpoints",
    "checkpoints_call",
    "checkpoints_without_reentry",
    "collator_without_unused_columns",
    "columns_of_model",
    "converted_to_parameters",
    "convolved",
    "disable_layer",
    "hook_lookup",
    "forward_hooks",
    "fused_lora",
    "image_writers",
    "inner_schedulers",
    "is_compiled",
    "is_input_gradient_hook",
    "is_replica",
    "is_reward_trainer",
    "is_sentence_transformer",
    "frozen_adapters",
    "keep_frozen",
    "knows_fsdp2",
    "load_sentence_transformer",
    "loss_is_of_rows",
    "loss_of_training_step",
    "makes_completions",
    "noted_preparation",
    "output_dir",
    "own_input_embeddings",
    "own_training_loop",
    "own_training_step",
    "preparation",
    "items_in_batch",
    "prepare_inputs",
    "remove_fsdp_parameters",
    "rewrites_all_linear",
    "saved_buffers",
    "set_checkpoint_function",
    "shortened_targets",
    "train_batch_size",
    "trainer_of_callback",
    "training_bar",
    "uncompiled",
    "uses_vllm",
    "with_reference_log_probs",
    "without_unused_columns",
]
