"""
An adapter of a subset of modules as a server takes it.

What each server does with an adapter was read from its code (July to November 2026), not run: vLLM takes any subset of
modules but one rank and one scale; SGLang wants query, key and value, and gate and up, together; LoRAX and TGI drop a
kind of module for all layers, with a warning alone, if one layer lacks it; llama.cpp takes any subset at one alpha.
"""

from __future__ import annotations

import copy
import importlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..compat import own_input_embeddings
from ..core.base_model import LABELS_NAME, base_class
from ..core.files import read_json
from ..core.grid import OTHER_ROW, Grid
from ..core.units import find_units
from ..logging import get_logger
from .pairs import PREFIX, Pair, check_start, read_pairs


logger = get_logger(__name__)

SERVERS = {
    "vllm": "one rank and one scale for all modules",
    "llama.cpp": "one rank and one scale for all modules",
    "sglang": "that, and query, key and value (gate and up) together in each layer",
    "lorax": "that, and each kind of module in all layers or in none; also for TGI",
    "merged": "the whole model with the adapter in its weights, for any server",
}
"""For what an adapter can be exported, and what that takes."""

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


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
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"There is no adapter in {folder}: it has no {CONFIG}.")
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
            _write_merged(folder, building, base_model)
        else:
            _write_adapter(folder, building, server, base_model)
        if target.exists():
            target.rmdir()
        building.rename(target)
    return target


def _write_merged(folder: Path, target: Path, base_model: Any) -> None:
    from transformers import AutoTokenizer

    model, name = _load(folder, base_model)
    untied = _untie(model)
    try:
        merge = getattr(model, "merge_and_unload", None)
        if merge is None:  # virtual tokens
            raise NotImplementedError
        merged = merge()
    except NotImplementedError as error:
        kind = model.peft_config[model.active_adapter].peft_type.value
        raise ValueError(
            f"The adapter is of type {kind}, which PEFT cannot merge into the weights of the base model. Please load "
            "it with PEFT."
        ) from error
    if untied:  # one weight still, where PEFT merges one change into both (trained tokens, `ensure_weight_tying`)
        tied = merged.get_input_embeddings().weight is merged.get_output_embeddings().weight
        for config in (merged.config, merged.config.get_text_config()):
            config.tie_word_embeddings = tied
    merged.save_pretrained(target)
    for source in (folder, name):
        try:
            AutoTokenizer.from_pretrained(source).save_pretrained(target)
            return
        except (OSError, ValueError, ImportError):  # there is none, or one that cannot be read here
            continue
    logger.warning(f"Neither the adapter nor {name} has a tokenizer; please add it to the merged model.")


def _write_adapter(folder: Path, target: Path, server: str, base_model: Any) -> None:
    from peft import LoraConfig, PeftType
    from safetensors.torch import load_file, save_file

    config = LoraConfig.from_pretrained(str(folder))
    if config.peft_type is not PeftType.LORA:  # PEFT gives the class that the file names
        raise ValueError(
            f"The adapter is of type {config.peft_type.value}, and what {server} takes holds the matrices of a LoRA "
            "alone. Please export it with `--for merged`, which takes every type that PEFT can merge into the weights."
        )
    check_start(config)
    pairs = read_pairs(load_file(folder / WEIGHTS), config)
    layers: Mapping[str, nn.Module] = {}
    if server in ("sglang", "lorax"):
        layers = _linear_layers(config, base_model)
        pairs = _completed(pairs, layers, server)
    rank = max(pair.rank for pair in pairs.values())
    pairs = {module: pair.at(rank) for module, pair in pairs.items()}
    tensors = {}
    for module, pair in pairs.items():
        tensors[f"{PREFIX}{module}.lora_A.weight"] = pair.a
        tensors[f"{PREFIX}{module}.lora_B.weight"] = pair.b
    config.r = config.lora_alpha = rank
    config.rank_pattern, config.alpha_pattern = {}, {}
    config.use_rslora = False
    config.target_modules = _targets(pairs, layers)
    # What only says how an adapter began, or which of the modules it has
    config.init_lora_weights = True
    config.layers_to_transform = config.layers_pattern = config.exclude_modules = None
    if base_model is not None:
        config.base_model_name_or_path = str(base_model)
    config.save_pretrained(str(target))
    save_file(tensors, target / WEIGHTS, metadata={"format": "pt"})


