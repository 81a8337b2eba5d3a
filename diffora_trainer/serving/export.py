"""
An adapter of a subset of modules as a server takes it.

What each server does with an adapter was read from its code (July to November 2026), not run: vLLM takes any subset of
modules but one rank and one scale; SGLang wants query, key and value, and gate and up, together; LoRAX and TGI drop a
kind of module for all layers, with a warning alone, if one layer lacks it; llama.cpp takes any subset at one alpha.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..adapters.base import extra_kinds
from ..compat.peft import PEFT_PREFIX, load_peft_config
from ..core.files import ADAPTER_CONFIG_NAME, ADAPTER_NAME, adapters_inside
from ..core.grid import OTHER_ROW, Grid
from ..core.units import find_units
from .loading import base_source, model_class, on_meta
from .mergeable import remedy
from .merged import write_merged
from .pairs import Pair, check_start, read_pairs


SERVERS = {
    "vllm": "one rank and one scale for all modules",
    "llama.cpp": "one rank and one scale for all modules",
    "sglang": "that, and query, key and value (gate and up) together in each layer",
    "lorax": "that, and each kind of module in all layers or in none; also for TGI",
    "merged": "the whole model with the adapter in its weights, for any server",
}
"""For what an adapter can be exported, and what that takes."""


def export(adapter: str | os.PathLike, server: str, output: str | os.PathLike, base_model: Any = None) -> Path:
    """
    Write an adapter as a server takes it. The update of the weights is the same: ranks are padded and missing pairs
    filled with zeros, and scales are multiplied into `lora_B`.

    Args:
        adapter (`str` or `os.PathLike`): folder of an adapter that PEFT has saved, by whatever training.
        server (`str`): one of `SERVERS`.
        output (`str` or `os.PathLike`): folder to write; it must not be there yet, or be empty.
        base_model (`str`, *optional*): folder or Hub id of the base model, where it is not where the adapter says.

    Returns:
        `Path`: the folder.

    Raises:
        ValueError: if there is no such server, the adapter cannot be brought into this form, or `output` is not empty.
        FileNotFoundError: if there is no adapter.
    """
    folder, target = Path(adapter), Path(output)
    if server not in SERVERS:
        raise ValueError(f"There is no export for {server!r}; there is one for {list(SERVERS)}.")
    if not (folder / ADAPTER_CONFIG_NAME).is_file():
        inside = [str(folder / name) for name in adapters_inside(folder)]
        raise FileNotFoundError(
            f"There is no adapter in {folder}: it has no {ADAPTER_CONFIG_NAME}."
            + (f" Inside of it there are adapters in {inside}. Please name one of these folders." if inside else "")
        )
    _check_is_all(folder)
    config = load_peft_config(folder)  # of the type that the file names
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} is there already and not empty. Please name another folder.")
    if target.resolve() == Path.cwd():
        raise ValueError(
            f"{target} is the current folder, which cannot be replaced. Please name a folder inside of it."
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    # A folder that is half-written when this is interrupted must not look like an adapter.
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as made:
        building = Path(made) / "export"
        building.mkdir()
        if server == "merged":
            write_merged(folder, building, config, base_model)
        else:
            _write_adapter(folder, building, config, server, base_model)
        if target.exists():
            target.rmdir()
        building.rename(target)
    return target


def _check_is_all(folder: Path) -> None:
    """Refuse an adapter that lies inside of a folder with what PEFT cannot hold, beside which it was trained."""
    above = folder.resolve().parent
    for kind in extra_kinds():
        if kind.adapter_folder == folder.resolve().name and kind.holds(above):
            loader = ".".join(kind.loader)
            raise ValueError(
                f"The adapter in {folder} was trained beside the {kind.name} in {above}, which no server takes, and "
                f"without them it is another model. Please load both with `{loader}.from_pretrained(base, "
                f"{str(above)!r})`."
            )


def _write_adapter(folder: Path, target: Path, config: Any, server: str, base_model: Any) -> None:
    from peft import PeftType
    from safetensors.torch import load_file, save_file

    if config.peft_type is not PeftType.LORA:
        raise ValueError(
            f"The adapter is of type {config.peft_type.value}, and what {server} takes holds the matrices of a LoRA "
            f"alone. {remedy(config)}"
        )
    check_start(config)
    pairs = read_pairs(load_file(folder / ADAPTER_NAME), config)
    layers: Mapping[str, nn.Module] = {}
    if server in ("sglang", "lorax"):
        layers = _linear_layers(config, base_model)
        pairs = _completed(pairs, layers, server)
    rank = max(pair.rank for pair in pairs.values())
    pairs = {module: pair.at(rank) for module, pair in pairs.items()}
    tensors = {}
    for module, pair in pairs.items():
        tensors[f"{PEFT_PREFIX}{module}.lora_A.weight"] = pair.a
        tensors[f"{PEFT_PREFIX}{module}.lora_B.weight"] = pair.b
    config.r = config.lora_alpha = rank
    config.rank_pattern, config.alpha_pattern = {}, {}
    config.use_rslora = False
    config.target_modules = _targets(pairs, layers)
    # What only says how an adapter began, or which of the modules it has
    config.init_lora_weights = True
    config.layers_to_transform = config.layers_pattern = config.exclude_modules = None
    if base_model is not None:
        config.revision = base_source(config, base_model)[1].get("revision")
        config.base_model_name_or_path = str(base_model)
    config.save_pretrained(str(target))
    save_file(tensors, target / ADAPTER_NAME, metadata={"format": "pt"})


def _completed(pairs: dict[str, Pair], layers: Mapping[str, nn.Module], server: str) -> dict[str, Pair]:
    """The pairs, and zeros for what a server wants beside them."""
    if unknown := [module for module in pairs if module not in layers]:
        raise ValueError(
            f"The adapter has a LoRA on {unknown[0]!r}, but the base model has no linear layer of this name. Please "
            "name the right one with `--base_model`."
        )
    grid = Grid.arrange([(name, 1, 1, "lora") for name in layers])
    if server == "lorax":
        layered = [site for site in grid.sites if grid.rows[site.row] != OTHER_ROW]
        kinds = {site.column for site in layered if site.name in pairs}
        wanted = [site.name for site in layered if site.column in kinds]
    else:
        units = find_units(grid, "group", {})
        used = {unit for unit, site in zip(units, grid.sites, strict=True) if site.name in pairs}
        wanted = [site.name for unit, site in zip(units, grid.sites, strict=True) if unit in used]
    some = next(iter(pairs.values()))
    return {**pairs, **{name: _zeros(layers[name], some) for name in wanted if name not in pairs}}


def _targets(pairs: Mapping[str, Pair], layers: Mapping[str, nn.Module]) -> set[str]:
    """Names for `target_modules`: kinds of module, where that says the same, or else every module."""
    kinds = {module.rsplit(".", 1)[-1] for module in pairs}
    of_kinds = {name for name in layers if name.rsplit(".", 1)[-1] in kinds}
    return kinds if of_kinds == set(pairs) else set(pairs)


def _zeros(layer: nn.Module, like: Pair) -> Pair:
    shape = tuple(layer.weight.shape)  # type: ignore[arg-type]
    outputs, inputs = shape if isinstance(layer, nn.Linear) else shape[::-1]  # GPT-2 has its weights the other way
    return Pair(like.a.new_zeros(like.rank, inputs), like.b.new_zeros(outputs, like.rank), 1.0)


def _linear_layers(config: Any, base_model: Any) -> dict[str, nn.Module]:
    """The linear layers of a base model, of which nothing but the configuration is read."""
    from transformers import AutoConfig
    from transformers.pytorch_utils import Conv1D

    name, revision = base_source(config, base_model)
    try:
        found = AutoConfig.from_pretrained(name, **revision)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The shapes of the other modules are those of the base model, whose configuration is not at {name!r}. "
            "Please name its folder or Hub id with `--base_model`."
        ) from error
    model = on_meta(model_class(config.task_type, found, config.auto_mapping), found)
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, (nn.Linear, Conv1D))}
