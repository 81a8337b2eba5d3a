"""The steps of a search over a PEFT model and a loss function. What happens when is in [`SelectionRun`]."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.backward import check_backward_ends_early, suspend_input_gradients
from ..adapters.gates import checkpoints_activations
from ..adapters.grid import AdapterGrid
from ..config import DiffoRAConfig
from ..core.agreement import is_main_process, shares, world_size
from ..core.costs import StepCosts
from ..core.selection import Selection
from ..logging import get_logger
from ..methods.base import GradientMethod
from ..methods.build import check_score_function
from ..methods.context import ScoreFunction, bounded
from .base import SearchBase, choice_of
from .batches import NO_LABELS, without_labels
from .bilevel import ArchitectureGradient
from .component_budget import faded_masks
from .deprecated import OldNames, old_runtime
from .losses import LossFunction
from .outcome import check_adapters, make_selection, search_metrics
from .runtime import Runtime
from .scoring import score_sites, try_out


logger = get_logger(__name__)


class ArchitectureSearch(OldNames, SearchBase):
    """
    Learns which LoRA modules of a model to keep (DiffoRA, https://huggingface.co/papers/2502.08905), or scores them.

    This is the toolbox of [`SelectionRun`], which calls it at the right moments and is what a training loop of your
    own should use. The two levels alternate: the loop steps the LoRA weights on training batches, and [`step`] moves
    the matrix on held-out batches. An architecture step touches neither the weights, nor their gradients, nor any
    random stream of PyTorch, NumPy or Python.

    Three calls concern the choice:

    - [`select`] looks: it returns the selection that a pruning would carry out now, and changes nothing.
    - [`discretize`] commits: the choice is final. The gates stay on the model, and may fade out ([`fade_out`]).
    - [`finish`] commits, if that is still to be done, takes the gates off and returns the selection. It is called
      once; [`apply_selection`] then carries it out.

    Args:
        model (`PeftModel`): a model with an active LoRA adapter.
        config ([`DiffoRAConfig`], *optional*): the options; what concerns a schedule and data is not read.
        loss_fn (`Callable`): `loss_fn(model, batch)` gives the scalar loss of a batch.
        adapter_name (`str`, *optional*): which adapter to search; defaults to the active one,
            and no other may be active.
        score_function (`Callable`, *optional*): for `method="custom"`: `score_function(model, batches)` gives a
            dictionary from the name of each LoRA module to its score; higher is kept.
        runtime ([`~diffora_trainer.search.runtime.Runtime`], *optional*): several processes and a loss scaler.
        reduce (`Callable`, *optional*): deprecated, pass `runtime=Runtime(reduce=...)`.
        loss_scale (`Callable`, *optional*): deprecated, pass `runtime=Runtime(loss_scale=...)`.

    Attributes:
        grid ([`~diffora_trainer.core.grid.Grid`]): the modules.
        method ([`~diffora_trainer.methods.base.SelectionMethod`]): what the choice is made by; of a search, the DAM.
        kept (`Tensor` of dtype `torch.bool`, or `None`): what stays, once that is decided: an entry for each gate.
        reached (`Tensor` of dtype `torch.bool`): which gates ever had a gradient, or adapters were called.
        effect ([`~diffora_trainer.search.confidence.Comparison`] or `None`): held-out loss without the modules and
            with all of them, when the choice was made (see [`measure_effect`]).
        ranks (`tuple[int, ...]`): how many components of each adapter take part now (see `selection_granularity`).

    Raises:
        TypeError: if the model is not a `PeftModel`, or its adapter not LoRA.
        ValueError: if the adapter cannot be searched (see
            [`~diffora_trainer.adapters.grid.AdapterGrid.from_model`]), no module fits the budget, only one of
            `score_function` and `method="custom"` is passed, or a step is to be limited (`max_step_time`,
            `max_step_memory`) where the input embeddings are trained too.
    """

    def __init__(
        self,
        model: nn.Module,
        config: DiffoRAConfig | None = None,
        *,
        loss_fn: LossFunction,
        adapter_name: str | None = None,
        score_function: ScoreFunction | None = None,
        runtime: Runtime | None = None,
        reduce: Callable[[Tensor], Tensor] | None = None,
        loss_scale: Callable[[], float] | None = None,
    ) -> None:
        _check_arguments(config, loss_fn)
        config = config or DiffoRAConfig()
        check_score_function(config, score_function)
        runtime = old_runtime(runtime or Runtime(), reduce=reduce, loss_scale=loss_scale)
        adapters = AdapterGrid.from_model(model, adapter_name)
        if config.limits_step:
            check_backward_ends_early(model, [p for site in adapters.sites for p in site.parameters])
        super().__init__(model, adapters, config, loss_fn, runtime)
        check_adapters(adapters, config, self.method)
        self._score_function = score_function
        self._gradient = ArchitectureGradient(model, self.gates, self.loss, self.runtime.loss_scale, self.split)
        self._fading: Tensor | None = None
        self._finished = False

    @property
    def adapter_name(self) -> str:
        """The PEFT adapter that is searched."""
        return self.adapters.adapter_name

    @property
    def has_no_choice(self) -> bool:
        """Whether the budget has room for everything, though it was to limit what is kept."""
        limited = self.config.max_trainable_parameters is not None or self.config.ratio < 1
        return limited and not self.config.limits_step and self.nothing_to_choose is not None

    def check_start(self, batch: Any) -> None:
        """Before the first step: raise a `ValueError` if it cannot look at this model, or learn from this batch."""
        try_out(self, batch)
        # If this batch has no label, none of this process has. A loss of the user's own may not need any.
        [unlabelled] = shares([without_labels(batch)], self.runtime.reduce)
        if unlabelled == 1 and (world_size() > 1 or math.isnan(self.held_out_loss([batch]))):
            raise ValueError(f"No held-out row has a label, so its loss is not a number. {NO_LABELS}")

    def begin(self) -> None:
        """
        Attach the gates to the model. From here on the weights train under the gates of [`draw_gates`].

        What makes the output of the embeddings require a gradient is suspended, so that a backward pass goes no deeper
        than the lowest module that is trained. Only reentrant checkpointing would need it: to train the model in that
        way later, call its `enable_input_require_grads()` again.

        Raises:
            ValueError: if the model checkpoints activations in the reentrant way.
        """
        # Activation checkpointing only works in training mode, and without it an architecture step needs more memory
        # than a training step has. Otherwise evaluation mode is better: dropout is noise in the gates' gradient.
        self._checkpointing = checkpoints_activations(self.model)
        suspend_input_gradients(self.model)
        self.gates.attach()
        self.gates.set_evaluation(self.method.evaluation_gates())

    # Gates

    def draw_gates(self) -> None:
        """
        Set the gates of the next training step. Call it before each forward pass of a training batch.

        Raises:
            TypeError: if the method leaves the gates open and its class does not say so.
            ValueError: if the gates are not on the model: before [`begin`] and after [`finish`].
        """
        self.gates.check_attached()
        self.gates.set_training(self.training_gates())

    def training_gates(self) -> Tensor | None:
        """The gates under which the weights train next, `(n,)`, or `None` if all are open."""
        if self._fading is not None:
            return self._fading
        gates = self.method.training_gates()
        if gates is None and not self.method.trains_open:
            raise TypeError(
                f"`training_gates` of {type(self.method).__name__} returned None, which leaves all gates open, but "
                "its `trains_open` is False, so the gates of the pruned modules would not fade out before the "
                "pruning. Please set `trains_open = True` in the class, or return gates."
            )
        return gates

    def fade_out(self, progress: float) -> None:
        """
        Set the gates of what will go, modules or components, for training and evaluation. Those of what stays are left
        open.

        Args:
            progress (`float`): 0 leaves all gates open, at 1 the model computes what it will after the pruning.

        Raises:
            ValueError: if the choice is not made yet, or the gates are not on the model: before [`begin`] and after
                [`finish`].
        """
        if self.kept is None:
            raise ValueError("Nothing can fade out before the choice is made: call `discretize` first.")
        self.gates.check_attached()
        if self.rank_plan is not None:
            self.set_ranks(self.ranks, progress)
            return
        if self.component_budget is not None:
            self.gates.set_masks(faded_masks(self.method, self.grid.ranks, self.told_components, progress))
            return
        self._fading = torch.ones(len(self.kept), dtype=torch.float32).masked_fill(~self.kept, 1.0 - progress)
        self.gates.set_evaluation(self._fading)

    # Learning

    def step(self, batch: Any, train_batch: Any = None, learning_rate: float | None = None) -> float | None:
        """
        One architecture step: the gradient of the held-out loss with respect to the gates moves the matrix.

        Args:
            batch: a held-out batch, as `loss_fn` takes it.
            train_batch (*optional*): a training batch; needed for `arch_order=2`.
            learning_rate (`float`, *optional*): present learning rate of the weights; needed for `arch_order=2`.

        Returns:
            `float` or `None`: the held-out loss, or `None` if it or its gradient was not finite. Such a step is
            counted in `skipped_steps` and never reaches the matrix.

        Raises:
            ValueError: if the method scores, `arch_order=2` lacks its training batch or learning rate, or the loss
                does not depend on any gate.
        """
        method = self.method
        if not isinstance(method, GradientMethod):
            raise ValueError(
                f"You called `step` with `method={self.config.method!r}`, which scores the modules and makes no "
                "architecture steps. Please call `score`, or choose another `method`."
            )
        second = method.options.arch_order == 2
        if second and (train_batch is None or learning_rate is None):
            raise ValueError(
                "`arch_order=2` looks one training step ahead, so `step` needs `train_batch` and `learning_rate`. "
                "Please pass both, or set `arch_order=1`."
            )
        values = method.search_gates().detach()
        with self.side_effect_free():
            if second:
                assert learning_rate is not None
                loss, gradient = self._gradient.second_order(batch, train_batch, learning_rate, values)
            else:
                loss, gradient = self._gradient.first_order(batch, values)
        # The one transfer from the device in an architecture step; loss and gradient travel together.
        report = torch.cat([gradient.float().cpu(), loss.detach().float().cpu().reshape(1)])
        report = self.runtime.reduce(report)
        gradient, value = report[:-1], float(report[-1])
        if not torch.isfinite(report).all():
            self.skipped_steps += 1
            return None
        self.reached |= gradient != 0
        self.halves.add(-bounded(gradient))
        method.step(gradient)
        self.gates.set_evaluation(method.evaluation_gates())
        self.pending_losses.append(value)
        self.last_loss = value
        return value

    def score(self, batches: Sequence[Any]) -> Tensor:
        """
        Score all modules once, by a method that scores: what is chosen from then on. Like an architecture step, this
        leaves no trace in weights, gradients, modes and random streams, also when it fails. Over several processes the
        scores are averaged.

        Args:
            batches (`Sequence`): the scoring batches, as `loss_fn` takes them.

        Returns:
            `Tensor` of shape `(n,)`: the scores in the order of the grid.

        Raises:
            ValueError: if the method searches, a score is not finite, or all scores tie.
        """
        return score_sites(self, list(batches), self._score_function)

    # Limits of a step

    def measure_costs(self, batch: Any) -> StepCosts:
        """
        Measure the time and memory of training steps of different depths, as far as they are limited, and restrict
        the search to sets within `max_step_time` and `max_step_memory`. Call it after the warm-up, before the first
        [`step`]. It leaves no trace, as [`step`].

        Args:
            batch: a batch of the size of a training batch, as `loss_fn` takes it.
        """
        measure = {"time": self.meter.times, "memory": self.meter.memory}
        costs = StepCosts(**{what: measure[what](batch) for what in self.config.step_limits})
        self.limit(costs)
        return costs

    # The choice

    def discretize(self, kept: Tensor | None = None) -> Tensor:
        """
        Commit to the choice, ahead of the pruning: what the method learns from here on does not change it any more.
        The gates stay on the model; [`fade_out`] then closes those of the unselected modules.

        Args:
            kept (`Tensor` of dtype `torch.bool`, *optional*): a choice that was made before, when a run is resumed.

        Returns:
            `Tensor` of dtype `torch.bool`: which modules stay, or which components (see `selection_granularity`).

        Raises:
            ValueError: on every process, if they would not all keep the same modules; if `kept` is not what a method
                keeps that gives ranks.
        """
        ranks = self.ranks
        if kept is None:
            kept, ranks = choice_of(self)
            self.check_choice(kept, ranks)
        else:
            self.check_choice(kept)
        self.commit(kept, ranks)
        return kept

    def select(self, step: int | None = None) -> Selection:
        """The selection that a pruning would carry out now. Changes nothing."""
        return make_selection(self, step)

    def finish(self, step: int | None = None) -> Selection:
        """
        Commit to the choice, if [`discretize`] has not, and take the gates off the model. To carry the choice out,
        pass the result to [`apply_selection`]. What makes it doubtful is logged as a warning, and stands in the
        selection's `notes`.

        Args:
            step (`int`, *optional*): present optimizer step, for the record.

        Raises:
            ValueError: on every process, if they would not all keep the same modules; if it was called before.
        """
        if self._finished and not self.gates.attached:
            raise ValueError(
                "You called `finish` a second time, but this search has ended: the gates are off the model, and what "
                "belongs into the weights was put there. Please use the selection that the first call returned."
            )
        selection = self.select(step)
        self.check_choice(torch.tensor(selection.kept), (*selection.ranks, *selection.components))
        if self.kept is None:
            self.commit(*choice_of(self))
        self._finished = True
        self.gates.detach()
        self.method.before_pruning(self.adapters.sites)  # once the gates are off, or they would act twice
        if is_main_process():
            for note in selection.notes:
                logger.warning(note)
        return selection

    def metrics(self) -> dict[str, float]:
        """
        What to log: the DAM's entropy and gates (of each kind too with `log_gates_by_kind`), and the mean architecture
        loss since the last call. For a method that scores: the scores, once there are any.
        """
        return search_metrics(self)


def _check_arguments(config: Any, loss_fn: Any) -> None:
    if not isinstance(config, (DiffoRAConfig, type(None))):
        raise TypeError(f"`config` must be a `DiffoRAConfig`, got {type(config).__name__}.")
    if not callable(loss_fn):
        raise TypeError(
            f"`loss_fn` must be a function of the model and a batch, got {type(loss_fn).__name__}. Please pass "
            "one, such as `lambda model, batch: model(**batch).loss`."
        )
