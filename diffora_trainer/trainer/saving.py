"""What a trainer saves beside its adapter, and how a run and its adapter are loaded again."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import PeftModel
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..adapters.base import extra_kinds, kinds_of
from ..adapters.lora import peft_model
from ..adapters.optimizer import remove_empty_groups
from ..compat.sentence_transformers import is_sentence_transformer, load_sentence_transformer
from ..compat.transformers import load_default_adapter
from ..core.base_model import head_files
from ..core.files import ADAPTER_CONFIG_NAME, adapters_inside, write_file
from ..core.selection import SELECTION_NAME, Selection
from ..hub.card import write_card
from ..hub.plots import PICTURE_NAME, plot_to
from ..hub.report import REPORT_NAME, is_log_of_choice, write_report
from ..logging import get_logger
from .checkpoint import find_checkpoint


if TYPE_CHECKING:
    from .types import SearchingTrainer


logger = get_logger(__name__)

# What a checkpoint holds to resume from, and its card, of which the output has its own.
_NOT_OF_THE_ADAPTER = ("README", "optimizer", "scheduler", "scaler", "rng_state", "trainer_state", "diffora_state")


class OutputCard:
    """
    When the card of the output folder is written. TRL writes it at each checkpoint, and an adapter that is there then
    is one of an earlier run or step: it keeps the card and the selection that tell of it until it is replaced.

    Args:
        trainer (`Trainer`): the trainer.
    """

    def __init__(self, trainer: SearchingTrainer) -> None:
        self._trainer = trainer
        self._at_checkpoint = False
        self._waiting: Callable[[], None] | None = None

    @contextmanager
    def at_checkpoint(self) -> Iterator[None]:
        """While the trainer writes a checkpoint."""
        self._at_checkpoint = True
        try:
            yield
        finally:
            self._at_checkpoint = False

    def write(self, parent: Callable[[], None]) -> None:
        """
        Write the card, and what the search found; or wait, while a checkpoint is written beside an earlier adapter.

        Args:
            parent (`Callable[[], None]`): writes the card of the parent trainer.
        """
        output = Path(self._trainer.args.output_dir)
        inside = (name for name in adapters_inside(output) if not name.startswith(("_", PREFIX_CHECKPOINT_DIR)))
        if self._at_checkpoint and ((output / ADAPTER_CONFIG_NAME).is_file() or any(inside)):
            self._waiting = parent
            return
        self._waiting = None
        parent()
        if self._trainer.is_world_process_zero():
            save_findings(self._trainer, output, new_adapter=False)

    def write_waiting(self, folder: Path) -> None:
        """Write the parent's card if it waits for the adapter in this folder to be replaced, as it is now."""
        if self._waiting is not None and folder.resolve() == Path(self._trainer.args.output_dir).resolve():
            parent, self._waiting = self._waiting, None
            parent()


def complete_adapter(trainer: SearchingTrainer, folder: Path) -> None:
    """
    Complete what the parent trainer has just saved: with what its model has beside LoRA, and what was found. A model
    without an adapter, into which its user has merged it, is whole as the parent saves it: as `diffora export --for
    merged` leaves one, with nothing that tells of LoRA modules.
    """
    if not isinstance(peft_model(trainer.model), PeftModel):
        return
    for kind in extra_kinds():
        kind.save(peft_model(trainer.model), folder)
    save_findings(trainer, folder)


def save_findings(trainer: SearchingTrainer, folder: Path, *, new_adapter: bool = True) -> None:
    """
    Save what the search found beside the adapter: the selection, its picture, the report and the card; and the names
    of the classes of a classifier. What an earlier run has left of these in the folder is removed. For an adapter that
    the selection does not describe, since the user has put another model in place of the trained one, only the card is
    written.

    Args:
        trainer (`Trainer`): the trainer.
        folder (`Path`): where its adapter is, or will be.
        new_adapter (`bool`, *optional*, defaults to `True`): whether the adapter in the folder is the trainer's: one
            of an earlier run, which the trainer has not replaced yet, keeps what tells of it.
    """
    model, selection = trainer.model, trainer._session.selection_of(trainer.model)
    if new_adapter and selection is None and trainer.selection is not None:
        logger.warning(
            "The adapter of this trainer's model is not the one of its run, so `diffora_selection.json`, the picture "
            "and the report are not saved beside it. `trainer.selection.save(folder)` writes the first elsewhere."
        )
    if new_adapter or selection is not None:
        _remove_other_selection(selection, folder)
    if selection is not None:
        selection.save(folder)
        plot_to(selection, folder)
        # A training that goes on with the chosen modules has a log of its own, which says nothing of the choice.
        if is_log_of_choice(trainer.state.log_history) or not (folder / REPORT_NAME).is_file():
            title = trainer.hub_model_id or Path(trainer.args.output_dir).resolve().name
            write_report(folder / REPORT_NAME, selection, trainer.state.log_history, trainer.state.max_steps, title)
    predicted = head_files(None)
    if isinstance(model, PeftModel):  # that of sentence-transformers is about the whole model
        # A log that is not of the choice is one of a training that went on.
        ended = selection is not None and trainer.state.global_step <= (selection.step or 0)
        went_on = not ended or not is_log_of_choice(trainer.state.log_history)
        peft_config, base = model.peft_config[model.active_adapters[0]], model.get_base_model()
        write_card(folder, selection, peft_config, trainer.hub_model_id, base, went_on)
        predicted = head_files(base)
    for name, content in predicted.items():
        if content is not None:
            write_file(folder / name, content)
        elif new_adapter:
            _remove(folder / name)


