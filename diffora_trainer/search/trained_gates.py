"""Gates of components that are trained with the weights, by the training loss."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from ..adapters.moments import copies_follow
from ..adapters.optimizer import innermost, learning_rate_of
from ..logging import get_logger
from ..methods.trained_gates import GateMethod
from .bilevel import SECOND_ORDER_IN_HALF, in_half_precision
from .search import ArchitectureSearch


logger = get_logger(__name__)


def rate_of_weights(
    search: ArchitectureSearch,
    optimizer: Any,
    remedy: str = "please leave `arch_order=2` out.",
    initial: bool = False,
) -> float:
    """The learning rate of the searched weights. See [`~diffora_trainer.adapters.optimizer.learning_rate_of`]."""
    weights = (weight for site in search.adapters.sites for weight in site.parameters)
    return learning_rate_of(optimizer, weights, remedy, initial)


def check_rate(search: ArchitectureSearch, optimizer: Any, trained: TrainedGates | None) -> None:
    """
    Raise a `ValueError` before the first step if a later one needs a learning rate that there is not, and warn if a
    look ahead by it would be lost in rounding.
    """
    if trained is not None:
        trained.learning_rate(optimizer)
    elif search.method.options.arch_order == 2:
        rate_of_weights(search, optimizer)
        if in_half_precision(search.model):
            logger.warning(SECOND_ORDER_IN_HALF)


class TrainedGates:
    """
    The gates of a method that trains one for each component, as leaves of the graph of a training step. Their
    gradients add up over the batches of a step, as those of the weights do, and belong to no optimizer but the
    method's own.

    Args:
        search ([`ArchitectureSearch`]): a search whose method `trains_gates`.
        until (`int`): the step of the choice.

    Raises:
        ValueError: if the training steps run a compiled model.
    """

    def __init__(self, search: ArchitectureSearch, until: int) -> None:
        if search.runtime.compiled:
            raise ValueError(
                f"You passed `method={search.config.method!r}`, which trains gates that a model compiled by "
                "`torch.compile` does not see. Please train without `torch_compile`, or use another method."
            )
        self.search, self._until = search, until
        self._leaves: list[Tensor] = []
        self._scale = 1.0

    @property
    def method(self) -> GateMethod:
        """The method of the search, which makes a new one when the limits of a step are known."""
        return cast(GateMethod, self.search.method)

    def renew(self) -> None:
        """Let the method's present gates act, without a gradient."""
        device = self.search.gates.device
        self._leaves = [gates.to(device).requires_grad_() for gates in self.method.component_gates()]
        self.search.gates.set_masks(self._leaves)

    def learning_rate(self, optimizer: Any, initial: bool = False) -> float:
        """
        The step size of the gates: their own, or that of the weights.

        Args:
            optimizer (`torch.optim.Optimizer`): that of the weights.
            initial (`bool`, *optional*, defaults to `False`): return the rate before any scheduler changed it.

        Raises:
            ValueError: if there is none.
        """
        own = self.method.options.gate_learning_rate
        remedy = "please give the gates one of their own (`gate_learning_rate` in `method_options`)."
        return own if own is not None else rate_of_weights(self.search, optimizer, remedy, initial)

    def doubt(self, optimizer: Any) -> str | None:
        """What the log warns of before the first step, if anything."""
        return self.method.doubt_gates(self._until, self.learning_rate(optimizer, initial=True))

    def before_step(self) -> None:
        """Note by what the loss of the coming forward pass is multiplied."""
        self._scale = self.search.runtime.loss_scale()

    def step(self, optimizer: Any) -> None:
        """
        Move the gates by the gradients of the training step just made: the mean over all processes. A gradient that is
        not finite moves nothing, as it moves no weight where a loss is scaled.

        Args:
            optimizer (`torch.optim.Optimizer`): that of the weights, whose learning rate is the default.
        """
        found = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in self._leaves]
        gradient = self.search.runtime.reduce(torch.cat([part.float().cpu() for part in found])) / self._scale
        if torch.isfinite(gradient).all():
            method = self.method
            parts = gradient.split([len(leaf) for leaf in self._leaves])
            self.search.reached |= torch.tensor([bool(part.any()) for part in parts])
            method.gate_step(gradient, self.learning_rate(optimizer))
            sites = self.search.adapters.sites
            with copies_follow((weight for site in sites for weight in site.parameters), innermost(optimizer)):
                method.after_gate_step(sites, min(1.0, method.steps / self._until))
        else:
            self.search.skipped_steps += 1
        self.renew()
