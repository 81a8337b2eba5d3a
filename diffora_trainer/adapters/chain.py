"""
A LoRA that grows from round to round: earlier rounds stay as they are, and only the last one is trained.

Of `k` rounds of rank `r` the adapter is one LoRA of rank `k * r`, their sum, at the scaling that each has had. That is
what it would do had each round been merged into the base weights, which are not touched: they may be quantized, and no
update is rounded to their precision.
"""

from __future__ import annotations

import json
import math
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.files import ADAPTER_CONFIG_NAME
from .base import find_sites
from .lora import LoraSite
from .optimizer import innermost, widen_weight
from .pruning import own_config, write_ranks


@dataclass
class _Rounds:
    """What is known of the rounds of one layer: the rank of each, and the weights of the earlier ones."""

    size: int
    earlier: tuple[Tensor, Tensor] | None = None
    masked: tuple[Any, Any] | None = None
    """Weak references to the parameters whose gradients are masked: a copy of a model has others, without hooks."""


class Chain:
    """
    The rounds of the LoRA of a model.

    Args:
        model (`PeftModel`): the model, whose adapter is the first round.
        train_a (`bool`): whether `lora_A` is trained, or stays as it is drawn.

    Raises:
        ValueError: if its adapter cannot grow.
    """

    def __init__(self, model: Any, train_a: bool) -> None:
        self.model = model
        self.train_a = train_a
        self.adapter_name = str(model.active_adapters[0])
        if not self._sites():
            raise ValueError("The model has no LoRA that could grow. Please check its `target_modules`.")
        for site in self._sites():
            if not site.resizable:
                raise ValueError(
                    f"The adapter of {site.name!r} cannot grow: only a plain LoRA of a linear layer that is not "
                    "sharded can. Please leave it out of `target_modules`, or train without a chain of rounds."
                )
            if not isinstance(site.layer.lora_dropout[self.adapter_name], nn.Identity):
                raise ValueError(
                    "The LoRA has a dropout, which would act on earlier rounds too, as if they were still trained. "
                    "Please set `lora_dropout=0`."
                )
            rounds = vars(site.layer).setdefault("diffora_rounds", {})
            if self.adapter_name not in rounds:
                rounds[self.adapter_name] = _Rounds(site.rank)
                site.layer.register_load_state_dict_pre_hook(_grow_to_loaded)

    def _sites(self) -> list[LoraSite]:
        return [site for site in find_sites(self.model, self.adapter_name).values() if isinstance(site, LoraSite)]

    @property
    def rank(self) -> int:
        """The largest rank of all its rounds together."""
        return max(site.rank for site in self._sites())

    @property
    def rank_of_round(self) -> int:
        """The largest rank of one round."""
        return max(site.layer.diffora_rounds[self.adapter_name].size for site in self._sites())

    def add_round(self, optimizer: Any, seed: int) -> None:
        """
        Begin another round: `lora_A` random, as PEFT starts it, `lora_B` at 0, and the optimizer's state anew.

        Args:
            optimizer (`torch.optim.Optimizer`): the live optimizer, or one that wraps it.
            seed (`int`): what the random numbers are drawn from.
        """
        generator = torch.Generator().manual_seed(seed)
        for site in self._sites():
            self._check_earlier(site)
            a, _ = _weights(site)
            rows = torch.empty(site.layer.diffora_rounds[self.adapter_name].size, a.shape[1])
            nn.init.kaiming_uniform_(rows, a=math.sqrt(5), generator=generator)
            _grow(site.layer, self.adapter_name, rows, optimizer)
        self.train_last(optimizer)

    def train_last(self, optimizer: Any) -> None:
        """See to it that the last round alone is trained, also after the adapter was loaded or pruned."""
        sites = self._sites()
        _check_no_decay([p for site in sites for p in _weights(site)], optimizer)
        changed = False
        for site in sites:
            rounds, (a, b) = site.layer.diffora_rounds[self.adapter_name], _weights(site)
            if rounds.masked is not None and rounds.masked[0]() is a and rounds.masked[1]() is b:
                continue
            before = site.rank - rounds.size
            rounds.masked = weakref.ref(a), weakref.ref(b)
            rounds.earlier = a.detach()[:before].clone(), b.detach()[:, :before].clone()
            _mask(a, 0, before if self.train_a else site.rank)
            _mask(b, 1, before)
            changed = True
        if changed:
            own_config(self.model, self.adapter_name)
            write_ranks(self.model, self.adapter_name, sites)

    def _check_earlier(self, site: LoraSite) -> None:
        """Raise a `ValueError` if an optimizer has moved what has no gradient."""
        rounds, (a, b) = site.layer.diffora_rounds[self.adapter_name], _weights(site)
        if rounds.earlier is None:
            return
        before = len(rounds.earlier[0])
        if not (torch.equal(a[:before], rounds.earlier[0]) and torch.equal(b[:, :before], rounds.earlier[1])):
            raise ValueError(
                f"The optimizer has moved the earlier rounds of {site.name!r}, which have no gradient. Please use one "
                "that leaves a weight alone whose gradient is 0, such as AdamW without weight decay."
            )


