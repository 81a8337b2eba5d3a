"""
A LoRA that grows from round to round: earlier rounds stay as they are, and only the last one is trained.

Of `k` rounds of rank `r` the adapter is one LoRA of rank `k * r`, their sum, at the scaling that each has had. That is
what it would do had each round been merged into the base weights, which are not touched: they may be quantized, and no
update is rounded to their precision.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..compat.peft import frozen_adapters
from ..core.files import ADAPTER_NAME, tensor_shapes
from .base import find_sites, peft_name
from .lora import LoraSite
from .optimizer import innermost, parameters_of, widen_weight
from .pruning import own_config, write_ranks


@dataclass
class _Rounds:
    """
    What is known of the rounds of one layer: the rank of each, that of all together, and the weights of the earlier
    ones.
    """

    size: int
    total: int
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
                rounds[self.adapter_name] = _Rounds(site.rank, site.rank)
                site.layer.register_load_state_dict_pre_hook(_grow_to_loaded)

    def _sites(self) -> list[LoraSite]:
        return _lora_sites(self.model, self.adapter_name)

    def _growing(self) -> list[LoraSite]:
        """The sites that are trained: but those that a choice has left frozen (`unselected="freeze"`)."""
        return [site for site in self._sites() if self.adapter_name not in frozen_adapters(site.layer)]

    @property
    def rank(self) -> int:
        """The largest rank of all its rounds together."""
        return max(site.rank for site in self._growing())

    @property
    def rank_of_round(self) -> int:
        """The largest rank of one round."""
        return max(_rounds_of(site.layer, self.adapter_name).size for site in self._growing())

    def add_round(self, optimizer: Any, seed: int) -> None:
        """
        Begin another round: `lora_A` random, as PEFT starts it, `lora_B` at 0, and the optimizer's state anew.

        Args:
            optimizer (`torch.optim.Optimizer`): the live optimizer, or one that wraps it.
            seed (`int`): what the random numbers are drawn from.
        """
        generator = torch.Generator(device="cpu").manual_seed(seed)
        for site in self._growing():
            self._check_earlier(site)
            a, _ = _weights(site)
            shape = (_rounds_of(site.layer, self.adapter_name).size, a.shape[1])
            rows = torch.empty(shape, dtype=torch.float32, device="cpu")
            nn.init.kaiming_uniform_(rows, a=math.sqrt(5), generator=generator)
            _grow(site.layer, self.adapter_name, rows, optimizer)
        self.train_last(optimizer)

    def train_last(self, optimizer: Any) -> None:
        """See to it that the last round alone is trained, also after the adapter was loaded or pruned."""
        sites = self._growing()
        _check_no_decay([p for site in sites for p in _weights(site)], optimizer)
        changed = False
        for site in sites:
            rounds, (a, b) = _rounds_of(site.layer, self.adapter_name), _weights(site)
            if rounds.masked is not None and rounds.masked[0]() is a and rounds.masked[1]() is b:
                continue
            before = site.rank - rounds.size
            rounds.masked = weakref.ref(a), weakref.ref(b)
            rounds.earlier = a.detach()[:before].clone(), b.detach()[:, :before].clone()
            _mask(a, 0, before if self.train_a else site.rank)
            if not self.train_a:  # what a search has left there would move it without a gradient
                innermost(optimizer).state.pop(a, None)
            _mask(b, 1, before)
            changed = True
        if changed:
            trained = {parameter for site in sites for parameter in _weights(site)[0 if self.train_a else 1 :]}
            _check_held({parameter for parameter in trained if parameter.requires_grad}, optimizer)
            own_config(self.model, self.adapter_name)
            write_ranks(self.model, self.adapter_name, self._sites())

    def _check_earlier(self, site: LoraSite) -> None:
        """Raise a `ValueError` if an optimizer has moved what has no gradient."""
        rounds, (a, b) = _rounds_of(site.layer, self.adapter_name), _weights(site)
        if rounds.earlier is None:
            return
        before = len(rounds.earlier[0])
        if not (torch.equal(a[:before], rounds.earlier[0]) and torch.equal(b[:, :before], rounds.earlier[1])):
            raise ValueError(
                f"The optimizer has moved the earlier rounds of {site.name!r}, which have no gradient. Please use one "
                "that leaves a weight alone whose gradient is 0, such as AdamW without weight decay."
            )


def in_chain(site: Any) -> bool:
    """Whether the adapter of a site is to grow from round to round."""
    return isinstance(site, LoraSite) and site.adapter_name in vars(site.layer).get("diffora_rounds", {})


def grow_to_checkpoint(folder: Path, model: Any) -> None:
    """Give a chain the rank that its adapter has in a checkpoint. Nothing happens to a model that has none."""
    adapter_name = str(model.active_adapters[0])
    if not (found := _chained(folder, model)):
        return
    grown = False
    for site, saved in found:
        missing = saved - site.rank
        if missing > 0 and missing % _rounds_of(site.layer, adapter_name).size == 0:
            a, _ = _weights(site)
            _grow(site.layer, adapter_name, torch.zeros(missing, a.shape[1]), None)
            grown = True
    if grown:  # else the patterns stay as their user has written them
        own_config(model, adapter_name)
        write_ranks(model, adapter_name, [LoraSite(site.name, site.layer, adapter_name) for site, _ in found])


def rounds_in_checkpoint(folder: Path, model: Any, ranks: Mapping[str, int]) -> int:
    """
    How many rounds the chain of a model has in a checkpoint; 1 if there is none.

    Args:
        folder (`Path`): where its adapter is.
        model (`PeftModel`): the model.
        ranks (`Mapping[str, int]`): the rank of one round of each module that the adapter has.
    """
    return max([saved // ranks[site.name] for site, saved in _chained(folder, model) if ranks.get(site.name)] or [1])


def _chained(folder: Path, model: Any) -> list[tuple[LoraSite, int]]:
    """The sites of a model in which each is one of a chain, and their ranks in a saved adapter; 0 if it has none."""
    adapter_name, file = str(model.active_adapters[0]), folder / ADAPTER_NAME
    sites = _lora_sites(model, adapter_name)
    if not file.is_file() or not all(_rounds_of(site.layer, adapter_name) for site in sites):
        return []
    shapes = tensor_shapes(file)
    return [(site, shapes.get(f"{peft_name(site.name)}.lora_A.weight", (0,))[0]) for site in sites]


def _lora_sites(model: Any, adapter_name: str) -> list[LoraSite]:
    """The sites of a model that PEFT's adapter has: others have no rounds."""
    return [site for site in find_sites(model, adapter_name).values() if isinstance(site, LoraSite)]


