r"""
Shortcuts: low-rank residual and cross-layer connections, after HeteroLoRA (https://huggingface.co/papers/2406.14956).

A shortcut adds `s * B(A v)` to the hidden states, with `A` of `r x d`, `B` of `d x r` and `s = lora_alpha / r`. `B` is
0 at the start, so a model with fresh shortcuts gives the outputs it gave before, bit for bit. Where the published ones
have a dense frozen matrix, the identity of a residual, the addition that the model makes anyway stands for it.

What is added where, in a layer with input `x`, attention `attn`, feed-forward `ffn` and norms `n1`, `n2`. `f` is what
the residual around the feed-forward carries and `f'` that of the layer before; `D_k v` is `s * B(A v)` of kind `k`.

- Pre-norm (Llama, Qwen, GPT-2, ViT, most OPT):
  `f = x + attn(n1(x)) + D_residual1 x + D_shortcut2 f'`,
  `out = f + ffn(n2(f)) + D_residual2 f + D_shortcut1 x`.
  The first two are added to the output of the attention and `D_residual2` to that of the feed-forward, before the
  model's own addition of the residual. Where the layer itself has a dropout between that output and the addition (OPT,
  ViT), it acts on the shortcut too.
- Post-norm (BERT, RoBERTa, DeBERTa, OPT-350m):
  `f = n1(x + attn(x) + D_residual1 x + D_shortcut2 f')`,
  `out = n2(f + ffn(f) + D_residual2 f) + D_shortcut1 x`.
  Here the sum that the norm reads is added to, after any dropout.

No norm is ever applied a second time, and `shortcut1` comes after everything in both cases. The first layer has no
layer before it, so no `shortcut2`.

None of these can be merged into the weights of the model as it stands, so there is no merge:

- In a pre-norm layer `D x` is linear in `x` itself, but every matrix of the layer reads `n(x)`, from which the scale
  of `x` is gone: twice the `x` is twice the `D x`, and the same output of attention and feed-forward. Nor can
  `I + s B A` be taken into what writes `x` (the layer before, the embeddings), since `n1` and all later layers would
  read the changed `x`, and a norm commutes with no such map in general.
- In a post-norm layer `residual1` would have to be part of the attention, which reads `x` as well, but mixes the
  tokens with weights of its own; a change of its value matrix reaches all tokens, and the shortcut only the one.
- The feed-forward of a post-norm layer reads `f`, and `residual2` could be `2 r` more hidden units with the rows `A`
  and `-A` and the columns `s B` and `-s B`, as `g(u) - g(-u) = u` for ReLU, GELU and SiLU. That is exact, but it is a
  wider feed-forward than the configuration of the model has, so not a merge.
- `shortcut1` and `shortcut2` pass by at least one nonlinear block, so no single matrix stands for them.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as serialize_tensors
from torch import Tensor, nn
from torch.nn import functional

from .connections import ATTRIBUTE, LayerShortcuts, plan_layers
from .files import write_file
from .grid import check_not_compiled


KINDS = ("residual1", "residual2", "shortcut1", "shortcut2")
CONFIG_NAME = "shortcut_config.json"
TENSORS_NAME = "shortcuts.safetensors"
ADAPTER_FOLDER = "adapter"
_REFUSAL = "LoRA with shortcuts, which PEFT alone cannot load: use diffora_trainer.ShortcutModel.from_pretrained"
_FORMAT = 1


@dataclass
class ShortcutConfig:
    """
    Configuration of the shortcuts of a model. See [`~diffora_trainer.shortcuts`] for what each kind adds where.

    Args:
        r (`int`, *optional*, defaults to `8`):
            Rank.
        lora_alpha (`float`, *optional*, defaults to `16`):
            The shortcut is scaled by `lora_alpha / r`.
        kinds (`tuple[str, ...]`, *optional*, defaults to all four):
            Which of `"residual1"`, `"residual2"`, `"shortcut1"` and `"shortcut2"` each layer gets.
        dropout (`float`, *optional*, defaults to `0.0`):
            Dropout of what a shortcut reads, in training. It draws from PyTorch's random stream, so that with it the
            other dropouts of the model draw other masks than without shortcuts.

    Raises:
        ValueError: if a value is out of its range.
        TypeError: if a value is of the wrong type.
    """

    r: int = 8
    lora_alpha: float = 16
    kinds: tuple[str, ...] = KINDS
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.r, bool) or not isinstance(self.r, int):
            raise TypeError(f"`r` must be an int, got {self.r!r}.")
        if self.r < 1:
            raise ValueError(f"You passed `r={self.r}`; a rank must be 1 or more.")
        for name in ("lora_alpha", "dropout"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"`{name}` must be a number, got {value!r}.")
        if not math.isfinite(self.lora_alpha) or self.lora_alpha <= 0:
            raise ValueError(f"You passed `lora_alpha={self.lora_alpha}`; it must be positive and finite.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"You passed `dropout={self.dropout}`; it must be in [0, 1).")
        if not isinstance(self.kinds, (list, tuple)):
            raise TypeError(f"`kinds` must be a list of names, got {self.kinds!r}.")
        unknown = [kind for kind in self.kinds if kind not in KINDS]
        if unknown or not self.kinds or len(set(self.kinds)) != len(self.kinds):
            raise ValueError(
                f"You passed `kinds={list(self.kinds)!r}`; it must name one or more of {list(KINDS)}, each once."
            )
        self.kinds = tuple(kind for kind in KINDS if kind in self.kinds)

    def to_json(self) -> str:
        """The text of a `shortcut_config.json`."""
        return json.dumps({"format": _FORMAT, **asdict(self)}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> ShortcutConfig:
        """
        Read the text of a `shortcut_config.json`.

        Args:
            text (`str`): the text.

        Raises:
            ValueError: if it is not one, or holds a value out of its range.
            TypeError: if it holds a value of the wrong type.
        """
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"This is not a `{CONFIG_NAME}`: {error}. Please pass one as it was saved.") from error
        names = {"format", *cls.__dataclass_fields__}
        if not isinstance(data, dict) or set(data) != names:
            raise ValueError(
                f"This is not a `{CONFIG_NAME}`: it must be an object with the keys {sorted(names)}, each once. "
                "Please pass one as it was saved."
            )
        if data.pop("format") != _FORMAT:
            raise ValueError(f"This `{CONFIG_NAME}` is not of format {_FORMAT}. Please update diffora-trainer.")
        return cls(**data)


class Shortcut(nn.Module):
    """One shortcut, `s * B(A v)`. The parameters have names that neither PEFT's targets nor its saving look for."""

    def __init__(self, width: int, config: ShortcutConfig, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.empty(config.r, width, device=device, dtype=dtype))
        self.B = nn.Parameter(torch.zeros(width, config.r, device=device, dtype=dtype))
        self.scale, self.dropout = config.lora_alpha / config.r, config.dropout
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))  # as PEFT starts `lora_A`

    def forward(self, value: Tensor) -> Tensor:
        value = functional.dropout(value.to(self.A.dtype), self.dropout, self.training)
        return functional.linear(functional.linear(value, self.A), self.B) * self.scale


