"""What the records of a comparison say: losses against chance and against rivals, with their intervals."""

from __future__ import annotations

import math
import random
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence

from methods import has_own_rate, is_adaptive, rate_of
from result_files import Record, as_loss, comparable


Runs = dict[int, Record]
"""Seed to record."""

BOOTSTRAP_ROUNDS = 2000
_QUANTILES = (
    *(12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13),
    *(2.12, 2.11, 2.10, 2.09, 2.09, 2.08, 2.07, 2.07, 2.06, 2.06, 2.06, 2.05, 2.05, 2.05, 2.04),
)
"""97.5 % quantiles of Student's t with 1 to 30 degrees of freedom."""


class Results:
    """
    The records of one task at one budget.

    Args:
        records (`Iterable[dict]`): of this budget, and those of `full`.
    """

    def __init__(self, records: Iterable[Record]) -> None:
        self.random: dict[int, list[Record]] = {}
        """The random sets of each seed that has some."""
        self.runs: dict[str, Runs] = defaultdict(dict)
        self.choices: dict[str, Runs] = defaultdict(dict)
        self.worst: dict[str, Runs] = defaultdict(dict)
        records = list(records)
        self.rates = best_rates(records)
        """The learning rate of each method, of those that it was run at."""
        # What was chosen at a rate of a method's own is trained again at several.
        again = best_rates((record for record in records if has_own_rate(record["method"])), "choice")
        for record in records:
            method = record["method"]
            rates = self.rates if record["reading"] == "run" or method not in again else again
            if rate_of(record) != rates.get(method):
                continue
            if method == "random":
                self.random.setdefault(record["seed"], []).append(record)
                continue
            kind = {"run": self.runs, "choice": self.choices, "worst": self.worst}[record["reading"]]
            kind[method][record["seed"]] = record
        for method, runs in self.runs.items():
            if not is_adaptive(method):  # chosen before training: one run is both
                self.choices[method] = runs

    def percentile(self, runs: Runs) -> tuple[float, float, float] | None:
        """
        Mean share of the random sets of the same seed that end with a higher loss, in percent, with the 95 % interval
        of a bootstrap over seeds and, within each, over draws.
        """
        pairs = [
            (run["loss"], [draw["loss"] for draw in self.random[seed]])
            for seed, run in runs.items()
            if seed in self.random
        ]
        if not pairs:
            return None
        rng = random.Random(0)
        means = sorted(
            statistics.fmean(
                _beaten(loss, rng.choices(draws, k=len(draws))) for loss, draws in rng.choices(pairs, k=len(pairs))
            )
            for _ in range(BOOTSTRAP_ROUNDS)
        )
        low, high = means[int(0.025 * len(means))], means[int(0.975 * len(means)) - 1]
        return statistics.fmean(_beaten(*pair) for pair in pairs), low, high

    def percentile_of_all(self, runs: Runs) -> float | None:
        """Mean share of all random sets, of whatever seed, that end with a higher loss, in percent."""
        draws = [draw["loss"] for found in self.random.values() for draw in found]
        return statistics.fmean(_beaten(run["loss"], draws) for run in runs.values()) if draws and runs else None

    def difference(self, method: str, rival: str) -> tuple[float, float, int] | None:
        """Mean of loss(method) - loss(rival) over common seeds, half its 95 % interval, and how many seeds."""
        ours = self.runs[method]
        if rival == "random":
            pairs = [
                run["loss"] - statistics.fmean(draw["loss"] for draw in self.random[seed])
                for seed, run in ours.items()
                if seed in self.random
            ]
        else:
            pairs = [
                run["loss"] - self.runs[rival][seed]["loss"] for seed, run in ours.items() if seed in self.runs[rival]
            ]
        if not pairs:
            return None
        mean = statistics.fmean(pairs) if all(map(math.isfinite, pairs)) else math.nan
        return mean, half_interval(pairs), len(pairs)

    def time(self, method: str) -> float | None:
        """CPU time of the runs of a method, search included, as a part of that of all linear layers."""
        even = self.runs.get("all_linear", {})
        pairs = [
            (run["cpu_seconds"], even[seed]["cpu_seconds"])
            for seed, run in self.runs[method].items()
            if "cpu_seconds" in run and "cpu_seconds" in even.get(seed, {})
        ]
        return sum(ours for ours, _ in pairs) / sum(theirs for _, theirs in pairs) if pairs else None

    def overlap(self, runs: Runs) -> float | None:
        """Mean overlap of the choices of two seeds: shared ranks over those of the smaller choice."""
        return mean_overlap([run["ranks"] for run in runs.values()])

    def chance_overlap(self) -> float | None:
        """The overlap of two random sets."""
        return mean_overlap([draw["ranks"] for draws in self.random.values() for draw in draws])


