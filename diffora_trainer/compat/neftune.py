"""
The noise of NEFTune, which `Trainer` hangs on the input embeddings when a training begins, and takes off at its end
(transformers 5.2 to 5.23).
"""

from __future__ import annotations

from typing import Any

from torch import nn

from .transformers import own_input_embeddings


def renew_neftune(trainer: Any) -> None:
    """
    Let the noise go on where the input embeddings have lost their LoRA, and are another module. Goes when `Trainer`
    finds them by itself.
    """
    from transformers.integrations.neftune import activate_neftune

    if trainer.neftune_noise_alpha is None:
        return
    embeddings = _embeddings(trainer)
    if embeddings is not None and not hasattr(embeddings, "neftune_noise_alpha"):
        trainer.neftune_hook_handle.remove()
        trainer.neftune_hook_handle = activate_neftune(trainer.model, trainer.neftune_noise_alpha, trainer.accelerator)


def end_neftune(trainer: Any) -> None:
    """
    Take the noise off, also after an error, at which `Trainer` leaves it there: the next training would add it twice.
    Goes when `Trainer` does so.
    """
    handle = getattr(trainer, "neftune_hook_handle", None)
    if handle is None:
        return
    handle.remove()
    if (embeddings := _embeddings(trainer)) is not None:
        vars(embeddings).pop("neftune_noise_alpha", None)


def _embeddings(trainer: Any) -> nn.Module | None:
    return own_input_embeddings(trainer.accelerator.unwrap_model(trainer.model))
