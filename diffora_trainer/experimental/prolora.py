"""
PRoLoRA (https://huggingface.co/papers/2402.16902): a LoRA whose matrices repeat one chunk of themselves.

`lora_A` is cut into chunks along its inputs, and `lora_B` along its outputs. The first chunk of each is trained, and
the others are copies of it, rolled along the rank by one stride more each. Some components (`unshared`) repeat
nothing. The whole matrices are saved, so the adapter is plain LoRA for whoever loads it.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional

from ..adapters.lora import LoraSite, register_lora_site
from .rebuilt import RebuiltLora


class Repeated(nn.Module):
    """
    A matrix that repeats its first chunk. In a state dict it is the whole matrix, the `weight` of LoRA.

    Args:
        weight (`Tensor`): a matrix as plain LoRA starts it, of which the parts that are trained are taken: their range
            fits the whole matrix, and not the chunk (the paper's rectified initialization).
        dim (`int`): the dimension of its inputs or outputs; the other one is the rank.
        chunks (`int`): how many chunks.
        unshared (`int`): how many components repeat nothing.
    """

    bias = None

    def __init__(self, weight: Tensor, dim: int, chunks: int, unshared: int) -> None:
        super().__init__()
        self.dim, self.chunks, self.unshared = dim, chunks, unshared
        for name, part in self.parts(weight.detach()).items():
            self.register_parameter(name, nn.Parameter(part))
        self.register_state_dict_post_hook(_save_whole)
        self.register_load_state_dict_pre_hook(_load_parts)

    def parts(self, weight: Tensor) -> dict[str, Tensor]:
        """What is trained of a whole matrix."""
        length, rank = weight.shape[self.dim] // self.chunks, weight.shape[1 - self.dim]
        shared = weight.narrow(1 - self.dim, self.unshared, rank - self.unshared)
        found = {"chunk": shared.narrow(self.dim, 0, length).clone()}
        if self.unshared:
            found = {"whole": weight.narrow(1 - self.dim, 0, self.unshared).clone(), **found}
        return found

    @property
    def weight(self) -> Tensor:
        """The matrix of plain LoRA."""
        return self.build({name: parameter for name, parameter in self.named_parameters()})

    def build(self, parts: dict[str, Tensor]) -> Tensor:
        """The whole matrix of its parts."""
        chunk = parts["chunk"]
        stride = max(chunk.shape[1 - self.dim] // self.chunks, 1)
        rolled = [chunk.roll(index * stride, 1 - self.dim) for index in range(self.chunks)]
        shared = torch.cat(rolled, self.dim)
        return torch.cat([parts["whole"], shared], 1 - self.dim) if "whole" in parts else shared

    def forward(self, value: Tensor) -> Tensor:
        return functional.linear(value, self.weight)


def _save_whole(module: Any, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for name, _ in module.named_parameters():
        state.pop(f"{prefix}{name}", None)
    state[f"{prefix}weight"] = module.weight.detach()


def _load_parts(module: Any, state: dict[str, Any], prefix: str, *args: Any) -> None:
    weight = state.pop(f"{prefix}weight", None)
    if weight is None:
        return
    parts = module.parts(weight)
    if weight.shape != module.weight.shape or not torch.equal(module.build(parts), weight):
        raise ValueError(
            f"What is loaded into {prefix!r} is not a PRoLoRA of {module.chunks} chunks and {module.unshared} "
            "unshared components. Please load it with the `PRoLoRA` of its run, or without one."
        )
    state.update({f"{prefix}{name}": part for name, part in parts.items()})


@register_lora_site
class PRoLoRASite(LoraSite):
    """The PRoLoRA of one layer. It is kept whole or pruned, and counts as one unit."""

    shareable = False
    matrices = None

    def __init__(self, name: str, layer: Any, adapter_name: str) -> None:
        super().__init__(name, layer, adapter_name)
        self.rank = 1

    @classmethod
    def fits(cls, layer: Any, adapter_name: str) -> bool:
        if not isinstance(layer, LoraLayer) or adapter_name not in layer.lora_B:
            return False
        return isinstance(layer.lora_B[adapter_name], Repeated)

    def saved_shapes(self, rank: int, adapted: Collection[str] | None = None) -> dict[str, tuple[int, ...]]:
        return super().saved_shapes(self.layer.r[self.adapter_name], adapted)

    def fold(self, factor: float) -> None:
        if factor != 1.0:
            for parameter in self.layer.lora_B[self.adapter_name].parameters():
                self.multiply(parameter, factor)


class PRoLoRA(RebuiltLora):
    """
    Trains the adapter of a `LoraConfig` as PRoLoRA. Pass it in `callbacks` when the trainer is built; in a loop of
    your own call [`attach`] on the `PeftModel` before the optimizer is made. The adapter is saved as plain LoRA, and a
    run is resumed with the same callback.

    ```python
    trainer = DiffoRASFTTrainer(model, peft_config=LoraConfig(r=16), callbacks=[PRoLoRA(chunks=4)], ...)
    ```

    Args:
        chunks (`int`, *optional*, defaults to `2`): into how many chunks both matrices are cut; it has to divide the
            inputs and outputs of each layer.
        unshared (`int`, *optional*, defaults to `1`): how many components repeat nothing; fewer than `r`.
    """

    form = Repeated

    def __init__(self, chunks: int = 2, unshared: int = 1) -> None:
        super().__init__()
        if chunks < 1 or unshared < 0:
            raise ValueError(f"You passed `chunks={chunks}` and `unshared={unshared}`; they must be 1 and 0, or more.")
        self.chunks, self.unshared = chunks, unshared

    def rebuild(self, name: str, layer: Any, adapter_name: str) -> tuple[nn.Module, nn.Module]:
        a, b = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
        if a.shape[1] % self.chunks or b.shape[0] % self.chunks or self.unshared >= len(a):
            raise ValueError(
                f"The LoRA of {name!r}, of {a.shape[1]} inputs, {b.shape[0]} outputs and rank {len(a)}, cannot be cut "
                f"into {self.chunks} chunks with {self.unshared} unshared components. Please choose `chunks` that "
                "divide both, and fewer `unshared` than `r`."
            )
        return Repeated(a, 1, self.chunks, self.unshared), Repeated(b, 0, self.chunks, self.unshared)
