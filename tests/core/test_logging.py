"""Who decides what is shown of this package's log: the user, by any of the usual means, before or after the import."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from helpers import ROOT


# What is done before the import, after it, and what is then seen of an info line and a warning.
CASES: dict[str, tuple[str, str, list[str]]] = {
    "as it comes": ("", "", ["info", "warning"]),
    "its own level, before": ("logging.getLogger('diffora_trainer').setLevel('WARNING')", "", ["warning"]),
    "its own level, after": ("", "logging.getLogger('diffora_trainer').setLevel('WARNING')", ["warning"]),
    "root level, before": ("logging.basicConfig(level='ERROR', stream=sys.stdout)", "", []),
    "root level, after": ("", "logging.basicConfig(level='WARNING', stream=sys.stdout)", ["warning"]),
    "root handler, once": ("logging.basicConfig(level='INFO', stream=sys.stdout)", "", ["info", "warning"]),
    "its own level beats the root's": (
        "logging.basicConfig(level='WARNING', stream=sys.stdout)",
        "logging.getLogger('diffora_trainer').setLevel('INFO')",
        ["info", "warning"],
    ),
    "training arguments": ("", "follow_log_level('warning')", ["warning"]),
    "training arguments, less": ("", "follow_log_level('critical')", []),
    "training arguments, their default": ("", "follow_log_level('passive')", ["info", "warning"]),
    "transformers": ("", "transformers.logging.set_verbosity_error(); follow_log_level('passive')", []),
}
PROGRAM = """
import json, logging, os, sys
import transformers
for number, (before, after) in enumerate(json.loads(sys.argv[1])):
    if os.fork():
        assert os.wait()[1] == 0
        continue
    shown = os.open(f"{number}.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(shown, 1), os.dup2(shown, 2)
    exec(before)
    from diffora_trainer.logging import follow_log_level, get_logger
    logger = get_logger("diffora_trainer.part")
    exec(after)
    logger.info("info")
    logger.warning("warning")
    break
"""


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What each case shows, in a process of its own, forked from one in which transformers is imported."""
    folder = tmp_path_factory.mktemp("logs")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps([(before, after) for before, after, _ in CASES.values()])],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr + "".join(path.read_text() for path in folder.iterdir())
    return {case: (folder / f"{number}.log").read_text() for number, case in enumerate(CASES)}


@pytest.mark.parametrize("case", CASES)
def test_what_is_shown(case: str, logs: dict[str, str]) -> None:
    shown = [line.rpartition(":")[2].rpartition("] ")[2] for line in logs[case].splitlines()]
    assert [line for line in shown if line in ("info", "warning")] == CASES[case][2], logs[case]
