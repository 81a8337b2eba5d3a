"""LoRA as PEFT has it: its sites, and what of it is refused and why."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

from peft import LoraConfig, PeftModel, PeftType
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Embedding, MultiheadAttention, ParamWrapper
from torch import Tensor, nn

from ..compat import is_sentence_transformer
from ..core.grid import LORA
from .base import AdapterSite, SiteKind, peft_name, register_site_kind
from .optimizer import narrow_weight


# A gate multiplies the output of `lora_A`. These layers never call it, so a gate there would have no effect.
_UNGATEABLE: dict[type[nn.Module], str] = {
    ParamWrapper: (
        "PEFT adapts fused experts by adding to the parameter itself (`target_parameters`, which it also fills in for "
        "'all-linear' on a mixture of experts). Please name the projections to choose from instead, for example "
        "`LoraConfig(target_modules=['q_proj', 'k_proj', 'v_proj', 'o_proj'])`."
    ),
    MultiheadAttention: (
        "PEFT merges the LoRA of `nn.MultiheadAttention` into its weight. Please target its other layers, or leave it "
        "out with `exclude_modules`."
    ),
    Embedding: "PEFT holds the LoRA of embeddings as bare parameters. Please leave it out with `exclude_modules`.",
}

# These initialisations subtract the LoRA from the base weight, so a module that loses its LoRA would be damaged.
_CHANGES_BASE_WEIGHT = ("pissa", "olora", "corda", "loftq", "lora_ga")


class LoraSite(AdapterSite):
    """
    The LoRA of one layer. A gate multiplies the output of `lora_A`: `r` numbers a token, so almost free.

    Args:
        name (`str`): name of the layer in the base model.
        layer (`LoraLayer`): the layer.
        adapter_name (`str`): the adapter.
    """

    kind = LORA

    def __init__(self, name: str, layer: Any, adapter_name: str) -> None:
        super().__init__(name, layer.r[adapter_name])
        self.layer = layer
        self.adapter_name = adapter_name

    @property
    def parameters(self) -> list[nn.Parameter]:
        pair = self.layer.lora_A[self.adapter_name], self.layer.lora_B[self.adapter_name]
        return [*pair[0].parameters(), *pair[1].parameters()]

    @property
    def gated(self) -> nn.Module:
        return self.layer.lora_A[self.adapter_name]

    @property
    def shape(self) -> tuple[Any, ...]:
        pair = self.layer.lora_A[self.adapter_name], self.layer.lora_B[self.adapter_name]
        return tuple((type(module).__name__, *module.weight.shape) for module in pair)

    def saved_shapes(self, rank: int) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the tensors that PEFT saves of it when it has some rank."""
        found = {}
        for dim, part in enumerate(("lora_A", "lora_B")):
            shape = list(getattr(self.layer, part)[self.adapter_name].weight.shape)
            shape[dim] = rank
            found[f"{peft_name(self.name)}.{part}.weight"] = tuple(shape)
        return found

    @property
    def enabled(self) -> bool:
        forward = self.layer.__dict__.get("forward")
        return not (isinstance(forward, partial) and forward.func is _passed_by)

    @enabled.setter
    def enabled(self, value: bool) -> None:
        # Not PEFT's own switches: they work on all adapters of a layer, and every `disable_adapter` of the model, by
        # which TRL's trainers take the base model for a reference, turns them on again.
        if self.enabled and not value:
            replaced = self.layer.__dict__.get("forward")  # of a hook of accelerate
            self.layer.forward = partial(_passed_by, self.layer, self.adapter_name, replaced)
        elif value and not self.enabled:
            replaced = self.layer.__dict__.pop("forward").args[2]
            if replaced is not None:
                self.layer.forward = replaced
        for parameter in self.parameters:
            parameter.requires_grad_(value)

    @property
    def resizable(self) -> bool:
        pair = self.layer.lora_A[self.adapter_name], self.layer.lora_B[self.adapter_name]
        # A shard of a parameter, as FSDP2 holds it, is a tensor of a class of its own.
        plain = all(type(module) is nn.Linear and type(module.weight.data) is Tensor for module in pair)
        return plain and pair[1].bias is None

    def resize(self, components: Sequence[int], optimizer: Any = None) -> None:
        layer, name = self.layer, self.adapter_name
        a, b = layer.lora_A[name], layer.lora_B[name]
        narrow_weight(a, 0, components, optimizer)
        narrow_weight(b, 1, components, optimizer)
        rank = len(components)
        a.out_features = b.in_features = rank
        layer.lora_alpha[name] = self._alpha(rank)
        layer.r[name] = self.rank = rank

    def _alpha(self, rank: int) -> float:
        """The `lora_alpha` with which another rank has the same scaling, which stays as it is."""
        alpha, share = self.layer.lora_alpha[self.adapter_name], rank / self.rank
        if not math.isclose(self.layer.scaling[self.adapter_name], alpha / self.rank):  # rsLoRA
            share = math.sqrt(share)
        return round(alpha * share) if math.isclose(alpha * share, round(alpha * share)) else alpha * share

    def share(self, other: LoraSite) -> None:
        for matrix in ("lora_A", "lora_B"):
            own, shared = (getattr(site.layer, matrix)[site.adapter_name] for site in (self, other))
            own.weight = shared.weight

    def check(self) -> None:
        layer = self.layer
        for kind, reason in _UNGATEABLE.items():
            if isinstance(layer, kind):
                raise ValueError(f"The LoRA of {self.name!r} cannot be gated: {reason}")
        if self.adapter_name in layer.lora_variant:
            raise ValueError(
                f"The LoRA of {self.name!r} is of the variant {type(layer.lora_variant[self.adapter_name]).__name__}, "
                "whose effect a gate on `lora_A` does not scale exactly. Please use plain LoRA."
            )
        if layer.merged:
            raise ValueError(
                f"The adapter is merged into {self.name!r}, so its LoRA takes no part in the forward pass. Please "
                "call `model.unmerge_adapter()` first."
            )
        if layer.disable_adapters:
            raise ValueError(
                f"The adapters of {self.name!r} are disabled. Please call `model.enable_adapter_layers()` first."
            )
        if not all(parameter.requires_grad for parameter in self.parameters):
            raise ValueError(
                f"The LoRA of {self.name!r} is frozen, so it cannot be trained. Load the adapter with "
                "`is_trainable=True`, or call `model.set_adapter(name)`."
            )


