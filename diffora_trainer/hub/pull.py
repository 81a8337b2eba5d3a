"""What a run has chosen, read from where it is: a folder, the Hub, or the run itself."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, RepositoryNotFoundError
from peft import LoraConfig

from ..adapters.handover import lora_config_of, lora_config_of_run
from ..compat.peft import load_peft_config
from ..core.files import ADAPTER_CONFIG_NAME, adapters_inside
from ..core.selection import SELECTION_NAME, Selection


def load_selection(source: str | os.PathLike) -> Selection:
    """
    What was chosen.

    Args:
        source (`str` or `os.PathLike`): a folder, a file, or the id of an adapter on the Hub.

    Raises:
        ValueError: if there is none.
        FileNotFoundError: if it is not in the folder.
    """
    if Path(source).exists():
        return Selection.load(source)
    try:
        return Selection.load(hf_hub_download(str(source), SELECTION_NAME))
    except (EntryNotFoundError, HFValidationError, RepositoryNotFoundError) as error:
        where = f"a folder here nor an adapter on the Hub with a {SELECTION_NAME}"
        raise ValueError(f"{str(source)!r} is neither {where}.") from error


def selected_lora_config(source: Any) -> LoraConfig:
    """
    The LoRA of the modules that a run has chosen, for a second run of any trainer, launcher or tool: an ordinary
    `LoraConfig` that names exactly these modules, with their ranks and scales.

    ```python
    search = DiffoRASFTTrainer(model, args, train_dataset=data, diffora_config=DiffoRAConfig(search_only=True))
    search.train()
    trainer = SFTTrainer(model, args, train_dataset=data, peft_config=selected_lora_config(search))
    ```

    Args:
        source (`str`, `os.PathLike`, `Trainer` or [`SelectionRun`]): folder or Hub id of the adapter that a run has
            saved after its choice, or the trainer or [`SelectionRun`] that has made it.

    Returns:
        `LoraConfig`: of which nothing else holds a reference.

    Raises:
        TypeError: if `source` is none of these, such as a [`Selection`], which lacks ranks and scales.
        ValueError: if no modules were chosen yet, or what was chosen is more than a configuration can say
            (`weight_sharing`, `extra_sites`).
        FileNotFoundError: if a folder lacks what a run saves.
    """
    if not isinstance(source, (str, os.PathLike)):
        return lora_config_of_run(source)
    selection = load_selection(source)
    folder = Path(source).parent if Path(source).is_file() else source
    inside = adapters_inside(folder) if not Path(folder, ADAPTER_CONFIG_NAME).is_file() else []
    inside = [name for name in inside if not name.startswith("checkpoint-")]
    if len(inside) == 1:  # PEFT saves an adapter that is not called "default" there
        folder = Path(folder, inside[0])
    if Path(folder).is_dir() and not Path(folder, ADAPTER_CONFIG_NAME).is_file():
        raise FileNotFoundError(
            f"There is a selection in {folder}, but no {ADAPTER_CONFIG_NAME}, which holds the ranks and scales. "
            "Please pass the folder that a run has saved its adapter to."
            + (f" There are adapters in the folders {inside} inside of it." if inside else "")
        )
    config = load_peft_config(folder)
    if not isinstance(config, LoraConfig):
        raise ValueError(
            f"The adapter in {folder} is configured by {type(config).__name__}, so no `LoraConfig` says what was "
            "chosen. Please load its configuration with `PeftConfig.from_pretrained`."
        )
    return lora_config_of(config, selection, str(source))