def _rounds_of(layer: Any, adapter_name: str) -> Any:
    """What is known of the rounds of a layer; nothing if it has none."""
    rounds = vars(layer).get("diffora_rounds", {}).get(adapter_name)
    if rounds is not None and rounds.total != layer.r[adapter_name]:
        # It was given another rank by a choice: what is left is the first round, and the others get its rank.
        rounds.size = rounds.total = layer.r[adapter_name]
        rounds.masked = rounds.earlier = None
    return rounds


def _weights(site: LoraSite) -> tuple[nn.Parameter, nn.Parameter]:
    layer: Any = site.layer
    return layer.lora_A[site.adapter_name].weight, layer.lora_B[site.adapter_name].weight


def _grow(layer: Any, adapter_name: str, rows: Tensor, optimizer: Any) -> None:
    """Append components to a LoRA, which keeps its scaling."""
    site, rounds = LoraSite("", layer, adapter_name), _rounds_of(layer, adapter_name)
    a, b = layer.lora_A[adapter_name], layer.lora_B[adapter_name]
    rank = site.rank + len(rows)
    alpha = site._alpha(rank)
    widen_weight(a, 0, rows, optimizer)
    widen_weight(b, 1, torch.zeros(b.weight.shape[0], len(rows)), optimizer)
    a.out_features = b.in_features = rank
    layer.lora_alpha[adapter_name], layer.r[adapter_name] = alpha, rank
    rounds.total = rank


def _grow_to_loaded(layer: Any, state: dict[str, Tensor], prefix: str, *args: Any) -> None:
    """Before weights are loaded into a layer: those of a checkpoint may have more rounds."""
    for adapter_name in vars(layer).get("diffora_rounds", {}):
        rounds = _rounds_of(layer, adapter_name)
        loaded = state.get(f"{prefix}lora_A.{adapter_name}.weight")
        if loaded is None:
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


def _check_held(parameters: set[nn.Parameter], optimizer: Any) -> None:
    if missing := parameters - parameters_of(optimizer):
        raise ValueError(
            f"The optimizer does not hold {len(missing)} of the {len(parameters)} matrices of the rounds, so they "
            "would not be trained. Please make it of the LoRA parameters that the model has now."
        )


def _check_no_decay(parameters: list[nn.Parameter], optimizer: Any) -> None:
    own = set(parameters)
    for group in innermost(optimizer).param_groups:
        if group.get("weight_decay") and own & set(group["params"]):
            raise ValueError(
                f"The LoRA is trained with a weight decay of {group['weight_decay']}, which would shrink its earlier "
                "rounds. Please set `weight_decay=0`."
            )
