"""When things happen in a run: the phases of the search. How they happen is in `search` and `surgery`."""

from __future__ import annotations

import json
import math
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..adapters.backward import keep_suspended, restore_input_gradients
from ..adapters.grid import peft_model
from ..adapters.pruning import apply_selection
from ..config import DiffoRAConfig
from ..core.selection import Selection
from ..experimental.shortcuts.shortcuts import shortcuts
from ..logging import get_logger
from ..search import messages
from ..search.held_out import ArchitectureBatches, without_labels
from ..search.reallocation import Reallocation
from ..search.search import ArchitectureSearch
from ..search.timing import StepTimes
from .checkpoint import SEARCH, SELECTED, STATE_NAME, TENSORS_NAME, WARMUP, load_state, reraise_with_path, save_state
from .resume import check_model, check_same, describe_base


logger = get_logger(__name__)

_GAP_BATCHES = 8
_SPLIT_OPTIONS = ("arch_split", "arch_seed")


class DiffoRACallback(TrainerCallback):
    """
    Drives a search through its three phases: warm-up, search, selected. A method that scores the modules once has no
    search: its warm-up lasts until the cut. One that reallocates does so in the second phase.

    Args:
        config ([`DiffoRAConfig`]): the options.
        make_search (`Callable[[nn.Module], ArchitectureSearch]`): makes the search of the trainer's model.
        make_held_out (`Callable[[int], ArchitectureBatches]`): gives the batches that the search of a run reads which
            is cut at some step.
        resume_split (`Callable[[int], None]`, *optional*): tells the training data of a run resumed after its cut at
            which step that was: until the end of that epoch the order of the rows depends on it.
        after_cut (`Callable[[], None]`, *optional*): what the trainer does when the modules have changed.
        last_train_batch (`Callable[[], Any]`, *optional*): the latest training batch; for `arch_order=2`.
        after_switch (`Callable[[], None]`, *optional*): what the trainer does when modules went on or off.
    """

    def __init__(
        self,
        config: DiffoRAConfig,
        make_search: Callable[[nn.Module], ArchitectureSearch],
        make_held_out: Callable[[int], ArchitectureBatches],
        resume_split: Callable[[int], None] | None = None,
        after_cut: Callable[[], None] | None = None,
        last_train_batch: Callable[[], Any] | None = None,
        after_switch: Callable[[], None] | None = None,
    ) -> None:
        self.config = config
        self.phase = WARMUP
        self.selection: Selection | None = None
        self.search: ArchitectureSearch | None = None
        self.reallocation: Reallocation | None = None
        self._make_search = make_search
        self._make_held_out = make_held_out
        self._resume_split = resume_split
        self._after_cut = after_cut
        self._last_train_batch = last_train_batch
        self._after_switch = after_switch or (lambda: None)
        self._held_out: ArchitectureBatches | None = None
        self._warmup = self._decision = self._cut = 0
        self._moments = range(0)
        self._report: dict[str, float] = {}
        self._resumed: tuple[str, dict[str, Any], dict[str, Any]] | None = None
        # Weak, so that a trial of a hyperparameter search does not keep the model of the one before in memory.
        self._cut_model: weakref.ref[nn.Module] | None = None
        self._began_cut = False
        self._suspensions: list[RemovableHandle] = []
        self._first_step = 0
        self.resumed_after_cut = False

    def is_cut(self, model: nn.Module) -> bool:
        """Whether a model has already lost its unselected modules: it is trained on as an ordinary LoRA model."""
        return self._cut_model is not None and self._cut_model() is peft_model(model)

    @property
    def gates_active(self) -> bool:
        """Whether the gates act on the model: from the start of training until the cut."""
        return self.search is not None and self.search.gates.attached

    @property
    def _scores(self) -> bool:
        """Whether the modules are scored once, right before the cut, and not searched."""
        return self.config.method != "diffora"

    def metrics(self) -> dict[str, float]:
        """What belongs into the next training log."""
        report, self._report = self._report, {}
        if self.gates_active and self.search is not None:
            report = {**self.search.metrics(), **report}
        return report

    def release(self) -> None:
        """Switch all modules on, if a run that was interrupted has left some off."""
        if self.reallocation is not None and self.reallocation.release():
            self._after_switch()
        self.reallocation = None

    def give_back(self, model: nn.Module) -> None:
        """
        Leave a model's embeddings as its user, TRL or PEFT had set them up, at the end of a run or when it fails.
        Whoever trains the model next may do so in another way, which needs their output to require a gradient.
        """
        self._forget_suspensions()
        restore_input_gradients(model)

    def _suspend(self, model: nn.Module) -> None:
        """From here on a backward pass goes no deeper than the lowest module that is trained."""
        self._forget_suspensions()
        self._suspensions = keep_suspended(model)

    def _forget_suspensions(self) -> None:
        for handle in self._suspensions:
            handle.remove()
        self._suspensions = []

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        self._first_step = state.global_step
        if state.global_step and hasattr(kwargs["train_dataloader"], "set_epoch"):
            # On several processes accelerate does not reach the sampler through the batches that a resumed run skips.
            kwargs["train_dataloader"].set_epoch(int(state.epoch or 0))
        self._suspend(kwargs["model"])
        if self.is_cut(kwargs["model"]):  # resumed after the cut, or trained again
            if self.resumed_after_cut and self._resume_split is not None and self.selection is not None:
                self._resume_split(self.selection.step or 0)
            # No rows are held out of a training that begins after the cut, and a checkpoint of it has to say so.
            self._began_cut, self.resumed_after_cut = not self.resumed_after_cut, False
            return
        self._began_cut = False
        self._warmup, self._cut = self.config.schedule(state.max_steps)
        self._decision = self.config.decision(state.max_steps)
        self._moments = self.config.reallocations(state.max_steps)
        if self.gates_active and self.search is not None:  # a run before this one was interrupted
            self.search.gates.detach()
        self.phase, self.selection = WARMUP, None
        self.search = self._make_search(kwargs["model"])
        self.reallocation = Reallocation(self.search) if self._moments else None
        self._held_out = self._make_held_out(self._cut)
        record = [self.config.to_dict(), self.search.grid.names, self.search.grid.parameters, self._warmup, self._cut]
        self.search.check_agreement(json.dumps([*record, len(self._held_out.dataset)]))
        if self._resumed is not None:
            self._restore()
        else:  # what is wrong with the data should be said now
            batch = self._held_out.check()
            # If this batch has no label, none has. A loss of the user's own may not need any.
            if without_labels(batch) and (args.world_size > 1 or math.isnan(self.search.held_out_loss([batch]))):
                raise ValueError(f"No held-out row has a label, so its loss is not a number. {messages.NO_LABELS}")
        self.search.begin()
        self._close(state.global_step)
        if state.is_world_process_zero:
            logger.info(f"Grid: {self.search.grid.describe()}.")
            logger.info(messages.plan(self.config, state.max_steps, self._held_out.describe()))
            if self.search.keeps_all and self.config.selection_ratio < 1:
                logger.warning(
                    f"There is nothing to choose: the budget keeps all {len(self.search.grid)} modules. Please set "
                    "`selection_scope='model'` where each layer has one module, or a smaller budget."
                )
        if not self._cut:  # what is done at the end of a step is due before the first one
            self.on_step_end(args, state, control, **kwargs)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        if not self.gates_active or self.search is None:
            return
        step = state.global_step
        searched = self._warmup < step <= self._decision and not self._scores
        if searched and (step - self._warmup - 1) % self.config.arch_every == 0:
            self._architecture_step(state, kwargs.get("lr_scheduler"))
        if step == self._warmup and self.config.cost == "time":
            self._measure_times(state)
        if step == self._warmup == self._cut:
            self._score(state)
        elif step == self._warmup:
            self.phase = SEARCH
            if state.is_world_process_zero and not self._scores:
                logger.info(f"Step {step}: warm-up done, the search begins.")
        if step in self._moments:
            self._reallocate(state)
        if step == self._decision < self._cut:
            self._decide(state)
        self._close(step)
        if step >= self._cut:
            self._discretize(state, control, **kwargs)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        if state.global_step == self._first_step < state.max_steps:
            self._refuse_no_step(state)
        if not self.gates_active or self.search is None:
            return
        if self.search.matrix.steps:
            logger.warning(
                f"Training ended at step {state.global_step}, before the cut at step {self._cut}. "
                + (
                    "The modules that are on now are kept."
                    if self._moments
                    else "The modules are chosen now, from what the search has found so far, and were not trained "
                    "alone."
                )
            )
            self._discretize(state, control, **kwargs)
        else:
            before = "the modules were scored" if self._scores else "the first architecture step"
            logger.warning(
                f"Training ended at step {state.global_step}, before {before}. No module was chosen; all of them stay."
            )
            self.search.gates.detach()

    def _refuse_no_step(self, state: TrainerState) -> None:
        """An adapter that nothing was trained of should not be saved as if it were."""
        held_out = 0 if self._held_out is None else len(self._held_out.dataset)
        beside = f" beside the {held_out:,} rows that are held out" if held_out else ""
        if self.search is not None:
            self.search.gates.detach()
        raise ValueError(
            f"Training ended at step {state.global_step} of {state.max_steps} without having made a step: the data "
            f"gave no batch{beside}, or a callback stopped it. The adapter is as it was. Please check that the data "
            "set, its filters and `dataloader_drop_last` leave rows to train on, and that a stream can be read again "
            "from its start."
        )

    def _measure_times(self, state: TrainerState) -> None:
        assert self.search is not None and self._held_out is not None
        times = self.search.measure_times(next(self._held_out.sample(1)))
        if state.is_world_process_zero:
            logger.info(messages.times(times, self.search))

    def _score(self, state: TrainerState) -> None:
        assert self.search is not None and self._held_out is not None
        batches = list(self._held_out.sample(self.config.score_batches))
        scores = self.search.score(batches)
        if state.is_world_process_zero:
            logger.info(f"Step {state.global_step}: {messages.scores(self.config.method, scores, len(batches))}")

    def _reallocate(self, state: TrainerState) -> None:
        assert self.reallocation is not None and self._held_out is not None
        batches = list(self._held_out.take(self.config.score_batches))
        changed = self.reallocation.reallocate(batches, state.global_step)
        if changed:
            self._after_switch()
        on, count = int(self.reallocation.on.sum()), len(self.reallocation.on)
        self._report.update({"diffora/modules_on": float(on), "diffora/switched_modules": float(changed)})
        if state.is_world_process_zero:
            logger.info(
                f"Step {state.global_step}: reallocation {len(self.reallocation.history)} of {len(self._moments)} by "
                f"{self.config.method}: {on} of {count} modules are on, {changed} were switched."
            )

    def _decide(self, state: TrainerState) -> None:
        assert self.search is not None and self._held_out is not None
        self.search.decide()
        if self._held_out.comparable:
            loss = self.search.measure_effect(self._held_out.sample(_GAP_BATCHES))
            self._report = {"diffora/held_out_loss_before_closing": loss}
        if state.is_world_process_zero and self.search.decided is not None:
            logger.info(
                f"Step {state.global_step}: {int(self.search.decided.sum())} modules are chosen; the gates of the "
                f"others close until step {self._cut}."
            )

    def _close(self, step: int) -> None:
        """Set the gates of the step after this one, if it is one of those in which gates close."""
        if self.search is not None and self.search.decided is not None and step < self._cut:
            self.search.close((step + 1 - self._decision) / (self._cut - self._decision))

    def _architecture_step(self, state: TrainerState, scheduler: Any) -> None:
        assert self.search is not None and self._held_out is not None
        train_batch, learning_rate = None, None
        if self.config.arch_order == 2:
            train_batch = self._last_train_batch() if self._last_train_batch is not None else None
            learning_rate = float(scheduler.get_last_lr()[0])
        batch = next(self._held_out)
        loss = self.search.step(batch, train_batch, learning_rate)
        if loss is None and state.is_world_process_zero:
            why = "no token of the held-out batch has a label" if without_labels(batch) else "the loss was not finite"
            logger.warning(
                f"Step {state.global_step}: {why}; this architecture step is skipped "
                f"({self.search.skipped_steps} so far)."
            )

    def _discretize(
        self,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        optimizer: Any = None,
        lr_scheduler: Any = None,
        **kwargs: Any,
    ) -> None:
        """Cut: decide, measure, and let the surgery change the model."""
        search, held_out, model = self.search, self._held_out, peft_model(model)
        assert search is not None and held_out is not None
        losses: tuple[float, float] | None = None
        # Where gates were closed, all modules were measured right before that.
        before_closing = None if search.decided is None or search.effect is None else search.effect[1]
        if held_out.comparable:
            before = search.held_out_loss(held_out.sample(_GAP_BATCHES), relaxed=True)
            if search.decided is None and not self._scores:  # a score need not rest on what was learned
                search.measure_effect(held_out.sample(_GAP_BATCHES))
        finish = search.finish if self.reallocation is None else self.reallocation.finish
        if self.reallocation is not None:  # what follows compares with all modules
            self.reallocation.release()
        seconds_before = None if search.times is None else search.step_seconds(next(held_out.sample(1)))
        self._report = {**self._report, **search.metrics()}
        self.selection = selection = finish(state.global_step)
        apply_selection(
            model,
            selection,
            optimizer,
            lr_scheduler,
            adapter_name=search.grid.adapter_name,
        )
        self.phase, self._cut_model = SELECTED, weakref.ref(model)
        if self._after_cut is not None:
            self._after_cut()
        if held_out.comparable:
            after = search.held_out_loss(held_out.sample(_GAP_BATCHES))
            losses = before, after
            self._report.update(
                {
                    "diffora/held_out_loss_before_cut": before,
                    "diffora/held_out_loss_after_cut": after,
                    "diffora/gap": after - before,
                }
            )
        if seconds_before is not None:
            seconds = {"before_cut": seconds_before, "after_cut": search.step_seconds(next(held_out.sample(1)))}
            self.selection = selection = replace(selection, times={**selection.times, **seconds})
        self._report.update(
            {
                "diffora/selected_modules": float(len(selection.selected)),
                "diffora/lora_parameters": float(selection.trainable_parameters),
            }
        )
        if selection.shortcuts:
            self._report["diffora/selected_shortcuts"] = float(len(selection.selected_shortcuts))
        # A checkpoint from before the cut holds other modules, so the best one is looked for from here on.
        state.best_metric = state.best_global_step = state.best_model_checkpoint = None
        control.should_log = True
        if state.is_world_process_zero:
            for line in messages.cut(selection, losses, before_closing):
                logger.info(line)
            for line in messages.unadapted(selection):
                logger.warning(line)
        self.search = self.reallocation = self._held_out = None

    # State of a checkpoint

    def save(self, folder: str, state: TrainerState, model: nn.Module) -> None:
        """Write the state of the search into a checkpoint of a model."""
        model = peft_model(model)
        record: dict[str, Any] = {
            "phase": self.phase,
            "step": state.global_step,
            "config": self.config.to_dict(),
            "base_model": describe_base(model),
            "shortcuts": bool(shortcuts(model)),
            "began_cut": self._began_cut,
            "selection": None if self.selection is None else self.selection.to_json(),
        }
        tensors = {}
        if self.search is not None and self._held_out is not None:
            record.update(
                warmup=self._warmup,
                cut=self._cut,
                modules=self.search.grid.names,
                held_out_position=self._held_out.position,
                held_out_rows=len(self._held_out.dataset),
                skipped_steps=self.search.skipped_steps,
                decision=self._decision,
                decided=None if self.search.decided is None else self.search.decided.tolist(),
                losses=self.search.pending_losses,
                reached=self.search.reached.tolist(),
                effect=None if self.search.effect is None else list(self.search.effect),
                history=[] if self.reallocation is None else self.reallocation.state_list(),
                times=None if self.search.times is None else self.search.times.to_dict(),
            )
            tensors = self.search.matrix.state_dict()
        save_state(folder, record, tensors)

    def load(self, folder: str, model: nn.Module, optimizer: Any, scheduler: Any) -> None:
        """
        Bring the model to the module set of a checkpoint, before its weights are loaded. The search itself is restored
        when training begins.

        Raises:
            ValueError: if the checkpoint has no state, is from before a cut that this model has already had, or from
                another model.
        """
        model = peft_model(model)
        record, tensors = load_state(folder)
        if record["phase"] == SELECTED:
            with reraise_with_path(Path(folder, STATE_NAME)):
                selection = Selection.from_json(record["selection"])
            if self.is_cut(model) and (self.selection is None or self.selection.adapted != selection.adapted):
                raise ValueError(
                    f"The checkpoint {folder!r} keeps other modules than this trainer's model, which has already been "
                    "cut. Please build a new trainer to resume from it."
                )
            check_model(folder, record, model, selection.modules, selection.adapted)
            # The order of the rows depends on them until the end of the epoch of the cut.
            split = {f"`{name}`": (record["config"].get(name), getattr(self.config, name)) for name in _SPLIT_OPTIONS}
            check_same(folder, split)
            if not self.is_cut(model):
                apply_selection(model, selection, optimizer, scheduler)
            self.phase, self.selection, self._cut_model = SELECTED, selection, weakref.ref(model)
            self.resumed_after_cut = not record["began_cut"]
            return
        if self.is_cut(model):
            raise ValueError(
                f"The checkpoint {folder!r} was made before the cut, but the model of this trainer has already lost "
                "the unselected modules. Please build a new trainer to resume from it."
            )
        check_model(folder, record, model, record["modules"], record["modules"])
        self._resumed = (folder, record, tensors)

    def forget_checkpoint(self) -> None:
        """Drop what a resumption that failed half-way has left, so that the next training starts anew."""
        self._resumed, self.resumed_after_cut = None, False

    def _restore(self) -> None:
        assert self._resumed is not None and self.search is not None and self._held_out is not None
        folder, record, tensors = self._resumed
        self._resumed = None
        options, present = dict(record["config"]), self.config.to_dict()
        options["base_model_id"] = present["base_model_id"]
        changed = {
            "the end of the warm-up": (record["warmup"], self._warmup),
            "the step of the cut": (record["cut"], self._cut),
            "the step of the choice": (record["decision"], self._decision),
            "the number of held-out rows": (record["held_out_rows"], len(self._held_out.dataset)),
            "the order of the modules": (tuple(record["modules"]), self.search.grid.names),
            "the options": (options, present),
        }
        if record["times"] is not None:
            changed["the number of layers"] = (len(record["times"]["depth"]), len(self.search.grid.rows))
        check_same(folder, changed)
        self.phase = record["phase"]
        if record["times"] is not None:
            self.search.restrict(StepTimes.from_dict(record["times"]))
        with reraise_with_path(Path(folder, TENSORS_NAME)):
            self.search.matrix.load_state_dict(tensors)
        if self.reallocation is not None:
            with reraise_with_path(Path(folder, STATE_NAME)):
                self.reallocation.load_state_list(record["history"])
            self.search.check_choice(self.reallocation.on)
            if not self.reallocation.on.all():
                self._after_switch()
        if record["decided"] is not None:
            self.search.decide(torch.tensor(record["decided"], dtype=torch.bool))
        self.search.skipped_steps = record["skipped_steps"]
        self.search.pending_losses = [float(loss) for loss in record["losses"]]
        self.search.effect = None if record["effect"] is None else (record["effect"][0], record["effect"][1])
        if record["reached"] is not None:
            self.search.reached = torch.tensor(record["reached"], dtype=torch.bool)
        else:  # not known of a checkpoint from before it was kept
            self.search.reached |= self.search.matrix.steps > 0
        self._held_out.position = record["held_out_position"]
