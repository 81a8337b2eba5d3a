"""Which adapters can be merged into the weights, and what is said of those that cannot."""

from __future__ import annotations

from typing import Any

from ..compat import merges


_LOAD_IT = "Please load it with PEFT."


def check_merges(config: Any) -> None:
    """
    Refuse an adapter that PEFT cannot merge into the weights, by its type or as it is configured.

    Args:
        config ([`~peft.PeftConfig`]): the adapter's configuration.

    Raises:
        ValueError: if it is such an adapter.
    """
    if reason := _obstacle(config):
        raise ValueError(f"The adapter {reason} {_LOAD_IT}")


def unmergeable(config: Any) -> ValueError:
    """The error of an adapter of a type that PEFT cannot merge."""
    return ValueError(f"The adapter {_of_type(config)} {_LOAD_IT}")


def remedy(config: Any) -> str:
    """What to do with an adapter that does not fit a form: merge it, where that is possible."""
    return _LOAD_IT if _obstacle(config) else "Please export it with `--for merged`."


def _of_type(config: Any) -> str:
    return f"is of type {config.peft_type.value}, which PEFT cannot merge into the weights of the base model."


def _obstacle(config: Any) -> str:
    if not merges(config):
        return _of_type(config)
    if getattr(config, "alora_invocation_tokens", None):
        return (
            "is an activated LoRA (`alora_invocation_tokens`), which acts on the tokens behind its invocation alone, "
            "so no weights hold it."
        )
    if getattr(config, "layer_replication", None):
        return (
            "repeats layers of its base model (`layer_replication`), which share their weights and have a LoRA each, "
            "so a merged model cannot be saved."
        )
    return ""
