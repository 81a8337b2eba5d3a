"""Which adapters can be merged into the weights, and what is said of those that cannot."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..adapters.tied import tied_layers
from ..compat.peft import PEFT_PREFIX, merges


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


def check_biases(config: Any, model: nn.Module) -> None:
    """
    Refuse an adapter with biases on layers that have none.

    Args:
        config ([`~peft.PeftConfig`]): the adapter's configuration.
        model ([`~peft.PeftModel`]): the base model with the adapter.

    Raises:
        ValueError: if it is such an adapter.
    """
    if not getattr(config, "lora_bias", False):
        return
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    if without := [name for name, layer in layers if getattr(layer.get_base_layer(), "bias", None) is None]:
        raise ValueError(
            "The adapter has biases (`lora_bias=True`), and layers of the base model such as "
            f"{without[0].removeprefix(PEFT_PREFIX)!r} have none, so no weights hold it. {_LOAD_IT}"
        )


def check_tied(model: nn.Module, untied: Collection[nn.Module]) -> None:
    """
    Refuse an adapter of layers whose weight is another module's too: merged into it, it would change both.

    Args:
        model ([`~peft.PeftModel`]): the base model with the adapter.
        untied (`Collection[nn.Module]`): what has been given weights of its own, or is merged into as one.

    Raises:
        ValueError: if it is such an adapter.
    """
    for name, other in tied_layers(model, untied).values():
        raise ValueError(
            f"The adapter acts on {name!r}, which shares its weight with {other!r}, so a merged model cannot hold "
            f"it. {_LOAD_IT}"
        )


def remedy(config: Any) -> str:
    """What to do with an adapter that does not fit a form: merge it, where that is possible."""
    if _obstacle(config):
        return _LOAD_IT
    if getattr(config, "lora_bias", False):  # only the base model says it
        return f"{_LOAD_IT} Where its layers have a bias in the base model too, `--for merged` is possible."
    return "Please export it with `--for merged`."


def _of_type(config: Any) -> str:
    return f"is of type {config.peft_type.value}, which PEFT cannot merge into the weights of the base model."


def _obstacle(config: Any) -> str:
    if not merges(config):
        return _of_type(config)
    if getattr(config, "alora_invocation_tokens", None):
        return (
            "is an activated LoRA (`alora_invocation_tokens`), which acts on the tokens after its invocation alone, "
            "so no weights hold it."
        )
    if getattr(config, "layer_replication", None):
        return (
            "repeats layers of its base model (`layer_replication`), which share their weights and have a LoRA each, "
            "so a merged model cannot be saved."
        )
    return ""
