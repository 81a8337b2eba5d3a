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

from ...core.files import ADAPTER_CONFIG_NAME, ADAPTER_NAME, write_file
from ...core.text import sanitize
from .files import (
    ADAPTER_FOLDER,
    SHORTCUT_CONFIG_NAME,
    SHORTCUT_TENSORS_NAME,
    holds_plain_adapter,
    holds_shortcuts,
)
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
_READ = (
    ADAPTER_CONFIG_NAME,
    SHORTCUT_CONFIG_NAME,
    SHORTCUT_TENSORS_NAME,
    f"{ADAPTER_FOLDER}/*.json",
    f"{ADAPTER_FOLDER}/*.safetensors",
)


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
    except (SafetensorError, KeyError) as error:  # KeyError: a data type that PyTorch has not
        raise ValueError(f"{path} is damaged: {error}. Please save the shortcuts again.") from error
    there = bool(shortcuts(model))
    if there and shortcut_config(model) != config:
        raise ValueError(
            f"The model has shortcuts of {shortcut_config(model)!r:.300}, and those in {folder} are of "
            f"{config!r:.300}. Please call `remove_shortcuts(model)` first."
        )
    shapes = shortcut_shapes(model, config)
    wrong = [name for name in {*shapes, *saved} if name not in saved or shapes.get(name) != tuple(saved[name].shape)]
    if wrong:
        name = min(wrong)
        found = tuple(saved[name].shape) if name in saved else "missing"
        raise ValueError(
            f"The shortcuts in {path} were saved for another model: {len(wrong)} tensors do not fit. "
            f"{sanitize(repr(name))} is {found} there, and {shapes.get(name, 'missing')!s:.100} in this "
            f"{type(model).__name__}."
        )
    damaged = [n for n, t in saved.items() if not t.is_floating_point() or not t.float().isfinite().all()]
    if damaged:
        raise ValueError(
            f"{path} has numbers in {min(damaged)!r} that are not finite. Please use what was saved before them."
        )
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
        raise FileNotFoundError(
            f"There is no {path}, so no shortcuts were saved there. Please pass the folder that "
            "`ShortcutModel.save_pretrained` or a trainer saved."
        )
    try:
        return ShortcutConfig.from_json(path.read_text(encoding="utf-8"))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def add_to_adapter(model: Any, folder: str | os.PathLike) -> None:
    """
    Complete what PEFT has just saved of a model: with shortcuts the adapter goes one level down, and where it was
    stands a configuration that PEFT refuses. For a model without them, shortcuts of an earlier save are removed.

    Args:
        model (`PeftModel`): the model.
        folder (`str` or `os.PathLike`): where PEFT has saved it.
    """
    folder, name = Path(folder), str(model.active_adapters[0])
    if not shortcuts(model):
        remove_saved_shortcuts(folder, with_adapter=name != ADAPTER_FOLDER)
        return
    _move_adapter(name, folder, folder / ADAPTER_FOLDER)
    write_file(folder / ADAPTER_CONFIG_NAME, _refusing_config(model))
    save_shortcuts(model, folder)


def _move_adapter(name: str, folder: Path, target: Path) -> None:
    """Move the adapter that PEFT has saved in a folder: one of another name than "default" is in one of its own."""
    saved = folder if name == "default" else folder / name
    if saved == target:
        return
    target.mkdir(exist_ok=True)
    # What is loaded by its configuration must not be there without the shortcuts, so this goes first.
    for file in (ADAPTER_CONFIG_NAME, ADAPTER_NAME):
        os.replace(saved / file, target / file)
    if saved != folder and not any(saved.iterdir()):  # it may have been there before, with other things in it
        saved.rmdir()


def remove_saved_shortcuts(folder: str | os.PathLike, with_adapter: bool = True) -> None:
    """
    Remove the shortcuts of an earlier save from a folder in which a plain adapter stands now.

    Args:
        folder (`str` or `os.PathLike`): where they were saved.
        with_adapter (`bool`, *optional*, defaults to `True`): and the adapter that was saved with them.
    """
    folder = Path(folder)
    if not (folder / SHORTCUT_CONFIG_NAME).is_file():
        return
    (folder / SHORTCUT_CONFIG_NAME).unlink()
    (folder / SHORTCUT_TENSORS_NAME).unlink(missing_ok=True)
    inner = folder / ADAPTER_FOLDER
    if with_adapter and inner.is_dir():
        for name in (ADAPTER_CONFIG_NAME, ADAPTER_NAME):
            (inner / name).unlink(missing_ok=True)
        if not any(inner.iterdir()):
            inner.rmdir()


def copy_inner_adapter(source: str | os.PathLike, target: str | os.PathLike) -> None:
    """
    Complete a folder to which the files of another one have been copied, but not its folders: with the adapter beside
    its shortcuts, or without those of an earlier copy.

    Args:
        source (`str` or `os.PathLike`): where a model was saved.
        target (`str` or `os.PathLike`): where its files were copied to.
    """
    if not holds_shortcuts(source):
        remove_saved_shortcuts(target)
        return
    (Path(target) / ADAPTER_NAME).unlink(missing_ok=True)
    shutil.copytree(Path(source) / ADAPTER_FOLDER, Path(target) / ADAPTER_FOLDER, dirs_exist_ok=True)


class ShortcutModel(nn.Module):
    """
    A model with shortcuts, saved and loaded as PEFT does it.

    The folder holds the shortcuts and, of a `PeftModel`, its adapter in `adapter/`, which is plain PEFT. A LoRA file
    cannot hold a shortcut, so in place of an `adapter_config.json` stands one that PEFT refuses, naming this class:
    an adapter trained beside shortcuts would otherwise be silently loaded without them. The trainers save in this form
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
        [`~diffora_trainer.experimental.shortcuts.merging`]. The feed-forward of every layer becomes `2 r` wider, and
        the configuration says so. The merge is done and compared in float64 on a copy, and this model stays as it is:
        for a moment that takes the memory of the model and of one in float64. In training, the model's own dropouts
        act on what was merged as on the rest.

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
            name, inner = str(self.model.active_adapters[0]), folder / ADAPTER_FOLDER
            self.model.save_pretrained(str(inner), selected_adapters=[name])
            _move_adapter(name, inner, inner)
        write_file(folder / ADAPTER_CONFIG_NAME, _refusing_config(self.model))
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
        if holds_plain_adapter(local):
            raise FileNotFoundError(
                f"What was saved last in {str(folder)!r} is a plain PEFT adapter without shortcuts. Please load it "
                "with `PeftModel.from_pretrained`."
            )
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
        base = getattr(getattr(model, "config", None), "name_or_path", None)
    return (json.dumps({"peft_type": _REFUSAL, "base_model_name_or_path": base}, indent=2) + "\n").encode()
