"""
What a place that can have an adapter has to do for a search, whatever the adapter is.

A search asks a *site* what it has to know, and never of which kind it is. LoRA is one kind
([`~diffora_trainer.adapters.lora.LoraKind`]); another one is a subclass of [`SiteKind`] and one of [`AdapterSite`] in
a module that registers it, and nothing else has to know of it.
"""

# ruff: noqa: B027 (a kind overrides what it needs)

from __future__ import annotations

import importlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from importlib.metadata import entry_points
from typing import Any, ClassVar, Protocol, TypeVar

from peft import PeftType
from torch import Tensor, nn

from ..compat.peft import PEFT_PREFIX
from ..config import DiffoRAConfig
from ..core.values import parse_mapping
from .matrices import Adapter


ENTRY_POINTS = "diffora_trainer.sites"
"""The entry-point group in which another package names the modules that register its kinds of site."""
_OWN = {"shortcuts": "diffora_trainer.experimental.shortcuts"}
"""Kinds of site of this package that nothing imports until one is asked for, with the modules that register them."""


def plain_name(name: str) -> str:
    """The name of a module in the base model, from its name in the `PeftModel`."""
    return name.removeprefix(PEFT_PREFIX)


def peft_name(name: str) -> str:
    """The name of a module in the `PeftModel`, from its name in the base model."""
    return PEFT_PREFIX + name


Scale = Callable[[nn.Module, Any, Tensor], Tensor | None]
"""Multiplies what a module of a site has computed, as a forward hook does; `None` leaves it as it is."""


class Handle(Protocol):
    """A removable gate hook."""

    def remove(self) -> None:
        """Remove the hook."""


class AdapterSite(Adapter):
    """
    One place of a live model that has an adapter.

    Args:
        name (`str`): its name in the base model.
        rank (`int`): rank of its adapter; 1 if its parameters do not belong to units of rank alone (see [`cost`]).
    """

    kind: ClassVar[str]
    """Name of its [`SiteKind`]."""
    peft_type: ClassVar[PeftType | None] = None
    """The type of the configuration of such an adapter, if it is one of PEFT."""
    foldable: ClassVar[bool] = True
    """Whether a gate can be multiplied into the weights, so that the adapter alone does what it did under it."""
    shareable: ClassVar[bool] = False
    """Whether it can be trained together with another site of equal shape: by [`share`]."""

    @property
    @abstractmethod
    def shape(self) -> tuple[Any, ...]:
        """What must be equal for two sites to share their parameters."""

    @property
    @abstractmethod
    def enabled(self) -> bool:
        """Whether the adapter takes part in the model. One that does not is not called, and not trained."""

    @enabled.setter
    @abstractmethod
    def enabled(self, value: bool) -> None: ...

    @property
    def merged(self) -> bool:
        """Whether the adapter stands in the weight of its module for now, and takes no part of its own."""
        return False

    @abstractmethod
    def check(self) -> None:
        """Raise a `ValueError` if a gate cannot scale the adapter exactly, or it cannot be trained."""

    def check_prunable(self) -> None:
        """Raise a `ValueError` if pruning it would not give the model that it had before the adapter."""

    def attach(self, scale: Scale) -> Handle:
        """
        Let a gate act, for as long as its handle is not removed. An adapter whose effect is not proportional to the
        output of any module calls `scale` elsewhere: with [`gated`], whose mode says which gates apply, and the part
        of what it computes that is the adapter's whole contribution, or follows from it linearly.
        """
        return self.gated.register_forward_hook(scale)

    @property
    def scales_gated(self) -> bool:
        """Whether a gate multiplies the output of what is [`gated`], and acts nowhere else (see [`attach`])."""
        return type(self).attach is AdapterSite.attach

    def freeze(self) -> None:
        """Train it no further: from now on it takes part in the model as it is."""
        for parameter in self.parameters:
            parameter.requires_grad_(False)

    @property
    def num_components(self) -> int:
        """
        How many gates can act on its components, each on one: as many as it has, where each output of what is
        [`gated`] is one of its [`matrices`]' components; 1, if a gate multiplies the adapter as a whole.
        """
        apart = self.scales_gated and isinstance(self.gated, nn.Linear) and self.matrices is not None
        return self.rank if apart else 1

    def fold_components(self, factors: Tensor) -> None:
        """Multiply gates of its components, [`num_components`] of them, into the weights for good. See [`fold`]."""
        if self.matrices is None or len(factors) == 1:
            self.fold(float(factors))
            return
        up = self.matrices[1]
        self.multiply(up, factors.reshape(1, -1, *[1] * (up.ndim - 2)))

    @property
    def resizable(self) -> bool:
        """Whether it can be given another rank: each output of what is [`gated`] is a component of the adapter."""
        return False

    def has_effect_beyond(self, rank: int) -> bool:
        """Whether more than its first components change what the model computes: of a new adapter, none does."""
        return bool(self.parameters[-1].detach()[:, rank:].any())

    def resize(self, components: Sequence[int], optimizer: Any = None) -> None:
        """
        Keep some components alone. They keep their weights, and these their moments in the optimizer.

        Args:
            components (`Sequence[int]`): their indices, in the order in which they stay.
            optimizer (`torch.optim.Optimizer`, *optional*): the live optimizer of the weights.
        """
        raise ValueError(f"{self.name!r} is of the kind {self.kind!r}, which has no rank that could be changed.")

    def share(self, other: Any) -> None:
        """Take over the parameters of another site of equal shape, to be trained together."""
        raise ValueError(f"{self.name!r} is of the kind {self.kind!r}, which shares no parameters.")


