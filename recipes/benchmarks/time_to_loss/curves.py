"""
What the runs of `time_to_loss.py` say: a table and a picture, from one or more files of results.

```bash
python recipes/benchmarks/time_to_loss/curves.py time-to-loss-sst2/results.jsonl --output_dir tables
```
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any


sys.path.append(str(Path(__file__).resolve().parents[1] / "compare"))

from result_files import as_loss, comparable, read_results  # noqa: E402


if TYPE_CHECKING:
    from matplotlib.axes import Axes

Record = dict[str, Any]
BASE = "all_linear"


class Run:
    """
    A run beside the one of all linear layers that it took turns with.

    Args:
        record (`dict`): the run.
        base (`dict`): the one of all linear layers.
    """

    def __init__(self, record: Record, base: Record) -> None:
        self.record = record
        self.seed, self.rate = record["seed"], record["learning_rate"]
        *_, total = accumulate(base["seconds"])
        times = [0.0, *accumulate(record["seconds"])]
        self.curve = [(times[step] / total, loss) for step, loss in record["losses"]]
        """Time, as a part of all of that of all linear layers, and the evaluation loss then."""
        self.steps = len(base["seconds"])
        count = min(self.steps, len(record["seconds"]))
        self.step_ratio = sum(record["seconds"][:count]) / sum(base["seconds"][:count])

    def loss_at(self, time: float) -> float:
        """The loss at a time, between two evaluations on a straight line."""
        for (before, low), (after, high) in zip(self.curve, self.curve[1:], strict=False):
            if before <= time <= after:
                return low if after == before else low + (high - low) * (time - before) / (after - before)
        return self.curve[-1][1]

    def loss_after(self, steps: int) -> float | None:
        """The loss after so many steps."""
        return next((loss for step, loss in self.record["losses"] if step == steps), None)

    def time_to(self, loss: float) -> float | None:
        """When a loss is reached for the first time; `None` if it is not."""
        for (before, low), (after, high) in zip(self.curve, self.curve[1:], strict=False):
            if high <= loss:
                return after if low == high else before + (after - before) * max(0.0, (low - loss) / (low - high))
        return None


def runs_of(records: Sequence[Record]) -> dict[str, list[Run]]:
    """
    The runs of each method, each beside that of all linear layers in its group.

    A group begins with all linear layers. Its name alone does not tell it from all others: those of two sittings had
    the same one once, if the second began in a file of its own.
    """
    runs = [record for record in records if record["kind"] == "run"]
    bases: dict[str, Record] = {}
    found: dict[str, list[Run]] = {}
    seen = set()
    for record in runs:
        if record["method"] == BASE:
            bases[record["group"]] = record
        key = (record["method"], record["seed"], record["learning_rate"])
        if record["group"] in bases and key not in seen:  # all linear layers run again with each new method
            seen.add(key)
            found.setdefault(record["method"], []).append(Run(record, bases[record["group"]]))
    return found


def at_best_rate(runs: Sequence[Run]) -> list[Run]:
    """
    The runs at the learning rate at which the loss is lowest when all linear layers have ended, on the mean. A rate at
    which a run diverged is the last to be chosen.
    """
    rates: dict[float, list[Run]] = {}
    for run in runs:
        rates.setdefault(run.rate, []).append(run)
    most = max(map(len, rates.values()))
    complete = {rate: of for rate, of in rates.items() if len(of) == most}
    return complete[min(complete, key=lambda rate: _end(complete[rate]))]


def _end(runs: Sequence[Run]) -> float:
    return statistics.fmean(as_loss(run.loss_at(1.0)) for run in runs)


def make_table(records: Sequence[Record]) -> str:
    """The figures of merit of all methods, as Markdown."""
    runs = {method: at_best_rate(found) for method, found in runs_of(records).items()}
    targets = {run.seed: run.loss_at(1.0) for run in runs[BASE]}
    peaks = {record["method"]: record["peak_bytes"] for record in records if record["kind"] == "memory"}
    lines = [
        "| method | learning rate | seeds | time to all-linear's final loss | loss at all-linear's time | loss after "
        "as many steps | time of a step | peak memory | lowest loss until then |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for method, found in sorted(runs.items(), key=lambda item: _end(item[1])):
        shared = [run for run in found if run.seed in targets]
        times = [time for run in shared if (time := run.time_to(targets[run.seed])) is not None]
        reached = "" if len(times) == len(shared) else f", {len(times)} of {len(shared)} reach it"
        after = [loss for run in found if (loss := run.loss_after(run.steps)) is not None]
        peak = f"{peaks[method] / peaks[BASE]:.2f}" if method in peaks and BASE in peaks else ""
        cells = [
            f"`{method}`",
            f"{found[0].rate:g}",
            str(len(found)),
            (_spread(times, 2) if times else "not reached") + (reached if times else ""),
            _spread([run.loss_at(1.0) for run in found], 4),
            _spread(after, 4) if after else "",
            _spread([run.step_ratio for run in found], 2),
            peak,
            _spread([min(as_loss(loss) for time, loss in run.curve if time <= 1.0) for run in found], 4),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _spread(values: Sequence[float], digits: int) -> str:
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def draw(trainings: Sequence[Sequence[Record]], path: Path) -> None:
    """
    Loss against time, a line for each method: the mean of the seeds at its best learning rate.

    Args:
        trainings (`Sequence[Sequence[dict]]`): the records of a picture each.
        path (`Path`): where they go, one below the other.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    count = len(trainings)
    figure, column = plt.subplots(count, figsize=(8, 5 * count), squeeze=False, layout="constrained")
    for axes, records in zip(column.flat, trainings, strict=True):
        _draw(axes, records)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _draw(axes: Axes, records: Sequence[Record]) -> None:
    runs = {method: at_best_rate(found) for method, found in runs_of(records).items()}
    times = [index / 100 for index in range(101)]
    for method, found in runs.items():
        losses = [statistics.fmean(run.loss_at(time) for run in found) for time in times]
        axes.plot(times, losses, label=method, linewidth=3 if method == BASE else 1.8)
    final = statistics.fmean(run.loss_at(1.0) for run in runs[BASE])
    axes.axhline(final, color="gray", linestyle=":", linewidth=1)
    later = [statistics.fmean(run.loss_at(time) for run in found) for found in runs.values() for time in times[15:]]
    if later := [loss for loss in later if math.isfinite(loss)]:
        axes.set_ylim(min(later) - 0.03 * (max(later) - min(later)), max(later))
    axes.set_xlim(0, 1)
    axes.set_xlabel("Time, as a part of the whole run of LoRA on all linear layers")
    axes.set_ylabel("Held-out loss")
    axes.set_title(f"{records[0]['task']}: which loss at which time ({len(runs[BASE])} seed(s))")
    axes.legend()


def write_report(paths: Sequence[Path], folder: Path) -> str:
    """
    Write `table.md` and `curves.png`, with a table and a picture of each training: other models, data, settings and
    devices have one of their own. Returns the tables.

    Raises:
        ValueError: if there are no results.
    """
    records = [record for path in paths for record in read_results(path)]
    trainings = {mark: found for mark, found in comparable(records).items() if BASE in runs_of(found)}
    if not trainings:
        raise ValueError(f"There are no results in {', '.join(map(str, paths))}.")
    tables = [
        (f"### {found[0]['task']}, {mark}\n\n" if len(trainings) > 1 else "") + make_table(found)
        for mark, found in trainings.items()
    ]
    folder.mkdir(parents=True, exist_ok=True)
    text = "\n\n".join(tables)
    (folder / "table.md").write_text(text + "\n", encoding="utf-8")
    draw(list(trainings.values()), folder / "curves.png")
    return text


if __name__ == "__main__":
    import argparse

    parser = argparse.ArgumentParser(description="The table and the picture of results of time_to_loss.py.")
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--output_dir", type=Path, default=Path("."))
    arguments = parser.parse_args()
    print(write_report(arguments.results, arguments.output_dir))
