"""Shortcuts as a kind of site, which a search chooses among beside the LoRA modules."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel
from torch import nn

from ...adapters.base import AdapterSite, SiteKind, register_site_kind
from ...core.files import read_json, reraise_with_path, tensor_shapes
from .files import ADAPTER_FOLDER, SHORTCUT_CONFIG_NAME, SHORTCUT_TENSORS_NAME, holds_shortcuts
from .model import ShortcutModel, add_to_adapter, copy_inner_adapter, load_shortcuts
from .shortcuts import (
    KINDS,
    Shortcut,
    ShortcutConfig,
    add_shortcuts,
    keep_shortcuts,
    reconnect_shortcuts,
    shortcut_config,
    shortcuts,
)
from .structure import ATTRIBUTE


RANKINGS = ("combined", "separated")
_NAME = "shortcuts"
_MARK = f".{ATTRIBUTE}."
# What a checkpoint's shortcuts were trained under, and is not read from it again.
_OPTIONS = ("r", "lora_alpha", "kinds", "dropout")


class ShortcutSite(AdapterSite):
    """
    One shortcut. A gate multiplies what it adds.

    Args:
        name (`str`): its name, `"<layer>.<kind>"`.
        shortcut (`Shortcut`): the shortcut.
    """

    kind = _NAME

    def __init__(self, name: str, shortcut: Shortcut) -> None:
        super().__init__(name, len(shortcut.A))
        self.shortcut = shortcut

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [self.shortcut.A, self.shortcut.B]

    @property
    def gated(self) -> nn.Module:
        return self.shortcut

    @property
    def shape(self) -> tuple[Any, ...]:
        return type(self.shortcut).__name__, *self.shortcut.A.shape

    @property
    def enabled(self) -> bool:
        return self.shortcut.enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        self.shortcut.enabled = value
        self.shortcut.requires_grad_(value)

    def check(self) -> None:
        if not all(parameter.requires_grad for parameter in self.parameters):
            raise ValueError(
                f"The shortcut {self.name!r} is frozen, so it cannot be trained. Please load it with "
                "`is_trainable=True`, and call `add_shortcuts` after `get_peft_model`, which freezes all that it does "
                "not know."
            )


@register_site_kind
class ShortcutKind(SiteKind):
    """
    Shortcuts, which are saved beside an adapter. Options of `extra_sites={"shortcuts": {...}}`: `kinds`, those that
    each layer gets (all by default), and `ranking`, whether they compete with the LoRA modules for one budget
    (`"combined"`, the default) or have their own (`"separated"`).
    """

    name = _NAME
    parameter_marks = (_MARK,)
    adapter_folder = ADAPTER_FOLDER
    library = "diffora-trainer"
    loader = ("diffora_trainer", "ShortcutModel")

    def match(self, name: str, module: nn.Module, adapter_name: str) -> ShortcutSite | None:
        return ShortcutSite(name.replace(_MARK, "."), module) if isinstance(module, Shortcut) else None

    def prune(self, model: nn.Module, sites: Sequence[AdapterSite], adapter_name: str) -> None:
        keep_shortcuts(model, shortcuts(model).keys() - {site.name for site in sites})

    def reattach(self, model: nn.Module) -> None:
        reconnect_shortcuts(model)

    def install(self, model: nn.Module, options: Mapping[str, Any]) -> None:
        kinds, _ = _read(options)
        lora = model.peft_config[model.active_adapters[0]] if isinstance(model, PeftModel) else None
        # What is not LoRA is refused by the search.
        if isinstance(lora, LoraConfig) and not shortcuts(model):
            add_shortcuts(model, ShortcutConfig.like(lora, kinds))

    def unwrap(self, model: Any) -> Any:
        return model.model if isinstance(model, ShortcutModel) else model

    def separately(self, options: Mapping[str, Any]) -> bool:
        return _read(options)[1] == "separated"

    def installed(self, model: nn.Module) -> bool:
        return bool(shortcuts(model))

    def save(self, model: nn.Module, folder: str | os.PathLike) -> None:
        add_to_adapter(model, folder)

    def load(self, model: nn.Module, folder: str | os.PathLike) -> None:
        load_shortcuts(model, Path(folder))

    def holds(self, folder: str | os.PathLike) -> bool:
        return holds_shortcuts(folder)

    def copy(self, source: str | os.PathLike, target: str | os.PathLike) -> None:
        copy_inner_adapter(source, target)

    def card_note(self, count: int) -> str:
        return (
            f"{count} of the modules that were kept are *shortcuts*, low-rank connections after "
            "[HeteroLoRA](https://huggingface.co/papers/2406.14956) that a LoRA adapter cannot hold, so that "
            "`diffora-trainer` is needed to load it, and PEFT alone refuses to. Of these only `residual2` of a "
            "post-norm model, such as BERT, can be merged, by `model.merge_and_unload()`."
        )

    def check_whole(self, folder: str | os.PathLike, saved: bool) -> None:
        config, tensors = Path(folder, SHORTCUT_CONFIG_NAME), Path(folder, SHORTCUT_TENSORS_NAME)
        if saved:
            with reraise_with_path(config):
                read_json(config)
            tensor_shapes(tensors)
        elif config.is_file():  # the Trainer would read the adapter that was saved with them
            raise ValueError(
                f"The checkpoint {os.fspath(folder)!r} is a mixture: its model has no shortcuts, so {config.name} is "
                f"left of an earlier one, as uploads to the Hub remove nothing. Please delete it, {tensors.name} and "
                f"{ADAPTER_FOLDER}/ there."
            )

    def check_fits(self, folder: str | os.PathLike, model: nn.Module, sites: Sequence[AdapterSite]) -> None:
        path, config_path = Path(folder, SHORTCUT_TENSORS_NAME), Path(folder, SHORTCUT_CONFIG_NAME)
        with reraise_with_path(config_path):
            config = ShortcutConfig.from_json(config_path.read_text(encoding="utf-8"))
        present = shortcut_config(model)
        for name in _OPTIONS:
            then, now = getattr(config, name), getattr(present, name)
            if then != now:
                raise ValueError(
                    f"The checkpoint {os.fspath(folder)!r} does not fit this run: `{name}` of the shortcuts in "
                    f"{config_path.name} differ(s) (saved: {then!r:.200}, now: {now!r:.200}). Please resume with the "
                    "model, data and options that the run was started with."
                )
        names = {site.name for site in sites}
        expected = {
            f"{site.name}.{part}": tuple(parameter.shape)
            for site in sites
            for part, parameter in zip("AB", site.parameters, strict=True)
        }
        saved = tensor_shapes(path)
        if saved != expected or (config.names is not None and set(config.names) != names):
            raise ValueError(
                f"{str(path)!r} does not fit diffora_state.json beside it: it holds {len(saved)} tensors of shortcuts "
                f"where {len(expected)} are needed, or others. Please resume from another checkpoint."
            )


def _read(options: Mapping[str, Any]) -> tuple[tuple[str, ...], str]:
    """The kinds and the ranking that options ask for."""
    if unknown := sorted(set(options) - {"kinds", "ranking"}):
        raise ValueError(f"You passed the option {unknown[0]!r} of shortcuts; there are 'kinds' and 'ranking'.")
    kinds, ranking = options.get("kinds"), options.get("ranking", RANKINGS[0])
    if not isinstance(ranking, str) or ranking not in RANKINGS:
        raise ValueError(f"You passed `ranking={ranking!r}` of shortcuts; it must be one of {list(RANKINGS)}.")
    if kinds is None:
        return KINDS, ranking
    if not isinstance(kinds, (list, tuple)):
        raise TypeError(f"`kinds` of shortcuts must be a list of names, got {kinds!r}.")
    known = all(isinstance(kind, str) and kind in KINDS for kind in kinds)
    if not known or not kinds or len(set(kinds)) != len(kinds):
        raise ValueError(
            f"You passed `kinds={kinds!r}` of shortcuts; it must name one or more of {list(KINDS)}, each once. To "
            "have all of them, leave it out."
        )
    return tuple(kinds), ranking
