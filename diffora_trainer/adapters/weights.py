"""LoRA that PEFT adds to a weight instead of to an output: of fused experts, and of `nn.MultiheadAttention`."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Any

from peft.tuners.lora.layer import MultiheadAttention, ParamWrapper
from torch import Tensor, nn

from .base import Handle, Scale, peft_name
from .lora import LoraSite, register_lora_site


class GatedWeights:
    """Layers whose change of a weight a gate multiplies, until `remove()`."""

    def __init__(self, layers: list[Any], adapter_name: str, scale: Scale) -> None:
        self._layers = layers
        for layer in layers:
            layer.get_delta_weight = partial(_gated_weight, layer, adapter_name, scale)
            if hasattr(type(layer), "get_delta_factors"):  # newer PEFT asks some layers for the factors
                layer.get_delta_factors = partial(_gated_factors, layer, adapter_name, scale)

    def remove(self) -> None:
        for layer in self._layers:
            for name in ("get_delta_weight", "get_delta_factors"):
                vars(layer).pop(name, None)


def _gated_weight(layer: Any, own: str, scale: Scale, adapter_name: str, *args: Any, **kwargs: Any) -> Tensor:
    weight: Tensor = type(layer).get_delta_weight(layer, adapter_name, *args, **kwargs)
    scaled = scale(layer, (), weight) if adapter_name == own else None
    return weight if scaled is None else scaled


def _gated_factors(layer: Any, own: str, scale: Scale, adapter_name: str) -> tuple[Tensor, Tensor, float]:
    left, right, scaling = type(layer).get_delta_factors(layer, adapter_name)
    scaled = scale(layer, (), right) if adapter_name == own else None
    return left, (right if scaled is None else scaled), scaling


class WeightSite(LoraSite):
    """A LoRA whose product is added to a weight. A gate multiplies the product."""

    resizable = False
    matrices = None  # of fused experts, each has its own

    @property
    def gated(self) -> nn.Module:
        return self.layer

    def attach(self, scale: Scale) -> Handle:
        return GatedWeights([self.layer], self.adapter_name, scale)


@register_lora_site
class ParameterSite(WeightSite):
    """
    The LoRA of a parameter (`target_parameters`): of the fused experts of a mixture of experts, say, all of which have
    factors of their own. Its name is that of the parameter. Where several parameters of a module have one, PEFT nests
    them.
    """

    of_parameter = True

    def __init__(self, name: str, layer: Any, adapter_name: str) -> None:
        while name.endswith(".base_layer"):
            name = name.removesuffix(".base_layer")
        super().__init__(f"{name}.{layer.parameter_name}", layer, adapter_name)
        self._module = name

    @classmethod
    def prepare(cls, model: nn.Module, adapter_name: str) -> None:
        """Note what stands outside of each wrapper of a nest."""
        for name, layer in model.named_modules():
            if isinstance(layer, ParamWrapper) and not name.endswith(".base_layer"):
                outside: tuple[str, ...] = ()
                while isinstance(layer, ParamWrapper):
                    vars(layer)["diffora_outside"] = outside
                    outside, layer = (*outside, layer.parameter_name), layer.base_layer

    @classmethod
    def fits(cls, layer: Any, adapter_name: str) -> bool:
        return isinstance(layer, ParamWrapper) and adapter_name in layer.lora_A

    def obstacle(self) -> str | None:
        if self.other_adapters:
            others = ", ".join(repr(name) for name in sorted(self.other_adapters))
            return (
                f"its parameter has a LoRA of the adapter {others} too, which would stay where this one is pruned. "
                "PEFT wraps a parameter for all adapters alike, so the saved one would load without some weights. "
                "Please merge the other adapter into the base model (`merge_and_unload()`) and pass a "
                "`peft_config`, or leave `target_parameters` out."
            )
        return super().obstacle()

    def saved_shapes(self, rank: int, adapted: Collection[str] | None = None) -> dict[str, tuple[int, ...]]:
        outside = [f"{self._module}.{name}" for name in vars(self.layer)["diffora_outside"]]
        depth = len([name for name in outside if adapted is None or name in adapted])
        prefix = peft_name(self._module) + ".base_layer" * depth
        weights = {part: getattr(self.layer, part)[self.adapter_name].weight for part in ("lora_A", "lora_B")}
        return {f"{prefix}.{part}.weight": tuple(weight.shape) for part, weight in weights.items()}

    def remove(self, model: nn.Module) -> None:
        parent, _, child = peft_name(self._module).rpartition(".")
        holder: Any = model.get_submodule(parent)
        while getattr(holder, child) is not self.layer:
            holder, child = getattr(holder, child), "base_layer"
        setattr(holder, child, self.layer.base_layer)


@register_lora_site
class AttentionSite(LoraSite):
    """The LoRA of an `nn.MultiheadAttention`, which cannot be searched."""

    @classmethod
    def fits(cls, layer: Any, adapter_name: str) -> bool:
        return isinstance(layer, MultiheadAttention) and adapter_name in layer.lora_A

    def obstacle(self) -> str | None:
        return (
            "PEFT adds the LoRA of an `nn.MultiheadAttention` to its weight before each pass and subtracts it after "
            "it, so the weight moves by a rounding each time, and a pruned module would not be the pre-trained one. "
            "Please target its other layers, or leave it out with `exclude_modules`."
        )
