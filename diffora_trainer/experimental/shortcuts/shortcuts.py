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

`residual2` of a post-norm layer can be merged into the weights, by [`ShortcutModel.merge_and_unload`]: its
feed-forward reads `f`, and `2 r` more hidden units with the rows `A` and `-A` and the columns `s B` and `-s B` give
`D_residual2 f` exactly, as `g(u) - g(-u) = u` for ReLU, GELU, SiLU and their like. The others cannot be merged within
the model's own class:

- In a pre-norm layer `D x` grows with `x`. Every matrix of the layer reads `n(x)` instead, which is bounded, also
  where the norm has no weights, and so is all that attention, feed-forward or one more layer, however wide, make of
  it. No model that is known here has layers without norms. Nor can `I + s B A` be taken into what writes `x`: `n1` and
  all later layers would read the changed `x`, and a norm commutes with such a map only if that is orthogonal up to a
  factor, which no training makes it.
- `residual1` of a post-norm layer would have to be part of the attention, which reads `x`, but mixes the tokens by
  weights that depend on them. It would take one more head, which attends to the token itself alone, and the heads of
  these classes are together as wide as the model, so that there is room for none. Attention could read
  `x' = (I + s B A) x` by matrices times the inverse, with `x'` in the residual; but `x` comes from a norm, whose
  weights are diagonal. Only the first layer of OPT-350m reads no norm, but the embeddings. There that would be exact
  where the inverse exists, for this one shortcut, and is not done.
- `shortcut1` of a post-norm layer comes after the norm that ends it, where no matrix is. `shortcut2` reads `f'`, of
  which the layer is given nothing but `x = n2(f' + ffn(f'))`.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from torch.nn import functional

from ...adapters.compiled import check_not_compiled
from ...core.text import sanitize
from .files import SHORTCUT_CONFIG_NAME
from .hooks import LayerShortcuts
from .structure import ATTRIBUTE, plan_layers


KINDS = ("residual1", "residual2", "shortcut1", "shortcut2")
_FORMAT = 1


@dataclass
class ShortcutConfig:
    """
    Configuration of the shortcuts of a model. See [`~diffora_trainer.experimental.shortcuts`] for what each kind adds
    where.

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
        names (`tuple[str, ...]`, *optional*):
            Only these of them, by name, `"<layer>.<kind>"`: what a pruning has left. By default every layer has all
            kinds, but the first, which has no layer before it, no `"shortcut2"`.

    Raises:
        ValueError: if a value is out of its range.
        TypeError: if a value is of the wrong type.
    """

    r: int = 8
    lora_alpha: float = 16
    kinds: tuple[str, ...] = KINDS
    dropout: float = 0.0
    names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.r, bool) or not isinstance(self.r, int):
            raise TypeError(f"`r` must be an int, got {sanitize(repr(self.r))}.")
        if self.r < 1:
            raise ValueError(f"You passed `r={self.r}`; a rank must be 1 or more.")
        for name in ("lora_alpha", "dropout"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"`{name}` must be a number, got {sanitize(repr(value))}.")
        if not 0 < self.lora_alpha <= sys.float_info.max:
            raise ValueError(
                f"You passed `lora_alpha={sanitize(str(self.lora_alpha))}`; it must be positive and finite."
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"You passed `dropout={sanitize(str(self.dropout))}`; it must be in [0, 1).")
        if not isinstance(self.kinds, (list, tuple)):
            raise TypeError(f"`kinds` must be a list of names, got {sanitize(repr(self.kinds))}.")
        unknown = [kind for kind in self.kinds if kind not in KINDS]
        if unknown or not self.kinds or len(set(self.kinds)) != len(self.kinds):
            raise ValueError(
                f"You passed `kinds={sanitize(repr(list(self.kinds)))}`; it must name one or more of {list(KINDS)}, "
                "each once."
            )
        self.kinds = tuple(kind for kind in KINDS if kind in self.kinds)
        if self.names is not None:
            if not isinstance(self.names, (list, tuple)) or not all(isinstance(name, str) for name in self.names):
                raise TypeError(f"`names` must be a list of names of shortcuts, got {sanitize(repr(self.names))}.")
            wrong = [name for name in self.names if name.rpartition(".")[2] not in self.kinds]
            if wrong or not self.names or len(set(self.names)) != len(self.names):
                found = f", such as {sanitize(repr(wrong[0]))}" if wrong else ""
                raise ValueError(
                    f"You passed {len(self.names)} `names`{found}; each must end in one of the kinds "
                    f"{list(self.kinds)}, and stand once. Please leave it out to have them all."
                )
            self.names = tuple(self.names)

    @classmethod
    def like(cls, config: LoraConfig, kinds: Sequence[str] = KINDS) -> ShortcutConfig:
        """
        Shortcuts of the rank, scale and dropout of a LoRA.

        Args:
            config (`LoraConfig`): the LoRA.
            kinds (`Sequence[str]`, *optional*): which kinds; all of them by default.
        """
        alpha = config.lora_alpha * (math.sqrt(config.r) if config.use_rslora else 1.0)
        return cls(r=config.r, lora_alpha=alpha, kinds=tuple(kinds), dropout=config.lora_dropout)

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
            raise ValueError(
                f"This is not a `{SHORTCUT_CONFIG_NAME}`: {error}. Please pass one as it was saved."
            ) from error
        names = {"format", *cls.__dataclass_fields__}
        if not isinstance(data, dict) or set(data) != names:
            raise ValueError(
                f"This is not a `{SHORTCUT_CONFIG_NAME}`: it must be an object with the keys {sorted(names)}, each "
                "once. Please pass one as it was saved."
            )
        if data.pop("format") != _FORMAT:
            raise ValueError(
                f"This `{SHORTCUT_CONFIG_NAME}` is not of format {_FORMAT}. Please update diffora-trainer."
            )
        return cls(**data)


