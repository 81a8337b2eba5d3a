"""What adapters share that are trained in another form and saved as plain LoRA."""

from __future__ import annotations

import weakref
from abc import abstractmethod
from typing import Any

from peft.tuners.lora import Linear, LoraLayer
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..adapters.base import plain_name
from ..adapters.lora import peft_model


class RebuiltLora(TrainerCallback):
    """
    Gives the LoRA of a model another form. Pass it in `callbacks` when the trainer is built, so that the optimizer is
    made of what is trained; in a loop of your own call [`attach`] on the `PeftModel` before the optimizer is made.
    """

    form: type[nn.Module]
    """What stands in the place of `lora_B`."""

    def __init__(self) -> None:
        self._model: weakref.ref[Any] | None = None

    @abstractmethod
    def rebuild(self, name: str, layer: Any, adapter_name: str) -> tuple[nn.Module, nn.Module]:
        """
        What stands in the place of the two matrices of a layer: modules with a `weight`.

        Args:
            name (`str`): name of the layer, for an error.
            layer (`LoraLayer`): the layer, whose LoRA is new and plain.
            adapter_name (`str`): the adapter.
        """

    def attach(self, model: Any) -> None:
        """
        Give the active adapter of a model this form.

        Args:
            model (`PeftModel`): the model, or a model of sentence-transformers that holds it.

        Raises:
            ValueError: if it is not a new, plain LoRA of linear layers.
        """
        model = peft_model(model)
        self._model = weakref.ref(model)
        adapter_name = model.active_adapters[0]
        for path, layer in model.named_modules():
            if not isinstance(layer, LoraLayer) or adapter_name not in {*layer.lora_B, *layer.lora_embedding_B}:
                continue
            if adapter_name in layer.lora_B and isinstance(layer.lora_B[adapter_name], self.form):
                continue
            name = plain_name(path)
            _check_new(name, layer, adapter_name, type(self).__name__)
            a, b = self.rebuild(name, layer, adapter_name)
            layer.lora_A[adapter_name], layer.lora_B[adapter_name] = a, b

    def found(self) -> dict[str, Any]:
        """The modules in the place of `lora_B`, by their names."""
        model = None if self._model is None else self._model()
        modules = {} if model is None else dict(model.named_modules())
        return {plain_name(name): module for name, module in modules.items() if isinstance(module, self.form)}

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if kwargs.get("model") is not None:
            self.attach(kwargs["model"])

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._model = weakref.ref(peft_model(kwargs["model"]))
        if not self.found():
            name = type(self).__name__
            raise ValueError(
                f"`{name}` came to a trainer that was built without it, whose optimizer is of plain LoRA. Please pass "
                "it in `callbacks` of the constructor, with a `PeftModel` or a `peft_config`."
            )


def _plain(module: Any) -> bool:
    return type(module) is nn.Linear and module.bias is None


def _check_new(name: str, layer: Any, adapter_name: str, form: str) -> None:
    up: Any = layer.lora_B[adapter_name] if adapter_name in layer.lora_B else None
    if not isinstance(layer, Linear) or not _plain(up) or layer.lora_variant:
        raise ValueError(
            f"The adapter of {name!r} is not a plain LoRA of a linear layer, so it cannot be trained as `{form}`. "
            "Please leave it out of `target_modules`."
        )
    if up.weight.detach().any():
        raise ValueError(
            f"The LoRA of {name!r} was trained already or starts as a part of its weight. `{form}` needs a new one; "
            "please set `init_lora_weights=True`."
        )
