"""LoRA as PEFT has it: its sites, and what of it is refused and why."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from functools import partial
from typing import Any, ClassVar, TypeVar

from peft import LoraConfig, PeftConfig, PeftModel, PeftType
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from ..compat.peft import keep_frozen, lora_start
from ..compat.sentence_transformers import is_sentence_transformer
from ..core.grid import LORA
from .base import AdapterSite, SiteKind, peft_name, register_site_kind
from .optimizer import NO_LORA_FA, narrow_weight


# These initialisations subtract the LoRA from the base weight. Given back to a module that is pruned it has to be what
# it was, and again the same when the adapter is loaded; `starts.py` has those of which both hold.
_CHANGES_BASE_WEIGHT: dict[str | None, str] = {
    "pissa_niter": (
        "it takes a random approximation of each weight out of it, another one whenever the adapter is loaded. Please "
        "use `init_lora_weights='pissa'`, which is exact."
    ),
    "corda": (
        "it takes a part out of each base weight that is computed from data which a saved adapter does not have, so "
        "the adapter would not load on its base model. Please use `init_lora_weights='pissa'` or `'olora'`."
    ),
    "lora_ga": (
        "it takes a part out of each base weight that is computed from gradients which a saved adapter does not have, "
        "so the adapter would load without it. Please use `init_lora_weights='pissa'` or `'olora'`."
    ),
    "loftq": (
        "it quantizes each base weight, and a module that is pruned could not get its pre-trained weight back. Please "
        "load the model quantized (`BitsAndBytesConfig`) and use `init_lora_weights=True`."
    ),
}


class LoraSite(AdapterSite):
    """
    The LoRA of one layer. A gate multiplies the output of `lora_A`: `r` numbers a token, so almost free.

    Args:
        name (`str`): name of the layer in the base model.
        layer (`LoraLayer`): the layer.
        adapter_name (`str`): the adapter.
    """

    kind = LORA
    shareable = True
    peft_type = PeftType.LORA
    marks: ClassVar[tuple[str, ...]] = (".lora_",)
    """What the names of all its parameters contain, and no other's: one of these."""
    of_parameter: ClassVar[bool] = False
    """Whether it adapts a parameter (`target_parameters`), and not a module."""

    @classmethod
    def fits(cls, layer: Any, adapter_name: str) -> bool:
        """Whether a layer with this adapter is one of this class, of those that are asked before the plain one."""
        return False

    @classmethod
    def prepare(cls, model: nn.Module, adapter_name: str) -> None:
        """See [`SiteKind.prepare`]."""

    @classmethod
    def fit_shared(cls, model: nn.Module, adapter_name: str) -> None:
        """After sites were pruned, make what those that are left share what PEFT would make for them alone."""

    def __init__(self, name: str, layer: Any, adapter_name: str) -> None:
        super().__init__(name, layer.r[adapter_name])
        self.layer = layer
        self.adapter_name = adapter_name

    @property
    def parameters(self) -> list[nn.Parameter]:
        pair = self.layer.lora_A[self.adapter_name], self.layer.lora_B[self.adapter_name]
        return [*pair[0].parameters(), *pair[1].parameters()]

    @property
    def other_adapters(self) -> set[str]:
        """Other adapters of its layer, such as DPO's frozen reference."""
        return {*self.layer.lora_A, *self.layer.lora_embedding_A} - {self.adapter_name}

    @property
    def gated(self) -> nn.Module:
        return self.layer.lora_A[self.adapter_name]

    @property
    def shape(self) -> tuple[Any, ...]:
        pair = self.layer.lora_A[self.adapter_name], self.layer.lora_B[self.adapter_name]
        return tuple((type(module).__name__, *module.weight.shape) for module in pair)

    def saved_shapes(self, rank: int, adapted: Collection[str] | None = None) -> dict[str, tuple[int, ...]]:
        """
        Names and shapes of the tensors that PEFT saves of it when it has some rank, and these sites (by default all)
        are left.
        """
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
            self.layer.forward = partial(_passed_by, self, replaced)
            self.layer.merge = partial(_refuse_merge, self)
        elif value and not self.enabled:
            replaced = self.layer.__dict__.pop("forward").args[1]
            del self.layer.merge
            if replaced is not None:
                self.layer.forward = replaced
        for parameter in self.parameters:
            parameter.requires_grad_(value)

    @property
    def merged(self) -> bool:
        return bool(self.layer.merged)

    def freeze(self) -> None:
        super().freeze()
        if self.adapter_name in self.layer.lora_dropout:  # what is not trained needs no noise
            self.layer.lora_dropout[self.adapter_name] = nn.Identity()
        keep_frozen(self.layer, self.adapter_name)

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
        if self.layer.use_rslora[self.adapter_name]:
            share = math.sqrt(share)
        return round(alpha * share) if math.isclose(alpha * share, round(alpha * share)) else alpha * share

    def without_adapter(self, *args: Any, **kwargs: Any) -> Any:
        """What the layer computes once the adapter is pruned."""
        return self.layer.base_layer(*args, **kwargs)

    def remove(self, model: nn.Module) -> None:
        """Put the layer back as it was without an adapter."""
        parent, _, child = peft_name(self.name).rpartition(".")
        setattr(model.get_submodule(parent), child, self.layer.get_base_layer())

    def delete(self) -> None:
        """Take the adapter off a layer that has others, which stay."""
        self.layer.set_adapter([])  # or PEFT would activate and unfreeze another one in place of the deleted one
        self.layer.delete_adapter(self.adapter_name)

    def share(self, other: LoraSite) -> None:
        for matrix in ("lora_A", "lora_B"):
            own, shared = (getattr(site.layer, matrix)[site.adapter_name] for site in (self, other))
            own.weight = shared.weight

    def obstacle(self) -> str | None:
        """Why a gate cannot scale the adapter exactly, and what to do; `None` if it can."""
        if self.adapter_name in self.layer.lora_variant:
            variant = type(self.layer.lora_variant[self.adapter_name]).__name__
            return (
                f"it is of the variant {variant}, whose effect a gate on `lora_A` does not scale exactly. Please use "
                "plain LoRA."
            )
        return None

    def check(self) -> None:
        layer = self.layer
        if (reason := self.obstacle()) is not None:
            raise ValueError(f"The LoRA of {self.name!r} cannot be gated: {reason}")
        if self.merged:
            raise ValueError(
                f"The adapter is merged into {self.name!r}, so its LoRA takes no part in the forward pass. Please "
                "call `model.unmerge_adapter()` first."
            )
        if layer.disable_adapters:
            raise ValueError(
                f"The adapters of {self.name!r} are disabled. Please call `model.enable_adapter_layers()` first."
            )
        trained = [parameter.requires_grad for parameter in self.parameters]
        if any(trained) and not all(trained):
            raise ValueError(
                f"A part of the LoRA of {self.name!r} is frozen, and another is trained. A search trains and prunes "
                "it as a whole. Where a run with `AlternateFactors` was interrupted, please call its "
                f"`finish(model)`. {NO_LORA_FA}"
            )
        if not all(trained):
            raise ValueError(
                f"The LoRA of {self.name!r} is frozen, so it cannot be trained. Load the adapter with "
                "`is_trainable=True`, or call `model.set_adapter(name)`."
            )