class Shortcut(nn.Module):
    """
    One shortcut, `s * B(A v)`. The parameters have names that neither PEFT's targets nor its saving look for. While
    `enabled` is false it is passed by, and costs nothing.
    """

    def __init__(self, width: int, config: ShortcutConfig, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.empty(config.r, width, device=device, dtype=dtype))
        self.B = nn.Parameter(torch.zeros(width, config.r, device=device, dtype=dtype))
        self.scale, self.dropout = config.lora_alpha / config.r, config.dropout
        self.enabled = True
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))  # as PEFT starts `lora_A`

    def forward(self, value: Tensor) -> Tensor:
        value = functional.dropout(value.to(self.A.dtype), self.dropout, self.training)
        return functional.linear(functional.linear(value, self.A), self.B) * self.scale


def add_shortcuts(model: nn.Module, config: ShortcutConfig | None = None) -> dict[str, Shortcut]:
    """
    Put shortcuts into a model, in place. Its outputs stay what they are, bit for bit, until these have learned.

    The layers are found by their structure, in any encoder or decoder of `transformers`: see
    [`~diffora_trainer.experimental.shortcuts`]. Call it after `get_peft_model`, which freezes all that it does not
    know. Nothing but the shortcuts is made trainable or frozen here. Each takes device and data type of its layer, but
    on a `PeftModel` float32 in place of half precision. While the adapters of a `PeftModel` are switched off with
    `disable_adapter()`, so are they.

    A search that is made afterwards chooses among them as among the LoRA modules, and the trainers save them. In a
    loop of your own save with [`ShortcutModel.save_pretrained`].

    Args:
        model (`PeftModel` or `PreTrainedModel`): the model.
        config ([`ShortcutConfig`], *optional*): rank, scale and kinds.

    Returns:
        `dict[str, Shortcut]`: the shortcuts by their names, `"<layer>.<kind>"`.

    Raises:
        ValueError: if the model has shortcuts already, is compiled, has no layers, or layers of another structure.
        TypeError: if `config` is not a [`ShortcutConfig`].
    """
    config = ShortcutConfig() if config is None else config
    if not isinstance(config, ShortcutConfig):
        raise TypeError(f"`config` must be a `ShortcutConfig`, got {type(config).__name__}.")
    check_not_compiled(model)
    if _blocks(model):
        raise ValueError("The model has shortcuts already. Please call `remove_shortcuts(model)` first.")
    _install(model, config, {})
    return shortcuts(model)


