"""The Differential Adaptation Matrix and its relaxations, each with its own architecture optimizer. Torch only."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from ..core.budget import Budget


# Gains beyond this are an accident; the sums and squares that are formed of them must stay finite in float32.
_LARGEST_GAIN = 1e15


class DifferentialAdaptationMatrix(ABC):
    """
    A gate for each LoRA module, relaxed from {0, 1} to [0, 1] and learned on held-out data (DiffoRA,
    https://huggingface.co/papers/2502.08905).

    The matrix has a row for each transformer layer and a column for each kind of module. Cells without a module are
    masked: the state is a float32 vector with an entry for each module that exists, in the order of the grid, and
    [`~DifferentialAdaptationMatrix.as_matrix`] gives the two-dimensional view. It lives on the CPU: it has a few
    hundred numbers, and only their gradient comes from the device, once in each architecture step.

    A new relaxation is one subclass with a `name`: it says under which gates the weights train, at which gates the
    held-out gradient is taken, how that gradient moves the matrix, and which gates the cut would leave. If the weights
    train with all gates open it also sets `trains_open`, so that the gates of the modules that go are closed before
    the cut (`arch_closing`).

    Args:
        budget ([`~diffora_trainer.core.budget.Budget`]): what may be kept in the end.
        learning_rate (`float`, *optional*): step size; defaults to the relaxation's own.
        seed (`int`, *optional*, defaults to `0`): seed of the gates that are drawn.
    """

    name: ClassVar[str]
    default_learning_rate: ClassVar[float | None] = None
    trains_open: ClassVar[bool] = False
    """Whether the weights train with all gates open, so that at the cut nothing has got used to doing without the
    modules that go."""
    relaxations: ClassVar[dict[str, type[DifferentialAdaptationMatrix]]] = {}

    def __init__(self, budget: Budget, learning_rate: float | None = None, seed: int = 0) -> None:
        self.budget = budget
        self.learning_rate = self.default_learning_rate if learning_rate is None else learning_rate
        self.generator = torch.Generator().manual_seed(seed)
        self.steps = 0

    def __init_subclass__(cls, relaxes: bool = True, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        if relaxes and "name" in vars(cls):  # helpers between this class and a relaxation have none
            cls.relaxations[cls.name] = cls

    @classmethod
    def create(
        cls, relaxation: str, budget: Budget, learning_rate: float | None = None, seed: int = 0
    ) -> DifferentialAdaptationMatrix:
        """Make the matrix of a named relaxation."""
        if relaxation not in cls.relaxations:
            raise ValueError(f"There is no relaxation {relaxation!r}; known are {sorted(cls.relaxations)}.")
        return cls.relaxations[relaxation](budget, learning_rate, seed)

    @abstractmethod
    def values(self) -> Tensor:
        """The relaxed matrix, `(n,)` in [0, 1]."""

    @abstractmethod
    def step(self, gradient: Tensor) -> None:
        """
        Move the matrix.

        Args:
            gradient (`Tensor` of shape `(n,)`): gradient of the held-out loss at [`search_gates`], finite float32.
        """

    def training_gates(self) -> Tensor | None:
        """The gates of the next training step, `(n,)`; `None`, where the class [`trains_open`], leaves all open."""
        return None if self.trains_open else self.values()

    def evaluation_gates(self) -> Tensor | None:
        """
        The gates of evaluation, `(n,)`, which are also folded into the selected modules at the cut; `None` leaves all
        of them open. They should be such that the weights have been trained for them.
        """
        return None if self.trains_open else self.values()

    def search_gates(self) -> Tensor:
        """The gates at which the next architecture gradient is taken, `(n,)`."""
        return self.values()

    def scores(self) -> Tensor:
        """What the choice is made by, `(n,)`; higher is better."""
        return self.values()

    def tie_breaker(self) -> Tensor | None:
        """What decides between equal scores, `(n,)`, higher is better; `None` leaves it to the order of the grid."""
        return None

    def choose(self) -> Tensor:
        """The discretized matrix, `(n,)` bools: the best set under the budget."""
        return self.budget.choose(self.scores(), self.tie_breaker())

    def num_boundary_ties(self) -> int:
        """How many modules tie with one that has the other fate: among them only the order of the grid has chosen."""
        scores, ties = self.scores(), self.tie_breaker()
        ties = torch.zeros_like(scores) if ties is None else ties
        allowed = self.budget.allowed.tolist()
        keys = list(zip(self.budget.group.tolist(), allowed, scores.tolist(), ties.tolist(), strict=True))
        kept = self.choose().tolist()
        tied = {key for key, keep in zip(keys, kept, strict=True) if keep}
        tied &= {key for key, keep in zip(keys, kept, strict=True) if not keep}
        return sum(key in tied for key in keys)

    def entropy(self) -> float:
        """Mean binary entropy of the entries in bits: 1 when nothing is decided, 0 when everything is."""
        p = self.values().double().clamp(1e-12, 1 - 1e-12)
        return float(-(p * p.log2() + (1 - p) * (1 - p).log2()).mean())

    def as_matrix(self, positions: Tensor, shape: tuple[int, int], values: Tensor | None = None) -> Tensor:
        """
        The two-dimensional view.

        Args:
            positions (`Tensor` of shape `(n, 2)`): row and column of each module.
            shape (`tuple[int, int]`): rows and columns.
            values (`Tensor` of shape `(n,)`, *optional*): what to show; defaults to [`values`].

        Returns:
            `Tensor` of shape `(rows, columns)`, NaN where no module is.
        """
        matrix = torch.full(shape, float("nan"))
        matrix[positions[:, 0], positions[:, 1]] = self.values() if values is None else values.float()
        return matrix

    def state_dict(self) -> dict[str, Tensor]:
        """All that a resumed search needs, as tensors."""
        return {
            "steps": torch.tensor(self.steps),
            "generator": self.generator.get_state(),
            **{name: tensor.detach().clone() for name, tensor in self._tensors().items()},
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what [`state_dict`] gave. Raises a `ValueError` if it belongs to another matrix."""
        own = self._tensors()
        expected = {"steps", "generator", *own}
        if set(state) != expected:
            raise ValueError(
                f"The saved matrix has the entries {sorted(state)}, but relaxation {self.name!r} needs "
                f"{sorted(expected)}. It was made with another relaxation."
            )
        needed = {"steps": torch.tensor(self.steps), "generator": self.generator.get_state(), **own}
        for name, tensor in needed.items():
            if state[name].shape != tensor.shape or state[name].dtype != tensor.dtype:
                raise ValueError(
                    f"The saved matrix has {tuple(state[name].shape)} numbers of {state[name].dtype} in {name!r}, "
                    f"this model needs {tuple(tensor.shape)} of {tensor.dtype}. It was made for another model or "
                    "other target modules, or is damaged."
                )
            if not torch.isfinite(state[name]).all() or name == "steps" and state[name] < 0:
                raise ValueError(f"The saved matrix has a number in {name!r} that cannot be. It is damaged.")
        try:
            self.generator.set_state(state["generator"])
        except RuntimeError as error:
            raise ValueError(f"The saved matrix has no state of a generator in 'generator': {error}.") from error
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(state[name])
        self.steps = int(state["steps"])

    @abstractmethod
    def _tensors(self) -> dict[str, Tensor]:
        """The tensors of the state, by name; restored in place."""


class BudgetMatrix(DifferentialAdaptationMatrix):
    """
    The matrix kept in the budget polytope `{0 <= gate <= 1, sum of gates <= budget}` and learned by stochastic
    Frank-Wolfe: at each step `t` it moves by `2 / (t + 2)` towards the affordable set with the largest linear gain on
    held-out data. One held-out batch is noisy, so gains are averaged over steps, as Mokhtari et al., 2018
    (https://huggingface.co/papers/1804.09554) do. The newest weighs `2 / (t + 1)`, which makes the weights rise
    linearly with `t`: it remembers longer than their `(t + 8)^(-2/3)`, since a search makes tens of steps and not
    thousands.

    It is zero-sum by construction, needs no learning rate, and drifts towards a 0/1 matrix. The gradient is taken at
    the matrix itself, so near the target sparsity: with all gates at 1 it would ask which module wants *more*, and
    rank the modules that have already learned last. The weights train with all gates open, so that until the cut a run
    is, bit for bit, one of plain LoRA on all modules and the rows that are not held out; `recipes/benchmarks/ablation`
    shows what it costs to train them under gates drawn at the target ratio.
    """

    name = "budget"
    trains_open = True

    def __init__(self, budget: Budget, learning_rate: float | None = None, seed: int = 0) -> None:
        super().__init__(budget, learning_rate, seed)
        self._values = budget.share.float()
        self._gains = torch.zeros(len(budget))

    def values(self) -> Tensor:
        return self._values.clone()

    def step(self, gradient: Tensor) -> None:
        self.steps += 1
        self._gains.lerp_(-_bounded(gradient), 2.0 / (self.steps + 1.0))
        length = 2.0 / (self.steps + 2.0) if self.learning_rate is None else self.learning_rate
        self._values.lerp_(self.budget.linear_oracle(self._gains), length).clamp_(0.0, 1.0)

    def tie_breaker(self) -> Tensor:
        # Several modules can stand at exactly 0 or 1; the averaged gain says which of them is worth more.
        return self._gains.clone()

    def _tensors(self) -> dict[str, Tensor]:
        return {"values": self._values, "gains": self._gains}


class SampledMatrix(DifferentialAdaptationMatrix):
    """
    Gates in {0, 1}, drawn without replacement at the target ratio (Gumbel top-k, Kool et al., 2019,
    https://huggingface.co/papers/1903.06059). The gradient of the held-out loss at the drawn gates passes straight
    through to the logits, which move by plain gradient ascent in units of the root mean square of all gains: Adam's
    normalisation of each entry would make a useless module's noise as large as a useful one's gain.
    """

    name = "sampled"
    default_learning_rate = 0.1

    def __init__(self, budget: Budget, learning_rate: float | None = None, seed: int = 0) -> None:
        super().__init__(budget, learning_rate, seed)
        self._logits = torch.zeros(len(budget))
        self._mean_square = torch.zeros(())

    def values(self) -> Tensor:
        return self.budget.calibrate(self._logits)

    def scores(self) -> Tensor:
        return self._logits.clone()

    def training_gates(self) -> Tensor:
        noise = -torch.empty(len(self.budget)).exponential_(generator=self.generator).log()
        return self.budget.choose(self._logits + noise).float()

    def evaluation_gates(self) -> Tensor:
        return self.choose().float()  # of the kind that the weights train under

    def search_gates(self) -> Tensor:
        return self.training_gates()

    def step(self, gradient: Tensor) -> None:
        self.steps += 1
        gradient = _bounded(gradient)
        # The average over the steps so far, so that early steps are not blown up.
        self._mean_square.lerp_(gradient.square().mean(), 1.0 / min(self.steps, 10))
        scale = self._mean_square.sqrt().clamp(min=1e-12)
        assert self.learning_rate is not None
        self._logits.sub_(gradient / scale, alpha=self.learning_rate)

    def _tensors(self) -> dict[str, Tensor]:
        return {"logits": self._logits, "mean_square": self._mean_square}


class _AdamMatrix(DifferentialAdaptationMatrix):
    """Logits learned by Adam with DARTS' betas; the subclass says how logits become gates."""

    default_learning_rate = 0.05

    def __init__(self, budget: Budget, learning_rate: float | None = None, seed: int = 0) -> None:
        super().__init__(budget, learning_rate, seed)
        self._logits = torch.zeros(len(budget), requires_grad=True)
        assert self.learning_rate is not None
        self._optimizer = torch.optim.Adam([self._logits], lr=self.learning_rate, betas=(0.5, 0.999))
        # Create the moments now, so that the state has the same entries before and after the first step.
        self._logits.grad = torch.zeros_like(self._logits)
        self._optimizer.step()
        self._optimizer.state[self._logits]["step"].zero_()

    @abstractmethod
    def _relax(self, logits: Tensor) -> Tensor:
        """Logits to gates in [0, 1], differentiable."""

    def values(self) -> Tensor:
        with torch.no_grad():
            return self._relax(self._logits)

    def step(self, gradient: Tensor) -> None:
        self.steps += 1
        self._optimizer.zero_grad()
        self._relax(self._logits).backward(_bounded(gradient))
        self._optimizer.step()

    def _tensors(self) -> dict[str, Tensor]:
        state = self._optimizer.state[self._logits]
        return {"logits": self._logits, **{f"adam_{name}": state[name] for name in ("step", "exp_avg", "exp_avg_sq")}}


class SigmoidMatrix(_AdamMatrix):
    """Independent sigmoids learned by Adam: DARTS (https://huggingface.co/papers/1806.09055) read literally."""

    name = "sigmoid"

    def _relax(self, logits: Tensor) -> Tensor:
        return torch.sigmoid(logits)


class SoftmaxMatrix(_AdamMatrix):
    """
    A softmax over each row, or over the whole matrix when that is the scope of the choice, times the number of modules
    that may be kept, at most 1. Zero-sum: a gate can rise only if others fall. The weights train with all gates open:
    under the soft gates they would make up for small ones, and the useful modules would ask for less.
    """

    name = "softmax"
    trains_open = True

    def _relax(self, logits: Tensor) -> Tensor:
        budget = self.budget
        # The same shift for all logits of a group changes no softmax and keeps `exp` in range.
        largest = torch.zeros(len(budget.targets)).scatter_reduce(
            0, budget.group, logits.detach(), "amax", include_self=False
        )
        weights = (logits - largest[budget.group]).exp()
        totals = torch.zeros(len(budget.targets)).index_add(0, budget.group, weights)
        counts = budget.counts_of_groups().float()
        return (weights / totals[budget.group] * counts[budget.group]).clamp(max=1.0)


class ScoreMatrix(DifferentialAdaptationMatrix, relaxes=False):
    """
    No relaxation, but the place of one for a method that scores the modules once: all gates stay open, so the values
    are 1, and the choice is made by scores of any range.
    """

    name = "scores"
    trains_open = True

    def __init__(self, budget: Budget, learning_rate: float | None = None, seed: int = 0) -> None:
        super().__init__(budget, learning_rate, seed)
        self._scores = torch.zeros(len(budget), dtype=torch.float64)
        self._tie_breaker = torch.zeros(len(budget), dtype=torch.float64)

    def values(self) -> Tensor:
        return torch.ones(len(self.budget))

    def scores(self) -> Tensor:
        return self._scores.clone()

    def tie_breaker(self) -> Tensor:
        return self._tie_breaker.clone()

    def step(self, gradient: Tensor) -> None:
        raise ValueError(
            "These modules are scored, not searched: there is no architecture step. Please call `score` once before "
            "the cut, or set `method='diffora'`."
        )

    def set_scores(self, scores: Tensor, tie_breaker: Tensor) -> None:
        """
        Take over finite scores, `(n,)`, and what decides between equal ones.

        Raises:
            ValueError: if all scores tie, and nothing else decides between them.
        """
        tie = bool((scores == scores[0]).all() and (tie_breaker == tie_breaker[0]).all())
        if len(scores) > 1 and tie:
            raise ValueError(
                f"All {len(scores)} modules have the score {float(scores[0]):g}, so there is nothing to choose by. "
                "While `lora_B` is still 0, as before the first step or as long as the learning rate is 0, most "
                "scores are 0. Please score later (`discretize_at`, or `arch_warmup` with `reallocate_every`), load "
                "an adapter that was trained before, or use another `method`; 'constant' is a random choice."
            )
        self._scores.copy_(scores)
        self._tie_breaker.copy_(tie_breaker)
        self.steps += 1

    def choose(self) -> Tensor:
        if not self.steps:
            raise ValueError("The modules have no scores yet. Please call `score` before the choice is made.")
        return super().choose()

    def _tensors(self) -> dict[str, Tensor]:
        return {"scores": self._scores, "tie_breaker": self._tie_breaker}


def _bounded(gradient: Tensor) -> Tensor:
    return gradient.clamp(-_LARGEST_GAIN, _LARGEST_GAIN)