def _completed(pairs: dict[str, Pair], layers: Mapping[str, nn.Module], server: str) -> dict[str, Pair]:
    """The pairs, and zeros for what a server wants beside them."""
    if unknown := [module for module in pairs if module not in layers]:
        raise ValueError(
            f"The adapter has a LoRA on {unknown[0]!r}, and the base model no linear layer of this name. Please name "
            "the right one with `--base_model`."
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

    name = base_model or config.base_model_name_or_path
    try:
        found = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The shapes of the other modules are those of the base model, whose configuration is not at {name!r}. "
            "Please name its folder or Hub id with `--base_model`."
        ) from error
    model = _on_meta(model_class(config.task_type, found, config.auto_mapping), found)
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, (nn.Linear, Conv1D))}


def model_class(task_type: Any, config: Any = None, auto_mapping: Any = None) -> Any:
    """
    The class that loads a model.

    Args:
        task_type (`str` or `None`): PEFT's name of what is trained.
        config (`PretrainedConfig`, *optional*): the model's configuration; read where PEFT says nothing.
        auto_mapping (`dict`, *optional*): what PEFT has saved of the class where there is no task type.
    """
    import transformers

    module, name = base_class(task_type, auto_mapping) or ("transformers", "")
    cls = getattr(importlib.import_module(module), name, None)
    of = getattr(cls, "config_class", None)
    if cls is not None and (config is None or of is None or isinstance(config, of)):
        return cls
    architectures = getattr(config, "architectures", None) or [""]
    return getattr(transformers, architectures[0], transformers.AutoModel)


def _load(folder: Path, base_model: Any) -> tuple[Any, str]:
    """The model with its adapter, and where the base model is from."""
    from peft import PeftConfig, PeftModel
    from transformers import AutoConfig

    config = PeftConfig.from_pretrained(str(folder))
    check_start(config, again=True)
    name = base_model or config.base_model_name_or_path
    if name is None:
        raise ValueError(
            f"The adapter in {folder} does not say what its base model is. Please name its folder or Hub id with "
            "`--base_model`."
        )
    found = AutoConfig.from_pretrained(name)
    cls = model_class(config.task_type, found, config.auto_mapping)
    options: dict[str, Any] = {}
    if (folder / LABELS_NAME).is_file():
        names = {int(index): str(label) for index, label in read_json(folder / LABELS_NAME).items()}
        options = {"id2label": names, "label2id": {label: index for index, label in names.items()}}
    elif (outputs := _outputs(folder, cls, found)) is not None:
        options["num_labels"] = outputs
    return PeftModel.from_pretrained(cls.from_pretrained(name, **options), folder), str(name)


def _outputs(folder: Path, cls: Any, config: Any) -> int | None:
    """Outputs of a classifier that was trained along; its base model does not know them."""
    from safetensors import safe_open

    with safe_open(folder / WEIGHTS, "pt") as file:
        saved = {n.removeprefix(PREFIX): n for n in file.keys() if n.startswith(PREFIX) and "lora_" not in n}
        # What has another shape with another number of classes is the head, whatever it is called.
        shapes = [_shapes(cls, config, number) for number in (3, 5)] if saved else [{}, {}]
        heads = [name for name, shape in shapes[0].items() if shape != shapes[1].get(name) and name in saved]
        return int(file.get_slice(saved[heads[0]]).get_shape()[0]) if heads else None


def _shapes(cls: Any, config: Any, num_labels: int) -> dict[str, tuple[int, ...]]:
    found = copy.deepcopy(config)
    found.num_labels = num_labels
    return {name: tuple(parameter.shape) for name, parameter in _on_meta(cls, found).named_parameters()}


def _on_meta(cls: Any, config: Any) -> nn.Module:
    """A model without weights."""
    with torch.device("meta"):
        model: nn.Module = cls.from_config(config) if hasattr(cls, "from_config") else cls(config)
    return model


def _untie(model: Any) -> bool:
    """
    Give the input and the output embeddings of a model weights of their own where an adapter acts on one of them:
    merged into the weight that both share, it would change both.

    Returns:
        `bool`: whether they were tied and an adapter acts on them, so that they may differ once it is merged.

    Raises:
        ValueError: if the model ties more than these two.
    """
    base = model.get_base_model()
    if (inputs := own_input_embeddings(base)) is None:  # as in a model of audio
        return False
    embeddings = [inputs, base.get_output_embeddings()]
    adapted = [part for part in embeddings if isinstance(part, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    if not adapted or not getattr(base.config.get_text_config(), "tie_word_embeddings", False):
        return False
    if None in embeddings or base.config.is_encoder_decoder:
        raise ValueError(
            f"The adapter acts on the embeddings of {type(base).__name__}, which shares their weight with other "
            "layers, so a merged model cannot hold it. Please load the adapter with PEFT."
        )
    for part in adapted:
        if isinstance(part, BaseTunerLayer):
            layer: Any = part.get_base_layer()
            layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
    return True
