"""Runs that the tests of shortcuts share."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import Trainer

from helpers.shortcut_runs import RUNS, shortcut_trainer


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The uninterrupted run of a name, made once."""
    made: dict[str, Trainer] = {}

    def run(name: str) -> Trainer:
        if name not in made:
            task, options = RUNS[name]
            made[name] = shortcut_trainer(tmp_path_factory.mktemp("run"), task, **options)
            made[name].train()
        return made[name]

    return run
