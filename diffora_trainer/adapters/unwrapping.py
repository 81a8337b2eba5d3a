"""A model as its user passed it, without what a trainer that could not be built has put in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from peft import PeftModel
from torch import nn

from ..compat.peft import PLAIN_STARTS, lora_start
from ..compat.torch import noted_structure
from .wrapping import has_adapter


@contextmanager
def taken_out_on_error(model: Any, config: Any = None) -> Iterator[None]:
    """
    If an error leaves this context, what was put into a model meanwhile is taken out again: adapters, copies of heads
    and hooks. The same parameters train as before. Weights that a start such as PiSSA has written into cannot be put
    back, so with one the adapter stays.

    Args:
        model (`nn.Module`, *optional*): the model that the user passed. Anything else is left alone, and so is a model
            that has an adapter and is no `PeftModel`.
        config (`PeftConfig`, *optional*): the adapter that it is to get.
    """
    if not isinstance(model, nn.Module) or not (isinstance(model, PeftModel) or _can_lose_adapter(model, config)):
        yield
        return
    put_back = noted_structure(model)
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    delete_new_adapters = _noted_adapters(model) if isinstance(model, PeftModel) else None
    configured = "peft_config" in vars(model)
    own: Any = getattr(model, "config", None)
    layers = getattr(own, "num_hidden_layers", None)
    try:
        yield
    except BaseException:
        if delete_new_adapters is not None:
            delete_new_adapters()
        put_back()
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)
        if not configured:  # PEFT notes it on the base model
            vars(model).pop("peft_config", None)
        if layers is not None:  # `layer_replication` writes it
            own.num_hidden_layers = layers
        raise


def _can_lose_adapter(model: nn.Module, config: Any) -> bool:
    return lora_start(config) in (None, *PLAIN_STARTS) and not has_adapter(model)


def _noted_adapters(model: PeftModel) -> Callable[[], None]:
    """What deletes the adapters that a model is given from now on, and activates those that are active now."""
    known, active = set(model.peft_config), list(model.active_adapters)

    def put_back() -> None:
        for name in set(model.peft_config) - known:  # TRL has added one for its reference, named "ref"
            model.delete_adapter(name)
        if list(model.active_adapters) != active:
            tuner: Any = model if len(active) == 1 else model.base_model  # a PeftModel activates one alone
            tuner.set_adapter(active[0] if len(active) == 1 else active)

    return put_back
