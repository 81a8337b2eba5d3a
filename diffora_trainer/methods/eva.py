"""EVA: ranks, and a start, by the variance of what a module reads (https://huggingface.co/papers/2410.07170)."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from ..core.budget import Budget
from ..core.grid import Grid
from .context import ScoreContext, Site, matrices_of
from .hidden import inputs_of_adapters
from .papers import Paper
from .ranks import RankMethod, magnitudes
from .registry import register_method
from .ties import TOO_FEW_ROWS


EVA = Paper(
    "EVA",
    "https://huggingface.co/papers/2410.07170",
    """\
@article{paischer2024eva,
    title  = {{Parameter Efficient Fine-tuning via Explained Variance Adaptation}},
    author = {Paischer, Fabian and others},
    year   = 2024,
    eprint = {arXiv:2410.07170},
}""",
)

_OVERSAMPLED = 32
"""How many directions the sketch has beside four times the rank."""
_PASSES = 3
"""How often a wide module is sketched, each time along what the last sketch has found."""


@register_method("eva")
class Eva(RankMethod):
    """
    The inputs of a module, centered over all tokens of the scoring batches, have principal directions, and each of
    these explains a part of their variance. A module's `j`-th component is worth the part of its `j`-th direction, so
    the rank goes where few directions explain most.

    Before the first step (`discretize_at=0`, with `lora_B` still 0) `lora_A` also starts as these directions, which is
    EVA's initialisation; later, only the ranks are EVA's, and of the components of a module the largest stay.

    Chosen here: the variance is centered, as in PEFT's implementation. The directions are found by a Nyström
    approximation of the covariance from a random sketch, which takes `4 r + 32` numbers for each input and adds up
    over batches and processes (PEFT has an incremental PCA). It is refined in two more passes over the batches, each
    along the directions of the last one, which makes the scoring about three times as long. A module with no more
    inputs than `4 r + 32` is exact after one pass. Measured at rank 8 with 6000 vectors of 576 to 4096 inputs, the
    first 8 parts come out too small by 2.1 % at most (by 35 to 70 % after one pass) where the variance of the `i`-th
    direction is `1 / sqrt(i)`, and by less than 0.1 % where it is `1 / i`. A module keeps at most the rank of its
    configuration: to let some have more than others, give all of them a larger one (EVA's `rho`) and limit the
    parameters. Padding is left out, and a convolution reads the patches under its kernel.
    """

    paper = EVA
    described = f"`eva`, the ranks of {EVA.link} in an independent implementation"
    reads_inputs = True
    advice_on_ties = TOO_FEW_ROWS

    def __init__(self, budget: Budget, seed: int = 0) -> None:
        super().__init__(budget, seed)
        self._directions: list[Tensor] = []

    def num_passes(self, batches: int, grid: Grid, sites: Sequence[Site]) -> tuple[int, int]:
        shapes = [(down[0].numel(), len(down)) for down, _ in map(matrices_of, sites)]
        count = batches * (_PASSES if any(_columns(size, rank) < size for size, rank in shapes) else 1)
        return count, count

    def score(self, context: ScoreContext) -> Tensor:
        sketches = [_Sketch(down[0].numel(), len(down)) for down, _ in map(matrices_of, context.sites)]
        rough = {index for index, sketch in enumerate(sketches) if not sketch.exact}
        for _ in range(_PASSES - 1 if rough else 0):
            _read(context, sketches, rough)
            for index in sorted(rough):
                sketches[index].refine(context)
        _read(context, sketches, set(range(len(sketches))))
        parts = []
        self._directions.clear()
        for sketch, site in zip(sketches, context.sites, strict=True):
            values, directions = sketch.principal(context)
            rank = len(matrices_of(site)[0])
            missing = max(0, rank - len(values))
            parts.append(torch.cat([values[:rank], values.new_zeros(missing)]))
            self._directions.append(directions[:rank])
        return self.spread(parts, [magnitudes(site) for site in context.sites])

    def before_pruning(self, sites: Sequence[Site]) -> None:
        pairs = [matrices_of(site) for site in sites]
        if not self._directions or any(bool(b.detach().any()) for _, b in pairs):
            return  # they have learned something
        with torch.no_grad():
            for (a, _), directions in zip(pairs, self._directions, strict=True):
                a[: len(directions)].copy_(directions.reshape(len(directions), *a.shape[1:]))


def _read(context: ScoreContext, sketches: Sequence[_Sketch], wanted: Collection[int]) -> None:
    """A pass over the batches in which some sketches see what their modules read."""

    def read(index: int, inputs: Tensor) -> None:
        if index in wanted:
            sketches[index].add(inputs)

    with inputs_of_adapters(context, read) as run:
        for batch in context.batches:
            run(batch)


def _columns(size: int, rank: int) -> int:
    """How many numbers a sketch has for each input; as many as there are inputs, it is exact."""
    return min(size, 4 * rank + _OVERSAMPLED)


class _Sketch:
    """
    The covariance of vectors times a random matrix (Tropp et al., 2017, https://huggingface.co/papers/1706.05736), or
    times what an earlier sketch has made of one (subspace iteration).

    Args:
        size (`int`): numbers of a vector.
        rank (`int`): how many directions are wanted.
    """

    def __init__(self, size: int, rank: int) -> None:
        count = _columns(size, rank)
        generator = torch.Generator(device="cpu").manual_seed(size)
        self.exact = count == size
        # Orthonormal columns.
        drawn = torch.randn(size, count, generator=generator, dtype=torch.float64, device="cpu")
        self.test = torch.linalg.qr(drawn).Q
        self._shift: Tensor | None = None
        self._sums: list[Tensor] = []

    def add(self, vectors: Tensor) -> None:
        """Add vectors, `(k, size)`."""
        if not len(vectors):
            return
        vectors = vectors.float()
        if self._shift is None:
            self._shift = vectors.mean(dim=0)
        # Near their mean: of large squares the variance would be lost in rounding.
        vectors = vectors - self._shift
        own = [vectors.T @ (vectors @ self.test.to(vectors)), vectors.sum(dim=0), vectors.square().sum(dim=0)]
        own.append(torch.full((1,), float(len(vectors)), dtype=torch.float32, device=vectors.device))
        self._sums = own if not self._sums else [a + b for a, b in zip(self._sums, own, strict=True)]

    def refine(self, context: ScoreContext) -> None:
        """Begin anew along the directions that were found, which are the same in all processes."""
        image, _ = self._covariance(context)
        if bool(image.any()):
            self.test = torch.linalg.qr(image).Q
        self._sums = []

    def _covariance(self, context: ScoreContext) -> tuple[Tensor, float]:
        """The covariance times the matrix, and the whole variance; zeros if there were no vectors."""
        size, count = self.test.shape
        shapes = ((size, count), (size,), (size,), (1,))
        # A module that was never called has no sums.
        sums = self._sums or [torch.zeros(shape, dtype=torch.float32) for shape in shapes]
        image, total, squares, number = (part.cpu().double() for part in sums)
        shift = torch.zeros_like(total) if self._shift is None else self._shift.cpu().double()
        # Each process has a shift of its own, and what it has seen is moved to the mean over all of them.
        means = context.reduce(torch.cat([total + number * shift, number]).float()).double()
        if (everywhere := means[-1]) <= 0:
            return torch.zeros_like(image), 0.0
        off = shift - means[:-1] / everywhere
        image = image + torch.outer(off, total @ self.test) + torch.outer(total + number * off, off @ self.test)
        squares = squares + 2 * off * total + number * off.square()
        flat = context.reduce(torch.cat([image.flatten(), squares]).float()).double() / everywhere
        return flat[: size * count].view(size, count), float(flat[size * count :].clamp(min=0.0).sum())

    def principal(self, context: ScoreContext) -> tuple[Tensor, Tensor]:
        """The parts of the variance that principal directions explain, falling, and these directions as rows."""
        image, variance = self._covariance(context)
        shift = torch.finfo(torch.float32).eps * float(image.norm())
        if variance <= 0 or shift <= 0:
            return torch.zeros(0, dtype=torch.float64), torch.zeros(0, len(image), dtype=torch.float64)
        shifted = image + shift * self.test
        core = self.test.T @ shifted
        values, vectors = torch.linalg.eigh((core + core.T) / 2)
        good = values > shift * 1e-3
        half = shifted @ (vectors[:, good] / values[good].sqrt())
        directions, singular, _ = torch.linalg.svd(half, full_matrices=False)
        found = (singular.square() - shift).clamp(min=0.0) / variance
        return found, directions.T
