"""Peak memory in every phase of a run, each variant in a process of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from profile_runs import PHASES, ProfileConfig, make_trainer, phase_of, schedule_of
from workers import processes


def measure_all_memory(config: ProfileConfig) -> dict[str, dict[str, int]]:
    """Peak bytes in each phase of all variants, one after the other."""
    memory: dict[str, dict[str, int]] = {}
    kept: list[str] | None = None
    for variant in config.variants:  # `diffora` before `kept`
        with processes(1) as work:
            [memory[variant]] = work(_memory_worker, [(config, variant, kept)])
        kept = memory[variant].pop("modules", kept)  # type: ignore[arg-type]
    return memory


def _memory_worker(job: tuple[ProfileConfig, str, list[str] | None]) -> dict[str, Any]:
    return measure_memory(*job)


def measure_memory(config: ProfileConfig, variant: str, kept: list[str] | None) -> dict[str, int]:
    """Peak bytes in each phase of a variant, alone in this process."""
    import torch
    from transformers import TrainerCallback

    torch.set_num_threads(config.threads)
    peaks: dict[str, int] = {}
    schedule = schedule_of(config)

    class Peak(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step in (0, schedule.warmup, schedule.prune):
                reset_peak()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            phase = PHASES[2] if variant == "kept" else phase_of(schedule, state.global_step)
            peaks[phase] = max(peaks.get(phase, 0), peak())

    # The last callback of the list, so that what the search does at the end of a step is measured too.
    trainer = make_trainer(config, variant, kept=kept)
    trainer.add_callback(Peak())
    trainer.train()
    return peaks | {"modules": list(trainer.selection.selected)} if variant == "diffora" else peaks


def peak() -> int:
    """The largest number of bytes since [`reset_peak`]: of the process, or allocated on its GPU."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if not status.is_file():
        raise OSError("Peak memory of a process is read from /proc, which this system lacks; pass `--memory false`.")
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def reset_peak() -> None:
    """Begin anew."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the highest size becomes the present one
