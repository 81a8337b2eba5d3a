"""The selection run of a trainer across calls of `train`: creation, resumption, saving and cleanup."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from peft import PeftModel
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerState

from ..adapters.backward import keep_suspended, restore_input_gradients
from ..adapters.base import extra_kinds
from ..adapters.grid import describe_base
from ..adapters.lora import peft_model
from ..adapters.pruning import is_described, restore_selection
from ..config import DiffoRAConfig
from ..core.agreement import is_main_process
from ..core.selection import Selection
from ..core.state import SELECTED, WARMUP, RunState, check_same
from ..logging import get_logger
from ..methods.build import make_schedule
from ..search.run import SelectionRun
from ..search.search import ArchitectureSearch
from .checkpoint import TENSORS_NAME, load_state, save_state
from .held_out import HeldOutData
from .resume import check_base_model, check_model, grow_to_saved


logger = get_logger(__name__)

_SPLIT_OPTIONS = ("arch_split", "arch_seed")
_BEGUN_ANEW = (
    "The training data has no rows beyond those of {step} steps, which are skipped, so training goes on at the start "
    "of the data. The Trainer cannot tell how far a stream was read in a later epoch: unless the checkpoint is from "
    "the end of one, rows of that epoch come again. Only a data set with a length can be resumed exactly there."
)
_FIRST_ORDER = (
    "The checkpoint is from epoch {epoch}, and TRL's sampler, which gives this trainer its prompts, knows no epochs: "
    "from here on they come in the order of the first one, as with TRL's own trainers. So this is not the "
    "uninterrupted run, and some prompts of this epoch may come twice and others not at all. Within the first epoch "
    "it is exact."
)


@dataclass(frozen=True)
class Hooks:
    """
    Callbacks of a session into its trainer.

    Args:
        make_run (`Callable`): makes the run of a model, its optimizer and its scheduler, of so many steps.
        resume_split (`Callable[[int], None]`): tells the training data of a run that is resumed after the pruning at
            which step its rows went back: until the end of that epoch the order of the rows depends on it.
        held_out ([`~diffora_trainer.trainer.held_out.HeldOutData`]): the held-out part of the training data.
    """

    make_run: Callable[[nn.Module, Any, Any, int], SelectionRun]
    resume_split: Callable[[int], None]
    held_out: HeldOutData


class TrainerSession:
    """
    Runs the selection in the training loops of a trainer: makes a run when a loop begins, drives it, keeps its result
    across calls of `train`, and saves it to and restores it from checkpoints.

    Args:
        config ([`DiffoRAConfig`]): the options.
        hooks ([`Hooks`]): callbacks into the trainer.

    Attributes:
        run ([`~diffora_trainer.search.run.SelectionRun`] or `None`): the run, until its modules are pruned.
        selection ([`Selection`] or `None`): what was chosen.
        resumed_after_prune (`bool`): whether training goes on from a checkpoint from after the pruning.
        in_loop (`bool`): whether a training loop has begun and not ended.
    """

    def __init__(self, config: DiffoRAConfig, hooks: Hooks) -> None:
        self.config = config
        self.run: SelectionRun | None = None
        self.selection: Selection | None = None
        self.resumed_after_prune = self.in_loop = False
        self._hooks = hooks
        self._report: dict[str, float] = {}
        self._resumed: tuple[str, RunState, dict[str, Tensor]] | None = None
        self._given_back: tuple[int, int] | None = None  # of the run that is resumed after its pruning, if known
        # Weak, so that a trial of a hyperparameter search does not keep the model of the one before in memory.
        self._pruned_model: weakref.ref[nn.Module] | None = None
        self._began_pruned = self._switched_on = False
        self._suspensions: list[RemovableHandle] = []
        self._first_step = self._epochs = 0

    @property
    def splitting_search(self) -> ArchitectureSearch | None:
        """The search for which training batches are split into micro-batches now, or `None`."""
        if self.run is None or not self.run.gates_active or self.run.search.training_micro_batches.parts == 1:
            return None
        return self.run.search

    @property
    def phase(self) -> str:
        """The phase of the run."""
        if self.run is not None:
            return self.run.phase
        return WARMUP if self.selection is None else SELECTED

    @property
    def gates_active(self) -> bool:
        """Whether the gates act on the model: from the start of training until the others are pruned."""
        return self.run is not None and self.run.gates_active

    def is_pruned(self, model: nn.Module) -> bool:
        """Whether a model has already lost its unselected modules: it is trained on as an ordinary LoRA model."""
        return self._pruned_model is not None and self._pruned_model() is peft_model(model)

    def selection_of(self, model: nn.Module) -> Selection | None:
        """What was chosen, unless a model was put in the place of the trained one that has other modules, or none."""
        model, selection = peft_model(model), self.selection
        if selection is None or self.is_pruned(model):
            return selection
        return selection if isinstance(model, PeftModel) and is_described(model, selection) else None

    @property
    def should_stop(self) -> bool:
        """Whether training should end: the modules are chosen, and nothing else was asked for (`search_only`)."""
        return self.config.search_only and self.selection is not None

    def metrics(self) -> dict[str, float]:
        """What belongs into the next training log."""
        report, self._report = self._report, {}
        return report if self.run is None else self.run.metrics()

    # A training loop

    def begin(self, model: nn.Module, optimizer: Any, scheduler: Any, state: TrainerState) -> bool:
        """Make the run of a training loop and begin it; tells whether modules were pruned before the first step."""
        self._first_step, self._epochs, self._report = state.global_step, 0, {}
        self.in_loop = True
        if state.global_step and (state.epoch or 0) >= 1 and self._hooks.held_out.repeats_order and is_main_process():
            logger.warning(_FIRST_ORDER.format(epoch=int(state.epoch or 0) + 1))
        self._suspend(model)
        if self.is_pruned(model):  # resumed after the pruning, or trained again
            if self.resumed_after_prune and self.selection is not None:
                self._hooks.resume_split(self._step_of_giving_back(self.selection, state.max_steps))
            # No rows are held out of a training that begins after the pruning, and a checkpoint of it has to say so.
            self._began_pruned, self.resumed_after_prune = not self.resumed_after_prune, False
            return False
        self._began_pruned = False
        self.abandon_run()
        self.selection = None
        self.run = self._hooks.make_run(model, optimizer, scheduler, state.max_steps)
        if self._resumed is not None:
            (folder, saved, tensors), self._resumed = self._resumed, None
            self.run.restore(saved, tensors, (folder, os.path.join(folder, TENSORS_NAME)))
        self.run.begin()
        return self._collect_result()

    def begin_epoch(self, step: int, skips_rows: bool) -> None:
        """
        Before the rows of an epoch are read, at an optimizer step of this number. The first epoch of a run that is
        resumed (`skips_rows`) may be read from its middle on, which is where the Trainer takes the step to be.
        """
        self._epochs += 1
        if self._epochs == 2 and step == self._first_step > 0 and is_main_process():
            logger.warning(_BEGUN_ANEW.format(step=step))
        if step > self._first_step or not skips_rows:
            self._hooks.held_out.begin_epoch(step)

    def before_step(self, batch: Any) -> None:
        """Before a forward pass of a training batch."""
        if self.run is not None:
            self.run.before_step(batch)

    def after_step(self, step: int) -> bool:
        """
        After an optimizer step of this number; tells whether modules were pruned. Nothing happens if it was called
        for this step already.
        """
        if self.run is not None and self.run.step < step:
            self.run.after_step()
        return self._collect_result()

    def end(self, state: TrainerState) -> bool:
        """At the end of a training loop, once; tells whether modules were pruned."""
        if not self.in_loop:
            return False
        self.in_loop = False
        if state.global_step == self._first_step < state.max_steps and not self.should_stop:
            self._refuse_no_step(state)
        if self.run is not None:
            self.run.finish()
        return self._collect_result()

    def held_out_rows(self, model: nn.Module) -> int | None:
        """
        How many rows a data loader of the training rows has to leave out, or to give back: those of the run that is
        resumed, 0 if none, and `None` if that is as in a run that begins now.
        """
        if self.in_loop:  # ms-swift makes another one in a loop that resumes
            alone = self._began_pruned
        else:
            alone = self.is_pruned(model) and not self.resumed_after_prune
        if alone:
            return 0
        return None if self._given_back is None else self._given_back[0]

    def leave_loop(self) -> None:
        """Forget the training loop before, which may have failed."""
        self.in_loop = False
        self.abandon_run()

    def abandon_run(self, *, together: bool = True) -> None:
        """
        Take the gates off, and switch all modules on, if a run that was interrupted has left them so.

        Args:
            together (`bool`, *optional*, defaults to `True`): whether all processes are here, so that what wraps the
                model can be told. Otherwise that is done when the next loop begins.
        """
        if self.run is not None:
            self._switched_on |= self.run.abandon()
            if together and self._switched_on:
                self._switched_on = False
                self.run.search.runtime.after_switch()

    def release_model(self, model: nn.Module) -> None:
        """
        At the end of a run, or when it fails on this process at least, leave the model to whoever has it next: without
        gates, with all modules that were not pruned, and with its embeddings as its user, TRL or PEFT had set them up.
        Another way to train it may need their output to require a gradient.
        """
        self.in_loop = False
        self.abandon_run(together=False)
        self._forget_suspensions()
        restore_input_gradients(model)

    def _collect_result(self) -> bool:
        """Let go of a run whose modules are pruned: nothing of it is kept but what was chosen."""
        run = self.run
        if run is None or run.selection is None:
            return False
        self.selection, self._report, self.run = run.selection, run.metrics(), None
        self._pruned_model = weakref.ref(run.model)
        return True

    def _refuse_no_step(self, state: TrainerState) -> None:
        """An adapter that nothing was trained of should not be saved as if it were."""
        held_out = 0 if self.run is None else len(self.run.held_out.dataset)
        beside = f" beside the {held_out:,} rows that are held out" if held_out else ""
        self.abandon_run()
        raise ValueError(
            f"Training ended at step {state.global_step} of {state.max_steps} without having made a step: the data "
            f"gave no batch{beside}, or a callback stopped it. The adapter is as it was. Please check that the data "
            "set, its filters and `dataloader_drop_last` leave rows to train on, and that a stream can be read again "
            "from its start."
        )

    def _step_of_giving_back(self, selection: Selection, max_steps: int) -> int:
        """The step at whose end the rows of a run that is resumed after its pruning went back to training."""
        if self._given_back is not None:
            return self._given_back[1]
        # Not known of an old checkpoint. Whenever the choice is made, they go back at the latest moment of it.
        return make_schedule(self.config, max_steps).prune if self.config.decide_early else selection.step or 0

    def _suspend(self, model: nn.Module) -> None:
        """From here on a backward pass goes no deeper than the lowest module that is trained."""
        self._forget_suspensions()
        self._suspensions = keep_suspended(model)

    def _forget_suspensions(self) -> None:
        for handle in self._suspensions:
            handle.remove()
        self._suspensions = []

    # A checkpoint

    def save(self, folder: str, step: int, model: nn.Module) -> None:
        """Write the state of the run into a checkpoint of a model."""
        model = peft_model(model)
        if self.run is not None:
            save_state(folder, self.run.state(), self.run.search.method.state_dict())
            return
        kinds = tuple(kind.name for kind in extra_kinds() if kind.installed(model))
        common = (step, self.config.to_dict(), describe_base(model), kinds, self._began_pruned)
        given_back = self._hooks.held_out.given_back
        save_state(folder, RunState(*common, selection=self.selection, given_back=given_back), {})

    def load(self, folder: str, model: nn.Module, optimizer: Any, scheduler: Any) -> None:
        """
        Bring the model to the module set of a checkpoint, before its weights are loaded. The run itself is restored
        when training begins.

        Raises:
            ValueError: if the checkpoint has no state, is from before a pruning that this model has already had, or
                from another model.
        """
        model = peft_model(model)
        state, tensors = load_state(folder)
        check_base_model(folder, state, model)
        selection = state.selection
        if selection is not None:
            if self.is_pruned(model) and (self.selection is None or self.selection.fate != selection.fate):
                raise ValueError(
                    f"The checkpoint {folder!r} keeps other modules than this trainer's model, which has already been "
                    "pruned. Please build a new trainer to resume from it."
                )
            grow_to_saved(folder, state, model, selection.present)
            check_model(folder, state, model, selection.modules, selection.present)
            if state.given_back is None or state.given_back[0]:
                # Which rows were held out: the order of all depends on that until the end of the epoch of the pruning.
                split = {f"`{name}`": (state.config.get(name), getattr(self.config, name)) for name in _SPLIT_OPTIONS}
                check_same(folder, split)
            # ms-swift resumes with the model of the checkpoint, which has what is left alone.
            if not self.is_pruned(model):
                restore_selection(model, selection, optimizer, scheduler)
            self.selection, self._pruned_model = selection, weakref.ref(model)
            self.resumed_after_prune = not state.began_pruned
            return
        if self.is_pruned(model):
            raise ValueError(
                f"The checkpoint {folder!r} was made before the pruning, but the model of this trainer has already "
                "lost the unselected modules. Please build a new trainer to resume from it."
            )
        grow_to_saved(folder, state, model, state.modules)
        check_model(folder, state, model, state.modules, state.modules)
        self._resumed = (folder, state, tensors)

    def prepare_resume(self, folder: str | None) -> None:
        """
        Before a training: drop what a resumption that failed half-way has left, and read what the data loader depends
        on from the checkpoint that is resumed from. With FSDP the loader is made before the checkpoint is loaded.
        """
        self._resumed, self.resumed_after_prune = None, False
        self._given_back = None if folder is None else load_state(folder)[0].given_back
