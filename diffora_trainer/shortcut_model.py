"""Models with shortcuts on disk and on the Hub: what PEFT alone cannot hold, and must not load without."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as serialize_tensors
from torch import nn

from .files import ADAPTER_FOLDER, SHORTCUT_CONFIG_NAME, SHORTCUT_TENSORS_NAME, write_file
from .merging import merge_shortcuts
from .shortcuts import (
    Shortcut,
    ShortcutConfig,
    add_shortcuts,
    shortcut_config,
    shortcut_shapes,
    shortcut_tensors,
    shortcuts,
)


_REFUSAL = "LoRA with shortcuts, which PEFT alone cannot load: use diffora_trainer.ShortcutModel.from_pretrained"
_ADAPTER_CONFIG, _ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_READ = (SHORTCUT_CONFIG_NAME, SHORTCUT_TENSORS_NAME, f"{ADAPTER_FOLDER}/*.json", f"{ADAPTER_FOLDER}/*.safetensors")


def save_shortcuts(model: nn.Module, folder: str | Path) -> None:
    """
    Save the shortcuts of a model: `shortcut_config.json` and `shortcuts.safetensors`.

    Args:
        model (`PeftModel` or `PreTrainedModel`): the model.
        folder (`str` or `Path`): where to.

    Raises:
        ValueError: if the model has none.
    """
    config = shortcut_config(model)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in shortcut_tensors(model).items()}
    write_file(Path(folder) / SHORTCUT_TENSORS_NAME, serialize_tensors(tensors, {"format": "pt"}))
    write_file(Path(folder) / SHORTCUT_CONFIG_NAME, config.to_json().encode())


def load_shortcuts(model: nn.Module, folder: str | Path) -> dict[str, Shortcut]:
    """
    Put saved shortcuts into a model. If something does not fit, the model is left as it was.

    Args:
        model (`PeftModel` or `PreTrainedModel`): the model. It may have fresh shortcuts of the same configuration.
        folder (`str` or `Path`): where they were saved.

    Returns:
        `dict[str, Shortcut]`: the shortcuts by their names.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a file is damaged, or was saved for another model.
    """
    folder = Path(folder)
    config = read_shortcut_config(folder)
    path = folder / SHORTCUT_TENSORS_NAME
    try:
        saved = load_tensors(path.read_bytes())
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}. Please save the shortcuts again.") from error
    there = bool(shortcuts(model))
    if there and shortcut_config(model) != config:
        raise ValueError(
            f"The model has shortcuts of {shortcut_config(model)}, and those in {folder} are of {config}. Please call "
            "`remove_shortcuts(model)` first."
        )
    shapes = shortcut_shapes(model, config)
    wrong = [name for name in {*shapes, *saved} if name not in saved or shapes.get(name) != tuple(saved[name].shape)]
    if wrong:
        name = min(wrong)
        found = tuple(saved[name].shape) if name in saved else "missing"
        raise ValueError(
            f"The shortcuts in {folder} were saved for another model: {len(wrong)} tensors do not fit. {name!r} is "
            f"{found} there, and {shapes.get(name, 'missing')} in this {type(model).__name__}."
        )
    damaged = [name for name, tensor in saved.items() if not tensor.isfinite().all()]
    if damaged:
        raise ValueError(f"{path} has numbers in {min(damaged)!r} that are not finite.")
    if not there:
        add_shortcuts(model, config)
    with torch.no_grad():
        for name, tensor in shortcut_tensors(model).items():
            tensor.copy_(saved[name])
    return shortcuts(model)


def read_shortcut_config(folder: str | Path) -> ShortcutConfig:
    """
    The configuration of the shortcuts that were saved in a folder.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is damaged.
    """
    path = Path(folder) / SHORTCUT_CONFIG_NAME
    if not path.is_file():
        plain = (Path(folder) / _ADAPTER_CONFIG).is_file()
        raise FileNotFoundError(
            f"There is no {path}, so no shortcuts were saved there. "
            + (
                "It is a plain PEFT adapter: please load it with `PeftModel.from_pretrained`."
                if plain
                else "Please pass the folder that `ShortcutModel.save_pretrained` or a trainer saved."
            )
        )
    return ShortcutConfig.from_json(path.read_text(encoding="utf-8"))


def adapter_folder(folder: str | os.PathLike) -> Path:
    """Where the files of the adapter lie in what was saved: beside shortcuts one level down."""
    folder = Path(folder)
    return folder / ADAPTER_FOLDER if (folder / SHORTCUT_CONFIG_NAME).is_file() else folder


def add_to_adapter(model: Any, folder: str | os.PathLike) -> None:
    """
    Complete what PEFT has just saved of a model: with shortcuts the adapter goes one level down, and where it was
    stands a configuration that PEFT refuses. Of a model without them, shortcuts of an earlier save are removed.

    Args:
        model (`PeftModel`): the model.
        folder (`str` or `os.PathLike`): where PEFT has saved it.
    """
    folder = Path(folder)
    if not shortcuts(model):
        remove_saved_shortcuts(folder)
        return
    name = str(model.active_adapters[0])
    saved, inner = folder if name == "default" else folder / name, folder / ADAPTER_FOLDER
    config = (saved / _ADAPTER_CONFIG).read_bytes()
    # What would be loaded without the shortcuts goes first.
    write_file(folder / _ADAPTER_CONFIG, _refusing_config(model))
    inner.mkdir(exist_ok=True)
    if saved != inner:
        os.replace(saved / _ADAPTER_WEIGHTS, inner / _ADAPTER_WEIGHTS)
        write_file(inner / _ADAPTER_CONFIG, config)
        if saved != folder:
            shutil.rmtree(saved)
    save_shortcuts(model, folder)


def remove_saved_shortcuts(folder: str | os.PathLike) -> None:
    """Remove the shortcuts of an earlier save from a folder in which a plain adapter stands now."""
    folder = Path(folder)
    if (folder / SHORTCUT_CONFIG_NAME).is_file():
        (folder / SHORTCUT_CONFIG_NAME).unlink()
        (folder / SHORTCUT_TENSORS_NAME).unlink(missing_ok=True)
        for name in (_ADAPTER_CONFIG, _ADAPTER_WEIGHTS):
            (folder / ADAPTER_FOLDER / name).unlink(missing_ok=True)
        if not any((folder / ADAPTER_FOLDER).iterdir()):
            (folder / ADAPTER_FOLDER).rmdir()


def copy_inner_adapter(source: str | os.PathLike, target: str | os.PathLike) -> None:
    """
    Complete a folder to which the files of another one have been copied, but not its folders: with the adapter beside
    its shortcuts, or without those of an earlier copy.

    Args:
        source (`str` or `os.PathLike`): where a model was saved.
        target (`str` or `os.PathLike`): where its files were copied to.
    """
    inner = adapter_folder(source)
    if inner == Path(source):
        remove_saved_shortcuts(target)
        return
    (Path(target) / _ADAPTER_WEIGHTS).unlink(missing_ok=True)
    shutil.copytree(inner, Path(target) / ADAPTER_FOLDER, dirs_exist_ok=True)


class ShortcutModel(nn.Module):
    """
    A model with shortcuts, saved and loaded as PEFT does it.

    The folder holds the shortcuts and, of a `PeftModel`, its adapter in `adapter/`, which is plain PEFT. A LoRA file
    cannot hold a shortcut, so in place of an `adapter_config.json` stands one that PEFT refuses, naming this class:
    an adapter trained beside shortcuts would else be loaded without them in silence. The trainers save in this form
    whenever their model has shortcuts.

    Args:
        model (`PeftModel` or `PreTrainedModel`): the model. Unless it is a `PeftModel`, its own weights are frozen.
        config ([`ShortcutConfig`], *optional*): what to add; left out, a model with shortcuts keeps them.
    """

    def __init__(self, model: nn.Module, config: ShortcutConfig | None = None) -> None:
        super().__init__()
        if config is not None or not shortcuts(model):
            add_shortcuts(model, config)
        if not isinstance(model, PeftModel):
            model.requires_grad_(False)
            for shortcut in shortcuts(model).values():
                shortcut.requires_grad_()
        self.model = model

    @property
    def shortcut_config(self) -> ShortcutConfig:
        """The configuration of the shortcuts."""
        return shortcut_config(self.model)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """What the model's own `generate` gives."""
        return self.model.generate(*args, **kwargs)  # type: ignore[operator]

    def merge_and_unload(self) -> Any:
        """
        A plain model of transformers with the shortcuts and the LoRA of a `PeftModel` merged into its weights, which
        needs neither PEFT nor this package.

        Only `residual2` of post-norm layers can be merged, and not with every activation: see
        [`~diffora_trainer.merging`]. The feed-forward of every layer becomes `2 r` wider, and the configuration says
        so. The merge is done and compared in float64 on a copy, and this model stays as it is: for a moment that
        takes the memory of the model and of one in float64. In training, the model's own dropouts act on what was
        merged as on the rest.

        Returns:
            `PreTrainedModel`: the merged model.

        Raises:
            ValueError: if a shortcut cannot be merged, or the merged model would not give what this one gives.
        """
        return merge_shortcuts(self.model)

    def save_pretrained(self, folder: str | Path) -> None:
        """
        Save the shortcuts, and the adapter of a `PeftModel`.

        Args:
            folder (`str` or `Path`): where to.
        """
        folder = Path(folder)
        if isinstance(self.model, PeftModel):
            self.model.save_pretrained(str(folder / ADAPTER_FOLDER))
        write_file(folder / _ADAPTER_CONFIG, _refusing_config(self.model))
        save_shortcuts(self.model, folder)

    @classmethod
    def from_pretrained(
        cls, model: nn.Module, folder: str | Path, is_trainable: bool = False, **hub: Any
    ) -> ShortcutModel:
        """
        Load what [`~ShortcutModel.save_pretrained`] or a trainer saved, from a folder or the Hub.

        Args:
            model (`PreTrainedModel`): the base model.
            folder (`str` or `Path`): where it was saved, or its id on the Hub.
            is_trainable (`bool`, *optional*, defaults to `False`): whether it is to be trained on.
            **hub: for [`~huggingface_hub.snapshot_download`], such as `revision`, `token` and `cache_dir`.

        Raises:
            FileNotFoundError: if a file is missing, or there is no such folder or id.
            ValueError: if a file is damaged, or was saved for another model.
        """
        local = Path(folder)
        if not local.is_dir():
            try:
                local = Path(snapshot_download(str(folder), allow_patterns=list(_READ), **hub))
            except HFValidationError as error:
                raise FileNotFoundError(
                    f"{str(folder)!r} is neither a folder nor the id of a model on the Hub. Please pass the folder "
                    "that `ShortcutModel.save_pretrained` or a trainer saved."
                ) from error
        read_shortcut_config(local)  # what is missing should be said before the model is changed
        if (local / ADAPTER_FOLDER).is_dir():
            model = PeftModel.from_pretrained(model, local / ADAPTER_FOLDER, is_trainable=is_trainable)
        load_shortcuts(model, local)
        loaded = cls(model)
        for shortcut in shortcuts(model).values():
            shortcut.requires_grad_(is_trainable)
        return loaded if is_trainable else loaded.eval()


def _refusing_config(model: nn.Module) -> bytes:
    if isinstance(model, PeftModel):
        base = model.peft_config[model.active_adapters[0]].base_model_name_or_path
    else:
        base = getattr(getattr(model, "config", None), "_name_or_path", None)
    return (json.dumps({"peft_type": _REFUSAL, "base_model_name_or_path": base}, indent=2) + "\n").encode()