def keep_shortcuts(model: nn.Module, names: Iterable[str]) -> None:
    """
    Take all shortcuts but some out of a model, in place. Those that stay keep their parameters.

    Args:
        model (`PeftModel` or `PreTrainedModel`): a model with shortcuts.
        names (`Iterable[str]`): the names of those that stay; none takes all of them out.

    Raises:
        ValueError: if the model has no shortcuts, or not one of a name.
    """
    config, there = shortcut_config(model), shortcuts(model)
    wanted = set(names)
    if unknown := sorted(wanted - set(there)):
        raise ValueError(
            f"The model has no shortcut {unknown[0]!r}, which should be kept. It has {len(there)}, such as "
            f"{next(iter(there))!r}."
        )
    if wanted == set(there):
        return
    remove_shortcuts(model)
    if wanted:
        kept = tuple(name for name in there if name in wanted)
        _install(model, replace(config, names=kept), there)


def reconnect_shortcuts(model: nn.Module) -> None:
    """
    Connect the shortcuts of a model again where a part of a layer is no longer the module that their hooks are on: a
    feed-forward of two linear layers, whose LoRA was pruned.

    Args:
        model (`PeftModel` or `PreTrainedModel`): the model; one without shortcuts is left as it is.
    """
    blocks = _blocks(model)
    if not blocks:
        return
    config, there = shortcut_config(model), shortcuts(model)
    plan = plan_layers(model, config.kinds, config.names)
    if any(name in blocks and blocks[name].parts != parts for name, _, parts, _ in plan):
        remove_shortcuts(model)
        _install(model, config, there)


def _install(model: nn.Module, config: ShortcutConfig, there: Mapping[str, Shortcut]) -> None:
    """Connect the shortcuts of a configuration: those that are there already, or new ones."""
    before: LayerShortcuts | None = None
    plan = plan_layers(model, config.kinds, config.names)
    following = [kinds for *_, kinds in plan[1:]] + [()]
    for (name, layer, parts, kinds), next_kinds in zip(plan, following, strict=True):
        if not kinds and "shortcut2" not in next_kinds:
            before = None
            continue
        found = next(p for p in layer.parameters() if p.is_floating_point() and p.element_size() > 1)
        # As PEFT holds its own: small updates are lost in half precision.
        dtype = torch.promote_types(found.dtype, torch.float32) if isinstance(model, PeftModel) else found.dtype
        made = {
            kind: there.get(f"{name}.{kind}") or Shortcut(parts.width, config, found.device, dtype) for kind in kinds
        }
        block = LayerShortcuts(made, config, name, layer, parts, model)
        block.train(layer.training)
        if "shortcut2" in kinds:
            assert before is not None
            block.before, before.after = (before,), True
        before = block
        setattr(layer, ATTRIBUTE, block)


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
    """
    Take all shortcuts out of a model, which is then as it was before them: no hook and no parameter is left.

    Args:
        model (`PeftModel` or `PreTrainedModel`): the model, with shortcuts or without.
    """
    for layer in list(model.modules()):
        block = getattr(layer, ATTRIBUTE, None)
        if isinstance(block, LayerShortcuts):
            for handle in block.handles:
                handle.remove()
            delattr(layer, ATTRIBUTE)


def _blocks(model: nn.Module) -> dict[str, LayerShortcuts]:
    return {block.name: block for block in model.modules() if isinstance(block, LayerShortcuts)}


def shortcut_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The parameters of a model's shortcuts, by the names that they are saved under."""
    return {f"{name}.{matrix}": getattr(s, matrix) for name, s in shortcuts(model).items() for matrix in "AB"}


def shortcut_shapes(model: nn.Module, config: ShortcutConfig) -> dict[str, tuple[int, int]]:
    """
    The shapes of the parameters that the shortcuts of a configuration have in a model, by their names.

    Raises:
        ValueError: if the model has no place for them.
    """
    return {
        f"{name}.{kind}.{matrix}": shape
        for name, _, parts, kinds in plan_layers(model, config.kinds, config.names)
        for kind in kinds
        for matrix, shape in (("A", (config.r, parts.width)), ("B", (parts.width, config.r)))
    }
