"""A model as its user passed it, without the LoRA of a trainer that could not be built."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..compat import PLAIN_STARTS, lora_start, noted_structure
from .wrapping import has_adapter


@contextmanager
def taken_out_on_error(model: Any, config: Any = None) -> Iterator[None]:
    """
    If an error leaves this context, what was put into a model meanwhile is taken out again: adapters, copies of heads
    and hooks. The same parameters train as before. Weights that a start such as PiSSA has written into cannot be put
    back, so with one the adapter stays.

    Args:
        model (`nn.Module`, *optional*): the model that the user passed. Anything else is left alone, and so is a model
            that has an adapter.
        config (`PeftConfig`, *optional*): the adapter that it is to get.
    """
    if not isinstance(model, nn.Module) or lora_start(config) not in (None, *PLAIN_STARTS) or has_adapter(model):
        yield
        return
    put_back = noted_structure(model)
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    configured = "peft_config" in vars(model)
    try:
        yield
    except BaseException:
        put_back()
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)
        if not configured:  # PEFT notes it on the base model
            vars(model).pop("peft_config", None)
        raise
