"""Running a model without leaving a trace in the training that it belongs to."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


@contextmanager
def side_effect_free(model: nn.Module, device: torch.device, training: bool) -> Iterator[None]:
    """
    Run a model without leaving a trace in the random streams, in its mode, or in the statistics of batch norms.

    Args:
        model (`nn.Module`): the model.
        device (`torch.device`): where it draws random numbers.
        training (`bool`): in training mode, or in evaluation mode.
    """
    modes = {module: module.training for module in model.modules()}  # some parts may be kept in evaluation
    norms = [module for module in modes if isinstance(module, _BatchNorm)] if training else []
    statistics = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers(recurse=False)]
    with isolated_random_state(device):
        model.train(training)
        for module in modes:
            if type(module).__name__ == "Linear4bit":
                # On some CPUs bitsandbytes repacks the weight at the first call in evaluation mode, for good
                # and rounded, into a form that passes no gradient on. It reads the mode for nothing else.
                module.training = True
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode
            with torch.no_grad():
                for buffer, before in statistics:
                    buffer.copy_(before)


@contextmanager
def isolated_random_state(device: torch.device) -> Iterator[None]:
    """Put the random streams of PyTorch, NumPy and Python back as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = [] if device.type == "cpu" else [device]
    try:
        with torch.random.fork_rng(devices=devices, device_type="cuda" if device.type == "cpu" else device.type):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


class OwnRandomState:
    """
    Random streams of PyTorch's CPU, NumPy and Python for one purpose: they go on from one use to the next, and those
    of everybody else stay as they are.

    Args:
        seed (`int`): where they start.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._state: tuple[Any, Any, torch.Tensor] | None = None

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Draw from them for a while."""
        with isolated_random_state(torch.device("cpu")):
            if self._state is None:
                random.seed(self._seed)
                np.random.seed(self._seed)
                torch.default_generator.manual_seed(self._seed)
            else:
                random.setstate(self._state[0])
                np.random.set_state(self._state[1])
                torch.set_rng_state(self._state[2])
            try:
                yield
            finally:
                self._state = (random.getstate(), np.random.get_state(), torch.get_rng_state())


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Give an object another attribute for a while."""
    attributes = vars(owner)
    missing = object()
    before = attributes.get(name, missing)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is missing:
            delattr(owner, name)
        else:
            setattr(owner, name, before)