def add_shortcuts(model: nn.Module, config: ShortcutConfig | None = None) -> dict[str, Shortcut]:
    """
    Put shortcuts into a model, in place. Its outputs stay what they are, bit for bit, until these have learned.

    The layers are found by their structure, in any encoder or decoder of `transformers`: see
    [`~diffora_trainer.shortcuts`]. Call it after `get_peft_model`, which freezes all that it does not know. Nothing
    but the shortcuts is made trainable or frozen here. Each takes device and data type of its layer. While the
    adapters of a `PeftModel` are switched off with `disable_adapter()`, so are they.

    A search does not choose among shortcuts, and neither PEFT nor the trainers save them: please call
    [`save_shortcuts`] or [`ShortcutModel.save_pretrained`] after the training.

    Args:
        model (`PeftModel` or `PreTrainedModel`): the model.
        config ([`ShortcutConfig`], *optional*): rank, scale and kinds.

    Returns:
        `dict[str, Shortcut]`: the shortcuts by their names, `"<layer>.<kind>"`.

    Raises:
        ValueError: if the model has shortcuts already, is compiled, has no layers, or layers of another structure.
    """
    config = ShortcutConfig() if config is None else config
    if not isinstance(config, ShortcutConfig):
        raise TypeError(f"`config` must be a `ShortcutConfig`, got {type(config).__name__}.")
    check_not_compiled(model)
    if _blocks(model):
        raise ValueError("The model has shortcuts already. Please call `remove_shortcuts(model)` first.")
    before: LayerShortcuts | None = None
    plan = plan_layers(model, config.kinds)
    for name, layer, parts, kinds in plan:
        found = next(p for p in layer.parameters() if p.is_floating_point() and p.element_size() > 1)
        made = {kind: Shortcut(parts.width, config, found.device, found.dtype) for kind in kinds}
        block = LayerShortcuts(made, config, name, layer, parts, model)
        block.train(layer.training)
        if "shortcut2" in kinds:
            assert before is not None
            block.before, before.after = (before,), True
        before = block
        setattr(layer, ATTRIBUTE, block)
    return shortcuts(model)