class SiteKind(ABC):
    """
    A kind of adapter, with what has to be done for all of its sites at once. Register a subclass with
    [`register_site_kind`].

    A kind that a plain PEFT adapter cannot hold (`in_adapter = False`) has to save and load itself; an adapter that
    was trained beside it has to be refused by PEFT, or it would be silently loaded without it.
    """

    name: ClassVar[str]
    in_adapter: ClassVar[bool] = False
    """Whether a plain PEFT adapter holds such sites. At least one that it holds is always kept."""
    adapter_folder: ClassVar[str] = ""
    """Where in a folder PEFT's adapter is saved beside such sites."""
    library: ClassVar[str] = "peft"
    """The library by which a model with such sites is loaded, as the Hub calls it."""
    loader: ClassVar[tuple[str, str]] = ("peft", "PeftModel")
    """Module and name of the class whose `from_pretrained(model, folder)` loads it."""

    @property
    def parameter_marks(self) -> tuple[str, ...]:
        """Texts of which the name of each of its parameters in a model contains one, and no other name any."""
        mark: str | None = getattr(self, "parameter_mark", None)  # of a kind that was written for version 0.1.0
        if mark is None:
            raise NotImplementedError(f"{type(self).__name__} does not say what its parameters are called.")
        return (mark,)

    def prepare(self, model: nn.Module, adapter_name: str) -> None:
        """Note what a site has to know of the start of its adapter. Called whenever the sites of a model are read."""

    @abstractmethod
    def match(self, name: str, module: nn.Module, adapter_name: str) -> AdapterSite | None:
        """
        The site that a module of a model is, if it is one of this kind.

        Args:
            name (`str`): name of the module, without PEFT's prefix.
            module (`nn.Module`): the module.
            adapter_name (`str`): the adapter that is searched.
        """

    @abstractmethod
    def prune(self, model: nn.Module, sites: Sequence[AdapterSite], adapter_name: str) -> None:
        """Take sites of this kind out of a model for good."""

    def install(self, model: nn.Module, options: Mapping[str, Any]) -> None:
        """Put sites of this kind into a `PeftModel`, by the options that stand in `DiffoRAConfig(extra_sites=...)`."""
        raise ValueError(f"Sites of the kind {self.name!r} cannot be put into a model by a configuration.")

    def reattach(self, model: nn.Module) -> None:
        """
        Put the sites of this kind where they act, after sites of any kind were pruned: what one hangs on may be
        another module now.
        """

    def unwrap(self, model: Any) -> Any:
        """The model inside one that the `loader` has given; any other as it is."""
        return model

    def separately(self, options: Mapping[str, Any]) -> bool:
        """Whether these options rank the kind apart from the others, under a budget of its own."""
        return False

    # Files of a kind that a plain PEFT adapter does not hold

    def installed(self, model: nn.Module) -> bool:
        """Whether a model has sites of this kind."""
        return False

    def save(self, model: nn.Module, folder: str | os.PathLike) -> None:
        """Complete a folder in which PEFT has just saved a model; without such sites, remove what is left of them."""

    def load(self, model: nn.Module, folder: str | os.PathLike) -> None:
        """Put what was saved in a folder into a model that has such sites."""

    def holds(self, folder: str | os.PathLike) -> bool:
        """Whether what was saved last in a folder has such sites."""
        return False

    def copy(self, source: str | os.PathLike, target: str | os.PathLike) -> None:
        """Complete a folder to which the files of another one were copied, but not its folders."""

    def card_note(self, count: int) -> str:
        """What a model card says of loading a model that keeps so many sites of this kind, in Markdown."""
        return ""

    def check_whole(self, folder: str | os.PathLike, saved: bool) -> None:
        """Raise a `ValueError` if a checkpoint that has, or has not, `saved` such sites is not whole."""

    def check_fits(self, folder: str | os.PathLike, model: nn.Module, sites: Sequence[AdapterSite]) -> None:
        """Raise a `ValueError` if what a checkpoint holds are not these sites of a model."""