def best_rates(records: Iterable[Record], reading: str = "run") -> dict[str, float | None]:
    """
    For each method the learning rate at which its runs end lowest on the mean; that of the random sets is chosen in
    the same way. Rates are compared by the seeds and draws that all of them have. Rates of which a method has half
    as many runs as of another, or fewer, are passed over, and so are all but the most frequent ones if they have none
    in common. A rate at which a run diverged is the last to be chosen.

    Args:
        records (`Iterable[dict]`): of any readings.
        reading (`str`, *optional*, defaults to `"run"`): by which of them rates are compared.
    """
    losses: dict[str, dict[float | None, dict[tuple[int, int], float]]] = defaultdict(lambda: defaultdict(dict))
    for record in records:
        if record["reading"] == reading:
            key = record["seed"], record.get("draw", 0)
            losses[record["method"]][rate_of(record)][key] = as_loss(record["loss"])
    best: dict[str, float | None] = {}
    for method, found in losses.items():
        most = max(map(len, found.values()))
        rates = {rate: runs for rate, runs in found.items() if 2 * len(runs) > most}
        if not (common := set.intersection(*(set(runs) for runs in rates.values()))):
            rates = {rate: runs for rate, runs in rates.items() if len(runs) == most}
        means = {
            rate: statistics.fmean(loss for key, loss in runs.items() if not common or key in common)
            for rate, runs in rates.items()
        }
        best[method] = min(means, key=lambda rate: means[rate])
    return best


def _beaten(loss: float, draws: Sequence[float]) -> float:
    loss, draws = as_loss(loss), [as_loss(draw) for draw in draws]
    return 100 * statistics.fmean(1.0 if draw > loss else 0.5 if draw == loss else 0.0 for draw in draws)


def half_interval(values: Sequence[float]) -> float:
    """Half the 95 % interval of a mean, by Student's t; not a number for one value, or if one is not finite."""
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return math.nan
    degrees = len(values) - 1
    # Beyond the table by the first terms of its expansion, right to two decimals.
    quantile = _QUANTILES[degrees - 1] if degrees <= len(_QUANTILES) else 1.96 + 2.4 / degrees
    return quantile * statistics.stdev(values) / math.sqrt(len(values))


def mean_overlap(choices: Sequence[dict[str, int]]) -> float | None:
    """Mean share of the smaller choice that two choices have in common, counted in ranks."""
    shares = [
        sum(min(rank, b.get(name, 0)) for name, rank in a.items()) / min(sum(a.values()), sum(b.values()))
        for i, a in enumerate(choices)
        for b in choices[:i]
        if a and b
    ]
    return statistics.fmean(shares) if shares else None


def group(records: Iterable[Record]) -> dict[tuple[str, str], dict[float, Results]]:
    """Records by task (and what was trained), then by budget."""
    tasks: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for mark, found in comparable(records).items():
        for record in found:
            tasks[record["task"], mark].append(record)
    grouped = {}
    for key, found in tasks.items():
        full = [record for record in found if record["method"] == "full"]
        budgets = sorted({record["budget"] for record in found if record["method"] != "full"})
        grouped[key] = {
            budget: Results(
                [record for record in found if record["budget"] == budget and record["method"] != "full"] + full
            )
            for budget in budgets
        }
    return grouped