def shortcuts(model: nn.Module) -> dict[str, Shortcut]:
    """The shortcuts of a model by their names, `"<layer>.<kind>"`, in the model's order."""
    return {f"{name}.{kind}": getattr(block, kind) for name, block in _blocks(model).items() for kind in block.kinds}


def shortcut_config(model: nn.Module) -> ShortcutConfig:
    """
    The configuration of a model's shortcuts.

    Raises:
        ValueError: if it has none.
    """
    blocks = list(_blocks(model).values())
    if not blocks:
        raise ValueError(f"This {type(model).__name__} has no shortcuts. Please call `add_shortcuts` first.")
    return blocks[0].config


def remove_shortcuts(model: nn.Module) -> None:
    """Take all shortcuts out of a model, which is then as it was before them: no hook and no parameter is left."""
    for layer in list(model.modules()):
        block = layer._modules.get(ATTRIBUTE)
        if isinstance(block, LayerShortcuts):
            for handle in block.handles:
                handle.remove()
            delattr(layer, ATTRIBUTE)


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
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in _tensors(model).items()}
    write_file(Path(folder) / TENSORS_NAME, serialize_tensors(tensors, {"format": "pt"}))
    write_file(Path(folder) / CONFIG_NAME, config.to_json().encode())


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
    config = ShortcutConfig.from_json((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    try:
        saved = load_tensors((folder / TENSORS_NAME).read_bytes())
    except SafetensorError as error:
        raise ValueError(f"{folder / TENSORS_NAME} is damaged: {error}. Please save the shortcuts again.") from error
    there = bool(_blocks(model))
    if there and shortcut_config(model) != config:
        raise ValueError(
            f"The model has shortcuts of {shortcut_config(model)}, and those in {folder} are of {config}. Please call "
            "`remove_shortcuts(model)` first."
        )
    shapes = {
        f"{name}.{kind}.{matrix}": shape
        for name, _, parts, kinds in plan_layers(model, config.kinds)
        for kind in kinds
        for matrix, shape in (("A", (config.r, parts.width)), ("B", (parts.width, config.r)))
    }
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
        raise ValueError(f"{folder / TENSORS_NAME} has numbers in {min(damaged)!r} that are not finite.")
    if not there:
        add_shortcuts(model, config)
    with torch.no_grad():
        for name, tensor in _tensors(model).items():
            tensor.copy_(saved[name])
    return shortcuts(model)


class ShortcutModel(nn.Module):
    """
    A model with shortcuts, saved and loaded as PEFT does it.

    The folder holds the shortcuts and, of a `PeftModel`, its adapter in `adapter/`, which is plain PEFT. A LoRA file
    cannot hold a shortcut, so in place of an `adapter_config.json` stands one that PEFT refuses, naming this class:
    an adapter trained beside shortcuts would else be loaded without them in silence.

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

    def save_pretrained(self, folder: str | Path) -> None:
        """
        Save the shortcuts, and the adapter of a `PeftModel`.

        Args:
            folder (`str` or `Path`): where to.
        """
        folder = Path(folder)
        if isinstance(self.model, PeftModel):
            self.model.save_pretrained(str(folder / ADAPTER_FOLDER))
        config = getattr(self.model, "config", None)
        told = {"peft_type": _REFUSAL, "base_model_name_or_path": getattr(config, "_name_or_path", None)}
        write_file(folder / "adapter_config.json", (json.dumps(told, indent=2) + "\n").encode())
        save_shortcuts(self.model, folder)

    @classmethod
    def from_pretrained(cls, model: nn.Module, folder: str | Path, is_trainable: bool = False) -> ShortcutModel:
        """
        Load what [`~ShortcutModel.save_pretrained`] saved.

        Args:
            model (`PreTrainedModel`): the base model.
            folder (`str` or `Path`): where it was saved.
            is_trainable (`bool`, *optional*, defaults to `False`): whether it is to be trained on.

        Raises:
            FileNotFoundError: if a file is missing.
            ValueError: if a file is damaged, or was saved for another model.
        """
        if (Path(folder) / ADAPTER_FOLDER).is_dir():
            model = PeftModel.from_pretrained(model, Path(folder) / ADAPTER_FOLDER, is_trainable=is_trainable)
        load_shortcuts(model, folder)
        loaded = cls(model)
        for shortcut in shortcuts(model).values():
            shortcut.requires_grad_(is_trainable)
        return loaded if is_trainable else loaded.eval()


def _blocks(model: nn.Module) -> dict[str, LayerShortcuts]:
    return {block.name: block for block in model.modules() if isinstance(block, LayerShortcuts)}


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {f"{name}.{matrix}": getattr(s, matrix) for name, s in shortcuts(model).items() for matrix in "AB"}
