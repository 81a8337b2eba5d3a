"""A run that dies anywhere, in the middle of writing a checkpoint too, ends as the run that did not die."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from diffora_trainer.trainer.checkpoint import check_checkpoint, newest_checkpoint
from helpers import IMPORT_PATH
from helpers.checks import assert_same
from helpers.crash_run import CUT, EVERY, STEPS


KILLS = 20


class Lives:
    """Lives of one run, one after the other, in processes of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.server = subprocess.Popen(
            [sys.executable, "-m", "helpers.crash_run"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONPATH": IMPORT_PATH},
        )

    def begin(self, name: str, **options: object) -> int:
        """Start a life of a run; its process id."""
        self.events, self.log, self.report = (self.folder / f"{name}.{kind}" for kind in ("events", "log", "pt"))
        self.events.write_text("")
        order = {"events": str(self.events), "log": str(self.log), "report": str(self.report), **options}
        self.server.stdin.write(json.dumps({"output_dir": str(self.folder / name), **order}) + "\n")
        self.server.stdin.flush()
        return int(self.server.stdout.readline())

    def end(self) -> int:
        """Wait for the end of a life; its exit code, negative if a signal ended it."""
        return os.waitstatus_to_exitcode(int(self.server.stdout.readline()))

    def told(self, event: str) -> list[int]:
        """The steps at which something happened."""
        return [int(line.split()[1]) for line in self.events.read_text().splitlines() if line.split()[0] == event]

    def unfinished(self) -> set[int]:
        """The steps of checkpoints whose writing began and did not end."""
        return set(self.told("writes")) - set(self.told("wrote"))

    def wait_for(self, event: str, count: int) -> None:
        limit = time.monotonic() + 120
        while len(self.told(event)) < count:
            assert time.monotonic() < limit, self.log.read_text()
            time.sleep(0.0005)

    def close(self) -> None:
        self.server.stdin.close()
        self.server.wait(60)


@pytest.fixture(scope="module")
def lives(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lives]:
    made = Lives(tmp_path_factory.mktemp("lives"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def whole(lives: Lives) -> dict:
    """What the run finds that nobody disturbs."""
    lives.begin("whole")
    assert lives.end() == 0, lives.log.read_text()
    return torch.load(lives.report, weights_only=True)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("shortcuts", [None, ["residual1", "residual2", "shortcut1", "shortcut2"]])
def test_killed_run_is_the_uninterrupted_run(shortcuts: list[str] | None, lives: Lives) -> None:
    chance = random.Random(3)
    name = f"killed-{shortcuts is not None}"
    run, inside, begun = lives.folder / name, 0, []
    for life in range(KILLS):
        before, passed = newest_checkpoint(run)
        process = lives.begin(name, save_total_limit=3, shortcuts=shortcuts)
        lives.wait_for("begins", 1)
        begun += lives.told("begins")
        assert begun[-1] == (0 if before is None else int(before.rpartition("-")[2]))
        if before is not None:
            assert all(name in lives.log.read_text() for name in passed)  # the warning names them
        if life % 4 != 3:  # most are killed while they write, early or late in it; the others anywhere
            lives.wait_for("writes", chance.choice((1, 2, 3, 3)))
            time.sleep(chance.uniform(0, 0.03))
        else:
            time.sleep(chance.uniform(0, 0.25))
        os.kill(process, signal.SIGKILL)
        assert lives.end() == -signal.SIGKILL, lives.log.read_text()
        inside += sum(not _is_whole(run / f"checkpoint-{step}") for step in lives.unfinished())
    print(f"{inside} of {KILLS} kills left a half-written checkpoint; lives began at steps {begun}")
    assert inside >= KILLS // 4
    # No life fell behind the one before it, and they came through all phases without ever reaching the end.
    assert begun == sorted(begun) and len(set(begun)) > KILLS // 4 and begun[-1] > CUT
    last = Lives(lives.folder)  # in a new interpreter
    last.begin(name, save_total_limit=3, shortcuts=shortcuts)
    assert last.end() == 0, last.log.read_text()
    last.close()
    assert begun[-1] <= last.told("begins")[0] < STEPS
    lives.begin(f"whole-{name}", shortcuts=shortcuts)
    assert lives.end() == 0, lives.log.read_text()
    whole = torch.load(lives.report, weights_only=True)
    assert bool(whole["shortcuts"]) == (shortcuts is not None)
    assert_same(torch.load(last.report, weights_only=True), whole)
    assert _is_whole(run / f"checkpoint-{STEPS}")


def _is_whole(checkpoint: Path) -> bool:
    try:
        check_checkpoint(checkpoint)
    except ValueError:
        return False
    return True


def _assert_stopped_well(lives: Lives, run: Path, reason: str) -> str:
    """A run stopped because a checkpoint could not be written, and lost only that one; the newest whole one."""
    assert lives.end() == 1
    log = lives.log.read_text()
    (step,) = lives.unfinished()
    error = next(line for line in reversed(log.splitlines()) if line.startswith("OSError"))
    assert f"checkpoint-{step}' could not be written" in error and "bytes free" in error
    assert reason in error
    print(error)
    left = [path.name for path in run.rglob("*") if path.name.startswith(".")]
    assert not left, left
    assert not _is_whole(run / f"checkpoint-{step}")
    assert all(_is_whole(run / f"checkpoint-{before}") for before in range(EVERY, step, EVERY))
    return str(run / f"checkpoint-{step - EVERY}")


@pytest.mark.slow
@pytest.mark.parametrize("room", [3.1, 3.5, 3.8, 3.97])  # in checkpoints: the disk is full at different files
def test_full_disk_leaves_the_checkpoint_before(room: float, whole: dict, lives: Lives) -> None:
    name = f"full-{room}"
    run = lives.folder / name
    run.mkdir()
    used = sum(-(-path.stat().st_size // 4096) * 4096 for path in (lives.folder / "whole/checkpoint-2").rglob("*"))
    mount = ["mount", "-t", "tmpfs", "-o", f"size={int(room * used)}", "tmpfs", run]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a file system of a small size cannot be mounted here")
    try:
        lives.begin(name)
        newest = _assert_stopped_well(lives, run, "")
        assert newest_checkpoint(run)[0] == newest
        subprocess.run(["mount", "-o", "remount,size=1G", run], check=True)
        lives.begin(name)
        assert lives.end() == 0, lives.log.read_text()
        assert lives.told("begins") == [int(newest.rpartition("-")[2])]
    finally:
        subprocess.run(["umount", run], check=True)
    assert_same(torch.load(lives.report, weights_only=True), whole)


@pytest.mark.slow
@pytest.mark.parametrize("limit", [12_000, 30_000])  # bytes: for the adapter, and for the optimizer's state
def test_refused_write_leaves_the_checkpoint_before(limit: int, whole: dict, lives: Lives) -> None:
    """What a quota does, where nothing can be mounted."""
    name = f"limited-{limit}"
    lives.begin(name, file_limit=limit)
    newest = _assert_stopped_well(lives, lives.folder / name, "pos" if limit == 30_000 else "File too large")
    assert newest.endswith("checkpoint-8")
    lives.begin(name)
    assert lives.end() == 0, lives.log.read_text()
    assert lives.told("begins") == [8]
    assert_same(torch.load(lives.report, weights_only=True), whole)
