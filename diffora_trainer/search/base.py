"""What a search knows at any moment: its model under gates, its method, and what that has found."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..adapters.base import site_kind
from ..adapters.grid import AdapterGrid
from ..config import DiffoRAConfig
from ..core.times import StepTimes
from ..methods.base import SelectionMethod
from ..methods.build import make_method
from .measured import GatedModel, LossFunction
from .runtime import Runtime


class SearchBase(GatedModel):
    """
    The state of a search.

    Args:
        model (`PeftModel`): the model.
        adapters ([`~diffora_trainer.adapters.grid.AdapterGrid`]): its sites.
        config ([`DiffoRAConfig`]): the options.
        loss_fn (`Callable`): `loss_fn(model, batch)` gives the scalar loss of a batch.
        runtime ([`~diffora_trainer.search.runtime.Runtime`]): several processes and a loss scaler.
    """

    def __init__(
        self, model: nn.Module, adapters: AdapterGrid, config: DiffoRAConfig, loss_fn: LossFunction, runtime: Runtime
    ) -> None:
        super().__init__(model, adapters, loss_fn, runtime)
        self.config = config
        self.method: SelectionMethod = self.make_method()
        self.kept: Tensor | None = None
        self.times: StepTimes | None = None
        self.reached = torch.zeros(len(self.grid), dtype=torch.bool)
        self.effect: tuple[float, float] | None = None
        self.skipped_steps = 0
        self.pending_losses: list[float] = []
        self.last_loss: float | None = None

    @property
    def _separate_kinds(self) -> list[str]:
        extra = self.config.extra_sites
        assert not isinstance(extra, str)
        return [name for name, options in (extra or {}).items() if site_kind(name).separately(options)]

    @property
    def ranks_kinds_apart(self) -> bool:
        """Whether different kinds of site have budgets of their own."""
        return bool(self._separate_kinds)

    def make_method(self, allowed: Tensor | None = None) -> SelectionMethod:
        """The method over all modules, or over those that are allowed."""
        return make_method(self.config, self.grid, self.adapters.in_adapter, self._separate_kinds, allowed)
