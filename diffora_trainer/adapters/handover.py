"""What was chosen, as the LoRA configuration of another run."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

from peft import LoraConfig

from ..core.files import ADAPTER_CONFIG_NAME, ADAPTER_NAME, file_at, write_file
from ..core.selection import Selection
from .lora import peft_model
from .pruning import finds


def lora_config_of(config: LoraConfig, selection: Selection, where: str) -> LoraConfig:
    """
    The LoRA of a pruned adapter, for a model that has none yet.

    Args:
        config (`LoraConfig`): that of the adapter; it is not changed.
        selection ([`Selection`]): what was chosen.
        where (`str`): what both are of, for an error.

    Raises:
        ValueError: if the adapter is not that of the selection, or what was chosen is more than a configuration can
            say: modules that share a pair, or other kinds of site.
    """
    if selection.shared or selection.frozen or len(selection.lora_modules) != len(selection.adapted):
        raise ValueError(
            f"What was chosen in {where} holds modules that share a pair of LoRA matrices, that are frozen, or that "
            "are not LoRA modules, which no `LoraConfig` can express. Please choose without `weight_sharing`, "
            "`unselected='freeze'` and `extra_sites`."
        )
    kept = set(selection.lora_modules)
    for name in selection.modules:
        found = finds(config.target_modules, name) and not finds(config.exclude_modules, name)
        found = found or name in (config.target_parameters or ())
        if found != (name in kept):
            raise ValueError(
                f"The LoRA configuration in {where} {'names' if found else 'does not name'} {name!r}, which was "
                f"{'not ' if found else ''}chosen: it is that of another adapter. Please pass what one run has saved "
                "after its choice."
            )
    handed_over = copy.deepcopy(config)
    handed_over.inference_mode = False
    return handed_over


def lora_config_of_run(run: object) -> LoraConfig:
    """
    The same of a trainer or a run, from its `model` and its `selection`.

    Raises:
        TypeError: if it is neither.
        ValueError: if no modules were chosen yet, or as in [`lora_config_of`].
    """
    name = type(run).__name__
    if isinstance(run, Selection):
        raise TypeError(
            "You passed a `Selection`, which does not hold the ranks and scales of the LoRA. Please pass the trainer, "
            "the run, or the folder that it is from."
        )
    if not hasattr(run, "selection") or not hasattr(run, "model"):
        raise TypeError(
            f"You passed an object of type {name}. `selected_lora_config` takes the folder or the Hub id of a saved "
            "adapter, a trainer that searches, or a `SelectionRun`. Please pass one of these."
        )
    selection, model = run.selection, peft_model(run.model)
    if not isinstance(selection, Selection):
        raise ValueError(
            f"This {name} has chosen no modules (yet): its `selection` is None. Please train first, until the others "
            "are pruned."
        )
    return lora_config_of(model.peft_config[model.active_adapters[0]], selection, f"this {name}")


def write_lora_config(config: LoraConfig, file: str | Path) -> Path:
    """
    Write a configuration as PEFT does, whole or not at all, into a file of any name, or into a folder (one that is
    there, or a name that ends with a slash) under PEFT's name. Returns its path.

    Raises:
        ValueError: if it would take the place of the configuration of an adapter.
    """
    path = file_at(file, ADAPTER_CONFIG_NAME)
    if path.name == ADAPTER_CONFIG_NAME and (path.parent / ADAPTER_NAME).exists():
        raise ValueError(f"{str(path)!r} is the configuration of the adapter beside it. Please name another file.")
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        write_file(path, Path(folder, ADAPTER_CONFIG_NAME).read_bytes())
    return path