def grow_to_checkpoint(folder: Path, model: Any) -> None:
    """Give a chain the rank that its adapter has in a checkpoint. Nothing happens to a model that has none."""
    adapter_name = str(model.active_adapters[0])
    sites = [site for site in find_sites(model, adapter_name).values() if isinstance(site, LoraSite)]
    rounds = [vars(site.layer).get("diffora_rounds", {}).get(adapter_name) for site in sites]
    file = folder / ADAPTER_CONFIG_NAME
    if not sites or None in rounds or not file.is_file():
        return
    saved = json.loads(file.read_text(encoding="utf-8"))
    for site, known in zip(sites, rounds, strict=True):
        missing = saved["r"] - site.rank
        if missing > 0 and missing % known.size == 0 and not saved.get("rank_pattern"):
            a, _ = _weights(site)
            _grow(site.layer, adapter_name, torch.zeros(missing, a.shape[1]), None)
    own_config(model, adapter_name)
    write_ranks(model, adapter_name, [LoraSite(site.name, site.layer, adapter_name) for site in sites])


def _weights(site: LoraSite) -> tuple[nn.Parameter, nn.Parameter]:
    layer: Any = site.layer
    return layer.lora_A[site.adapter_name].weight, layer.lora_B[site.adapter_name].weight


def _grow(layer: Any, adapter_name: str, rows: Tensor, optimizer: Any) -> None:
    """Append components to a LoRA, which keeps its scaling."""
    site = LoraSite("", layer, adapter_name)
    a, b = layer.lora_A[adapter_name], layer.lora_B[adapter_name]
    rank = site.rank + len(rows)
    alpha = site._alpha(rank)
    widen_weight(a, 0, rows, optimizer)
    widen_weight(b, 1, torch.zeros(b.weight.shape[0], len(rows)), optimizer)
    a.out_features = b.in_features = rank
    layer.lora_alpha[adapter_name], layer.r[adapter_name] = alpha, rank


def _grow_to_loaded(layer: Any, state: dict[str, Tensor], prefix: str, *args: Any) -> None:
    """Before weights are loaded into a layer: those of a checkpoint may have more rounds."""
    for adapter_name, rounds in vars(layer).get("diffora_rounds", {}).items():
        loaded = state.get(f"{prefix}lora_A.{adapter_name}.weight")
        if loaded is None or adapter_name not in layer.lora_A:
            continue
        missing = loaded.shape[0] - layer.r[adapter_name]
        if missing > 0 and missing % rounds.size == 0:
            _grow(layer, adapter_name, torch.zeros(missing, loaded.shape[1]), None)
        rounds.masked = rounds.earlier = None  # what is loaded is other than what was there


def _mask(parameter: nn.Parameter, dim: int, before: int) -> None:
    """Let the first entries along a dimension have no gradient."""
    if before:

        def mask(gradient: Tensor) -> Tensor:
            gradient = gradient.clone()
            gradient.narrow(dim, 0, before).zero_()
            return gradient

        trained = parameter.requires_grad
        parameter.requires_grad_(True).register_hook(mask)  # it may be frozen for now
        parameter.requires_grad_(trained)


def _check_no_decay(parameters: list[nn.Parameter], optimizer: Any) -> None:
    own = set(parameters)
    for group in innermost(optimizer).param_groups:
        if group.get("weight_decay") and own & set(group["params"]):
            raise ValueError(
                f"The LoRA is trained with a weight decay of {group['weight_decay']}, which would shrink its earlier "
                "rounds. Please set `weight_decay=0`."
            )
