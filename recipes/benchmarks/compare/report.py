"""
The table and the picture of a comparison, from its results.

```bash
python recipes/benchmarks/compare/report.py compare-sst2/results.jsonl compare-mrpc/results.jsonl --output_dir tables
```
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import confidence
from methods import is_adaptive
from result_files import Record, read_results


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


def _mean(runs: Runs, key: str) -> float | None:
    values = [run[key] for run in runs.values() if run.get(key) is not None]
    return statistics.fmean(values) if values else None


def _text(value: float | None, form: str) -> str:
    return "" if value is None or math.isnan(value) else format(value, form)


def make_table(task: str, budget: float, results: Results, ours: str) -> str:
    """The Markdown table of one task and budget: choice and run side by side, best choice first."""
    draws = [draw for runs in results.random.values() for draw in runs]
    lines = [
        f"\n### {task}, {budget:.3g} of the LoRA parameters\n",
        f"| method | seeds | parameters | choice: percentile among random sets of its seed; among all {len(draws)} "
        "| choice: loss "
        f"| run: loss | `{ours}` minus this | metric | overlap of seeds | rise at the cut | CPU time |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]

    def order(method: str) -> float:
        runs = results.choices[method] or results.runs[method]
        return _mean(runs, "loss") or math.inf

    def row(method: str) -> str:
        runs, choices = results.runs[method], results.choices[method]
        percentile, of_all = results.percentile(choices), results.percentile_of_all(choices)
        gap = None
        if all(run.get("before_cut") for run in runs.values()):
            gap = statistics.fmean(run["after_cut"] / run["before_cut"] - 1 for run in runs.values())
        difference = results.difference(ours, method) if method != ours else None
        cells = [
            f"`{method}`" + _rate(results.rates[method]),
            str(len(runs)),
            f"{_mean(runs, 'parameters'):,.0f}",
            ("" if percentile is None else "{:.0f} ({:.0f} to {:.0f})".format(*percentile))
            + ("" if of_all is None else f"; {of_all:.0f}"),
            _text(_mean(choices, "loss"), ".4f"),
            _text(_mean(runs, "loss"), ".4f"),
            "" if difference is None else f"{difference[0]:+.4f}" + _plus_minus(difference[1]),
            _text(_mean(runs, "metric"), ".4f"),
            _text(results.overlap(choices), ".2f"),
            _text(gap, "+.1%"),
            _text(results.time(method), ".2f"),
        ]
        return "| " + " | ".join(cells) + " |"

    for method in sorted((m for m in results.runs if m != "full"), key=order):
        lines.append(row(method))
    if draws:
        losses = [draw["loss"] for draw in draws]
        metrics = [draw["metric"] for draw in draws if "metric" in draw]
        difference = results.difference(ours, "random")
        cells = [
            f"`random`, {len(draws)} draws" + _rate(results.rates["random"]),
            str(len(results.random)),
            f"{statistics.fmean(draw['parameters'] for draw in draws):,.0f}",
            "50",
            f"{statistics.fmean(losses):.4f} ({min(losses):.4f} to {max(losses):.4f})",
            f"{statistics.fmean(losses):.4f}",
            "" if difference is None else f"{difference[0]:+.4f}" + _plus_minus(difference[1]),
            _text(statistics.fmean(metrics) if metrics else None, ".4f"),
            _text(results.chance_overlap(), ".2f"),
            "",
            "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    if "full" in results.runs:
        lines.append(row("full"))
    for method, worst in results.worst.items():
        common = [(results.choices[method][seed]["loss"], run["loss"]) for seed, run in worst.items()]
        best, last = (statistics.fmean(values) for values in zip(*common, strict=True))
        lines.append(
            f"\n`{method}`: its best-scored set ends at {best:.4f}, its worst-scored one at {last:.4f} "
            f"({len(common)} seed(s))."
        )
    return "\n".join(lines)


def _rate(rate: float | None) -> str:
    return "" if rate is None else f" at {rate:g}"


def _plus_minus(half: float) -> str:
    return "" if math.isnan(half) else f" ± {half:.4f}"


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


def plot(grouped: dict[tuple[str, str], dict[float, Results]], path: Path, ours: str) -> None:
    """For each task and budget with random sets and `ours`: the losses of each method's choices and runs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [(task, budget, results) for (task, _), budgets in grouped.items() for budget, results in budgets.items()]
    panels = [panel for panel in panels if any(panel[2].random.values()) and panel[2].runs[ours]]
    if not panels:
        return
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    height = 1.6 + 0.34 * max(len(_losses(results)) for *_, results in panels)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(6.4 * columns, height * rows), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    rng = random.Random(0)
    # A method has one color in all panels.
    names = sorted({name.partition(" (")[0] for *_, results in panels for name, _ in _losses(results)})
    colors = {name: "0.6" if name == "random sets" else f"C{number % 10}" for number, name in enumerate(names)}
    for axis, (task, budget, results) in zip(axes.flat, panels, strict=False):
        entries = _losses(results)
        for number, (name, losses) in enumerate(entries):
            drawn = name.startswith("random")
            heights = [number + rng.uniform(-0.25, 0.25) if drawn else number for _ in losses]
            axis.scatter(losses, heights, s=22, color=colors[name.partition(" (")[0]], zorder=2)
            axis.plot([statistics.fmean(losses)] * 2, [number - 0.35, number + 0.35], color="black", zorder=3)
        axis.set_title(f"{task}, {budget:.3g} of the LoRA parameters")
        axis.locator_params(axis="x", nbins=6)
        axis.set_xlabel("held-out loss at the last step (line: mean)")
        axis.set_yticks(range(len(entries)), [name for name, _ in entries])
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _losses(results: Results) -> list[tuple[str, list[float]]]:
    """What stands in a line of the picture, from the lowest mean to the highest."""
    from methods import is_adaptive

    draws = [draw["loss"] for of in results.random.values() for draw in of]
    found = {f"random sets ({len(draws)})": draws}
    for method, choices in results.choices.items():
        if choices and method != "full":
            adaptive = is_adaptive(method)
            found[f"{method}, choice" if adaptive else method] = [run["loss"] for run in choices.values()]
    for method, runs in results.runs.items():
        if runs and method != "full" and is_adaptive(method):
            found[f"{method}, run"] = [run["loss"] for run in runs.values()]
    return sorted(found.items(), key=lambda entry: statistics.fmean(entry[1]))


