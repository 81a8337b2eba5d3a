"""The peak of memory of a method, in a process of its own."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from workers import processes


def measure_peak(task_config: Any, method: str, steps: int, threads: int) -> dict[str, int]:
    """
    Train for a few steps in a new process.

    Returns:
        `dict[str, int]`: `peak_bytes`, and `before_bytes`, what was there before the first step, the model say: the
        resident memory of the process, or what is allocated on its GPU.
    """
    with processes(1) as work:
        [found] = work(_measure, [(task_config, method, steps, threads)])
    return found


def _measure(job: tuple[Any, str, int, int]) -> dict[str, int]:
    task_config, method, steps, threads = job
    benchmarks = Path(__file__).resolve().parents[1]
    sys.path += [str(benchmarks / name) for name in ("time_to_loss", "compare", "profile")]
    import torch
    from contestants import make_trainer
    from profile_memory import peak, reset_peak
    from tasks import Task
    from transformers import TrainerCallback

    torch.set_num_threads(threads)
    trainer = make_trainer(Task(task_config).at(1e-3), method, 0, steps, steps)
    before: list[int] = []

    class Start(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if not before:
                reset_peak()
                before.append(peak())

    trainer.add_callback(Start())
    trainer.train()
    return {"before_bytes": before[0], "peak_bytes": peak()}
