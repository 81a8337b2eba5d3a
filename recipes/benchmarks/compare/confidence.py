"""Does the confidence that a run states predict how good its choice is? A picture, and a rank correlation."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from comparison import Results

SOME = 0.05
"""From here on a confidence is taken for some: without evidence it is 0."""
_ORDERS = 2000
Point = tuple[str, float, float]
"""Task, budget and method, confidence of a run, percentile of its choice among random sets of its budget and seed."""


def points(grouped: Mapping[tuple[str, str], Mapping[float, Results]], ours: str) -> list[Point]:
    """
    All runs that state a confidence, and whose choice was trained again beside random sets. The method `ours` goes
    without saying.
    """
    found = []
    for (task, _), budgets in grouped.items():
        for budget, results in budgets.items():
            for method, runs in results.runs.items():
                what = f"{task}, {budget:.3g}" + ("" if method == ours else f", {method.partition(':')[2] or method}")
                for seed, run in runs.items():
                    choice = results.choices.get(method, {}).get(seed)
                    if run.get("confidence") is not None and choice is not None and results.random.get(seed):
                        percentile = results.percentile({seed: choice})
                        assert percentile is not None
                        found.append((what, float(run["confidence"]), percentile[0]))
    return found


def rank_correlation(pairs: list[tuple[float, float]]) -> float | None:
    """Spearman's, with mean ranks for ties; `None` if there are fewer than three pairs or one side never differs."""
    columns = list(zip(*pairs, strict=True))
    if len(pairs) < 3 or any(len(set(column)) < 2 for column in columns):
        return None
    return statistics.correlation(*map(mean_ranks, columns))


def mean_ranks(values: Sequence[float]) -> list[float]:
    """The rank of each value among all, from the lowest; equal ones have their mean one."""
    return [values.count(x) / 2 + sum(y < x for y in values) for x in values]


def by_chance(statistic: Callable[[list[float]], float], values: list[float]) -> float:
    """In what part of random orders of the values a statistic of them is as large as in this one, or larger."""
    observed, rng, orders = statistic(values), random.Random(0), list(values)
    count = 0
    for _ in range(_ORDERS):
        rng.shuffle(orders)
        count += statistic(orders) >= observed
    return count / _ORDERS


def describe(found: list[Point]) -> str:
    """A line of Markdown on what was found; nothing without runs."""
    if not found:
        return ""
    stated, percentiles = [x for _, x, _ in found], [y for *_, y in found]
    correlation = rank_correlation(list(zip(stated, percentiles, strict=True)))
    if correlation is None:
        return f"\nRank correlation of confidence and percentile over {len(found)} runs cannot be computed.\n"
    ranks = mean_ranks(stated)
    as_high = by_chance(lambda ys: statistics.correlation(ranks, ys), mean_ranks(percentiles))
    sure = [x > SOME for x in stated]
    parts = [list(compress(percentiles, sure)), list(compress(percentiles, (not some for some in sure)))]
    means = [f"{statistics.fmean(part):.0f} ({len(part)} runs)" if part else "not known" for part in parts]
    if all(parts):
        # Of all orders those are as far apart whose sure runs have as large a sum.
        as_far = by_chance(lambda ys: math.fsum(compress(ys, sure)), percentiles)
        means[1] += f", by as much or more in {as_far:.1%} of random orders"
    return (
        f"\nRank correlation of confidence and percentile over {len(found)} runs is {correlation:.2f}, as high or "
        f"higher in {as_high:.1%} of random orders. With a confidence above {SOME} the mean percentile is {means[0]}, "
        f"otherwise {means[1]}.\n"
    )


def plot(found: list[Point], path: Path) -> None:
    """Confidence against percentile, a colour for each task, budget and method."""
    if not found:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8.0, 4.0))
    rng = random.Random(0)  # many points are equal
    for name in dict.fromkeys(name for name, *_ in found):
        axis.scatter(
            [confidence for other, confidence, _ in found if other == name],
            # A percentile is in [0, 100], also where it is drawn a little off.
            [min(100, max(0, percentile + rng.uniform(-2, 2))) for other, _, percentile in found if other == name],
            s=28,
            alpha=0.7,
            label=name,
        )
    axis.axhline(50, color="0.7", linewidth=1, linestyle="--")
    axis.set(xlabel="confidence that the run states", ylabel="percentile of its choice among random sets")
    axis.set(xlim=(-0.03, 1.03), ylim=(-5, 105))
    axis.legend(
        fontsize=7, title="task, budget, options", title_fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5)
    )
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
