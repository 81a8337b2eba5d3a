"""What tests read from models and runs, and how they compare it."""

from __future__ import annotations

import re

import numpy as np
import torch
from peft import (
    get_peft_model_state_dict,
)
from torch import Tensor, nn
from transformers import (
    Trainer,
)

from helpers.adapted import lora_layers
from helpers.trainers import CUT


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter and buffer."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def adapter(model: nn.Module) -> dict[str, Tensor]:
    """A copy of what is saved of the adapter."""
    return {name: tensor.detach().clone() for name, tensor in get_peft_model_state_dict(model).items()}


def raw_optimizer(optimizer: object) -> torch.optim.Optimizer:
    """The optimizer inside accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


def optimizer_state(model: nn.Module, optimizer: object) -> dict[str, dict[str, object]]:
    """A copy of the optimizer's state, by the name of the parameter."""
    state = raw_optimizer(optimizer).state
    return {
        name: {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in state[parameter].items()}
        for name, parameter in model.named_parameters()
        if parameter in state
    }


def assert_same(first: object, second: object, where: str = "") -> None:
    """Equal bit for bit, through dictionaries, lists and tensors."""
    if isinstance(first, dict):
        assert isinstance(second, dict) and list(first) == list(second), f"{where}: {set(first) ^ set(second)}"
        for key in first:
            assert_same(first[key], second[key], f"{where}/{key}")
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second), where
        for index, (a, b) in enumerate(zip(first, second, strict=True)):
            assert_same(a, b, f"{where}[{index}]")
    elif isinstance(first, Tensor):
        assert torch.equal(first, second), where
    else:
        assert first == second, where


def assert_each_close(found: list[Tensor], expected: list[object], rtol: float = 1e-4) -> None:
    """Numbers of each module are those of a direct computation, in NumPy or PyTorch."""
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.numpy(), np.asarray(other), rtol=rtol, atol=1e-9)


def step_logs(trainer: Trainer, ignored: tuple[str, ...] = ()) -> dict[int, dict[str, float]]:
    """The training logs by step, without the one at the end of training."""
    return {
        log["step"]: {key: value for key, value in log.items() if not key.startswith(ignored or ("\0",))}
        for log in trainer.state.log_history
        if "loss" in log
    }


def assert_continues(resumed: Trainer, whole: Trainer, step: int) -> None:
    """A run resumed from a step is the one that was not interrupted: selection, logs from there on, and adapter."""
    assert resumed.selection == whole.selection
    # TRL counts tokens from 0 again when it resumes.
    expected, found = (
        {at: log for at, log in step_logs(trainer, ("num_tokens",)).items() if at > step}
        for trainer in (whole, resumed)
    )
    assert set(expected) == set(range(step + 1, whole.state.max_steps + 1))
    assert_same(found, expected, f"logs from step {step}")
    assert_same(adapter(resumed.model), adapter(whole.model), f"adapter from step {step}")


def assert_helpful(message: str, essential: str) -> None:
    """It names what was passed, and says what to do or what would be right."""
    assert re.search(essential, message, re.DOTALL), message
    assert len(message) > 30 and re.search(r"[Pp]lease|[Uu]se |must|[Pp]ass|[Cc]all|Load |has to be", message), message


def search_keys(log: dict[str, float]) -> set[str]:
    return {key.removeprefix("diffora/") for key in log if key.startswith("diffora/")}


def assert_was_searched(trainer: Trainer, cut: int = CUT) -> None:
    assert "gap" in search_keys(step_logs(trainer)[cut])
    assert set(lora_layers(trainer.model, "default")) == set(trainer.selection.selected)
    assert 0 < len(trainer.selection.selected) < len(trainer.selection.modules)
