"""BeamLoRA: strong components take the place of weak ones (https://huggingface.co/papers/2502.13604)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.budget import Budget
from ..core.grid import Grid
from ..core.ranks import RankBudget
from ..core.values import check_integer, check_number
from .context import Site, matrices_of
from .papers import Paper
from .ranks import rows_and_columns
from .registry import register_method
from .trained_gates import GateMethod, GateOptions


BEAMLORA = Paper(
    "BeamLoRA",
    "https://huggingface.co/papers/2502.13604",
    """\
@article{gu2025beamlora,
    title  = {{BeamLoRA: Beam-Constraint Low-Rank Adaptation}},
    author = {Gu, Naibin and Zhang, Zhenyu and others},
    year   = 2025,
    eprint = {arXiv:2502.13604},
}""",
)


@dataclass(frozen=True)
class BeamLoraOptions(GateOptions):
    """
    Options of `method="beamlora"`.

    Args:
        beam_every (`int`, *optional*, defaults to `20`): after how many steps weak components are replaced again.
        top_p (`float`, *optional*, defaults to `0.95`): at first those components are weak that the strongest ones
            with this part of all importance leave over, in (0, 1]; it rises to 1 until `discretize_at`.
        temperature (`float`, *optional*, defaults to `0.05`): of the softmax.
        gate_learning_rate (`float`, *optional*): step size of the scores. Defaults to that of the weights, whose
            schedule it then follows.
    """

    beam_every: int = 20
    top_p: float = 0.95
    temperature: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("beam_every", self.beam_every, minimum=2)
        for name in ("top_p", "temperature"):
            value = check_number(name, getattr(self, name))
            object.__setattr__(self, name, value)
            if value <= 0 or (name == "top_p" and value > 1):
                raise ValueError(
                    f"You passed `{name}={value}`; it must be {'in (0, 1]' if value > 1 else 'positive'}."
                )


@register_method("beamlora")
class BeamLora(GateMethod):
    """
    All modules have the rank that the budget has room for, from the first step to the last, and within a module
    components compete. Each has a score `s`, trained with the weights, and is multiplied by its importance
    `r softmax(s / temperature)`. After every so many steps the components of all modules are sorted by importance;
    those beyond the first ones that have `top_p` of all importance together are weak (`top_p` rises to 1 along a
    cosine). A weak one becomes what a strong one of its module was half a period before, and both go on from the mean
    of their scores. At `discretize_at` what the scores have come to is multiplied into `lora_B`, and plain LoRA goes
    on: nothing is pruned, so it needs a budget with room for rank 1 in every module.

    This follows the authors' published code. Chosen here: scores start at 0, so that a run begins as one of plain LoRA
    of that rank; the weakest is paired with the strongest, the next with the next, where they are shuffled there; no
    more than half of a module's components are replaced at once; and the scores are Adam's, with its moments set to 0
    in a module that has changed. To let it act to the end, set `discretize_at=0.999`.
    """

    paper = BEAMLORA
    described = f"`beamlora`, the beams of {BEAMLORA.link} in an independent implementation"
    Options = BeamLoraOptions
    begins_at = 0.0
    saved_as = "logits"

    def __init__(self, budget: Budget, seed: int = 0) -> None:
        super().__init__(budget, seed)
        self._on = torch.ones(len(budget), dtype=torch.bool)
        self._sizes = [0] * len(budget)
        self._past = torch.zeros(0, dtype=torch.float32)

    def prepare(self, grid: Grid, ranks: RankBudget | None) -> None:
        super().prepare(grid, ranks)
        even = self._counts if ranks is None else ranks.start()
        whole = ranks is None and not self.budget.keeps_all
        if whole or (ranks is not None and not ranks.fits(even)):
            raise ValueError(
                f"You passed `method={self.name!r}`, which keeps every module, with a budget that "
                f"{'keeps whole modules' if whole else 'has no room for rank 1 in each'}. Please raise it, leave "
                "`selection_granularity` and limits of a step at their defaults, or use another method."
            )
        self._on = torch.cat([torch.arange(count) < rank for count, rank in zip(self._counts, even, strict=True)])
        self._past = torch.zeros(sum(self._sizes), dtype=torch.float32)

    def start_ranks(self) -> tuple[int, ...] | None:
        if self._ranks is None:
            return None
        return tuple(int(own.sum()) for own in self.split(self._on))

    def doubt_gates(self, steps: int, learning_rate: float) -> str | None:
        every = self.options.beam_every
        if every < steps:
            return None
        return (
            f"`method='beamlora'` replaces weak components every {every} steps (`beam_every`), so no component is "
            f"replaced before the choice at step {steps}. Please pass a smaller `beam_every` in `method_options`, or "
            "a later `discretize_at`."
        )

    def inspect(self, model: Any, sites: Sequence[Site]) -> None:
        super().inspect(model, sites)
        # A single component has no other one to take its place.
        self._sizes = [0 if count == 1 else sum(matrix.numel() for matrix in matrices_of(site))
                       for count, site in zip(self._counts, sites, strict=True)]  # fmt: skip

    def gates(self) -> Tensor:
        open_ = self.numbers.masked_fill(~self._on, -math.inf) / self.options.temperature
        return torch.cat([own.softmax(0) * int(own.isfinite().sum()) for own in self.split(open_)])

    def move(self, gradient: Tensor, learning_rate: float) -> None:
        gates = self.gates()
        products = self.split(gates * gradient)
        # The derivative of a softmax that is multiplied by its length.
        found = [
            (own - gate * own.sum() / gate.sum()) / self.options.temperature
            for own, gate in zip(products, self.split(gates), strict=True)
        ]
        self.numbers.add_(self.adam.step(torch.cat(found), learning_rate))

    def after_gate_step(self, sites: Sequence[Site], progress: float) -> None:
        every = self.options.beam_every
        if self.steps % every == every // 2:
            self._past = torch.cat([torch.zeros(0, dtype=torch.float32), *[
                torch.cat(rows_and_columns(matrices_of(site)), dim=1).flatten().float().cpu()
                for site, size in zip(sites, self._sizes, strict=True) if size
            ]])  # fmt: skip
        elif self.steps % every == 0 and progress < 1:
            self._replace(sites, progress)

    def _replace(self, sites: Sequence[Site], progress: float) -> None:
        importance = self.gates()
        order = torch.sort(importance, descending=True, stable=True).indices
        top_p = 1 - (1 - self.options.top_p) * (1 + math.cos(math.pi * progress)) / 2
        beyond = importance[order].cumsum(0) > top_p * importance.sum() * (1 + 1e-6)
        weak = torch.zeros(len(importance), dtype=torch.bool)
        weak[order[beyond]] = True
        weak &= self._on
        parts = zip(sites, self._past.split(self._sizes), self.split(weak), self.split(importance), strict=True)
        start = 0
        for site, past, own, gates in parts:
            self._replace_in(site, past, own, gates, slice(start, start + len(own)))
            start += len(own)
        self._scores.copy_(self.gates())

    def _replace_in(self, site: Site, past: Tensor, weak: Tensor, gates: Tensor, place: slice) -> None:
        falling = torch.sort(gates, descending=True, stable=True).indices
        falling = falling[gates[falling] > 0]
        count = min(int(weak.sum()), len(falling) // 2)
        if not count:
            return
        worst, best = falling.flip(0)[:count], falling[:count]
        a, b = matrices_of(site)
        rows = past.reshape(len(gates), -1)[best]
        width = a[0].numel()
        with torch.no_grad():
            a[worst.to(a.device)] = rows[:, :width].reshape(count, *a.shape[1:]).to(a)
            b[:, worst.to(b.device)] = rows[:, width:].T.reshape(-1, count, *b.shape[2:]).to(b)
        logits = self.numbers[place]
        logits[worst] = logits[best] = (logits[worst] + logits[best]) / 2
        self.adam.forget(place)

    def components(self) -> Tensor:
        return self._on.clone()

    def scores(self) -> Tensor:
        return torch.stack([own.max() for own in self.split(self._scores)])

    def _tensors(self) -> dict[str, Tensor]:
        return {**super()._tensors(), "past": self._past}
