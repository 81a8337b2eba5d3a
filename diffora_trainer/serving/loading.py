"""The base model of a saved adapter, of its class and of its sizes, and the adapter on it."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..compat.peft import PEFT_PREFIX, keys_not_loaded
from ..compat.transformers import loading_class, own_input_embeddings
from ..core.base_model import base_class, read_head
from ..core.files import ADAPTER_NAME, tensor_shapes
from .pairs import check_start


# Where in their module PEFT saves the weights of embeddings: as they are, under a LoRA, under trained tokens.
_PLACES = ("", "base_layer.", "token_adapter.base_layer.")
_IN_PYTHON = (
    "`PeftModel.from_pretrained({}.from_pretrained(base), adapter).merge_and_unload().save_pretrained(output)`"
)


def model_class(task_type: Any, config: Any = None, auto_mapping: Any = None) -> Any:
    """
    The class that loads a model.

    Args:
        task_type (`str` or `None`): PEFT's name of what is trained.
        config (`PretrainedConfig`, *optional*): the model's configuration; read where PEFT says nothing.
        auto_mapping (`dict`, *optional*): what PEFT has saved of the class where there is no task type.

    Raises:
        ValueError: if it is a class of the user's own, in a module that cannot be imported.
    """
    import transformers

    module, name = loading_class(task_type, auto_mapping, config)
    try:
        cls = getattr(importlib.import_module(module), name, None)
    except ImportError as error:
        raise ValueError(
            f"The base model is of class {name} from {module!r}, which cannot be imported here ({error}). Please put "
            "the folder that holds this module on PYTHONPATH, or merge in Python, with this class: "
            f"{_IN_PYTHON.format(name)}."
        ) from error
    of = getattr(cls, "config_class", None)
    if cls is not None and (config is None or of is None or isinstance(config, of)):
        return cls
    architectures = getattr(config, "architectures", None) or [""]
    return getattr(transformers, architectures[0], transformers.AutoModel)


def base_source(config: Any, base_model: Any) -> tuple[Any, dict[str, str]]:
    """
    Where the base model of an adapter is loaded from.

    Args:
        config (`PeftConfig`): the adapter's, which may name a revision of its base model.
        base_model (`str`, *optional*): folder or Hub id of the base model, where it is not where the adapter says.

    Returns:
        `tuple[Any, dict[str, str]]`: folder or Hub id, or `None` if neither says it; and the revision, as an argument
            of a `from_pretrained`, if there is one. It is of no other model.
    """
    named = config.base_model_name_or_path
    if config.revision and (not base_model or str(base_model) == named):
        return named, {"revision": config.revision}
    return base_model or named, {}


def load(folder: Path, config: Any, base_model: Any) -> Any:
    """The model with its adapter, of this configuration."""
    from peft import PeftModel
    from transformers import AutoConfig

    check_start(config, again=True)
    name, revision = base_source(config, base_model)
    if name is None:
        raise ValueError(
            f"The adapter in {folder} does not say what its base model is. Please name its folder or Hub id with "
            "`--base_model`."
        )
    found = AutoConfig.from_pretrained(name, **revision)
    cls = model_class(config.task_type, found, config.auto_mapping)
    saved = _saved_shapes(folder)
    options = read_head(folder)
    if "id2label" not in options and (outputs := _outputs(saved, cls, found)) is not None:
        options["num_labels"] = outputs
    base = _load_base(cls, (name, found), {**revision, **options}, saved)
    _fit_embeddings(base, saved)
    try:
        model = PeftModel.from_pretrained(base, folder)
    except (ValueError, RuntimeError) as error:  # it lacks the modules, or has them in other shapes
        if not saved:
            raise
        said = " ".join(str(error).split())
        raise ValueError(
            f"The adapter does not fit a {type(base).__name__}: {said[:300]} {_other_class(config)}"
        ) from error
    if left := keys_not_loaded(model, folder):
        raise ValueError(
            f"The adapter holds {left[0].removeprefix(PEFT_PREFIX)!r}"
            + (f" and {len(left) - 1} more weights" if len(left) > 1 else "")
            + f" for which a {type(base).__name__} has no place, so that they would be lost. {_other_class(config)}"
        )
    return model


def _load_base(cls: Any, base: tuple[Any, Any], options: dict[str, Any], saved: Mapping[str, tuple[int, ...]]) -> Any:
    """
    A base model, of its name and configuration. Where its own head has another number of outputs than that of the
    adapter, which takes its place, the weights of the old one are left out.
    """
    name, config = base
    number = len(options["id2label"]) if "id2label" in options else options.get("num_labels", config.num_labels)
    if number == config.num_labels:
        return cls.from_pretrained(name, **options)
    options = {"problem_type": None, **options}  # the old head's is another's
    model, info = cls.from_pretrained(name, ignore_mismatched_sizes=True, output_loading_info=True, **options)
    drawn = sorted(key for key, *_ in info["mismatched_keys"] if saved and key not in saved)
    if drawn:
        raise ValueError(
            f"The base model {name} holds {drawn[0]!r} in another shape than its configuration says, and the adapter "
            "holds no weight for it. Please check the folder of the base model."
        )
    return model


def _other_class(config: Any) -> str:
    """What to do where the class of the base model is not the one that the adapter was trained with."""
    module, name = base_class(config.task_type, config.auto_mapping) or ("", "")
    if module == "__main__":
        why = f"It was trained with {name}, a class of the script that trained it, which cannot be imported from here."
    else:
        why, name = "It does not say its class, if that is one of a script, or PEFT knows the task.", "TheClass"
    return f"{why} Please merge in Python, with this class: {_IN_PYTHON.format(name)}; or name another `--base_model`."


def _saved_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of an adapter, by the names of a base model's parameters."""
    if not (folder / ADAPTER_NAME).is_file():  # in a file of the older form
        return {}
    return {name.removeprefix(PEFT_PREFIX): shape for name, shape in tensor_shapes(folder / ADAPTER_NAME).items()}


def _fit_embeddings(model: Any, saved: Mapping[str, tuple[int, ...]]) -> None:
    """Give the embeddings of a base model the rows of those in an adapter, whose vocabulary may have grown."""
    inputs: Any = own_input_embeddings(model)
    if inputs is None:
        return
    embeddings = (inputs, model.get_output_embeddings())
    names = [name for name, module in model.named_modules() if any(module is part for part in embeddings)]
    for key in (f"{name}.{place}weight" for name in names for place in _PLACES):
        if key in saved and saved[key][0] != inputs.weight.shape[0]:
            model.resize_token_embeddings(saved[key][0], mean_resizing=False)  # the rows are replaced
            return


def _outputs(saved: Mapping[str, tuple[int, ...]], cls: Any, config: Any) -> int | None:
    """Outputs of a classifier that was trained along; its base model does not know them."""
    if all("lora_" in name for name in saved):
        return None
    # What has another shape with another number of classes is the head, whatever it is called.
    three, five = (_shapes(cls, config, number) for number in (3, 5))
    heads = [name for name, shape in three.items() if shape != five.get(name) and name in saved]
    return saved[heads[0]][0] if heads else None


def _shapes(cls: Any, config: Any, num_labels: int) -> dict[str, tuple[int, ...]]:
    found = copy.deepcopy(config)
    found.num_labels = num_labels
    return {name: tuple(parameter.shape) for name, parameter in on_meta(cls, found).named_parameters()}


def on_meta(cls: Any, config: Any) -> nn.Module:
    """A model without weights."""
    with torch.device("meta"):
        model: nn.Module = cls.from_config(config) if hasattr(cls, "from_config") else cls(config)
    return model
