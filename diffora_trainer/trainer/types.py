"""What a trainer that searches has: for annotations alone, nothing makes or asks for an object of this class."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from torch import Tensor, nn
from transformers import Trainer

from ..config import DiffoRAConfig
from ..core.selection import Selection
from ..methods.context import ScoreFunction
from .callback import SessionCallback
from .held_out import HeldOutData
from .saving import OutputCard
from .session import TrainerSession


class SearchingTrainer(Trainer):
    """
    A [`~transformers.Trainer`] with what [`DiffoRAMixin`] adds and others use. What the parent declares as a union,
    of which a search has one case, is `Any` here.
    """

    args: Any
    model: Any
    train_dataset: Any
    diffora_config: DiffoRAConfig
    arch_dataset: Any
    score_function: ScoreFunction | None
    _callback: SessionCallback | None
    _held_out: HeldOutData
    _output_card: OutputCard
    _session: TrainerSession

    @property
    @abstractmethod
    def selection(self) -> Selection | None: ...

    @property
    @abstractmethod
    def _generates_for_loss(self) -> bool: ...

    @abstractmethod
    def compute_architecture_loss(self, model: nn.Module, inputs: Any) -> Tensor: ...

    @abstractmethod
    def _set_prune_step(self, step: int) -> None: ...
