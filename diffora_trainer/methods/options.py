"""The options of a method: what belongs to it alone, and stands in `DiffoRAConfig(method_options=...)`."""

from __future__ import annotations

from dataclasses import dataclass

from ..core.values import check_integer, check_number


ARCH_EVERY = 4
MOST_ARCH_STEPS = 32
"""Of a search that is not told how often. What the defaults rest on made fewer (`docs/defaults.md`)."""


class _Defaults:
    """
    What is asked of the options of any method, and what holds for one that has no such option. No fields: a user can
    pass those alone that the method has.
    """

    arch_order: int = 1
    fold_gates: bool = True
    gate_learning_rate: float | None = None
    normalize_scores: bool = False
    reallocate_every: float | None = None
    score_batches: int = 1


@dataclass(frozen=True)
class MethodOptions(_Defaults):
    """
    The options of a method that has none. Those of every other one are a frozen dataclass that derives from it, or
    from [`GradientOptions`] or [`ScoreOptions`], which do.
    """


@dataclass(frozen=True)
class GradientOptions(MethodOptions):
    """
    Options of a method that searches, as they stand in `DiffoRAConfig(method_options=...)`.

    Args:
        arch_every (`int`, *optional*):
            During the search an architecture step follows each `arch_every`-th optimizer step, the first one included.
            Defaults to `4`, in a long search to as many as keep it at 32 architecture steps or fewer.
        arch_learning_rate (`float`, *optional*):
            Step size of the matrix. Defaults to the method's own: `2 / (t + 2)` at the `t`-th Frank-Wolfe step of
            `"diffora"`, `0.1` for `"sampled"` and `0.05` for the Adam of `"sigmoid"` and `"softmax"`.
        arch_order (`int`, *optional*, defaults to `1`):
            `1` takes the gradient of the held-out loss at the present weights; `2` is the finite-difference unrolled
            step of DARTS (https://huggingface.co/papers/1806.09055, eqs. 7 and 8), about four times as costly. It
            needs float32: in half precision the difference is mostly rounding.
        fold_gates (`bool`, *optional*, defaults to `True`):
            Multiply the gate that each selected module's weights were trained for into its `lora_B` when the others
            are pruned, so that the model's output does not jump. This matters for `"sigmoid"`, whose weights train
            under fractions; for the others that gate is 1. With `False` the selected gates are set to 1.
        rank_margin (`float`, *optional*, defaults to `1.0`):
            With `selection_granularity="component"`: how many times the parameters of the budget a run begins with,
            spread evenly over all modules. AdaLoRA begins with 1.5 times its target. A margin is a warm-up at more
            rank than is kept: where learning starts late, a run may stay on its plateau (`docs/benchmarks.md`).
        rank_growth (`float`, *optional*, defaults to `0.25`):
            With `selection_granularity="component"`: the part of the budget, in [0, 1), that goes to new components at
            the choice. They grow in the modules whose components are worth most, with columns of zeros in `lora_B`,
            so that the function of the model stays the same.

    Raises:
        TypeError: if a value is of the wrong type.
        ValueError: if a value is out of its range.
    """

    arch_every: int | None = None
    arch_learning_rate: float | None = None
    arch_order: int = 1
    fold_gates: bool = True
    rank_margin: float = 1.0
    rank_growth: float = 0.25

    def __post_init__(self) -> None:
        if self.arch_every is not None:
            check_integer("arch_every", self.arch_every, minimum=1)
        check_integer("arch_order", self.arch_order)
        if self.arch_order not in (1, 2):
            raise ValueError(f"You passed `arch_order={self.arch_order}`; it must be 1 (first order) or 2 (unrolled).")
        if not isinstance(self.fold_gates, bool):
            raise TypeError(f"`fold_gates` must be a bool, got {self.fold_gates!r}.")
        self._check_ranks()
        if self.arch_learning_rate is None:
            return
        rate = check_number("arch_learning_rate", self.arch_learning_rate)
        object.__setattr__(self, "arch_learning_rate", rate)
        if rate <= 0:
            raise ValueError(
                f"You passed `arch_learning_rate={rate}`; it must be positive, or None for the method's default."
            )
        if rate > 1000:
            raise ValueError(
                f"You passed `arch_learning_rate={rate}`, after one step of which every gate would stand at 0 or 1 "
                "for good. Use a value such as 0.05, or None for the method's default."
            )

    def _check_ranks(self) -> None:
        margin, growth = (check_number(name, getattr(self, name)) for name in ("rank_margin", "rank_growth"))
        if margin < 1:
            raise ValueError(
                f"You passed `rank_margin={margin}`, but it says how many times the parameters of the budget a run "
                "begins with, so it must be 1 or more."
            )
        if not 0 <= growth < 1:
            raise ValueError(
                f"You passed `rank_growth={growth}`, but it is the part of the budget that new components get, and "
                "must be in [0, 1): something has to be left to choose."
            )
        if margin == 1 and growth == 0:
            raise ValueError(
                "You passed `rank_growth=0` with `rank_margin=1`, so that a run begins with what the budget has room "
                "for, and there is nothing to choose. Please pass a larger margin, or let components grow."
            )


@dataclass(frozen=True)
class ScoreOptions(MethodOptions):
    """
    Options of a method that scores, as they stand in `DiffoRAConfig(method_options=...)`.

    Args:
        score_batches (`int`, *optional*, defaults to `32`):
            Batches that a score is taken on, of `arch_batch_size` rows on each process. They come in random order from
            the rows of the training set that are held out until the others are pruned (see `arch_split`), each row
            once: if these are fewer, so are the batches.
        normalize_scores (`bool`, *optional*, defaults to `False`):
            Divide each score by the module's number of parameters. By default scores are raw, as published, which
            favours large modules. `"random"`, and methods that give ranks or choose layers, have no score that grows
            with the size of a module and refuse it.
        reallocate_every (`float`, *optional*):
            Choose anew every so many optimizer steps (a whole number of 1 or more), or after each such fraction of all
            steps of the run (a number in (0, 1)); each fifth of an epoch, as HeteroLoRA has it, is
            `0.2 / num_train_epochs`. From the end of the warm-up (`arch_warmup`, which is read then) until
            `discretize_at` all modules are switched on and scored at each of these moments, on held-out batches that
            go on through the rows from moment to moment; the best under the budget stay on, and the others are
            switched off. These keep their weights and their state in the optimizer, take no part in a step, and go on
            as they were when they are chosen again. `discretize_at` prunes to the set that is in force:
            `discretize_at=0.999`, or the number of the last step, goes on to the end. It does not combine with
            `weight_sharing`. Each moment costs `score_batches` passes. By default modules are scored once.

    Raises:
        TypeError: if a value is of the wrong type.
        ValueError: if a value is out of its range.
    """

    score_batches: int = 32
    normalize_scores: bool = False
    reallocate_every: float | None = None

    def __post_init__(self) -> None:
        check_integer("score_batches", self.score_batches, minimum=1)
        if not isinstance(self.normalize_scores, bool):
            raise TypeError(f"`normalize_scores` must be a bool, got {self.normalize_scores!r}.")
        if self.reallocate_every is None:
            return
        every = check_number("reallocate_every", self.reallocate_every)
        object.__setattr__(self, "reallocate_every", every)
        if every <= 0 or (every >= 1 and not every.is_integer()):
            raise ValueError(
                f"You passed `reallocate_every={every}`. A whole number of 1 or more is a number of optimizer steps "
                "and a number in (0, 1) a fraction of all steps; this is neither."
            )
