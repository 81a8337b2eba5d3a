"""
Scores of gradients of the loss, after HeteroLoRA (https://huggingface.co/papers/2406.14956, section 3.1).

With `A` and `B` the matrices of one LoRA and `gA` and `gB` the gradients of the mean loss of the
scoring batches with respect to them; one forward and backward pass for each batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .base import ScoreMethod
from .context import ScoreContext, saliency
from .papers import HETEROLORA, ZERO_COST
from .registry import register_method


@register_method("grad_norm")
class GradNorm(ScoreMethod):
    """`||gA|| + ||gB||`: norm of the gradient of `lora_A` plus that of `lora_B`."""

    paper = HETEROLORA
    described = f"`grad_norm`, {ZERO_COST}"
    shardable = False
    gradient_score = True

    def score(self, context: ScoreContext) -> Tensor:
        return context.sum_over_weights(lambda weight, gradient: torch.linalg.vector_norm(gradient))


@register_method("snip")
class Snip(ScoreMethod):
    """`sum |A * gA| + sum |B * gB|`: sum of `|weight * gradient|` over both (SNIP, Lee et al., 2019)."""

    paper = HETEROLORA
    described = f"`snip`, {ZERO_COST}"
    shardable = False
    gradient_score = True

    def score(self, context: ScoreContext) -> Tensor:
        return context.sum_over_weights(saliency)
