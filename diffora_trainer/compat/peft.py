"""Private and version-dependent names of PEFT."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from peft import LoraConfig, PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _check_lora_target_modules_mamba,
    _find_minimal_target_modules,
    _maybe_include_all_linear_layers,
)
from peft.tuners.vera import VeraModel
from torch import Tensor, nn


convert_peft_config_for_transformers: Any
try:
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
except ImportError:
    convert_peft_config_for_transformers = None


# Modules in which PEFT keeps an entry for each adapter, by its name
_BY_ADAPTER = (nn.ModuleDict, nn.ParameterDict, BufferDict)

# Tuners that have `merge_and_unload` and no weights into which they could be merged: PEFT raises, or, of X-LoRA, whose
# scales are computed from each input, merges something else.
_NEVER_MERGED = ("LILY", "POLY", "SHADOW", "XLORA")

PEFT_PREFIX = "base_model.model."
"""What PEFT puts before the names of a base model's modules and weights, in all versions."""

VERA_LOADER = "PEFT 0.21"
"""The first version that loads the shared matrices of a saved VeRA. Goes with these before it."""

LOADS_VERA_MATRICES = hasattr(VeraModel, "_remap_adapter_state_dict_for_load")
"""
Whether PEFT loads the shared matrices of a saved VeRA. Before 0.21 it passes them over, since it looks for them
without the name of the adapter, and goes on with those that it has drawn. Goes with these versions.
"""


PLAIN_STARTS = ("gaussian", "orthogonal", "eva", "mica")
"""Starts of a LoRA beside the usual one (`init_lora_weights`) that leave the base weights as they are."""

SUBTRACTED_STARTS = ("pissa", "olora")
"""Those that are taken out of the base weights, and are the same each time they are computed."""

EXACT_STARTS = (*SUBTRACTED_STARTS, "loftq")
"""
Those that change the base weights in the same way each time. What is in no table ("pissa_niter", "corda", "lora_ga")
may change them in another way each time. That is so in `LoraLayer.update_layer` up to PEFT 0.21.
"""


def modules_of_adapters(model: nn.Module) -> set[nn.Module]:
    """The modules that the adapters of a model consist of, without those that they adapt."""
    found: set[nn.Module] = set()
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            found |= {*layer.modules()} - {*layer.get_base_layer().modules()}
    return found


def lora_start(config: Any) -> str | None:
    """What the LoRA of a configuration starts as, if not as usual. PEFT takes variants of some names."""
    start = getattr(config, "init_lora_weights", None)
    if not isinstance(start, str):
        return None
    families = [family for family in ("pissa_niter", "corda") if start.startswith(family)]
    return families[0] if families else start.lower()


def load_peft_config(source: str | os.PathLike) -> PeftConfig:
    """
    The configuration of an adapter in a folder or on the Hub. A type that PEFT does not know, as of an adapter with
    shortcuts, is a `ValueError`: PEFT raises a `KeyError`, in all versions. So is a file of another tool, of which it
    raises a `TypeError`. Goes when PEFT says it.
    """
    try:
        return PeftConfig.from_pretrained(os.fspath(source))
    except KeyError as error:
        raise ValueError(
            f"The adapter in {os.fspath(source)} is of a type that PEFT does not know: {error.args[0]}."
        ) from error
    except (TypeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"The configuration of the adapter in {os.fspath(source)} is not one of PEFT's: {str(error).rstrip('.')}. "
            "Please pass an adapter that PEFT has saved."
        ) from error


def merges(config: PeftConfig) -> bool:
    """
    Whether PEFT can merge adapters of the type of a configuration into the weights: its tuner is a `BaseTuner`, which
    virtual tokens have not, and not one of a few, in PEFT 0.18 to 0.21. Goes when PEFT says it of a configuration.
    """
    kind = PeftType(config.peft_type)
    return issubclass(PEFT_TYPE_TO_TUNER_MAPPING.get(kind, nn.Module), BaseTuner) and kind.value not in _NEVER_MERGED


def adapters_disabled(model: Any) -> bool:
    """
    Whether a model is inside `disable_adapter()`: `PeftModel._adapters_disabled` in all versions. Goes with
    a public property of the model.
    """
    return getattr(model, "_adapters_disabled", False) is True


def adapters_in_use(model: Any) -> frozenset[str]:
    """
    Names of the adapters of a `PeftModel` that take part in a pass made now, none inside `disable_adapter()`: in all
    versions `active_adapters` alone names those that are switched off too. Goes with [`adapters_disabled`].
    """
    return frozenset(() if adapters_disabled(model) else model.active_adapters)