def _remove_other_selection(selection: Selection | None, folder: Path) -> None:
    """Remove a selection that is not this one from a folder, with its picture and its report."""
    path = folder / SELECTION_NAME
    try:
        other = path.read_bytes()
    except OSError:  # most often there is none
        return
    if selection is None or other != selection.to_json().encode():
        for name in (PICTURE_NAME, REPORT_NAME, SELECTION_NAME):  # by the last one the others are known to be ours
            _remove(folder / name)


def _remove(path: Path) -> None:
    """Remove a file of an earlier run, if it is there."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:  # no reason not to save the adapter
        logger.warning(f"{path} is of another adapter, which was here before, and could not be removed: {error}")


def update_output(trainer: SearchingTrainer, checkpoint: str) -> None:
    """Copy the adapter of a checkpoint to the output folder, as the parent does it before it pushes, with a card."""
    output = Path(trainer.args.output_dir)
    trainer._output_card.write_waiting(output)
    for path in Path(checkpoint).iterdir():
        if path.is_file() and not path.name.startswith(_NOT_OF_THE_ADAPTER):
            shutil.copy(path, output)
    for kind in extra_kinds():
        kind.copy(checkpoint, output)
    save_findings(trainer, output)


def checkpoint_to_resume(trainer: SearchingTrainer, wanted: str | os.PathLike | bool | None) -> str | None:
    """The checkpoint that a run of a trainer is resumed from, or `None`. Logs which newer ones are passed over."""
    if wanted is None or wanted is False:
        return None
    found, passed = find_checkpoint(wanted, trainer.args.output_dir)
    if passed and trainer.is_world_process_zero():
        reasons = "".join(f"\n{name}: {reason}" for name, reason in passed.items())
        logger.warning(f"Resuming from {found}, because newer ones are not whole.{reasons}")
    return found


def log_restart(trainer: SearchingTrainer, checkpoint: str | None) -> None:
    """Say that a run starts anew because memory ran out, from a checkpoint or from its first step."""
    alone = trainer._session.is_pruned(trainer.model) and checkpoint is None
    logger.warning(
        f"Memory ran out; training starts again from {checkpoint or 'its first step'} with smaller batches."
        + (" The modules that were chosen stay, and are trained alone from there." if alone else "")
    )


def load_adapter(trainer: SearchingTrainer, checkpoint: str, parent: Callable[[str], None]) -> None:
    """
    Load the weights of a checkpoint into a trainer's model, which has its modules already.

    Args:
        trainer (`Trainer`): the trainer.
        checkpoint (`str`): the checkpoint.
        parent (`Callable[[str], None]`): loads an adapter from a folder, as the parent trainer does it.
    """
    model = trainer.model
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    if is_sentence_transformer(model):
        load_sentence_transformer(model, peft_model(model), checkpoint)
        return
    folder = Path(checkpoint, _adapter_folder(model))
    parent(str(folder))
    if not trainer.is_fsdp_enabled:  # there the parent loads the whole model, from one file
        load_default_adapter(model, folder)
    for kind in kinds_of(model):
        kind.load(model, checkpoint)
    # The parent loads the adapter with PEFT's default, which makes LoRA weights in half precision float32: the
    # resumed run would round otherwise than the run that made the checkpoint.
    for name, parameter in model.named_parameters():
        if parameter.dtype != dtypes.get(name, parameter.dtype):  # of another adapter, which the parent has just added
            parameter.data = parameter.data.to(dtypes[name])


def load_optimizer(trainer: SearchingTrainer, checkpoint: str | None, parent: Callable[[str | None], None]) -> None:
    """
    Load the states of a trainer's optimizer and scheduler.

    Args:
        trainer (`Trainer`): the trainer.
        checkpoint (`str`, *optional*): the checkpoint.
        parent (`Callable[[str | None], None]`): loads them as the parent trainer does it.
    """
    try:
        parent(checkpoint)
    except ValueError:
        # A group that the pruning emptied has left the run, but an optimizer that is built anew may have it, empty.
        pruned = trainer._session.is_pruned(trainer.model)
        if not pruned or not remove_empty_groups(trainer.optimizer, trainer.lr_scheduler):
            raise
        parent(checkpoint)


def load_best_adapter(trainer: SearchingTrainer, parent: Callable[[], None]) -> None:
    """
    Load the weights of a trainer's best checkpoint.

    Args:
        trainer (`Trainer`): the trainer.
        parent (`Callable[[], None]`): loads the adapter that `state` calls the best, as the parent trainer does it.
    """
    best = trainer.state.best_model_checkpoint
    if best is None or not kinds_of(trainer.model):
        parent()
        return
    trainer.state.best_model_checkpoint = str(Path(best, _adapter_folder(trainer.model)))
    try:
        parent()
    finally:
        trainer.state.best_model_checkpoint = best
    for kind in kinds_of(trainer.model):
        kind.load(trainer.model, best)


def _adapter_folder(model: Any) -> str:
    """Where in a folder of a run PEFT's adapter of a model is saved."""
    return next((kind.adapter_folder for kind in kinds_of(model) if kind.adapter_folder), "")
