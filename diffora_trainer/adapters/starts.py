"""
LoRA that starts as a part of the base weight: PiSSA and OLoRA.

PEFT subtracts the start `s * B0 A0` from the base weight, so that the model computes at first what it did before. What
the adapter has learned is `s * (B A - B0 A0)`, on top of the pre-trained weight: that is what a gate multiplies, and
what goes when a module is pruned. The base weight then gets its part back.

A saved adapter loads on the pre-trained model with plain PEFT, which takes the same part out of the weights again: the
singular value decomposition (PiSSA) or the QR decomposition (OLoRA) of a weight is the same each time.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear, LoraLayer
from torch import Tensor, nn
from torch.nn import functional

from .base import Handle, Scale
from .distributed import add_to_weight
from .lora import LoraSite, register_lora_site


_STARTS = ("pissa", "olora")
_TOLERANCE = 1e-4


class _Handles:
    """Several handles as one."""

    def __init__(self, *handles: Handle) -> None:
        self._handles = handles

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


@register_lora_site
class StartedSite(LoraSite):
    """A LoRA that starts as a part of the weight of its layer. It is kept whole or pruned."""

    resizable = False
    shareable = False
    foldable = False

    @classmethod
    def prepare(cls, model: nn.Module, adapter_name: str) -> None:
        """Keep the start of each adapter on its layer, as plain tensors, which PEFT does not save."""
        config = getattr(model, "peft_config", {}).get(adapter_name)
        if not isinstance(config, LoraConfig) or config.init_lora_weights not in _STARTS:
            return
        for layer in model.modules():
            if not isinstance(layer, LoraLayer) or adapter_name not in layer.lora_A:
                continue
            known = vars(layer).setdefault("diffora_starts", {})
            if adapter_name not in known:
                known[adapter_name] = _start(layer, adapter_name, config.init_lora_weights)

    @classmethod
    def fits(cls, layer: Any, adapter_name: str) -> bool:
        return adapter_name in vars(layer).get("diffora_starts", ())

    def fold(self, factor: float) -> None:
        if factor != 1.0:
            raise ValueError(
                f"{self.name!r} starts as a part of its base weight, and under a gate it would need twice its rank."
            )

    def attach(self, scale: Scale) -> Handle:
        layer, name = self.layer, self.adapter_name
        inputs: list[Tensor] = []

        def keep(module: nn.Module, args: Any, output: Tensor) -> None:
            inputs[:] = [args[0]]

        def gate(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
            start = self._start_of(inputs.pop()).to(output.dtype)
            scaled = scale(module, args, output - start)
            return None if scaled is None else start + scaled

        # The input of the dropout is that of the layer, which the start is a part of.
        return _Handles(
            layer.lora_dropout[name].register_forward_hook(keep), layer.lora_B[name].register_forward_hook(gate)
        )

    def without_adapter(self, *args: Any, **kwargs: Any) -> Any:
        result = super().without_adapter(*args, **kwargs)
        start = self._start_of(args[0]) * self.layer.scaling[self.adapter_name]
        return result + start.to(result.dtype)

    def remove(self, model: nn.Module) -> None:
        layer, name = self.layer, self.adapter_name
        a, b = layer.diffora_starts[name]
        weight = layer.get_base_layer().weight
        update = layer.scaling[name] * (b.to(weight.device) @ a.to(weight.device))
        add_to_weight(weight, update.T if layer.fan_in_fan_out else update)
        super().remove(model)

    def check_prunable(self) -> None:
        if (reason := self.obstacle()) is not None:
            raise ValueError(f"{self.name!r} cannot be pruned: {reason}")

    def _start_of(self, value: Tensor) -> Tensor:
        """`B0 A0 x`."""
        a, b = (matrix.to(value.device) for matrix in self.layer.diffora_starts[self.adapter_name])
        return functional.linear(functional.linear(value.to(a.dtype), a), b)

    def obstacle(self) -> str | None:
        if self.layer.diffora_starts[self.adapter_name] is None:
            return (
                "it starts as a part of the base weight (`init_lora_weights`), which can be given back to a pruned "
                "module only if that is in float32, and known: the adapter has to be new, and a plain one of a linear "
                "layer. Please load the model in float32 (`dtype='float32'`; `bf16=True` of the training arguments "
                "may stay) and let the trainer make the adapter, or use `init_lora_weights=True`."
            )
        if set(self.layer.lora_A) != {self.adapter_name}:
            return (
                "another adapter on its layer would lose a part of its base weight. Please use "
                "`init_lora_weights=True`."
            )
        return super().obstacle()


def _start(layer: Any, adapter_name: str, init: str) -> tuple[Tensor, Tensor] | None:
    """The matrices with which an adapter was made, if it still has them."""
    a, b = layer.lora_A[adapter_name].weight.detach(), layer.lora_B[adapter_name].weight.detach()
    base = layer.get_base_layer().weight
    if not isinstance(layer, Linear) or {a.dtype, b.dtype, base.dtype} != {torch.float32} or a.is_meta:
        return None
    weight = base.detach().T if layer.fan_in_fan_out else base.detach()
    if not a.shape[1] == weight.shape[1] or not b.shape[0] == weight.shape[0]:
        return None
    scale = layer.scaling[adapter_name]
    if init == "pissa":  # singular vectors of the weight, of which the rest is orthogonal to them
        checks = [(b.T @ b, a @ a.T), (b.T @ weight, 0.0 * a), (weight @ a.T, 0.0 * b)]
    else:  # the first columns of Q, and rows of R
        checks = [
            (b.T @ b, torch.eye(len(a), dtype=torch.float32, device=b.device)),
            (b.T @ weight, (1.0 - scale) * a),
        ]
    size = float(torch.linalg.matrix_norm(weight)) + float(torch.linalg.matrix_norm(a)) + 1.0
    if any(float((found - wanted).abs().max()) > _TOLERANCE * size for found, wanted in checks):
        return None
    return a.clone(), b.clone()
