"""From scores to a set of modules: the rules of the budget. No model in here."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


class Budget:
    """
    What may be kept, and how a choice is made from scores.

    All vectors have one entry a module, in the order of the grid. Equal scores are decided by `tie_breaker`, then by
    the order of the grid, so a choice is deterministic.

    Args:
        rows (`Sequence[int]` of length `n`): row (layer) of each module.
        parameters (`Sequence[int]` of length `n`): trainable LoRA parameters of each module.
        ratio (`float`, *optional*, defaults to `0.5`): share of the modules to keep.
        scope (`str`, *optional*, defaults to `"layer"`): `"layer"` or `"model"`.
        cap (`int`, *optional*): exact cap on the kept parameters; overrides `ratio` and `scope`.
        kinds (`Sequence[int]` of length `n`, *optional*): modules of different kinds are ranked apart, each kind by
            the same ratio, or under its part of the cap, in proportion to its parameters.
        required (`Sequence[bool]` of length `n`, *optional*): at least one of these is kept, the best-scored one, in
            place of the last that would be.

    Attributes:
        allowed (`Tensor` of shape `(n,)`): which modules may be kept at all; all of them, unless [`restrict`] said
            otherwise.

    Raises:
        ValueError: if there is no module, or not even the smallest one fits under the cap.
    """

    def __init__(
        self,
        rows: Sequence[int],
        parameters: Sequence[int],
        ratio: float = 0.5,
        scope: str = "layer",
        cap: int | None = None,
        kinds: Sequence[int] | None = None,
        required: Sequence[bool] | None = None,
    ) -> None:
        if not len(rows):
            raise ValueError("There is no module to choose from.")
        if len(rows) != len(parameters):
            raise ValueError(
                f"Got {len(rows)} rows for {len(parameters)} parameter counts; they must be equally many."
            )
        if scope not in ("layer", "model"):
            raise ValueError(f"You passed `scope={scope!r}`; it must be 'layer' or 'model'.")
        if min(parameters) < 1:
            raise ValueError(f"A module has {min(parameters)} parameters; each must have at least one.")
        if not ratio > 0:
            raise ValueError(f"You passed `ratio={ratio}`; it is the share of modules to keep and must be above 0.")
        self.parameters = torch.tensor(parameters, dtype=torch.float64)
        self.cap = None if cap is None else min(cap, sum(parameters))
        if cap is not None and min(parameters) > cap:
            raise ValueError(
                f"You passed `max_trainable_parameters={cap:,}`, but the smallest LoRA module has {min(parameters):,} "
                "parameters, so not one fits. Please raise the cap or lower the LoRA rank `r`."
            )
        kinds = [0] * len(rows) if kinds is None else kinds
        self.required = None if required is None or all(required) else torch.tensor(required)
        # Modules compete within their group: a row or the whole model, and there within their kind.
        grouped = cap is None and scope == "layer"
        places = [(row if grouped else 0, kind) for row, kind in zip(rows, kinds, strict=True)]
        index = {place: group for group, place in enumerate(sorted(set(places)))}
        self.group = torch.tensor([index[place] for place in places])
        sizes = torch.bincount(self.group, minlength=len(index)).tolist()
        if self.cap is None:
            self.counts = [max(1, math.floor(min(ratio, 1.0) * size + 0.5)) for size in sizes]
            self.targets = torch.tensor(self.counts, dtype=torch.float64)
            self.weights = torch.ones(len(rows), dtype=torch.float64)
        else:
            self.counts = []
            totals = [
                sum(p for p, g in zip(parameters, self.group.tolist(), strict=True) if g == group)
                for group in range(len(index))
            ]
            self.targets = torch.tensor([self.cap * total // sum(totals) for total in totals], dtype=torch.float64)
            self.weights = self.parameters
            if not (self.parameters <= self.targets[self.group]).any():
                raise ValueError(
                    f"You passed `max_trainable_parameters={cap:,}`, but divided among {len(index)} kinds of module "
                    "that are ranked apart it has room for none. Please raise the cap, or rank them together."
                )

        # A kind whose part of the cap is not one parameter takes no part.
        self._usable = (self.targets > 0)[self.group]
        self.allowed = self._usable

    def __len__(self) -> int:
        return len(self.group)

    def restrict(self, allowed: Tensor) -> None:
        """
        Restrict what may be kept.

        Args:
            allowed (`Tensor` of shape `(n,)` and dtype `torch.bool`).

        Raises:
            ValueError: if no affordable module would be left.
        """
        room = self.targets[self.group] if self.cap is not None else math.inf
        if not (allowed & (self.parameters <= room)).any():
            raise ValueError("Not one affordable module would be allowed.")
        self.allowed = allowed & self._usable

    def size(self, allowed: Tensor) -> float:
        """How much of the budget the allowed modules, `(n,)` bools, can use up: 1 if all of it."""
        room = torch.zeros_like(self.targets).index_add_(0, self.group, self.weights * allowed)
        used = self.targets > 0  # a part of a cap may be too small for one parameter
        return float((torch.minimum(room, self.targets)[used] / self.targets[used]).min())

    @property
    def share(self) -> Tensor:
        """Part of its group that each module may expect if all scores were equal, `(n,)` in [0, 1]."""
        totals = torch.zeros_like(self.targets).index_add_(0, self.group, self.weights * self.allowed)
        # Where nothing is allowed, the total is 0; any other is 1 at least.
        return (self.targets / totals.clamp(min=1.0)).clamp(max=1.0)[self.group] * self.allowed

    def discretize(self, scores: Tensor, tie_breaker: Tensor | None = None) -> Tensor:
        """
        The best affordable set.

        With a count for each group these are the top scores of the group. Under a cap modules are taken by falling
        score, and those that do not fit any more are passed over, so that no other module would still fit. If none of
        the `required` ones is among them, the best of these is taken first.

        Args:
            scores (`Tensor` of shape `(n,)`): higher is better; finite.
            tie_breaker (`Tensor` of shape `(n,)`, *optional*): decides between equal scores; higher is better.

        Returns:
            `Tensor` of shape `(n,)` and dtype `torch.bool`.
        """
        if scores.shape != (len(self),):
            raise ValueError(
                f"Expected {len(self)} scores, one a module, got a tensor of shape {tuple(scores.shape)}."
            )
        if not torch.isfinite(scores).all():
            raise ValueError("Scores must be finite: a module cannot be compared with NaN or infinity.")
        order = torch.arange(len(self))
        if tie_breaker is not None:
            order = order[torch.sort(tie_breaker, descending=True, stable=True).indices]
        order = order[torch.sort(scores[order], descending=True, stable=True).indices]
        order = order[torch.sort((~self.allowed[order]).int(), stable=True).indices]  # the others come last
        kept = self._first(order)
        if self.required is not None and not (kept & self.required).any():
            fits = self.required & self.allowed
            if self.cap is not None:
                fits &= self.parameters <= self.targets[self.group]
            if best := [module for module in order.tolist() if fits[module]][:1]:
                kept = self._first(torch.tensor([*best, *(module for module in order.tolist() if module != best[0])]))
        return kept

    def _first(self, order: Tensor) -> Tensor:
        """Which modules are kept if they are taken in some order, `(n,)` bools."""
        kept = torch.zeros(len(self), dtype=torch.bool)
        if self.cap is not None:
            left, groups = self.targets.tolist(), self.group[order].tolist()
            for module, group, cost in zip(order.tolist(), groups, self.parameters[order].tolist(), strict=True):
                if cost <= left[group]:
                    kept[module] = True
                    left[group] -= cost
            return kept & self.allowed
        # Group the order without losing it, then take the first `count` of each group.
        order = order[torch.sort(self.group[order], stable=True).indices]
        start = 0
        for size, count in zip(torch.bincount(self.group).tolist(), self.counts, strict=True):
            kept[order[start : start + count]] = True
            start += size
        return kept & self.allowed

    def max_depth_mask(self, depth: Sequence[float], limit: float) -> Tensor:
        """
        Which modules may be kept so that a step stays fast, `(n,)` bools: all those above the deepest layer with
        which it does.

        Args:
            depth (`Sequence[float]` of length `n`): time of a step whose lowest module is this one.
            limit (`float`): what `depth` may be at most. If the modules that this leaves cannot use up the budget, the
                fastest depth that can is taken.
        """
        depths = torch.tensor(depth, dtype=torch.float64)
        enough = [level for level in sorted(set(depth)) if self.size(depths <= level) >= 1]
        level = max((level for level in enough if level <= limit), default=enough[0])
        return depths <= level

    @property
    def expected_count(self) -> float:
        """How many modules will be kept, on average over sets."""
        return float(self.counts_of_groups().sum())

    def counts_of_groups(self) -> Tensor:
        """How many modules of each group will be kept, on average over sets."""
        if self.cap is None:
            return self.targets
        totals = torch.zeros_like(self.targets).index_add_(0, self.group, self.parameters)
        return self.targets / totals * torch.bincount(self.group, minlength=len(self.targets))

    def linear_oracle(self, gains: Tensor) -> Tensor:
        """
        The affordable set with the largest linear gain: the linear maximisation oracle of Frank-Wolfe over the
        polytope `{0 <= gate <= 1, sum of gate x weight <= target in each group}`. Modules without a gain stay out.
        Under a cap gains count per parameter, as in a fractional knapsack.

        Args:
            gains (`Tensor` of shape `(n,)`): expected decrease of the loss for each unit of gate.

        Returns:
            `Tensor` of shape `(n,)` with entries 0 or 1.
        """
        return (self.discretize(gains / self.weights) & (gains > 0)).to(gains.dtype)

    def calibrate(self, logits: Tensor) -> Tensor:
        """
        Probabilities `sigmoid(logit + shift)` with one shift for each group, found by bisection such that the expected
        weight of the group equals its target.

        Args:
            logits (`Tensor` of shape `(n,)`).

        Returns:
            `Tensor` of shape `(n,)` in [0, 1].
        """
        totals = torch.zeros_like(self.targets).index_add_(0, self.group, self.weights * self.allowed)
        reach = float(logits.abs().max()) + 60.0
        low, high = torch.full_like(self.targets, -reach), torch.full_like(self.targets, reach)
        for _ in range(80):
            middle = (low + high) / 2
            expected = torch.zeros_like(self.targets).index_add_(
                0, self.group, torch.sigmoid(logits.double() + middle[self.group]) * self.weights * self.allowed
            )
            below = expected < self.targets
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        full = (self.targets >= totals)[self.group]  # nothing to give up: the shift would be infinite
        probabilities = torch.sigmoid(logits.double() + low[self.group])
        return (torch.where(full, torch.ones_like(probabilities), probabilities) * self.allowed).to(logits.dtype)
