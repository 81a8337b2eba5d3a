"""
Every private or version-dependent name of transformers, TRL, PEFT, accelerate and torch that this package touches.

Each entry is one small function or constant. Its docstring says which name it reads, in which versions that name is
there or differs, and what would let the entry go. Nothing else of this package may name a version or read a private
name of these libraries.
"""

from __future__ import annotations

from typing import Any


# transformers


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


# TRL


def skips_preparation(trainer: Any) -> bool:
    """
    Whether a TRL trainer takes its data sets as they are.

    `SFTTrainer._skip_prepare_dataset` since TRL 1.7; before, its constructor computes the same from these two. Goes
    when TRL says so in public.
    """
    asked = bool((getattr(trainer.args, "dataset_kwargs", None) or {}).get("skip_prepare_dataset"))
    return getattr(trainer, "_skip_prepare_dataset", asked or getattr(trainer, "_is_vision_dataset", False))
