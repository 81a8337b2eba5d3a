"""The sites of a live model and the grid in which they stand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig, PeftModel
from torch import nn

from ..core.grid import Grid
from .base import AdapterSite, find_sites, site_kind, site_kinds
from .compiled import check_not_compiled
from .fused import check_not_fused
from .lora import check_lora_config, searchable
from .starts import check_plain


@dataclass(frozen=True)
class AdapterGrid:
    """
    The sites of a model, as a search chooses among them.

    Args:
        adapter_name (`str`): the PEFT adapter they belong to.
        grid ([`~diffora_trainer.core.grid.Grid`]): where they stand.
        sites (`tuple[AdapterSite, ...]`): they themselves, in the order of the grid.
    """

    adapter_name: str
    grid: Grid
    sites: tuple[AdapterSite, ...]

    @classmethod
    def from_model(cls, model: nn.Module, adapter_name: str | None = None) -> AdapterGrid:
        """
        Read the sites of a PEFT model.

        Args:
            model (`PeftModel`): a model with a LoRA adapter.
            adapter_name (`str`, *optional*): which adapter; defaults to the active one, and has to be it.

        Raises:
            TypeError: if the model is not a `PeftModel`, or the adapter is not LoRA.
            ValueError: if the adapter has no layer, is not the only active one, is merged, disabled or frozen, or is
                of a variant whose effect a gate cannot scale exactly, or if modules share their weights.
        """
        config = _check_adapter(model, adapter_name)
        assert isinstance(model, PeftModel)
        adapter_name = adapter_name or model.active_adapters[0]
        found = find_sites(model, adapter_name)
        if not any(site_kind(site.kind).in_adapter for site in found.values()):
            raise ValueError(
                f"The adapter {adapter_name!r} has no LoRA layer in this model, so there is nothing to choose from. "
                f"Please check `target_modules` (it is {config.target_modules!r}); 'all-linear' fits most models."
            )
        for site in found.values():
            site.check()
        check_plain(found.values())
        _check_not_shared(found)
        grid = Grid.arrange([(site.name, site.rank, site.cost, site.kind) for site in found.values()])
        return cls(adapter_name, grid, tuple(found[name] for name in grid.names))

    @property
    def in_adapter(self) -> tuple[bool, ...]:
        """Whether a plain PEFT adapter holds each site."""
        return tuple(site_kind(kind).in_adapter for kind in self.grid.kinds)

    def named(self, names: Sequence[str]) -> list[AdapterSite]:
        """The sites of these names."""
        wanted = set(names)
        return [site for site in self.sites if site.name in wanted]


def describe_base(model: Any) -> dict[str, Any]:
    """What a checkpoint tells base models apart by: it does not hold their weights."""
    added = [mark for kind in site_kinds() for mark in kind.parameter_marks]
    parameters = sum(p.numel() for name, p in model.named_parameters() if not any(part in name for part in added))
    # FSDP2 makes a class of its own of a model's.
    return {"class": type(model.get_base_model()).__name__.removeprefix("FSDP"), "parameters": parameters}


def only_active(model: PeftModel, adapter_name: str | None = None) -> str:
    """
    The name of the adapter that is searched or pruned; by default the active one.

    Raises:
        ValueError: if there is none of that name, or it is not the one and only active adapter. A module that is
            pruned, or off for a while, is without any: another one that acts beside it would be off there too.
    """
    active = list(model.active_adapters)
    if adapter_name is not None and adapter_name not in model.peft_config:
        raise ValueError(
            f"You passed `adapter_name={adapter_name!r}`, but the model's adapters are {sorted(model.peft_config)}. "
            "Please pass one of them, or none for the active one."
        )
    if adapter_name is None and len(active) == 1:
        return active[0]
    if active != [adapter_name]:
        named = "one" if adapter_name is None else repr(adapter_name)
        call = "name" if adapter_name is None else repr(adapter_name)
        raise ValueError(
            f"The model has {len(active)} active adapters ({active}), but {named} alone has to be active, since a "
            f"module without it is the base model's. Please call `model.set_adapter({call})`; what another adapter "
            "is to add goes into the base model first (load that one alone, `model.merge_and_unload()`)."
        )
    return active[0]


def _check_not_shared(sites: Mapping[str, AdapterSite]) -> None:
    owners: dict[nn.Parameter, str] = {}
    for name, site in sites.items():
        for parameter in site.parameters:
            other = owners.setdefault(parameter, name)
            if other != name and parameter.requires_grad:
                raise ValueError(
                    f"The adapters of {other!r} and {name!r} share one weight, as after a search with "
                    "`weight_sharing`, so neither can be kept, pruned or resized alone. Please save the adapter and "
                    "load it into a fresh base model, where each has its own, or search without `weight_sharing`."
                )


def _check_adapter(model: nn.Module, adapter_name: str | None) -> Any:
    check_not_compiled(model)
    if not isinstance(model, PeftModel):
        raise TypeError(
            f"Expected a `peft.PeftModel` with a LoRA adapter, got {type(model).__name__}. Please wrap the model with "
            "`peft.get_peft_model`, or pass `peft_config` to the trainer."
        )
    adapter_name = only_active(model, adapter_name)
    config = model.peft_config[adapter_name]
    if not isinstance(config, LoraConfig) and not searchable(config):
        raise TypeError(
            f"The adapter {adapter_name!r} is configured by {type(config).__name__}; only LoRA modules can be "
            "searched. Please pass a `peft.LoraConfig`."
        )
    check_lora_config(config)
    check_not_fused(model)
    return config
