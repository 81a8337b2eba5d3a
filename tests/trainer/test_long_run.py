"""A search of thousands of steps holds on to nothing."""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import IMPORT_PATH


STEPS, CUT = 3000, 2950

RUN = """
import gc, json, os, sys
from helpers.checks import step_logs
from helpers.trainers import make_trainer
from transformers import TrainerCallback

class Watch(TrainerCallback):
    found = []

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % 25 == 0:
            gc.collect()
            pages = int(open("/proc/self/statm").read().split()[1])
            self.found.append((state.global_step, pages * os.sysconf("SC_PAGESIZE"), len(os.listdir("/proc/self/fd"))))

steps, cut = int(sys.argv[2]), int(sys.argv[3])
trainer = make_trainer(
    sys.argv[1],
    args={
        "max_steps": steps, "logging_steps": 10, "save_strategy": "steps", "save_steps": 500, "save_total_limit": 2,
        "learning_rate": 1e-3,
    },
    search={"arch_warmup": 100, "discretize_at": cut, "arch_every": 1},
)
trainer.add_callback(Watch())
trainer.train()
report = {"watched": Watch.found, "logs": trainer.state.log_history, "kept": len(trainer.selection.selected)}
with open(f"{sys.argv[1]}/report.json", "w") as file:
    json.dump(report, file)
"""


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="the memory of a process is read from /proc")
def test_long_search_holds_on_to_nothing(tmp_path: Path) -> None:
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": IMPORT_PATH}
    subprocess.run([sys.executable, "-c", RUN, tmp_path, str(STEPS), str(CUT)], check=True, env=env, timeout=1100)
    report = json.loads((tmp_path / "report.json").read_text())

    memory = {step: size for step, size, _ in report["watched"]}
    early = statistics.median(size for step, size in memory.items() if 500 < step <= 1000)
    late = statistics.median(size for step, size in memory.items() if CUT - 500 < step <= CUT)
    growth = late / early - 1
    print(f"resident memory: {early / 2**20:.1f} MiB, later {late / 2**20:.1f} MiB ({growth:+.2%})")
    assert growth < 0.01
    handles = [count for step, _, count in report["watched"] if step > 500]  # the first checkpoint is written there
    assert max(handles) == min(handles), handles

    numbers = [value for log in report["logs"] for value in log.values() if isinstance(value, (int, float))]
    assert len(report["logs"]) > STEPS / 10 and all(map(math.isfinite, numbers))
    searched = [log for log in report["logs"] if "diffora/arch_loss" in log]
    assert len(searched) >= (CUT - 100) / 10 and report["kept"] == 7
