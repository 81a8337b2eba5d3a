"""LoHa, LoKr and VeRA: adapters of other configurations of PEFT, whose effect a gate can multiply."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, ClassVar

from peft import PeftType
from peft.tuners.loha import LoHaLayer
from peft.tuners.lokr import LoKrLayer
from peft.tuners.vera import VeraLayer
from torch import nn

from ..compat.peft import LOADS_VERA_MATRICES, VERA_LOADER
from .base import Handle, Scale, peft_name
from .lora import LoraSite, register_lora_site
from .weights import GatedWeights


class OtherSite(LoraSite):
    """
    An adapter whose parameters stand on its layer, in dictionaries by the name of the adapter. It is kept whole or
    pruned, and counts as one unit.
    """

    resizable = False
    shareable = False
    matrices = None
    layer_type: ClassVar[Any]
    holders: ClassVar[tuple[str, ...]]
    """Attributes of the layer that may hold a parameter; that which starts at 0, or one beside it, comes last."""

    def __init__(self, name: str, layer: Any, adapter_name: str) -> None:
        super().__init__(name, layer, adapter_name)
        self.rank = 1

    @classmethod
    def fits(cls, layer: Any, adapter_name: str) -> bool:
        return isinstance(layer, cls.layer_type) and adapter_name in getattr(layer, "r", ())

    def _named(self) -> dict[str, nn.Parameter]:
        held = {name: getattr(self.layer, name) for name in self.holders}
        return {name: values[self.adapter_name] for name, values in held.items() if self.adapter_name in values}

    @property
    def parameters(self) -> list[nn.Parameter]:
        return list(self._named().values())

    @property
    def other_adapters(self) -> set[str]:
        return set(self.layer.r) - {self.adapter_name}

    @property
    def gated(self) -> nn.Module:
        return self.layer

    def attach(self, scale: Scale) -> Handle:
        return GatedWeights([self.layer], self.adapter_name, scale)

    @property
    def shape(self) -> tuple[Any, ...]:
        return (type(self).__name__, *(tuple(parameter.shape) for parameter in self.parameters))

    def saved_shapes(self, rank: int, adapted: Collection[str] | None = None) -> dict[str, tuple[int, ...]]:
        return {f"{peft_name(self.name)}.{name}": tuple(value.shape) for name, value in self._named().items()}

    def obstacle(self) -> str | None:
        return None


@register_lora_site
class LoHaSite(OtherSite):
    """LoHa (https://huggingface.co/papers/2108.06098): the elementwise product of two low-rank products."""

    peft_type = PeftType.LOHA
    marks = (".hada_",)
    layer_type = LoHaLayer
    holders = ("hada_t1", "hada_w1_a", "hada_w1_b", "hada_t2", "hada_w2_a", "hada_w2_b")


@register_lora_site
class LoKrSite(OtherSite):
    """LoKr (https://huggingface.co/papers/2309.14859): the Kronecker product of two matrices."""

    peft_type = PeftType.LOKR
    marks = (".lokr_",)
    layer_type = LoKrLayer
    holders = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_t2", "lokr_w2", "lokr_w2_a", "lokr_w2_b")


@register_lora_site
class VeraSite(OtherSite):
    """
    VeRA (https://huggingface.co/papers/2310.11454): two vectors that scale frozen random matrices, which all modules
    share. The adapter is linear in its input, so a gate multiplies that.

    The matrices are as wide as the widest module needs, and each uses the first columns and rows of them. PEFT makes
    them as wide as the configuration needs, so they are cut when the widest module is pruned.
    """

    peft_type = PeftType.VERA
    marks = (".vera_lambda_",)
    layer_type = VeraLayer
    holders = ("vera_lambda_d", "vera_lambda_b")

    @classmethod
    def fits(cls, layer: Any, adapter_name: str) -> bool:
        # Not by `r`, as the others: old versions of PEFT leave it on a layer whose adapter they delete.
        return isinstance(layer, VeraLayer) and adapter_name in layer.vera_lambda_d

    @classmethod
    def fit_shared(cls, model: nn.Module, adapter_name: str) -> None:
        layers: list[Any] = [layer for layer in model.modules() if cls.fits(layer, adapter_name)]
        if layers:
            a, b = layers[0].vera_A, layers[0].vera_B  # of all layers
            a[adapter_name] = a[adapter_name][:, : max(layer.in_features for layer in layers)].clone()
            b[adapter_name] = b[adapter_name][: max(layer.out_features for layer in layers)].clone()

    @property
    def other_adapters(self) -> set[str]:
        return set(self.layer.vera_lambda_d) - {self.adapter_name}

    def delete(self) -> None:
        shared = [(held, held[self.adapter_name]) for held in (self.layer.vera_A, self.layer.vera_B)]
        super().delete()
        for held, matrix in shared:  # PEFT has deleted those of all layers
            held[self.adapter_name] = matrix

    def obstacle(self) -> str | None:
        layer: Any = self.layer
        saved, size = layer.vera_A.persistent, (layer.out_features, layer.in_features)
        widest = layer.vera_B[self.adapter_name].shape[0], layer.vera_A[self.adapter_name].shape[1]
        if size == widest or (saved and LOADS_VERA_MATRICES):
            return None
        remedy = f"use {VERA_LOADER}, which loads the saved ones" if saved else "set `save_projection=True`"
        return (
            "when the adapter is loaded, PEFT would draw the shared matrices anew, by the widest module that is left: "
            f"others, once a wider one than this was pruned. Please {remedy}, or adapt modules of one shape."
        )

    def attach(self, scale: Scale) -> Handle:
        handle: Handle = self.layer.vera_dropout[self.adapter_name].register_forward_hook(scale)
        return handle
