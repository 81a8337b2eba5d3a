"""
How modules are chosen: what every method has to say and do.

A method is one class in one file, with the formula, its paper and its options. It declares what others have to know of
it, so that nobody asks for its name: whether it searches, by gradients of gates on held-out data ([`GradientMethod`]),
or scores ([`ScoreMethod`]), under which gates the weights train, and what it can be combined with. Register it with
[`~diffora_trainer.methods.registry.register_method`].
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..core.budget import Budget
from ..core.grid import Grid
from ..core.ranks import RankBudget
from .context import ScoreContext, Site
from .options import GradientOptions, MethodOptions, ScoreOptions
from .papers import DIFFORA, Paper
from .saved import check_saved
from .ties import NOT_TRAINED, check_ties


class SelectionMethod(ABC):
    """
    What a choice is made by: a state with one entry a module, in the order of the grid, that says how good each is.
    It lives on the CPU: it has a few hundred numbers, and only what they are made from comes from the device.

    Args:
        budget ([`~diffora_trainer.core.budget.Budget`]): what may be kept in the end.
        seed (`int`, *optional*, defaults to `0`): seed of what is drawn.

    Attributes:
        steps (`int`): how often the state has learned something.
    """

    name: ClassVar[str] = ""
    """Under what it is registered, and stands in `DiffoRAConfig(method=...)`."""
    paper: ClassVar[Paper | None] = None
    """Its paper."""
    described: ClassVar[str] = ""
    """What it is, in Markdown, for the model card; by default its name and its paper."""
    informed: ClassVar[bool] = True
    """Whether it looks at the modules at all."""
    Options: ClassVar[type[MethodOptions]] = MethodOptions
    """A frozen dataclass of its own options."""
    options: Any = None
    """Those of the run, also in the constructor; the defaults if the method was made without any."""
    searches: ClassVar[bool]
    """Whether it learns from architecture steps, and does not score."""
    trains_open: ClassVar[bool] = True
    """All gates are open during training, so pruned modules are still in use and have to fade out."""
    spends_ranks: ClassVar[bool] = False
    """Whether its matrix can steer ranks: modules that it favours get more, and the others less."""
    tells_ranks: ClassVar[bool] = False
    """Whether it chooses components itself, and with them the rank of each module (see `RankMethod`)."""
    trains_gates: ClassVar[bool] = False
    """Whether it has a gate for each component that the training loss moves, at each step (see `GateMethod`)."""
    compares_layers: ClassVar[bool] = False
    """Scores whole layers; modules compete over the model regardless of `selection_scope`."""
    unit: ClassVar[str] = "module"
    """What it keeps or prunes together, where `selection_unit` asks for nothing else."""
    shardable: ClassVar[bool] = True
    """Whether it works where FSDP holds each parameter in shards."""
    takes_function: ClassVar[bool] = False
    """Whether the user's own `score_function` does its work."""
    normalizable: ClassVar[bool] = False
    """Whether it has a score that grows with the size of a module, so that it can be divided by it."""
    gradient_score: ClassVar[bool] = False
    """Whether it has a score that is exactly 0 where no gradient has arrived at the module."""
    compares_losses: ClassVar[bool] = False
    """Whether it compares values of the loss, so that the loss has to mean something beside its gradient."""
    reads_data: ClassVar[bool] = False
    """Whether it scores by running the model on the scoring batches."""
    keeps_worthless: ClassVar[bool] = True
    """Whether what is worth 0 or less is kept as well where the budget has room for it."""

    def __init__(self, budget: Budget, seed: int = 0) -> None:
        self.budget = budget
        self.generator = torch.Generator(device="cpu").manual_seed(seed)
        self.seed = seed
        self.steps = 0
        if self.options is None:
            self.options = self.Options()

    @classmethod
    def create(cls, budget: Budget, options: Any, seed: int = 0) -> SelectionMethod:
        """The method with its [`Options`], which its constructor can read."""
        method = cls.__new__(cls)
        method.options = options
        cls.__init__(method, budget, seed=seed)
        return method

    def prepare(self, grid: Grid, ranks: RankBudget | None) -> None:  # noqa: B027 (most need nothing of it)
        """
        Take note of what is chosen from, before anything else is called.

        Args:
            grid ([`~diffora_trainer.core.grid.Grid`]): the modules.
            ranks ([`~diffora_trainer.core.ranks.RankBudget`] or `None`): the budget, if the method [`tells_ranks`] and
                it can be spent in ranks.
        """

    def inspect(self, model: Any, sites: Sequence[Site]) -> None:  # noqa: B027 (most take any)
        """
        Take note of the adapters of a model, before [`prepare`]. Raise a `ValueError` if the method cannot choose
        among them, or of this model.
        """

    def try_out(self, context: ScoreContext) -> None:  # noqa: B027 (most need no more than a loss)
        """Raise what scoring would raise of this model, before the first step: on one batch, and briefly."""

    def num_passes(self, batches: int, grid: Grid, sites: Sequence[Site]) -> tuple[int, int]:
        """How many passes through the model scoring makes over so many batches: at least, and at most."""
        return 0, 0

    @abstractmethod
    def values(self) -> Tensor:
        """The relaxed matrix, `(n,)` in [0, 1]."""

    @abstractmethod
    def scores(self) -> Tensor:
        """What the choice is made by, `(n,)`; higher is better."""

    def entropy(self) -> float:
        """Mean binary entropy of the relaxed matrix in bits: 1 when nothing is decided, 0 when everything is."""
        p = self.values().double().clamp(1e-12, 1 - 1e-12)
        return float(-(p * p.log2() + (1 - p) * (1 - p).log2()).mean())

    def tie_breaker(self) -> Tensor | None:
        """What decides between equal scores, `(n,)`, higher is better; `None` leaves it to the order of the grid."""
        return None

    def worth(self) -> Tensor | None:
        """
        What each module adds to the worth of a set, `(n,)`, where sets of different sizes are compared (limits of time
        and memory leave room for many modules in few layers or for few in many); `None`: its score above the lowest.
        """
        return None

    def start_ranks(self) -> tuple[int, ...] | None:
        """With how many of its components, the first ones, each module begins; `None` if with all."""
        return None

    def kept_components(self) -> tuple[tuple[int, ...], ...]:
        """Which components each module keeps, rising indices, if the method [`tells_ranks`]. Changes nothing."""
        raise NotImplementedError(f"{type(self).__name__} says that it tells ranks, but not which.")

    def before_pruning(self, sites: Sequence[Site]) -> None:  # noqa: B027 (most put nothing there)
        """
        Put into the weights what belongs there when the choice is carried out, such as a start for what is kept.

        Args:
            sites (`Sequence[Site]`): the modules, in the order of the grid.
        """

    def training_gates(self) -> Tensor | None:
        """The gates of the next training step, `(n,)`; `None`, where the class [`trains_open`], leaves all open."""
        return None if self.trains_open else self.values()

    def evaluation_gates(self) -> Tensor | None:
        """
        The gates of evaluation, `(n,)`, which are also folded into the selected modules when the others are pruned;
        `None` leaves all of them open. They should be such that the weights have been trained for them.
        """
        return None if self.trains_open else self.values()

    def discretize(self) -> Tensor:
        """The discretized matrix, `(n,)` bools: the best set under the budget. Changes nothing."""
        return self.budget.discretize(self.scores(), self.tie_breaker(), self.worth())

    def num_boundary_ties(self) -> int:
        """How many modules tie with one that has the other fate: among them only the order of the grid has chosen."""
        return self.budget.num_boundary_ties(self.scores(), self.tie_breaker(), self.discretize())

    def state_dict(self) -> dict[str, Tensor]:
        """All that a resumed search needs, as tensors."""
        return {
            "steps": torch.tensor(self.steps),
            "generator": self.generator.get_state(),
            **{name: tensor.detach().clone() for name, tensor in self._tensors().items()},
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what [`state_dict`] gave. Raises a `ValueError` if it belongs to another method or model."""
        own = self._tensors()
        needed = {"steps": torch.tensor(self.steps), "generator": self.generator.get_state(), **own}
        check_saved(state, needed, self.name)
        try:
            self.generator.set_state(state["generator"])
        except RuntimeError as error:
            raise ValueError(f"The saved matrix has no valid state in 'generator': {error}.") from error
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(state[name])
        self.steps = int(state["steps"])

    @abstractmethod
    def _tensors(self) -> dict[str, Tensor]:
        """The tensors of the state, by name; restored in place."""


class GradientMethod(SelectionMethod):
    """
    The Differential Adaptation Matrix (DAM) and its architecture optimizer: a gate for each module, relaxed from
    {0, 1} to [0, 1] and learned on held-out data (DiffoRA, https://huggingface.co/papers/2502.08905).

    The matrix has a row for each transformer layer and a column for each kind of module. Cells without a module are
    masked: the state is a float32 vector with an entry for each module that exists, in the order of the grid.

    A new one is a subclass that says at which gates the held-out gradient is taken, how that gradient moves the
    matrix, and under which gates the weights train: all open (`trains_open`), so that the gates of the pruned modules
    fade out before they are pruned, or those of [`training_gates`].

    Args:
        budget ([`~diffora_trainer.core.budget.Budget`]): what may be kept in the end.
        learning_rate (`float`, *optional*): step size; defaults to that of the options, or the method's own.
        seed (`int`, *optional*, defaults to `0`): seed of the gates that are drawn.
    """

    paper = DIFFORA
    described = f"an independent implementation of {DIFFORA.link}"
    Options: ClassVar[type[MethodOptions]] = GradientOptions
    searches = True
    trains_open = False
    default_learning_rate: ClassVar[float | None] = None

    def __init__(self, budget: Budget, learning_rate: float | None = None, seed: int = 0) -> None:
        super().__init__(budget, seed)
        given = self.options.arch_learning_rate if learning_rate is None else learning_rate
        self.learning_rate = self.default_learning_rate if given is None else given

    @abstractmethod
    def step(self, gradient: Tensor) -> None:
        """
        Move the matrix.

        Args:
            gradient (`Tensor` of shape `(n,)`): gradient of the held-out loss at [`search_gates`], finite float32.
        """

    def search_gates(self) -> Tensor:
        """The gates at which the next architecture gradient is taken, `(n,)`."""
        return self.values()

    def scores(self) -> Tensor:
        return self.values()


class ScoreMethod(SelectionMethod):
    """
    A method that scores the modules: all gates stay open, so the relaxed values are 1, and the choice is made by
    scores of any range. A new one is a subclass with a [`score`].
    """

    Options: ClassVar[type[MethodOptions]] = ScoreOptions
    searches = False
    normalizable = True
    comparable: ClassVar[bool] = False
    """Whether scores of different kinds of site are on one scale. Others are divided by the mean of their kind."""
    reads_data = True
    advice_on_ties: ClassVar[str | None] = NOT_TRAINED
    """What to do if all scores are equal; `None` if they may be, so that the order of the modules decides."""

    def __init__(self, budget: Budget, seed: int = 0) -> None:
        super().__init__(budget, seed)
        self._scores = torch.zeros(len(budget), dtype=torch.float64)
        self._tie_breaker = torch.zeros(len(budget), dtype=torch.float64)

    @abstractmethod
    def score(self, context: ScoreContext) -> Tensor | tuple[Tensor, Tensor]:
        """
        Score all modules. It leaves every `.grad` alone; random streams and the model's mode are the caller's affair.

        Args:
            context ([`~diffora_trainer.methods.context.ScoreContext`]): the model, its sites and the scoring batches.

        Returns:
            `Tensor` of shape `(n,)`, higher is kept; or two of them, of which the second decides between equal ones.
        """

    def num_passes(self, batches: int, grid: Grid, sites: Sequence[Site]) -> tuple[int, int]:
        """How many passes through the model [`score`] makes over so many batches: at least, and at most."""
        return batches, batches

    @property
    def owner(self) -> Tensor:
        """Index of the module of each number that [`score`] returns."""
        return torch.arange(len(self.budget))

    @property
    def num_scores(self) -> int:
        """How many numbers [`score`] returns."""
        return len(self.owner)

    def values(self) -> Tensor:
        return torch.ones(len(self.budget), dtype=torch.float32)

    def scores(self) -> Tensor:
        return self._scores.clone()

    def tie_breaker(self) -> Tensor:
        return self._tie_breaker.clone()

    def keeps_all(self, scores: Tensor) -> bool:
        """Whether nothing goes with scores, `(m,)`, since the budget has room for everything."""
        return self.budget.keeps_all

    def set_scores(self, scores: Tensor, tie_breaker: Tensor) -> None:
        """
        Take over finite scores, `(n,)`, and what decides between equal ones.

        Raises:
            ValueError: if all scores tie, nothing else decides between them, and not everything is kept.
        """
        check_ties(self, scores, tie_breaker)
        self._scores.copy_(scores)
        self._tie_breaker.copy_(tie_breaker)
        self.steps += 1

    def discretize(self) -> Tensor:
        if not self.steps:
            raise ValueError("The modules have no scores yet. Please call `score` before the choice is made.")
        return super().discretize()

    def _tensors(self) -> dict[str, Tensor]:
        return {"scores": self._scores, "tie_breaker": self._tie_breaker}
