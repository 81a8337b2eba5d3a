"""AdaLoRA's sensitivity of single components (https://huggingface.co/papers/2303.10512, section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.values import check_number
from .context import ScoreContext, Site, matrices_of, wide
from .options import ScoreOptions
from .papers import Paper
from .ranks import RankMethod, rows_and_columns
from .registry import register_method


ADALORA = Paper(
    "AdaLoRA",
    "https://huggingface.co/papers/2303.10512",
    """\
@article{zhang2023adalora,
    title  = {{AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning}},
    author = {Zhang and others},
    year   = 2023,
    eprint = {arXiv:2303.10512},
}""",
)


@dataclass(frozen=True)
class AdaLoraOptions(ScoreOptions):
    """
    Options of `method="adalora"`.

    Args:
        beta1 (`float`, *optional*, defaults to `0.85`): weight of the past in the mean sensitivity, in [0, 1).
        beta2 (`float`, *optional*, defaults to `0.85`): weight of the past in its mean deviation, in [0, 1).
    """

    beta1: float = 0.85
    beta2: float = 0.85

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("beta1", "beta2"):
            value = check_number(name, getattr(self, name))
            object.__setattr__(self, name, value)
            if not 0 <= value < 1:
                raise ValueError(f"You passed `{name}={value}`; it must be in [0, 1).")


@register_method("adalora")
class AdaLora(RankMethod):
    """
    For each weight `w` with the gradient `g` of a batch, the sensitivity `I = |w g|` is averaged over batches, and so
    is how far it deviates from its average (equations 8 to 10 of the paper); the score is the product of both:

    ```
    I_mean <- beta1 I_mean + (1 - beta1) I        U <- beta2 U + (1 - beta2) |I - I_mean|        s = I_mean U
    ```

    A component is worth the score of its singular value plus the mean score of its entries in `lora_A` plus that in
    `lora_B` (equation 7).

    Chosen here: of the paper's `P`, `Lambda` and `Q` a plain LoRA has no `Lambda`. In its place stands the gate of the
    component, whose value is 1 and whose gradient is the inner product of a row of `lora_A` with its gradient. The
    averages run over the scoring batches at the weights of one moment, and not over the steps of a training; the cut
    is one, and not a cubic schedule of small ones; and there is no regularisation towards orthogonal factors. The
    magnitudes of DoRA, which belong to no component, do not count. What is
    cut leaves the adapter, where AdaLoRA in PEFT masks it.
    """

    paper = ADALORA
    described = f"`adalora`, the sensitivity of {ADALORA.link} in an independent implementation"
    Options = AdaLoraOptions
    gradient_score = True

    def score(self, context: ScoreContext) -> Tensor:
        beta1, beta2 = self.options.beta1, self.options.beta2
        weights = [weight for site in context.sites for weight in site.parameters]
        means: list[Tensor] = []
        deviations: list[Tensor] = []

        def learn(found: Sequence[Tensor | None], scale: float) -> None:
            by_site = zip(context.sites, context.by_site(found, scale), strict=True)
            parts = [part for site, gradients in by_site for part in _sensitivities(site, gradients)]
            if not means:
                means.extend(map(torch.zeros_like, parts))
                deviations.extend(map(torch.zeros_like, parts))
            for now, mean, deviation in zip(parts, means, deviations, strict=True):
                mean.lerp_(now, 1 - beta1)
                deviation.lerp_((now - mean).abs(), 1 - beta2)

        context.each_gradient(weights, learn)
        if not means:  # the losses of other processes are finite
            return torch.zeros(self.num_scores, dtype=torch.float64)
        scores = [(mean * deviation).mean(dim=1).cpu() for mean, deviation in zip(means, deviations, strict=True)]
        zero = torch.zeros((), dtype=torch.float32)
        return torch.cat([sum(scores[i : i + 3], zero) for i in range(0, len(scores), 3)]).double()


def _sensitivities(site: Site, gradients: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Of the gate, `lora_A` and `lora_B`, a row for each component. `gradients` are those of all of its parameters."""
    pair = matrices_of(site)
    gradient_of = {id(p): gradient for p, gradient in zip(site.parameters, gradients, strict=True)}
    a, b = map(wide, rows_and_columns(pair))
    grad_a, grad_b = map(wide, rows_and_columns([gradient_of[id(matrix)] for matrix in pair]))
    return (a * grad_a).sum(dim=1, keepdim=True).abs(), (a * grad_a).abs(), (b * grad_b).abs()
