"""Whether a checkpoint belongs to the model and the search that are resumed with it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..adapters.grid import searched_modules
from ..core.files import ADAPTER_CONFIG_NAME, ADAPTER_FOLDER, ADAPTER_NAME, SHORTCUT_CONFIG_NAME, SHORTCUT_TENSORS_NAME
from ..experimental.shortcuts.hooks import ATTRIBUTE
from ..experimental.shortcuts.shortcuts import Shortcut, ShortcutConfig, shortcut_config
from .checkpoint import STATE_NAME, reraise_with_path, tensor_shapes


# What a checkpoint's weights were trained under, and is not read from it again.
_LORA_OPTIONS = ("r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern")
_SHORTCUT_OPTIONS = ("r", "lora_alpha", "kinds", "dropout")


def describe_base(model: Any) -> dict[str, Any]:
    """What a checkpoint tells base models apart by: it does not hold their weights."""
    added = (".lora_", f".{ATTRIBUTE}.")
    parameters = sum(p.numel() for name, p in model.named_parameters() if not any(part in name for part in added))
    # FSDP2 makes a class of its own of a model's.
    return {"class": type(model.get_base_model()).__name__.removeprefix("FSDP"), "parameters": parameters}


def check_model(
    folder: str, record: dict[str, Any], model: Any, modules: Sequence[str], adapted: Sequence[str]
) -> None:
    """
    Raise a `ValueError` if the weights in a checkpoint are not those of this model.

    Args:
        folder (`str`): the checkpoint.
        record (`dict`): its state.
        model (`PeftModel`): the model, with the modules of the checkpoint or with those from before its cut.
        modules (`Sequence[str]`): the modules from before the cut, by the state.
        adapted (`Sequence[str]`): the modules that are trained in the checkpoint, by the state.
    """
    if record["base_model"] != (present := describe_base(model)):
        raise ValueError(
            f"The checkpoint {folder!r} was made for another base model (saved: {record['base_model']}, now: "
            f"{present}). Please resume with the model of the run."
        )
    adapter_name = model.active_adapters[0]
    layers: dict[str, Any] = dict(searched_modules(model, adapter_name))
    if set(layers) not in (set(modules), set(adapted)):
        raise ValueError(
            f"The checkpoint {folder!r} was made for other LoRA modules ({short(list(modules))}) than this model has "
            f"({short(list(layers))}). Please resume with the model, `target_modules` and `shortcuts` of the run."
        )
    shortcuts = [name for name in adapted if isinstance(layers[name], Shortcut)]
    if shortcuts:
        _check_shortcuts(folder, model, {name: layers[name] for name in shortcuts})
        path = Path(folder, ADAPTER_FOLDER, ADAPTER_NAME)
    else:
        path = Path(folder, "" if adapter_name == "default" else adapter_name, ADAPTER_NAME)
    saved = {name: shape for name, shape in tensor_shapes(path).items() if ".lora_" in name}
    expected = {
        f"base_model.model.{name}.lora_{part}.weight": tuple(
            getattr(layers[name], f"lora_{part}")[adapter_name].weight.shape
        )
        for name in adapted
        if not isinstance(layers[name], Shortcut)
        for part in "AB"
    }
    if saved != expected:
        differing = sorted(n for n in {*saved, *expected} if saved.get(n) != expected.get(n))
        raise ValueError(
            f"{str(path)!r} does not fit {STATE_NAME} beside it and this model in {len(differing)} tensors, such as "
            f"{differing[0]!r} (saved: {saved.get(differing[0])}, needed: {expected.get(differing[0])}). Please "
            "resume with the model and the LoRA configuration of the run, or from another checkpoint."
        )
    options = json.loads(path.with_name(ADAPTER_CONFIG_NAME).read_text(encoding="utf-8"))
    config = model.peft_config[adapter_name]
    check_same(folder, {f"`{name}` of the LoRA": (options.get(name), getattr(config, name)) for name in _LORA_OPTIONS})


def _check_shortcuts(folder: str, model: Any, shortcuts: dict[str, Shortcut]) -> None:
    """Raise a `ValueError` if the shortcuts in a checkpoint are not those that its state names, in this model."""
    path, config_path = Path(folder, SHORTCUT_TENSORS_NAME), Path(folder, SHORTCUT_CONFIG_NAME)
    with reraise_with_path(config_path):
        config = ShortcutConfig.from_json(config_path.read_text(encoding="utf-8"))
    present = shortcut_config(model)
    check_same(
        folder,
        {
            f"`{name}` of the shortcuts in {SHORTCUT_CONFIG_NAME}": (getattr(config, name), getattr(present, name))
            for name in _SHORTCUT_OPTIONS
        },
    )
    expected = {f"{name}.{part}": tuple(getattr(s, part).shape) for name, s in shortcuts.items() for part in "AB"}
    saved = tensor_shapes(path)
    if saved != expected or (config.names is not None and set(config.names) != set(shortcuts)):
        raise ValueError(
            f"{str(path)!r} does not fit {STATE_NAME} beside it: it holds {len(saved)} tensors of shortcuts where "
            f"{len(expected)} are needed, or others. Please resume from another checkpoint."
        )


def check_same(folder: str, values: dict[str, tuple[Any, Any]]) -> None:
    """
    Raise a `ValueError` if something in a checkpoint differs from the run that is resumed with it.

    Args:
        folder (`str`): the checkpoint.
        values (`dict[str, tuple]`): what is saved and what is present, by what it is.
    """
    for what, (saved, present) in values.items():
        if saved != present:
            raise ValueError(
                f"The checkpoint {folder!r} does not fit this run: {what} differ(s) (saved: {short(saved)}, now: "
                f"{short(present)}). Please resume with the model, data and options that the run was started with."
            )


def short(value: Any) -> str:
    """A value for a message, cut to 200 characters."""
    text = repr(value)
    return text if len(text) <= 200 else text[:197] + "..."
