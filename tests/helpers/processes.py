"""Programs that run in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from helpers import IMPORT_PATH, ROOT, distributed_run


def elsewhere(program: str, jobs: object, folder: Path, missing: tuple[str, ...] = ("diffora_trainer", "trl")) -> Any:
    """
    What a program reports that runs in a process of its own, where some packages cannot be imported. It finds its
    `jobs`, and leaves its `report`.
    """
    program = f"""
import json, sys

for name in {missing!r}:
    sys.modules[name] = None
jobs = json.loads(sys.argv[1])
{program}
print("REPORT" + json.dumps(report))
"""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-c", program, json.dumps(jobs)]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.split("REPORT")[1])


RECIPES = ROOT / "recipes"
HELPERS = Path(__file__).parent


def launch(kind: str | None, script: Path, *arguments: object, ok: bool = True) -> str:
    """Run a script alone, or in two processes as one of the recipes' files says. Returns what it printed."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "3000", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = IMPORT_PATH
    command = [sys.executable, script]
    if kind is not None:
        accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
        file = RECIPES / "accelerate_configs" / f"{kind}.yaml"
        command = [*accelerate, "--config_file", file, HELPERS / "launch_on_cpu.py", script]
    command = [str(part) for part in [*command, *arguments]]
    # What hangs is killed and fails the test.
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    output = done.stdout + done.stderr
    assert (done.returncode == 0) == ok, output[-4000:]
    return output


def distribute(kind: str, runs: Mapping[Path, dict[str, Any]], ok: bool = True) -> str:
    """Runs of `distributed_run.py` in two processes, one after the other, since these take long to start."""
    for folder in runs:
        folder.mkdir(exist_ok=True)
    jobs = json.dumps({str(folder): options for folder, options in runs.items()})
    return launch(kind, HELPERS / "distributed_run.py", jobs, ok=ok)


def read_reports(folder: Path) -> list[dict[str, Any]]:
    """What each process has found in a run."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("report.*.json"))]


def train(kind: str | None, folder: Path, **options: Any) -> list[dict[str, Any]]:
    """A run in two processes, or in this one, and the reports of its processes."""
    if kind is None:
        folder.mkdir(exist_ok=True)
        distributed_run.run(folder, options)
    else:
        distribute(kind, {folder: options})
    return read_reports(folder)
