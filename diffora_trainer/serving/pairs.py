"""The pairs of matrices of a saved LoRA: read, brought to one rank and scale, and completed with zeros."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..compat.peft import EXACT_STARTS, PEFT_PREFIX, PLAIN_STARTS, lora_start
from .mergeable import remedy


_NAME = re.compile(rf"^{re.escape(PEFT_PREFIX)}(?P<module>.+)\.lora_(?P<part>[AB])\.weight$")


@dataclass(frozen=True)
class Pair:
    """
    The LoRA of a module.

    Args:
        a (`Tensor` of shape `(rank, in_features)`, and kernel sizes of a convolution): `lora_A`.
        b (`Tensor` of shape `(out_features, rank)`, and ones of a convolution): `lora_B`.
        scale (`float`): what their product is multiplied with.
    """

    a: Tensor
    b: Tensor
    scale: float

    @property
    def rank(self) -> int:
        """Its rank."""
        return int(self.a.shape[0])

    def at(self, rank: int) -> Pair:
        """The same update at a larger rank and at a scale of 1: padded with zeros, the scale in `lora_B`."""
        more = rank - self.rank
        a = torch.cat([self.a, self.a.new_zeros(more, *self.a.shape[1:])]) if more else self.a
        b = (self.b.float() * self.scale).to(self.b.dtype)
        b = torch.cat([b, b.new_zeros(b.shape[0], more, *b.shape[2:])], dim=1) if more else b
        return Pair(a.contiguous(), b.contiguous(), 1.0)


def check_start(config: Any, again: bool = False) -> None:
    """
    Refuse adapters whose matrices alone are not an update of the base model: they started as a part of its weights.

    Args:
        config ([`~peft.LoraConfig`]): the adapter's configuration.
        again (`bool`, *optional*, defaults to `False`): whether PEFT will take the part out of the weights again.

    Raises:
        ValueError: if it is such an adapter; with `again`, if PEFT would take out another part each time.
    """
    start = lora_start(config)
    if start in (None, *PLAIN_STARTS) or (again and start in EXACT_STARTS):
        return
    given = config.init_lora_weights
    if start in EXACT_STARTS:
        raise ValueError(
            f"The adapter starts as a part of the base weights (`init_lora_weights={given!r}`), so its matrices alone "
            f"are not an update of the base model. {remedy(config)}"
        )
    raise ValueError(
        f"The adapter starts as a part of the base weights (`init_lora_weights={given!r}`) that is not the same "
        "when it is computed again, so the base model cannot be brought to what it was trained on. Please save the "
        "adapter where it was trained with `save_pretrained(..., path_initial_model_for_weight_conversion=...)` of "
        "PEFT, which makes a plain LoRA of it, and export that."
    )


def read_pairs(tensors: Mapping[str, Tensor], config: Any) -> dict[str, Pair]:
    """
    The pairs of an adapter, by module.

    Args:
        tensors (`Mapping[str, Tensor]`): what PEFT has saved.
        config ([`~peft.LoraConfig`]): the adapter's configuration.

    Raises:
        ValueError: if it is not a LoRA of linear layers and convolutions, or holds more than that.
    """
    if getattr(config, "use_dora", False):
        raise ValueError(f"The adapter is a DoRA, whose magnitudes no pair of matrices holds. {remedy(config)}")
    if getattr(config, "target_parameters", None):
        raise ValueError(
            "The adapter holds a LoRA of parameters (`target_parameters`), such as fused experts, which is not a "
            f"pair for a layer. {remedy(config)}"
        )
    if getattr(config, "lora_bias", False):
        raise ValueError(
            f"The adapter has biases (`lora_bias=True`), which no pair of matrices holds. {remedy(config)}"
        )
    halves: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if (match := _NAME.match(name)) is not None:
            halves.setdefault(match["module"], {})[match["part"]] = tensor
        elif "lora_" in name:
            raise ValueError(
                f"The adapter holds {name!r}, which is not a LoRA of a linear layer or a convolution. {remedy(config)}"
            )
        else:
            raise ValueError(
                f"The adapter holds {name!r} beside its LoRA, a whole weight (`modules_to_save`, `bias`, "
                "`trainable_token_indices`, or embeddings that PEFT saved along). Servers refuse that or leave it "
                f"out. {remedy(config)}"
            )
    if broken := [module for module, parts in halves.items() if set(parts) != {"A", "B"}]:
        raise ValueError(f"The adapter lacks one of the two matrices of {broken[0]!r}: the file is damaged.")
    if not halves:
        raise ValueError("The adapter holds no LoRA matrices.")
    return {
        module: Pair(parts["A"], parts["B"], _scale(config, module, int(parts["A"].shape[0])))
        for module, parts in halves.items()
    }


def _scale(config: Any, module: str, rank: int) -> float:
    """`alpha / rank`, or with rsLoRA `alpha / sqrt(rank)`, as PEFT finds both by the patterns of the configuration."""
    from peft.utils.other import get_pattern_key

    alphas = config.alpha_pattern or {}
    alpha = alphas.get(get_pattern_key(list(alphas), module), config.lora_alpha)
    return float(alpha) / (math.sqrt(rank) if config.use_rslora else rank)
