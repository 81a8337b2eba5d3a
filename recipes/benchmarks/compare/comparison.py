"""What the records of a comparison say: losses against chance and against rivals, with their intervals."""

from __future__ import annotations

import math
import random
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence

from methods import is_adaptive
from result_files import Record


Runs = dict[int, Record]
"""Seed to record."""

BOOTSTRAP_ROUNDS = 2000


class Results:
    """
    The records of one task at one budget.

    Args:
        records (`Iterable[dict]`): of this budget, and those of `full`.
    """

    def __init__(self, records: Iterable[Record]) -> None:
        self.random: dict[int, list[Record]] = defaultdict(list)
        self.runs: dict[str, Runs] = defaultdict(dict)
        self.choices: dict[str, Runs] = defaultdict(dict)
        self.worst: dict[str, Runs] = defaultdict(dict)
        records = list(records)
        self.rates = best_rates(records)
        """The learning rate of each method, of those that it was run at."""
        for record in records:
            if record.get("learning_rate") != self.rates.get(record["method"]):
                continue
            if record["method"] == "random":
                self.random[record["seed"]].append(record)
                continue
            kind = {"run": self.runs, "choice": self.choices, "worst": self.worst}[record["reading"]]
            kind[record["method"]][record["seed"]] = record
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
            if self.random[seed]
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
                if self.random[seed]
            ]
        else:
            pairs = [
                run["loss"] - self.runs[rival][seed]["loss"] for seed, run in ours.items() if seed in self.runs[rival]
            ]
        if not pairs:
            return None
        return statistics.fmean(pairs), half_interval(pairs), len(pairs)

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


def best_rates(records: Iterable[Record]) -> dict[str, float | None]:
    """
    For each method the learning rate at which its runs end lowest on the mean; that of the random sets is chosen in
    the same way. Rates are compared by the seeds and draws that all of them have. Rates of which a method has half
    as many runs as of another, or fewer, are passed over, and so are all but the most frequent ones if they have none
    in common.
    """
    losses: dict[str, dict[float | None, dict[tuple[int, int], float]]] = defaultdict(lambda: defaultdict(dict))
    for record in records:
        if record["reading"] == "run":
            key = record["seed"], record.get("draw", 0)
            losses[record["method"]][record.get("learning_rate")][key] = record["loss"]
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
    return 100 * statistics.fmean(1.0 if draw > loss else 0.5 if draw == loss else 0.0 for draw in draws)


def half_interval(values: Sequence[float]) -> float:
    """Half the 95 % interval of a mean, by Student's t; not a number for a single value."""
    if len(values) < 2:
        return math.nan
    quantiles = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}
    return quantiles.get(len(values) - 1, 2.0) * statistics.stdev(values) / math.sqrt(len(values))


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
    for record in records:
        tasks[record["task"], record["fingerprint"]].append(record)
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