def write_report(paths: Sequence[Path], folder: Path, ours: str | None = None) -> str:
    """Write `table.md`, `losses.png` and `confidence.png`; returns the table."""
    records = [record for path in paths for record in read_results(path)]
    if not records:
        raise ValueError(f"There are no results in {', '.join(map(str, paths))}.")
    if ours is None:
        names = [record["method"] for record in records if record["method"].split(":")[0] == "diffora"]
        ours = min(names, key=len) if names else records[0]["method"]
    grouped = group(records)
    text = "\n".join(
        make_table(task, budget, results, ours)
        for (task, _), budgets in sorted(grouped.items())
        for budget, results in budgets.items()
    )
    found = confidence.points(grouped, ours)
    text += confidence.describe(found)
    folder.mkdir(parents=True, exist_ok=True)
    confidence.plot(found, folder / "confidence.png")
    (folder / "table.md").write_text(text + "\n", encoding="utf-8")
    plot(grouped, folder / "losses.png", ours)
    return text


def main() -> None:
    """Read results and print their table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--ours", help="the method that all others are compared with; by default `diffora`")
    parser.add_argument("--output_dir", type=Path, help="default: the folder of the first file")
    args = parser.parse_args()
    print(write_report(args.results, args.output_dir or args.results[0].parent, args.ours))


if __name__ == "__main__":
    main()
