"""
The table of the runs in the setting of HeteroLoRA, from their results.

```bash
python recipes/benchmarks/heterolora/table.py recipes/benchmarks/heterolora/results/*.jsonl --output_dir tables
```
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any


sys.path.append(str(Path(__file__).resolve().parents[1] / "compare"))

from comparison import half_interval, mean_overlap  # noqa: E402
from result_files import as_loss, comparable, read_results  # noqa: E402


Runs = dict[int, dict[str, Any]]
"""Seed to record."""


def control_of(method: str) -> str | None:
    """For a row with options: the random choice with the same ones, which is made anew as often."""
    name, colon, options = method.partition(":")
    return "constant" + colon + options if options and name not in ("lora", "constant") else None


def spread(runs: Runs, key: str) -> str:
    """Mean ± sample standard deviation over the seeds."""
    values = [run[key] for run in runs.values() if key in run]
    if not values:
        return ""
    return f"{statistics.fmean(values):.4f}" + (f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else "")


def difference(runs: Runs, others: Runs, key: str) -> str:
    """Mean of the paired differences over common seeds, with half the 95 % interval by Student's t."""
    pairs = [run[key] - others[seed][key] for seed, run in runs.items() if seed in others]
    if not pairs:
        return ""
    half = half_interval(pairs)
    return f"{statistics.fmean(pairs):+.4f}" + ("" if math.isnan(half) else f" ± {half:.4f}")


def stays_on(runs: Runs) -> str:
    """The mean share of the modules that are on which the next choice leaves on; empty for a choice made once."""
    shares = [1 - change / len(run["chosen"]) for run in runs.values() for change in run.get("changes", ())]
    return f"{statistics.fmean(shares):.2f}" if shares else ""


def make_table(task: str, rows: dict[str, Runs]) -> str:
    """The Markdown table of one task, lowest loss first."""
    majority = next(run["majority"] for runs in rows.values() for run in runs.values())
    has_f1 = any("f1" in run for runs in rows.values() for run in runs.values())
    names = ["method", "seeds", "active parameters", "accuracy", *(["F1"] if has_f1 else []), "held-out loss"]
    names += ["loss minus `lora`", "loss minus `constant`", "loss minus `constant` in the same form"]
    names += ["accuracy minus `lora`", "accuracy minus `constant`", "overlap of seeds", "stays on"]
    lines = [f"### {task} (a constant answer: {majority:.3f})\n", "| " + " | ".join(names) + " |"]
    lines.append("| " + " | ".join(["---"] * len(names)) + " |")

    def mean(runs: Runs, key: str) -> float:
        return statistics.fmean(run[key] for run in runs.values())

    for method in sorted(rows, key=lambda method: as_loss(mean(rows[method], "loss"))):
        runs, others = rows[method], ["lora", "constant", control_of(method) or method]
        cells = [f"`{method}`", str(len(runs)), f"{mean(runs, 'parameters'):,.0f}", spread(runs, "accuracy")]
        cells += [spread(runs, "f1")] if has_f1 else []
        cells.append(spread(runs, "loss"))
        for key, rivals in (("loss", others), ("accuracy", others[:2])):
            cells += ["" if other == method else difference(runs, rows.get(other, {}), key) for other in rivals]
        overlap = mean_overlap([dict.fromkeys(run["chosen"], 1) for run in runs.values() if "chosen" in run])
        cells += ["" if overlap is None else f"{overlap:.2f}", stays_on(runs)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_table(paths: Sequence[Path], folder: Path) -> str:
    """
    Write `table.md`; returns the tables. Results of another model, data or training are never mixed.

    Raises:
        ValueError: if there are no results.
    """
    tasks: dict[tuple[str, str], dict[str, Runs]] = defaultdict(lambda: defaultdict(dict))
    for mark, records in comparable(record for path in paths for record in read_results(path)).items():
        for record in records:
            tasks[record["task"], mark][record["method"]][record["seed"]] = record
    if not tasks:
        raise ValueError(f"There are no results in {', '.join(map(str, paths))}.")
    text = "\n\n".join(make_table(task, rows) for (task, _), rows in tasks.items())
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.md").write_text(text + "\n", encoding="utf-8")
    return text


def main() -> None:
    """Read results and print their tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--output_dir", type=Path, help="default: the folder of the first file")
    args = parser.parse_args()
    print(write_table(args.results, args.output_dir or args.results[0].parent))


if __name__ == "__main__":
    main()