def _passed_by(layer: Any, adapter_name: str, replaced: Any, *args: Any, **kwargs: Any) -> Any:
    """The forward pass of a layer whose LoRA is off. With another adapter active (DPO's reference) it is the usual."""
    if list(layer.active_adapters) == [adapter_name]:
        return layer.base_layer(*args, **kwargs)
    return replaced(*args, **kwargs) if replaced is not None else type(layer).forward(layer, *args, **kwargs)


@register_site_kind
class LoraKind(SiteKind):
    """LoRA, which a plain PEFT adapter holds."""

    name = LORA
    in_adapter = True
    parameter_mark = ".lora_"

    def match(self, name: str, module: nn.Module, adapter_name: str) -> LoraSite | None:
        if isinstance(module, LoraLayer) and (
            adapter_name in module.lora_A or adapter_name in module.lora_embedding_A
        ):
            return LoraSite(name, module, adapter_name)
        return None

    def prune(self, model: nn.Module, sites: Sequence[Any], adapter_name: str) -> None:
        for site in sites:
            layer = site.layer
            if {*layer.lora_A, *layer.lora_embedding_A} - {adapter_name}:
                # Another adapter lives here too, such as DPO's frozen reference.
                layer.set_adapter([])  # or PEFT would activate and unfreeze it in place of the deleted one
                layer.delete_adapter(adapter_name)
                continue
            parent, _, child = peft_name(site.name).rpartition(".")
            setattr(model.get_submodule(parent), child, layer.get_base_layer())


def peft_model(model: Any) -> Any:
    """
    The part of a model that has the LoRA: the model itself, but of one of sentence-transformers the `PeftModel` that
    it holds.
    """
    if not is_sentence_transformer(model):
        return model
    found = [module for module in model.modules() if isinstance(module, PeftModel)]
    return found[0] if len(found) == 1 else model


def check_lora_config(config: LoraConfig) -> None:
    """
    Raise a `TypeError` if a configuration is of another method that is derived from LoRA, and a `ValueError` if it
    asks for something that a gate or the pruning cannot do exactly.
    """
    if config.peft_type != PeftType.LORA:
        raise TypeError(
            f"The LoRA is configured by {type(config).__name__}, a method with modules of its own "
            f"({getattr(config.peft_type, 'value', config.peft_type)}): they have no `lora_A` whose output a gate "
            "could multiply. Please pass a plain `peft.LoraConfig`, among whose modules the search chooses, or use "
            "the parent trainer."
        )
    switches = [
        *("use_dora", "use_qalora", "use_bdlora", "alora_invocation_tokens"),
        *("velora_config", "monteclora_config", "arrow_config", "kasa_config"),
    ]
    variants = [name for name in switches if getattr(config, name, None)]
    if variants:
        raise ValueError(
            f"You passed a `LoraConfig` with `{variants[0]}`. A gate multiplies the output of `lora_A`, and this "
            "variant's effect is not proportional to it, so the search would score the wrong thing. Please use plain "
            "LoRA."
        )
    if config.lora_bias:
        raise ValueError(
            "You passed a `LoraConfig` with `lora_bias=True`. The bias of `lora_B` is not behind the gate, so the "
            "gate could not switch the module off. Please set `lora_bias=False`."
        )
    if config.bias != "none":
        raise ValueError(
            f"You passed a `LoraConfig` with `bias={config.bias!r}`. Biases trained in a module that is dropped later "
            "would stay changed in the run but not be saved with it. Please set `bias='none'`."
        )
    init = config.init_lora_weights
    if isinstance(init, str) and init.startswith(_CHANGES_BASE_WEIGHT):
        raise ValueError(
            f"You passed a `LoraConfig` with `init_lora_weights={init!r}`. It moves a part of each base weight into "
            "the LoRA, so a module that loses its LoRA would lose that part of the pre-trained model. Please use "
            "`init_lora_weights=True`."
        )
    if config.target_parameters:
        raise ValueError(
            f"You passed a `LoraConfig` with `target_parameters={config.target_parameters!r}`. "
            + _UNGATEABLE[ParamWrapper]
        )