def keep_frozen(layer: Any, adapter_name: str, weights: Collection[str] | None = None) -> None:
    """
    Leave weights of an adapter of one layer frozen where PEFT makes adapters trainable, as it does at the end of each
    `disable_adapter()`: by `frozen_peft_weight_names`, or before PEFT 0.21, which has no such names, by its
    `set_adapter`. Goes when PEFT leaves alone what was frozen.

    Args:
        layer (`LoraLayer`): the layer; what is trainable in it now stays as it is.
        adapter_name (`str`): one of its adapters.
        weights (`Collection[str]`, *optional*): names of those of its `adapter_layer_names` that stay frozen, in place
            of those of an earlier call; by default all of them, for good.
    """
    kept = tuple(layer.adapter_layer_names if weights is None else weights)
    by_adapter = vars(layer).setdefault("diffora_frozen", {})
    names = getattr(layer, "frozen_peft_weight_names", None)
    # What PEFT itself leaves frozen (in its MiCA one factor) stays on its list when ours are taken off.
    own = by_adapter[adapter_name][1] if adapter_name in by_adapter else (names or {}).get(adapter_name)
    by_adapter[adapter_name] = kept, own
    if names is None:
        layer.set_adapter = partial(_set_adapter, layer)
    else:
        layer.frozen_peft_weight_names = {**names, adapter_name: tuple(dict.fromkeys((*(own or ()), *kept)))}


def _set_adapter(layer: Any, *args: Any, **kwargs: Any) -> None:
    """`set_adapter` of PEFT before 0.21, and then what [`keep_frozen`] leaves frozen."""
    type(layer).set_adapter(layer, *args, **kwargs)
    for adapter_name, (weights, _) in vars(layer)["diffora_frozen"].items():
        for weight in weights:
            if adapter_name in (held := getattr(layer, weight)):
                held[adapter_name].requires_grad_(False)


def keep_frozen_no_longer(layer: Any, adapter_name: str) -> None:
    """Undo [`keep_frozen`]: PEFT makes all weights of the adapter trainable again that it did before."""
    by_adapter = vars(layer).get("diffora_frozen", {})
    if adapter_name not in by_adapter:
        return
    _, own = by_adapter.pop(adapter_name)
    names = getattr(layer, "frozen_peft_weight_names", None)
    if names is not None:
        others = {name: weights for name, weights in names.items() if name != adapter_name}
        layer.frozen_peft_weight_names = others if own is None else {**others, adapter_name: own}
    elif not by_adapter:
        vars(layer).pop("set_adapter", None)


@contextmanager
def kept_frozen(layer: Any, adapter_name: str) -> Iterator[None]:
    """[`keep_frozen`] of all weights of an adapter for a while; what an earlier call leaves frozen stays so."""
    earlier = vars(layer).get("diffora_frozen", {}).get(adapter_name)
    keep_frozen(layer, adapter_name)
    try:
        yield
    finally:
        if earlier is None:
            keep_frozen_no_longer(layer, adapter_name)
        else:
            keep_frozen(layer, adapter_name, earlier[0])


def is_kept_frozen(layer: Any, adapter_name: str) -> bool:
    """Whether [`keep_frozen`] leaves weights of an adapter of one layer frozen."""
    return adapter_name in vars(layer).get("diffora_frozen", {})


def frozen_adapters(layer: Any) -> set[str]:
    """
    The adapters of one layer that [`keep_frozen`] leaves frozen as a whole: it notes them on the layer, in all
    versions.
    """
    whole = set(layer.adapter_layer_names)
    return {name for name, (weights, _) in vars(layer).get("diffora_frozen", {}).items() if whole <= set(weights)}


class _Replaced:
    """A method of one object that something else stands in for, until `remove()`."""

    def __init__(self, owner: Any, name: str, stand_in: Callable[..., Any]) -> None:
        self._owner, self._name = owner, name
        setattr(owner, name, stand_in)

    def remove(self) -> None:
        vars(self._owner).pop(self._name, None)


def hook_lookup(layer: Any, hook: Callable[[Tensor], Tensor]) -> _Replaced:
    """
    Let a function change what the LoRA of an embedding looks up, before its second matrix: what `Embedding._embed`
    returns, in all versions. Goes when PEFT holds the two matrices as modules.
    """
    embed = layer._embed
    return _Replaced(layer, "_embed", lambda *args, **kwargs: hook(embed(*args, **kwargs)))


