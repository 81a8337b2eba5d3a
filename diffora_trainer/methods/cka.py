"""Layers by how much they change the representation (https://huggingface.co/papers/2602.05988)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .context import ScoreContext
from .hidden import StateMethod, StateOptions, is_constant, of_modules
from .papers import Paper
from .registry import register_method
from .ties import TOO_FEW_ROWS


CKA = Paper(
    "Layer-wise LoRA with CKA",
    "https://huggingface.co/papers/2602.05988",
    """\
@article{ogawa2026layerwise,
    title  = {{Layer-wise LoRA fine-tuning: a similarity metric approach}},
    author = {Ogawa, Keith Ando and others},
    year   = 2026,
    eprint = {arXiv:2602.05988},
}""",
)


@dataclass(frozen=True)
class CkaOptions(StateOptions):
    """
    Options of `method="cka"`.

    Args:
        position (`str`, *optional*, defaults to `"auto"`): which state of a layer stands for a row: that of its
            `"first"` or `"last"` token, the `"mean"` of all, or `"auto"`, the first where tokens see those behind
            them and the last elsewhere.
    """


@register_method("cka")
class CkaLayers(StateMethod):
    """
    Whole layers by `1 - CKA(R_in, R_out)`, where `R_in` are the states that go into a layer, one for each row, and
    `R_out` those that come out (linear centered kernel alignment): layers that change the representation most are
    kept. With both centered over the rows,

    ```
    CKA(X, Y) = ||X^T Y||^2 / (||X^T X|| ||Y^T Y||)
    ```

    Which state stands for a row is that of the first token in encoders, and of the last one in decoders, as in the
    paper and its code; which of both a stack of layers is, is tried. Only forward passes are made.

    Chosen here: where the states that go in do not differ between rows, as those of the first token in front of the
    first layer of an encoder, nothing can be compared. The authors' code leaves out the layer with the largest change,
    which in an encoder is this one; here such a layer has the score 0, and no other is left out. So have modules
    outside the numbered layers.
    """

    paper = CKA
    described = f"`cka`, the similarity metric of {CKA.link} in an independent implementation"
    Options = CkaOptions
    normalizable = False
    comparable = True
    compares_layers = True
    unit = "layer"
    advice_on_ties = TOO_FEW_ROWS

    def score(self, context: ScoreContext) -> Tensor:
        states = self.states(context)
        if len(states[0][0]) < 3:
            raise ValueError(
                f"The states of {len(states[0][0])} rows are alike before and after any layer, for there is but one "
                "line through two points. Please score on more batches (`score_batches`), some hundreds of rows."
            )
        changes = [1.0 - linear_cka(into, out) for into, out in states]
        return of_modules(context.grid, torch.tensor(changes, dtype=torch.float32), outside=0.0)


def linear_cka(x: Tensor, y: Tensor) -> float:
    """
    Linear centered kernel alignment of two representations of the same rows, in [0, 1]; 1 if one of them does not
    differ between the rows.

    Args:
        x (`Tensor` of shape `(n, size)`): float64.
        y (`Tensor` of shape `(n, other size)`): float64.
    """
    kernels = []
    for states in (x, y):
        if is_constant(states):
            return 1.0
        centered = states - states.mean(dim=0)
        kernels.append(centered @ centered.T)
    first, second = kernels
    return float((first * second).sum() / (first.norm() * second.norm()))
