"""A run: warm-up, search, fade-out, pruning. The state machine that the trainers and a loop of one's own share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from ..adapters.optimizer import check_holds, check_optimizer, innermost
from ..compat.accelerate import beside_the_training_loader
from ..config import DiffoRAConfig
from ..core.schedule import Event
from ..core.selection import Selection
from ..core.state import FADE_OUT, SEARCH, SELECTED, WARMUP, RunState
from ..methods.build import make_schedule
from ..methods.context import ScoreFunction
from . import messages
from .batches import Batches, as_batches, own_copy
from .deprecated import OldRunNames
from .due_events import DueEvents
from .early import decide_early
from .held_out import GAP_BATCHES, batch_to_measure
from .losses import LossFunction
from .messages import say, warn
from .pruning import discretize_run, prune_run
from .reallocation import Reallocation
from .run_state import check_same_run, restore_run, state_of
from .runtime import Runtime, check_reduces
from .search import ArchitectureSearch
from .trained_gates import TrainedGates, check_rate
from .updates import architecture_step, reallocate, score_modules


class SelectionRun(OldRunNames):
    """
    Chooses the modules of a model that deserve a LoRA while a training loop trains it, prunes the others at a set
    step, and lets the loop go on with the chosen ones.

    ```python
    run = SelectionRun(model, optimizer, config, loss_fn, held_out_batches, total_steps=300)
    for batch in batches:
        run.before_step()
        loss_fn(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        run.after_step()
        if run.should_stop:  # with `search_only=True`, once the modules are chosen
            break
    print(run.selection.table())
    ```

    That is bit for bit what the trainers of this package do. With gradient accumulation call [`before_step`] before
    each forward pass of a training batch, and [`after_step`] once, after the optimizer has stepped. What a run does
    besides leaves no trace in weights, gradients and random streams until modules are pruned.

    Args:
        model (`PeftModel`): a model with an active LoRA adapter.
        optimizer (`torch.optim.Optimizer`): the optimizer of its weights; what is pruned leaves it too.
        config ([`DiffoRAConfig`]): the options.
        loss_fn (`Callable`): `loss_fn(model, batch)` gives the scalar loss of a batch.
        held_out_batches (`Iterable`): batches that are not trained on, as `loss_fn` takes them: a list or a
            `DataLoader`, which is read again and again, or an endless iterator.
        total_steps (`int`): optimizer steps of the whole run.
        scheduler (*optional*): the learning rate scheduler, if it holds values for each group of the optimizer.
        adapter_name (`str`, *optional*): which adapter to search; defaults to the active one,
            and no other may be active.
        score_function (`Callable`, *optional*): for `method="custom"`: `score_function(model, batches)` gives a
            dictionary from the name of each LoRA module to its score; higher is kept.
        runtime ([`~diffora_trainer.search.runtime.Runtime`], *optional*): several processes and a loss scaler.

    Attributes:
        selection ([`Selection`] or `None`): what was chosen, once the others are pruned.
        step (`int`): optimizer steps that were made.
        schedule ([`~diffora_trainer.core.schedule.Schedule`]): when things happen.
        search ([`ArchitectureSearch`]): how they happen.

    Raises:
        TypeError: if the model is not a `PeftModel`, or its adapter not LoRA.
        ValueError: if model or optimizer cannot be searched with, no module fits the budget, or the run too short.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        config: DiffoRAConfig | None,
        loss_fn: LossFunction,
        held_out_batches: Iterable[Any] | Batches,
        total_steps: int,
        *,
        scheduler: Any = None,
        adapter_name: str | None = None,
        score_function: ScoreFunction | None = None,
        runtime: Runtime | None = None,
    ) -> None:
        self.model, self.optimizer, self.scheduler = model, optimizer, scheduler
        self.search = search = ArchitectureSearch(
            model, config, loss_fn=loss_fn, adapter_name=adapter_name, score_function=score_function, runtime=runtime
        )
        options = search.method.options
        self.schedule = make_schedule(self.config, total_steps)
        keep = max(GAP_BATCHES, options.score_batches)
        self.held_out = as_batches(held_out_batches, keep, self.config.arch_seed, beside_the_training_loader)
        self.reallocation = None if options.reallocate_every is None else Reallocation(search)
        self.step = 0
        self.selection: Selection | None = None
        check_reduces(search.runtime)
        check_optimizer(optimizer)
        check_holds(optimizer, model, search.adapters.sites)
        self._trained = TrainedGates(search, self.schedule.prune) if search.method.trains_gates else None
        self._report: dict[str, float] = {}
        self._train_batch: Any = None
        self._begun = False
        self._handlers: dict[Event, Callable[[], None]] = {
            Event.END_WARMUP: self._end_warmup,
            Event.UPDATE: self._update,
            Event.DISCRETIZE: self._discretize,
            Event.PRUNE: self._prune,
        }
        self._due = DueEvents()
        check_same_run(self)
        search.gates.announce()

    @property
    def config(self) -> DiffoRAConfig:
        """The options of the run."""
        return self.search.config

    @property
    def phase(self) -> str:
        """`"warm-up"`, `"search"`, `"fade-out"` or `"selected"`."""
        if self.selection is not None:
            return SELECTED
        if self.step < self.schedule.warmup or self.step == self.schedule.warmup == self.schedule.prune:
            return WARMUP
        return SEARCH if self.search.kept is None else FADE_OUT

    @property
    def gates_active(self) -> bool:
        """Whether the gates act on the model: until the others are pruned."""
        return self.search.gates.attached

    @property
    def should_stop(self) -> bool:
        """Whether the loop should end: the modules are chosen, and nothing else was asked for (`search_only`)."""
        return self.config.search_only and self.selection is not None

    # What a loop calls

    def begin(self) -> None:
        """
        Let the gates act, and do what is due before the first step. [`before_step`] calls it if nobody has.

        Raises:
            ValueError: if no held-out row has a label, or the model checkpoints activations in the reentrant way.
        """
        if self._begun:
            return
        check_rate(self.search, self.optimizer, self._trained)
        if self.step == 0:  # what is wrong with the adapter or the data should be said now
            self.search.settle_ranks()
            self.search.check_start(self.held_out.check())
        self._begun = True
        self.search.begin()
        if self._trained is not None:
            self._trained.renew()
            if self.step == 0 and (line := self._trained.doubt(self.optimizer)) is not None:
                warn(line)
        self._fade()
        messages.announce(self)
        if self.schedule.prune == 0:
            self._happen(self.schedule.events(0))

    def before_step(self, batch: Any = None) -> None:
        """
        Set the gates under which the weights train. Call it before each forward pass of a training batch.

        Args:
            batch (*optional*): the training batch, as `loss_fn` takes it; needed for `arch_order=2`.
        """
        self.begin()
        self._due.stepping = True
        if self.gates_active:
            self.search.draw_gates()
            if self._trained is not None:
                self._trained.before_step()
            if self.search.method.options.arch_order == 2:
                self._train_batch = own_copy(batch)

    def after_step(self) -> bool:
        """
        Do what is due after an optimizer step: search, score, decide, fade out, prune. Call it once the optimizer has
        stepped and its gradients are gone. After an error the next call does what is left; it counts no step if there
        was no [`before_step`].

        Returns:
            `bool`: whether modules were pruned: they have left the model and the optimizer.

        Raises:
            ValueError: on every process, if they would not all keep the same modules; if the pruning was interrupted.
        """
        self.begin()
        repeated = self._due.take_repeat()
        self.step += not repeated
        if not self.gates_active and not self._due.events:
            return False
        if self._due.events:
            warn(messages.after_an_error(self.step, self._due.events))
        elif self.step == 1 and not self.model.training:
            warn(messages.IN_EVALUATION_MODE)
        self._happen([] if repeated else self.schedule.events(self.step))
        return self.selection is not None

    def finish(self) -> bool:
        """
        End the run, also ahead of its schedule: if something was learned, the modules are chosen now.

        Returns:
            `bool`: whether modules were pruned by this call.
        """
        if not self.gates_active and not self._due.events:
            return False
        if not self.search.method.steps:
            warn(messages.ended_before_anything(self.step, self.search.method))
            self.search.gates.detach()
            return False
        warn(messages.ended_early(self.step, self.schedule, self.reallocation is not None))
        self._due.events.clear()
        self._happen([Event.PRUNE])
        return True

    def abandon(self) -> bool:
        """Take the gates off and switch all modules on; whether any was off, so that `Runtime.after_switch` is due."""
        self._due.events.clear()
        self.search.gates.detach()
        return self.reallocation is not None and self.reallocation.release()

    def metrics(self) -> dict[str, float]:
        """What belongs into the next log of the training: it is given once."""
        report, self._report = self._report, {}
        return {**self.search.metrics(), **report} if self.gates_active else report

    # What happens

    def _happen(self, events: list[Event]) -> None:
        for event in self._due.each(events):
            self._handlers[event]()
        if self.selection is None:
            self._fade()

    def _fade(self) -> None:
        """Set the gates of the step after this one, if it is one of those in which gates fade out."""
        progress = self.schedule.fade_progress(self.step)
        if self.search.kept is not None and progress is not None:
            self.search.fade_out(progress)

    def _end_warmup(self) -> None:
        if self.config.limits_step:
            costs = self.search.measure_costs(batch_to_measure(self.held_out))
            say(messages.costs(costs, self.search.ceilings, self.search.grid))
        if self._trained is not None:
            self._trained.step(innermost(self.optimizer))  # its updates begin one step later
        if self.search.method.searches:
            say(f"Step {self.step}: warm-up done, the search begins.")

    def _update(self) -> None:
        if self.reallocation is not None:
            self._report.update(reallocate(self, self.reallocation))
        elif self._trained is not None:
            self._trained.step(innermost(self.optimizer))
        elif self.search.method.searches:
            self._architecture_step()
        else:
            score_modules(self)

    def _architecture_step(self) -> None:
        architecture_step(self, self._train_batch)
        if self.config.decide_early and (early := decide_early(self, GAP_BATCHES)) is not None:
            self.schedule, line = early
            say(line)
            if self.schedule.fades:
                self._discretize(measured=True)
            else:
                self._prune()

    def _discretize(self, measured: bool = False) -> None:
        if self.held_out.comparable and not measured:  # first: where nothing was learned, nothing should be favoured
            self.search.measure_effect(self.held_out.sample(GAP_BATCHES))
        if self.search.effect is not None:
            self._report = {"diffora/held_out_loss_before_fade_out": self.search.effect.after}
        discretize_run(self)

    def _prune(self) -> None:
        """Decide if that is still to be done, carry it out, and measure what that does."""
        outcome = prune_run(self, GAP_BATCHES)
        self.selection, self._train_batch = outcome.selection, None
        self._report.update(outcome.metrics)
        for line in outcome.lines:
            say(line)
        for line in messages.prune_warnings(outcome.selection, self.config):
            warn(line)

    # State

    def state(self, began_pruned: bool = False) -> RunState:
        """
        What a checkpoint holds of the run, beside the tensors of the method.

        Args:
            began_pruned (`bool`, *optional*, defaults to `False`): see [`RunState`].
        """
        self._due.check_done(self.step)
        return state_of(self, began_pruned)

    def state_dict(self) -> dict[str, Any]:
        """`dict` of all that a resumed run needs beside model and optimizer, as JSON values and tensors."""
        tensors = {} if self.selection is not None else self.search.method.state_dict()
        return {"run": self.state().to_dict(), "method": tensors}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """
        Go on where [`state_dict`] was taken. Call it on a fresh run before weights and optimizer are loaded: if
        modules were pruned they are pruned now, so that these states fit. An endless iterator of held-out batches has
        to start from its beginning.

        Args:
            state (`dict`): what [`state_dict`] gave.

        Raises:
            ValueError: if it is of another model, other options or another schedule, or damaged.
        """
        self.restore(RunState.from_dict(state["run"]), state["method"])

    def restore(
        self, state: RunState, tensors: dict[str, Tensor], sources: tuple[str, str] = ("given", "given")
    ) -> None:
        """
        [`load_state_dict`] of a state that was read before.

        Args:
            state ([`RunState`]): the state.
            tensors (`dict[str, Tensor]`): the tensors of the method.
            sources (`tuple[str, str]`, *optional*): where both are from, for messages.
        """
        if self._begun:
            raise ValueError("A state can only be restored before the first step. Please make a new run for it.")
        self._begun = restore_run(self, state, tensors, sources)
