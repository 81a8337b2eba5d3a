"""Aletheia's gradient probe of layers (https://huggingface.co/papers/2604.15351)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.grid import Grid
from ..core.values import check_integer
from .base import ScoreMethod
from .context import ScoreContext, Site, holds_floats, wide
from .hidden import numbered_rows, of_modules
from .options import ScoreOptions
from .papers import Paper
from .registry import register_method
from .ties import TOO_FEW_ROWS


ALETHEIA = Paper(
    "Aletheia",
    "https://huggingface.co/papers/2604.15351",
    """\
@article{saket2026aletheia,
    title  = {{Aletheia: Gradient-Guided Layer Selection for Efficient LoRA Fine-Tuning Across Architectures}},
    author = {Saket, Abdulmalek},
    year   = 2026,
    eprint = {arXiv:2604.15351},
}""",
)


@dataclass(frozen=True)
class AletheiaOptions(ScoreOptions):
    """
    Options of `method="aletheia"`.

    Args:
        score_batches (`int`, *optional*, defaults to `5`): batches of the probe.
        layers_at_once (`int`, *optional*, defaults to `8`): of how many layers gradients are held at a time. Fewer
            take less memory and more passes.
    """

    score_batches: int = 5
    layers_at_once: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("layers_at_once", self.layers_at_once, minimum=1)


@register_method("aletheia")
class Aletheia(ScoreMethod):
    """
    Whole layers by the gradient of the loss with respect to their pre-trained weights: the norm of each frozen
    parameter's gradient, summed over the parameters of a layer and over a few batches. The layers with the largest sum
    are kept.

    This is the probe of the authors' published code. Chosen here: the batches have the size of those of the run, not
    one row; dropout is off; modules outside the numbered layers have the score 0; and all modules of a layer keep the
    rank of the configuration (the paper also gives MLPs another rank than attention: that is `rank_pattern`). A layer
    that is trained itself, or whose weights are quantized, has no gradient to be probed: a model in which an adapted
    weight is packed (4 and 8 bits of bitsandbytes, GPTQ, AWQ, the tensors of torchao) is refused, since its norms
    alone would be compared.
    """

    paper = ALETHEIA
    described = f"`aletheia`, the gradient probe of {ALETHEIA.link} in an independent implementation"
    Options = AletheiaOptions
    normalizable = False
    comparable = True
    compares_layers = True
    shardable = False
    unit = "layer"
    advice_on_ties = TOO_FEW_ROWS

    def inspect(self, model: Any, sites: Sequence[Site]) -> None:
        for name, module in model.named_modules():
            base = module.get_base_layer() if hasattr(module, "get_base_layer") else None  # of an adapted one
            if isinstance(base, nn.Module) and not _differentiable(base):
                raise ValueError(
                    f"You passed `method={self.name!r}`, which takes the gradient of pre-trained weights, but that of "
                    f"{name!r} ({type(base).__name__}) is quantized and has none. Please use another method, such as "
                    "'grad_norm', whose gradients are those of the LoRA, or load the model without quantization."
                )

    def num_passes(self, batches: int, grid: Grid, sites: Sequence[Site]) -> tuple[int, int]:
        count = batches * math.ceil(len(numbered_rows(grid)) / self.options.layers_at_once)
        return count, count

    def score(self, context: ScoreContext) -> Tensor:
        names = [context.grid.rows[row] for row in numbered_rows(context.grid)]
        layers = [self._frozen(context, name) for name in names]
        step = self.options.layers_at_once
        sums = [
            number
            for start in range(0, len(layers), step)
            for number in self._probe(context, layers[start : start + step])
        ]
        return of_modules(context.grid, torch.tensor(sums, dtype=torch.float64), outside=0.0)

    def _probe(self, context: ScoreContext, layers: Sequence[list[nn.Parameter]]) -> list[float]:
        weights = [weight for layer in layers for weight in layer]
        sums = [0.0] * len(weights)

        def add(found: Sequence[Tensor | None], scale: float) -> None:
            for index, gradient in enumerate(found):
                if gradient is not None:
                    sums[index] += float(wide(gradient).norm()) / scale

        try:
            for weight in weights:
                weight.requires_grad_(True)
            context.each_gradient(weights, add)
        finally:
            for weight in weights:
                weight.requires_grad_(False)
        rest = iter(sums)
        return [sum(next(rest) for _ in layer) for layer in layers]

    def _frozen(self, context: ScoreContext, name: str) -> list[nn.Parameter]:
        found = [p for p in context.base_model.get_submodule(name).parameters() if not p.requires_grad]
        if not found or not all(map(holds_floats, found)):
            raise ValueError(
                f"The layer {name!r} has {'quantized weights' if found else 'no frozen weight'}, so its gradient "
                "cannot be probed. Please use another method, such as 'grad_norm', whose gradients are those of the "
                "LoRA."
            )
        return found


def _differentiable(base: nn.Module) -> bool:
    """
    Whether the weights of a layer are such as have a gradient. Packed ones are parameters of integers or of 8 bits
    (bitsandbytes, FP8), tensors of a class of their own around such ones (torchao, Quanto), or buffers beside no
    parameter or only a bias (GPTQ, AWQ).
    """
    parameters = list(base.parameters())
    return any(p.ndim > 1 for p in parameters) and all(map(holds_floats, parameters))