def shortened_targets(targets: Collection[str], others: Collection[str]) -> set[str]:
    """
    The suffixes by which PEFT finds many target modules: `_find_minimal_target_modules` in all versions. Goes when
    PEFT no longer shortens a list that it is given.
    """
    return _find_minimal_target_modules(targets, others)  # type: ignore[arg-type]


def all_linear_modules(config: LoraConfig, model: nn.Module) -> set[str]:
    """
    Names of the modules that `target_modules="all-linear"` stands for in a base model, without the output embeddings.

    Reads `peft.tuners.tuners_utils._maybe_include_all_linear_layers`, the same in PEFT 0.18 to 0.21. A public function
    that resolves the short form would let it go.
    """
    probe: Any = LoraConfig(target_modules="all-linear", task_type=config.task_type)
    _maybe_include_all_linear_layers(probe, model)
    return set(probe.target_modules)


def refused_modules(config: PeftConfig, model: nn.Module, names: Collection[str]) -> set[str]:
    """
    Those modules of a base model, by their names, that PEFT refuses to adapt: with LoRA `out_proj` of Mamba and its
    kin, whose weight a fused kernel reads past the adapter.

    Reads `peft.tuners.tuners_utils._check_lora_target_modules_mamba`, the same in PEFT 0.18 to 0.21, which looks at
    the last part of a name and at the configuration of the model. It can go when "all-linear" stands for what PEFT can
    adapt.
    """
    found = set()
    for name in names:
        try:
            _check_lora_target_modules_mamba(config, model, name.rpartition(".")[2])
        except ValueError:
            found.add(name)
    return found


def converted_to_parameters(target_modules: str | list[str], model: nn.Module) -> set[str] | None:
    """
    The parameters of fused experts that PEFT adapts when these target modules are asked for, because it takes them for
    experts by their names; `None` if it refuses them, being a part of fused ones. Only the configuration of the model
    is read, unless a string has to be resolved.

    Reads `peft.utils.transformers_weight_conversion.convert_peft_config_for_transformers`, which newer versions of
    PEFT call on every configuration (seen in 0.21); PEFT 0.18 has none and adapts the modules as named. It can go when
    gates can act on adapted parameters.
    """
    if convert_peft_config_for_transformers is None:
        return set()
    probe = LoraConfig(target_modules=target_modules)
    try:
        convert_peft_config_for_transformers(probe, model=model, conversions=None)
    except ValueError:
        return None
    return set(probe.target_parameters or ())


def rewrites_all_linear(model: nn.Module) -> bool:
    """
    Whether PEFT puts something else in the place of `target_modules="all-linear"` for a model, because it knows it as
    a mixture of experts: PEFT 0.21 the modules and the parameters of fused experts, PEFT 0.19 the letters of the word,
    with which it then finds nothing. Reads and goes as [`converted_to_parameters`].
    """
    if convert_peft_config_for_transformers is None:
        return False
    probe = LoraConfig(target_modules="all-linear")
    convert_peft_config_for_transformers(probe, model=model, conversions=None)
    return probe.target_modules != "all-linear" or bool(probe.target_parameters)


def keys_not_loaded(model: Any, folder: str | os.PathLike) -> list[str]:
    """
    Keys in the file of an adapter that the model it was loaded into has no place for, in order.

    `PeftModel.from_pretrained` silently drops them; `load_adapter`, of an adapter that is there already, returns
    them, in PEFT 0.18 to 0.21. It is passed `_checkpoint_conversion_mapping` of the model, names of older versions of
    transformers, as there. What lies where each adapter has an entry is a second copy (embeddings that have grown and
    are in `modules_to_save`), or what a version passes over (see `LOADS_VERA_MATRICES`). Goes when PEFT tells of them.
    """
    base, name = model.get_base_model(), model.active_adapter
    if model.peft_config[name].is_prompt_learning:  # whose file holds nothing else
        return []
    mapping = getattr(base, "_checkpoint_conversion_mapping", {})
    found = model.load_adapter(str(folder), name, torch_device="cpu", key_mapping=mapping)
    entries = {
        place for place, module in model.named_modules(remove_duplicate=False) if isinstance(module, _BY_ADAPTER)
    }
    return sorted(key for key in found.unexpected_keys if not {key, key.rpartition(".")[0]} & entries)


def calls_around_hooks(module: Any, base: Any) -> bool:
    """
    Whether a module is what PEFT has put around a model and calls the model's `forward` itself, around its hooks:
    `BaseTuner.forward` (PEFT 0.18 to 0.21). Goes when it calls the model.
    """
    return isinstance(module, BaseTuner) and module.model is base
