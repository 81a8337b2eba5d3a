"""SoRA: gates of components with a soft threshold after each step (https://huggingface.co/papers/2311.11696)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..core.values import check_number
from .papers import Paper
from .registry import register_method
from .trained_gates import GateMethod, GateOptions


SORA = Paper(
    "SoRA",
    "https://huggingface.co/papers/2311.11696",
    """\
@article{ding2023sora,
    title  = {{Sparse Low-rank Adaptation of Pre-trained Language Models}},
    author = {Ding, Ning and Lv, Xingtai and others},
    year   = 2023,
    eprint = {arXiv:2311.11696},
}""",
)


@dataclass(frozen=True)
class SoraOptions(GateOptions):
    """
    Options of `method="sora"`.

    Args:
        gate_learning_rate (`float`, *optional*): step size of the gates. Defaults to that of the weights, whose
            schedule it then follows.
        threshold (`float`, *optional*, defaults to `3e-4`): by how much each gate moves towards 0 after each step. It
            should be smaller than the learning rate, which is about the largest step away from 0.
    """

    threshold: float = 3e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        value = check_number("threshold", self.threshold)
        object.__setattr__(self, "threshold", value)
        if value < 0:
            raise ValueError(f"You passed `threshold={value}`; it must be positive.")


@register_method("sora")
class Sora(GateMethod):
    """
    Each component has a gate, `B diag(g) A`, that is trained with the weights, on the same batches and the same loss.
    After each step it is moved towards 0 by a threshold, and stays at 0 where it would change its sign: the proximal
    step of an L1 penalty,

    ```
    g <- T(g - step),        T(x) = sign(x) max(|x| - threshold, 0)
    ```

    with the step of Adam. The components with the largest `|g|` are kept, none whose gate is 0, and what is left of
    the gates is multiplied into `lora_B`. Gates learn from the first step on, until `discretize_at`.

    Chosen here: gates start at 1, so that a run begins as one of plain LoRA (in the authors' code they are drawn at
    random). In the paper the threshold is `learning rate x lambda`, in the code a number of its own, 3e-4 in its
    script, which is the default here; it alone decides there how many components are left, while here the budget has
    the last word. To let the threshold decide, pass `selection_ratio=1.0`, and give it enough steps to get from 1
    to 0.
    """

    paper = SORA
    described = f"`sora`, the gates of {SORA.link} in an independent implementation"
    Options = SoraOptions
    keeps_worthless = False

    def gates(self) -> Tensor:
        return self.numbers

    def doubt_gates(self, steps: int, learning_rate: float) -> str | None:
        threshold = self.options.threshold
        if learning_rate > threshold or steps * threshold < 1:
            return None
        return (
            f"A gate of `method='sora'` is moved by the threshold of {threshold:g} towards 0 after each of {steps:,} "
            f"steps, and a step away from it is {learning_rate:g} at most, so that all gates can be 0 before the "
            "choice. Please pass a smaller `threshold`, or a larger `gate_learning_rate`, in `method_options`."
        )

    def move(self, gradient: Tensor, learning_rate: float) -> None:
        moved = self.numbers + self.adam.step(gradient, learning_rate)
        self.numbers.copy_(moved.sign() * (moved.abs() - self.options.threshold).clamp(min=0.0))

    def components(self) -> Tensor:
        tie = bool((self._scores == self._scores[0]).all())
        if self.steps and tie and not self.keeps_all(self._scores):
            raise ValueError(
                f"All {len(self._scores)} gates of `method='sora'` are {float(self._scores[0]):g}, so there is "
                "nothing to choose by. While `lora_B` is still 0 they have no gradient. Please choose later "
                "(`discretize_at`), or with a smaller `threshold`."
            )
        return super().components()
