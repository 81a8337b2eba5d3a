"""
LoRA that starts as a part of the base weight: PiSSA and OLoRA.

PEFT subtracts the start `s * B0 A0` from the base weight, so that the model computes at first what it did before. What
the adapter has learned is `s * (B A - B0 A0)`, on top of the pre-trained weight: that is what a gate multiplies, and
what goes when a module is pruned. The base weight then gets its part back.

A saved adapter loads on the pre-trained model with plain PEFT, which takes the same part out of the weights again: the
singular value decomposition (PiSSA) or the QR decomposition (OLoRA) of a weight is the same each time.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear, LoraLayer
from torch import Tensor, nn
from torch.nn import functional

from ..compat.peft import SUBTRACTED_STARTS, lora_start
from .base import AdapterSite, Handle, Scale
from .distributed import add_to_weight
from .lora import LoraSite, register_lora_site
from .tied import tied_layers


_TOLERANCE = 1e-4
_LIKENESS = 0.05
"""How far a start may be from an exact one and be told all the same: in bfloat16, or approximate."""


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
        if not isinstance(config, LoraConfig) or (init := lora_start(config)) not in SUBTRACTED_STARTS:
            return
        tied = tied_layers(model)
        for layer in model.modules():
            if not isinstance(layer, LoraLayer) or adapter_name not in layer.lora_A:
                continue
            known = vars(layer).setdefault("diffora_starts", {})
            if adapter_name not in known:
                known[adapter_name] = _start(layer, adapter_name, init)
            vars(layer)["diffora_tied_with"] = tied[layer][1] if layer in tied else None

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
        if (other := vars(self.layer).get("diffora_tied_with")) is not None:
            return (
                "it starts as a part of the base weight (`init_lora_weights`), which is also that of "
                f"{other!r}, so that part is missing there too. Please load the model again and use "
                "`init_lora_weights=True`."
            )
        if self.adapter_name in self.layer.lora_variant:
            return (
                "it starts as a part of the base weight (`init_lora_weights`) and is of a variant such as DoRA, whose "
                "effect beyond the start is not known exactly. Please use `init_lora_weights=True`, or plain LoRA "
                "without the variant."
            )
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


def check_plain(sites: Iterable[AdapterSite]) -> None:
    """
    Raise a `ValueError` if an adapter that is configured as plain LoRA is the start of PiSSA or OLoRA that its base
    weight lacks. Saving a start for PEFT's conversion leaves the configuration like that, and pruning would take a
    part of the base weight away with the adapter. What has been trained on since is like any plain LoRA.
    """
    for site in sites:
        if type(site) is not LoraSite or not isinstance(site.layer, Linear):
            continue
        if (init := _likeness(site.layer, site.adapter_name)) is None:
            continue
        raise ValueError(
            f"The LoRA of {site.name!r} is a part that was taken out of its base weight, as "
            f"`init_lora_weights={init!r}` does, but its configuration does not say so, and a module that is pruned "
            "would lose that part for good. If you have set the flag to True to save the start, please set it back: "
            f"`model.peft_config[{site.adapter_name!r}].init_lora_weights = {init!r}`. If the base model was saved "
            "without that part, please load the pre-trained one and let PEFT make the adapter, with "
            f"`LoraConfig(init_lora_weights={init!r})`."
        )


def _likeness(layer: Any, adapter_name: str) -> str | None:
    """Which start, not trained yet, the pair of a linear layer looks like, if any. A trained one never does."""
    base = layer.get_base_layer().weight.detach()
    a, b = layer.lora_A[adapter_name].weight.detach(), layer.lora_B[adapter_name].weight.detach()
    if any(type(value.data) is not Tensor or value.is_meta for value in (a, b, base)) or not base.is_floating_point():
        return None
    weight = base.T if layer.fan_in_fan_out else base
    if weight.shape != (b.shape[0], a.shape[1]):
        return None
    a, b = a.float(), b.float()
    ours, theirs, one = b.T @ b, a @ a.T, torch.eye(len(a), dtype=torch.float32, device=a.device)
    # The columns of `lora_B` have the lengths of the rows of `lora_A` and are orthogonal (PiSSA), or are of length 1.
    if not (
        found := [init for init, wanted in zip(SUBTRACTED_STARTS, (theirs, one), strict=True) if _near(ours, wanted)]
    ):
        return None
    # What is left of the weight is orthogonal to them, with OLoRA but for a multiple of `lora_A`.
    left = (b.T.to(weight.dtype) @ weight).float()
    size = torch.linalg.vector_norm(b) * torch.linalg.vector_norm(weight, dtype=torch.float32)
    for init in found:
        expected = (1.0 - layer.scaling[adapter_name]) * a if init == "olora" else torch.zeros_like(a)
        if float(torch.linalg.vector_norm(left - expected)) <= _LIKENESS * float(size) / len(b) ** 0.5:
            return init
    return None


def _near(found: Tensor, wanted: Tensor) -> bool:
    apart, size = torch.linalg.matrix_norm(found - wanted), torch.linalg.matrix_norm(wanted)
    return bool(size > 0) and bool(apart <= _LIKENESS * size)


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
