"""Trials of a hyperparameter search."""

from __future__ import annotations

from typing import Any

import optuna


class Given(optuna.samplers.RandomSampler):
    """Suggests these values of one parameter, one a trial."""

    def __init__(self, values: list[float]) -> None:
        super().__init__(seed=0)
        self.values = values

    def sample_independent(self, study: Any, trial: Any, name: str, distribution: Any) -> float:
        return self.values[trial.number]
