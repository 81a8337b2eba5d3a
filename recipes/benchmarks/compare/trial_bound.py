"""
How much could a trial gain at most that trains two candidates for some steps at the choice, the moved ranks and the
even spread, and goes on with the better one? From the records of `diffora` and `all_linear` with the same seed and
learning rate: of a trial that always knew which of the two ends lower.

```bash
python recipes/benchmarks/compare/trial_bound.py recipes/benchmarks/compare/results/h100_*.jsonl
```

Where no rank moved, both are the same method, and what such a trial would gain there is what noise alone pays it.
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from result_files import Record, comparable, read_results


Key = tuple[str, bool]
"""A task, and whether ranks moved."""


def differences(records: Iterable[Record]) -> dict[Key, list[float]]:
    """Loss of each run of `diffora` minus that of all linear layers with the same budget, seed and learning rate."""
    runs: dict[tuple[object, ...], dict[str, Record]] = defaultdict(dict)
    for mark, group in comparable(records).items():
        for record in group:
            if record["reading"] == "run" and record["method"] in ("diffora", "all_linear"):
                key = record["task"], mark, record["budget"], record["seed"], record.get("learning_rate")
                runs[key][record["method"]] = record
    found: dict[Key, list[float]] = defaultdict(list)
    for pair in runs.values():
        if len(pair) == 2:
            ours, even = pair["diffora"], pair["all_linear"]
            moved = sorted(ours["ranks"].values()) != sorted(even["ranks"].values())
            found[ours["task"], moved].append(ours["loss"] - even["loss"])
    return found


def make_table(records: Iterable[Record]) -> str:
    """A row for each task, as Markdown."""
    found = differences(records)
    lines = [
        "| task | ranks moved: runs | mean difference | a perfect trial gains | none moved: runs | mean difference "
        "| what it would gain by noise |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for task in dict.fromkeys(task for task, _ in found):
        cells = [task]
        for moved in (True, False):
            values = found.get((task, moved), [])
            cells.append(str(len(values)))
            cells.append(f"{statistics.fmean(values):+.4f}" if values else "")
            cells.append(f"{statistics.fmean(max(0.0, value) for value in values):.4f}" if values else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Read results and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path)
    args = parser.parse_args()
    print(make_table(record for path in args.results for record in read_results(path)))


if __name__ == "__main__":
    main()