_KINDS: dict[str, SiteKind] = {}
_Kind = TypeVar("_Kind", bound=type[SiteKind])


def register_site_kind(kind: _Kind) -> _Kind:
    """
    Let searches find the sites of a kind. A decorator for subclasses of [`SiteKind`].

    Args:
        kind (`type`): the class. A kind that was registered under its name before is replaced.

    Returns:
        `type`: the class, unchanged.
    """
    _KINDS[kind.name] = kind()
    return kind


def site_kinds() -> tuple[SiteKind, ...]:
    """All kinds of site that are registered."""
    return tuple(_KINDS.values())


def extra_kinds() -> tuple[SiteKind, ...]:
    """
    The kinds that a plain PEFT adapter does not hold: all that are installed, for a folder may have the files of one
    that nothing in this process has asked for.
    """
    load_installed()
    for name in _OWN:
        site_kind(name)
    return tuple(kind for kind in site_kinds() if not kind.in_adapter)


def extra_sites_of(config: DiffoRAConfig) -> dict[str, Any]:
    """The kinds beside LoRA that a configuration asks for, by name, with the options of each."""
    return parse_mapping("extra_sites", config.extra_sites)  # it has parsed them itself, which its type does not say


def kinds_of(model: nn.Module) -> tuple[SiteKind, ...]:
    """Those of [`extra_kinds`] of which a model has sites."""
    return tuple(kind for kind in extra_kinds() if kind.installed(model))


@cache
def load_installed() -> None:
    """Import what other packages name in the entry-point group."""
    for entry in entry_points(group=ENTRY_POINTS):
        entry.load()


def site_kind(name: str) -> SiteKind:
    """
    A kind of site by its name: a registered one, one of the entry-point group `diffora_trainer.sites`, or one of this
    package.

    Raises:
        ValueError: if there is none.
    """
    if name not in _KINDS:
        for entry in entry_points(group=ENTRY_POINTS, name=name):
            entry.load()
    if name not in _KINDS and name in _OWN:
        importlib.import_module(_OWN[name])
    if name not in _KINDS:
        raise ValueError(f"There is no kind of site {name!r}; known are {sorted({*_KINDS, *_OWN})}.")
    return _KINDS[name]


def find_sites(model: nn.Module, adapter_name: str) -> dict[str, AdapterSite]:
    """The sites of a model by their names in the base model, in the model's order."""
    found = {}
    load_installed()
    for kind in _KINDS.values():
        kind.prepare(model, adapter_name)
    for name, module in model.named_modules():
        for kind in _KINDS.values():
            site = kind.match(plain_name(name), module, adapter_name)
            if site is not None:
                found[site.name] = site
    return found


def prune_sites(model: nn.Module, sites: Iterable[AdapterSite], adapter_name: str) -> None:
    """Take sites out of a model for good, kind by kind."""
    groups: dict[str, list[AdapterSite]] = {}
    for site in sites:
        groups.setdefault(site.kind, []).append(site)
    for name, group in groups.items():
        site_kind(name).prune(model, group, adapter_name)
    for kind in site_kinds():
        kind.reattach(model)