def _passed_by(site: LoraSite, replaced: Any, *args: Any, **kwargs: Any) -> Any:
    """The forward pass of a layer whose LoRA is off. With another adapter active (DPO's reference) it is the usual."""
    layer: Any = site.layer
    if list(layer.active_adapters) == [site.adapter_name]:
        return site.without_adapter(*args, **kwargs)
    return replaced(*args, **kwargs) if replaced is not None else type(layer).forward(layer, *args, **kwargs)


def _refuse_merge(site: LoraSite, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
    """What merges adapters of a layer whose LoRA is off."""
    layer: Any = site.layer
    if site.adapter_name not in (adapter_names or layer.active_adapters):
        type(layer).merge(layer, safe_merge, adapter_names)
        return
    raise ValueError(
        f"The LoRA of {site.name!r} is off (`reallocate_every`), and merged it would act again. Please evaluate "
        "without `merge_adapter`, or merge once modules are chosen; `model.unmerge_adapter()` takes back what was "
        "merged of the other modules."
    )


_OTHER_SITES: list[type[LoraSite]] = []
_Site = TypeVar("_Site", bound=type[LoraSite])


def register_lora_site(site: _Site) -> _Site:
    """Let a class say for its layers how their LoRA is gated, folded and pruned. A decorator."""
    _OTHER_SITES.append(site)
    return site


def _all_sites() -> list[type[LoraSite]]:
    return [LoraSite, *_OTHER_SITES]


@register_site_kind
class LoraKind(SiteKind):
    """LoRA, which a plain PEFT adapter holds."""

    name = LORA
    in_adapter = True

    @property
    def parameter_marks(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(mark for site in _all_sites() for mark in site.marks))

    def prepare(self, model: nn.Module, adapter_name: str) -> None:
        for site in _OTHER_SITES:
            site.prepare(model, adapter_name)

    def match(self, name: str, module: nn.Module, adapter_name: str) -> LoraSite | None:
        site = next((other for other in _OTHER_SITES if other.fits(module, adapter_name)), None)
        if site is None and isinstance(module, LoraLayer) and adapter_name in module.lora_A:
            site = LoraSite
        return None if site is None else site(name, module, adapter_name)

    def prune(self, model: nn.Module, sites: Sequence[Any], adapter_name: str) -> None:
        for site in sites:
            if site.other_adapters:
                site.delete()
            else:
                site.remove(model)
        for kind in _OTHER_SITES:
            kind.fit_shared(model, adapter_name)


def peft_model(model: Any) -> Any:
    """
    The part of a model that has the LoRA: the model itself, but of one of sentence-transformers the `PeftModel` that
    it holds.
    """
    if not is_sentence_transformer(model):
        return model
    found = [module for module in model.modules() if isinstance(module, PeftModel)]
    return found[0] if len(found) == 1 else model


def searchable(config: Any) -> bool:
    """Whether there are sites for adapters of a configuration."""
    return isinstance(config, PeftConfig) and config.peft_type in {site.peft_type for site in _all_sites()}


def check_lora_config(config: Any) -> None:
    """
    Raise a `TypeError` if a configuration is of another method for which there are no sites, and a `ValueError` if it
    asks for something that a gate or the pruning cannot do exactly.
    """
    if not searchable(config):
        raise TypeError(
            f"The LoRA is configured by {type(config).__name__}, a method with modules of its own "
            f"({getattr(config.peft_type, 'value', config.peft_type)}), whose effect a gate cannot scale. Please pass "
            "a plain `peft.LoraConfig`, or one of LoHa, LoKr or VeRA, among whose modules the search chooses, or use "
            "the parent trainer."
        )
    if getattr(config, "bias", "none") != "none":
        raise ValueError(
            f"You passed a `{type(config).__name__}` with `bias={config.bias!r}`. Biases trained in a module that is "
            "dropped later would stay changed in the run but not be saved with it. Please set `bias='none'`."
        )
    if not isinstance(config, LoraConfig):
        return
    switches = [
        *("use_qalora", "use_bdlora", "alora_invocation_tokens"),
        *("velora_config", "monteclora_config", "arrow_config", "kasa_config"),
    ]
    variants = [name for name in switches if getattr(config, name, None)]
    if variants:
        raise ValueError(
            f"You passed a `LoraConfig` with `{variants[0]}`. A gate multiplies the output of `lora_A`, and this "
            "variant's effect is not proportional to it, so the search would score the wrong thing. Please use plain "
            "LoRA, or DoRA (`use_dora=True`)."
        )
    if config.lora_bias:
        raise ValueError(
            "You passed a `LoraConfig` with `lora_bias=True`. The bias of `lora_B` is not behind the gate, so the "
            "gate could not switch the module off. Please set `lora_bias=False`."
        )
    # Set by PEFT where it has tied them; in `modules_to_save` and `trainable_token_indices` the flag does no harm.
    if tied := getattr(config, "target_modules_to_tie", None):
        raise ValueError(
            f"You passed a `LoraConfig` with `ensure_weight_tying=True`, by which the LoRA of {sorted(tied)} is tied "
            "to that of the input embeddings. Were one of them pruned, PEFT would put it back when the adapter is "
            "loaded. Please leave `ensure_weight_tying` out, or the embeddings in `target_modules`."
        )
    if (reason := _CHANGES_BASE_WEIGHT.get(lora_start(config))) is not None:
        init = config.init_lora_weights
        raise ValueError(f"You passed a `LoraConfig` with `init_lora_weights={init!r}`: {reason}")
