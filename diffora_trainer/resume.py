"""Whether a checkpoint belongs to the model and the search that are resumed with it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .checkpoint import ADAPTER_CONFIG_NAME, ADAPTER_NAME, STATE_NAME, tensor_shapes
from .grid import lora_layers


# What a checkpoint's weights were trained under, and is not read from it again.
_LORA_OPTIONS = ("r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern")


def describe_base(model: Any) -> dict[str, Any]:
    """What a checkpoint tells base models apart by: it does not hold their weights."""
    parameters = sum(p.numel() for name, p in model.named_parameters() if ".lora_" not in name)
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
        adapted (`Sequence[str]`): the modules that have a LoRA in the checkpoint, by the state.
    """
    if record["base_model"] != (present := describe_base(model)):
        raise ValueError(
            f"The checkpoint {folder!r} was made for another base model (saved: {record['base_model']}, now: "
            f"{present}). Please resume with the model of the run."
        )
    adapter_name = model.active_adapters[0]
    layers: dict[str, Any] = dict(lora_layers(model, adapter_name))
    if set(layers) not in (set(modules), set(adapted)):
        raise ValueError(
            f"The checkpoint {folder!r} was made for other LoRA modules ({short(list(modules))}) than this model has "
            f"({short(list(layers))}). Please resume with the model and `target_modules` of the run."
        )
    path = Path(folder, "" if adapter_name == "default" else adapter_name, ADAPTER_NAME)
    saved = {name: shape for name, shape in tensor_shapes(path).items() if ".lora_" in name}
    expected = {
        f"base_model.model.{name}.lora_{part}.weight": tuple(
            getattr(layers[name], f"lora_{part}")[adapter_name].weight.shape
        )
        for name in adapted
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
