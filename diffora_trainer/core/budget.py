"""From scores to a set of modules: the rules of the budget. No model in here."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from .costs import Ceiling


class Budget:
    """
    What may be kept, and how a choice is made from scores.

    All vectors have one entry a module, in the order of the grid. Equal scores are decided by `tie_breaker`, then by
    the order of the grid, so a choice is deterministic.

    Args:
        rows (`Sequence[int]` of length `n`): row (layer) of each module.
        parameters (`Sequence[int]` of length `n`): trainable LoRA parameters of each module.
        ratio (`float`, *optional*): share of the modules to keep; all of them if it is left out.
        scope (`str`, *optional*, defaults to `"layer"`): `"layer"` or `"model"`.
        cap (`int`, *optional*): exact cap on the kept parameters; overrides `scope`.
        kinds (`Sequence[int]` of length `n`, *optional*): modules of different kinds are ranked apart, each kind by
            the same ratio, or under its part of the cap, in proportion to its parameters.
        required (`Sequence[bool]` of length `n`, *optional*): at least one of these is kept, the best-scored one, in
            place of the last that would be.
        units (`Sequence[int]` of length `n`, *optional*): the unit of each module; those of one unit are kept or
            pruned together, by the mean of their scores. A unit stands in one row and has one kind.
        limits (`Sequence[int]`, *optional*): what each kind may keep of the parameters, in the order of the kinds,
            instead of its part of the cap.

    Attributes:
        allowed (`Tensor` of shape `(n,)`): which modules may be kept at all; all of them, unless [`limit`] said
            otherwise.
        at_least_one (`bool`): whether some group keeps a module, or a unit, only because every group keeps one.

    Raises:
        ValueError: if there is no module, or not even the smallest one fits under the cap.
    """

    def __init__(
        self,
        rows: Sequence[int],
        parameters: Sequence[int],
        ratio: float | None = None,
        scope: str = "layer",
        cap: int | None = None,
        kinds: Sequence[int] | None = None,
        required: Sequence[bool] | None = None,
        units: Sequence[int] | None = None,
        limits: Sequence[int] | None = None,
    ) -> None:
        _check(rows, parameters, ratio, scope)
        ratio = 1.0 if ratio is None else min(ratio, 1.0)
        self.parameters = torch.tensor(parameters, dtype=torch.float64)
        self.cap = None if cap is None else min(cap, sum(parameters))
        self.rows = torch.tensor(rows)
        self.unit = torch.arange(len(rows)) if units is None else torch.tensor(units)
        self.required = None if required is None or all(required) else torch.tensor(required)
        # Modules compete within their group: a row or the whole model, and there within their kind.
        grouped = cap is None and scope == "layer"
        kinds = [0] * len(rows) if kinds is None else kinds
        places = [(row if grouped else 0, kind) for row, kind in zip(rows, kinds, strict=True)]
        index = {place: group for group, place in enumerate(sorted(set(places)))}
        self.group = torch.tensor([index[place] for place in places])
        sizes = torch.bincount(self.group, minlength=len(index))
        rounded = [math.floor(ratio * size + 0.5) for size in sizes.tolist()]
        counts = [max(1, count) for count in rounded]
        if self.cap is None:
            self.targets = torch.tensor(counts, dtype=torch.float64)
            self.weights = torch.ones(len(rows), dtype=torch.float64)
        else:
            totals = torch.zeros(len(index), dtype=torch.float64).index_add_(0, self.group, self.parameters)
            share = [self.cap * int(total) // sum(parameters) for total in totals.tolist()]
            share = share if limits is None else list(limits)
            self.targets = torch.tensor(share, dtype=torch.float64)
            self.weights = self.parameters
        # A kind whose share of the cap rounds down to 0 parameters is excluded.
        self.allowed = (self.targets > 0)[self.group]
        self._sizes = self._of_units(torch.ones(len(rows), dtype=torch.float32))
        self._costs = self._of_units(self.weights)
        self._groups = self._of_units(self.group, "amin").long()
        self._check_cap(cap)
        # Without a cap the targets already limit the number of modules. Beside one, the ratio leaves room for a unit.
        most = len(rows) if self.cap is None else max(sum(counts), int(self._sizes[self._fits & self._needed].min()))
        self._ceilings = [(self.allowed, most)]
        smallest = torch.full_like(self.targets, math.inf).scatter_reduce(0, self._groups, self._costs, "amin")
        # Every group keeps at least one unit, even if its smallest unit has more modules than the group's target.
        self._keeps_one = ((smallest > self.targets) & (self.cap is None)).tolist()
        self.at_least_one = self.cap is None and (min(rounded) < 1 or any(self._keeps_one))

    def _check_cap(self, cap: int | None) -> None:
        if cap is None:
            return
        unit = "LoRA module" if len(self._costs) == len(self) else "unit of LoRA modules"
        smallest = float(self._costs[self._needed].min())
        if smallest > cap:
            raise ValueError(
                f"You passed `max_trainable_parameters={cap:,}`, but the smallest {unit} has {int(smallest):,} "
                "parameters, so none fits. Please raise the cap or lower the LoRA rank `r`."
            )
        if not (self._fits & self._needed).any():
            raise ValueError(
                f"You passed `max_trainable_parameters={cap:,}`, but divided among {len(self.targets)} kinds of "
                "module that are ranked apart, it has room for none. Please raise the cap, or rank them together."
            )

    def __len__(self) -> int:
        return len(self.group)

    @property
    def is_one_unit(self) -> bool:
        """Whether all modules are kept or pruned together, and there are several."""
        return len(self) > len(self._costs) == 1

    def of_equals(self) -> Tensor:
        """What is kept of modules that are all equally good, `(n,)` bools: as many as there is room for."""
        return self.discretize(torch.zeros(len(self), dtype=torch.float32))

    @property
    def keeps_all(self) -> bool:
        """Whether there is room for everything, so that there is nothing to choose."""
        return bool(self.of_equals().all())

    @property
    def _fits(self) -> Tensor:
        """Which units the budget has room for, `(u,)` bools."""
        return self._costs <= self.targets[self._groups]

    @property
    def _needed(self) -> Tensor:
        """Units of which one has to be kept, `(u,)` bools: those with a required module, or all."""
        if self.required is None or not self.required.any():
            return torch.ones(len(self._costs), dtype=torch.bool)
        return self._of_units(self.required, "amax").bool()

    def limit(self, ceilings: Sequence[Ceiling]) -> None:
        """
        Limit what may be kept to sets under at least one of some ceilings, on top of the budget. The choice is then
        made among all of them at once: over how deep it goes, and what it keeps there.

        Args:
            ceilings (`Sequence[Ceiling]`): at least one.

        Raises:
            ValueError: if no module that fits is under any of them.
        """
        usable, most = self._ceilings[0]
        narrowed = []
        for ceiling in ceilings:
            under = torch.tensor([row in ceiling.rows for row in self.rows.tolist()])
            narrowed.append((under & usable, min(most, ceiling.count)))
        fits = self._fits | torch.tensor(self._keeps_one)[self._groups]
        fitting = (fits & (self._sizes <= count) & self._of_units(under, "amin").bool() for under, count in narrowed)
        if not any(bool(units.any()) for units in fitting):
            raise ValueError(
                "No module or unit of modules that fits the budget is within the limits of a step: the smallest has "
                f"{int(self._sizes[fits].min())} modules, and there is room for {max(n for _, n in narrowed)}. "
                "Please raise `max_step_time` or `max_step_memory`, or leave `selection_unit` out."
            )
        self._ceilings = narrowed
        self.allowed = torch.stack([under for under, _ in narrowed]).any(dim=0)

    @property
    def share(self) -> Tensor:
        """Part of each module in the mean of all sets that may be kept, if all scores were equal, `(n,)` in [0, 1]."""
        shares = []
        for allowed, most in self._ceilings:
            room = self.weights * allowed
            totals = torch.zeros_like(self.targets).index_add_(0, self.group, room)
            # Where nothing is allowed, the total is 0; any other is 1 at least.
            share = (self.targets / totals.clamp(min=1.0)).clamp(max=1.0)[self.group] * allowed
            shares.append(share * min(1.0, most / max(float(share.sum()), 1e-9)))
        return torch.stack(shares).mean(dim=0)

    def discretize(self, scores: Tensor, tie_breaker: Tensor | None = None, worth: Tensor | None = None) -> Tensor:
        """
        The best set within the budget.

        With a count for each group these are the top scores of the group. Under a cap modules are taken by falling
        score, and those that do not fit any more are passed over, so that no other module would still fit. If none of
        the `required` ones is among them, the best of these is taken first. Under several ceilings this is done for
        each of them, and the set that is worth most is taken, the deepest of equal ones.

        Args:
            scores (`Tensor` of shape `(n,)`): higher is better; finite.
            tie_breaker (`Tensor` of shape `(n,)`, *optional*): decides between equal scores; higher is better.
            worth (`Tensor` of shape `(n,)`, *optional*): what modules add to the worth of a set. By default their
                scores above the lowest one.

        Returns:
            `Tensor` of shape `(n,)` and dtype `torch.bool`.
        """
        if scores.shape != (len(self),):
            raise ValueError(
                f"Expected {len(self)} scores, one a module, got a tensor of shape {tuple(scores.shape)}."
            )
        if not torch.isfinite(scores).all():
            raise ValueError("Scores must be finite: a module cannot be compared with NaN or infinity.")
        means = self._of_units(scores) / self._sizes
        order = torch.arange(len(means))
        if tie_breaker is not None:
            ties = self._of_units(tie_breaker) / self._sizes
            order = order[torch.sort(ties, descending=True, stable=True).indices]
        order = order[torch.sort(means[order], descending=True, stable=True).indices]
        sets = [self._under(order, allowed, most) for allowed, most in self._ceilings]
        if len(sets) == 1:
            return sets[0]
        worth = scores - scores.min() if worth is None else worth.clamp(min=0.0)
        required = torch.ones(len(self), dtype=torch.bool) if self.required is None else self.required
        # A ceiling may have no room for a whole unit, or for one that is required.
        return max(sets, key=lambda kept: (bool((kept & required).any()), float((worth.double() * kept).sum())))

    def _under(self, order: Tensor, allowed: Tensor, most: int) -> Tensor:
        """The best set under one ceiling, `(n,)` bools."""
        kept = self._first(order.tolist(), allowed, most)
        if self.required is not None and not (kept & self.required).any():
            fits = self._of_units(self.required & allowed, "amax").bool() & self._fits & (self._sizes <= most)
            if best := [unit for unit in order.tolist() if fits[unit]][:1]:
                others = [unit for unit in order.tolist() if unit != best[0]]
                kept = self._first([*best, *others], allowed, most)
        return kept

    def _first(self, order: Sequence[int], allowed: Tensor, most: int) -> Tensor:
        """Which modules are kept if units are taken in some order, `(n,)` bools."""
        costs, groups, sizes = self._costs.tolist(), self._groups.tolist(), self._sizes.tolist()
        under, left, keeps_one = self._of_units(allowed, "amin").tolist(), self.targets.tolist(), list(self._keeps_one)
        kept = torch.zeros(len(costs), dtype=torch.bool)
        for unit in order:
            group = groups[unit]
            if under[unit] and sizes[unit] <= most and (costs[unit] <= left[group] or keeps_one[group]):
                kept[unit], keeps_one[group] = True, False
                left[group] -= costs[unit]
                most -= int(sizes[unit])
        return kept[self.unit]

    def compared(self, gains: Tensor) -> tuple[Tensor, Tensor]:
        """
        By what units are compared, `(k, u)`, from gains of modules, `(k, n)`: the mean gain of each, or under a cap
        its gain per parameter; and the group in which each competes, `(u,)`.
        """
        return torch.stack([self._of_units(row) / self._costs for row in gains]), self._groups

    def _of_units(self, values: Tensor, how: str = "sum") -> Tensor:
        """Numbers of modules, `(n,)`, as those of units."""
        per_unit = torch.zeros(int(self.unit.max()) + 1, dtype=torch.float64)
        return per_unit.scatter_reduce(0, self.unit, values.double(), how, include_self=how == "sum")

    def num_boundary_ties(self, scores: Tensor, tie_breaker: Tensor | None, kept: Tensor) -> int:
        """How many modules tie with one that has the other fate: among them only the order of the grid has chosen."""
        first = torch.zeros(int(self.unit.max()) + 1, dtype=torch.long)
        first.scatter_reduce_(0, self.unit, torch.arange(len(self)), "amin", include_self=False)
        ties = torch.zeros_like(scores) if tie_breaker is None else tie_breaker
        means = [(self._of_units(values) / self._sizes).tolist() for values in (scores, ties)]
        keys = list(zip(self.group[first].tolist(), self.allowed[first].tolist(), *means, strict=True))
        tied = tied_at_boundary(keys, kept[first].tolist())
        return sum(int(size) for size, tie in zip(self._sizes.tolist(), tied, strict=True) if tie)

    def counts_of_groups(self) -> Tensor:
        """How many modules of each group will be kept, on average over sets."""
        if self.cap is None:
            return self.targets
        totals = torch.zeros_like(self.targets).index_add_(0, self.group, self.parameters)
        return self.targets / totals * torch.bincount(self.group, minlength=len(self.targets))

    def linear_oracle(self, gains: Tensor) -> Tensor:
        """
        The set within the budget that has the largest linear gain: the linear maximisation oracle of Frank-Wolfe over
        the polytope `{0 <= gate <= 1, sum of gate x weight <= target in each group}`, or over the convex hull of
        several, one for each ceiling. Modules without a gain stay out. Under a cap gains count per parameter, as in a
        fractional knapsack.

        Args:
            gains (`Tensor` of shape `(n,)`): expected decrease of the loss for each unit of gate.

        Returns:
            `Tensor` of shape `(n,)` with entries 0 or 1.
        """
        of_units = self._of_units(gains)
        density, mean = (of_units / self._costs)[self.unit], (of_units / self._sizes)[self.unit]
        return (self.discretize(density, worth=mean) & (mean > 0)).to(gains.dtype)

    def calibrate(self, logits: Tensor) -> Tensor:
        """
        Probabilities `sigmoid(logit + shift)` with one shift for each group, found by bisection such that the expected
        weight of the group equals its target. The formula is this package's own.

        Args:
            logits (`Tensor` of shape `(n,)`): one for each module.

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


def tied_at_boundary(keys: Sequence[Hashable], kept: Sequence[bool]) -> list[bool]:
    """Which of several things tie, by what they are compared by, with one that has the other fate."""
    fates = list(zip(keys, kept, strict=True))
    tied = {key for key, keep in fates if keep} & {key for key, keep in fates if not keep}
    return [key in tied for key in keys]


def _check(rows: Sequence[int], parameters: Sequence[int], ratio: float | None, scope: str) -> None:
    if not len(rows):
        raise ValueError("There is no module to choose from.")
    if len(rows) != len(parameters):
        raise ValueError(f"Got {len(rows)} rows for {len(parameters)} parameter counts; they must be equally many.")
    if scope not in ("layer", "model"):
        raise ValueError(f"You passed `scope={scope!r}`; it must be 'layer' or 'model'.")
    if min(parameters) < 1:
        raise ValueError(f"A module has {min(parameters)} parameters; each must have at least one.")
    if ratio is not None and not ratio > 0:
        raise ValueError(f"You passed `ratio={ratio}`; it is the share of modules to keep and must be above 0.")
