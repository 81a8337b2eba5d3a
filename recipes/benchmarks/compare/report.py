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
from collections.abc import Sequence
from pathlib import Path

import confidence
from comparison import Results, Runs, group
from result_files import as_loss, read_results


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
        mean = _mean(runs, "loss")
        return math.inf if mean is None else as_loss(mean)

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
    return sorted(found.items(), key=lambda entry: as_loss(statistics.fmean(entry[1])))


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
