"""What a trainer saves beside its adapter, and how a run and its adapter are loaded again."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft import PeftModel

from ..adapters.grid import peft_model
from ..adapters.pruning import remove_empty_groups
from ..compat import is_sentence_transformer, load_sentence_transformer
from ..core.files import ADAPTER_FOLDER
from ..experimental.shortcuts.model import add_to_adapter, copy_inner_adapter, load_shortcuts
from ..experimental.shortcuts.shortcuts import shortcuts
from ..hub.card import write_card
from ..hub.plots import plot_to
from ..logging import get_logger
from .checkpoint import find_checkpoint


logger = get_logger(__name__)

# What a checkpoint holds to resume from, and its card, of which the output has its own.
_NOT_OF_THE_ADAPTER = ("README", "optimizer", "scheduler", "scaler", "rng_state", "trainer_state", "diffora_state")


def complete_adapter(trainer: Any, folder: Path) -> None:
    """Complete what the parent trainer has just saved: with what its model has beside LoRA, and what was found."""
    add_to_adapter(peft_model(trainer.model), folder)
    save_findings(trainer, folder)


def save_findings(trainer: Any, folder: Path) -> None:
    """Save what the search found beside the adapter: the selection, its picture and the card."""
    model, selection = trainer.model, trainer.selection
    if selection is not None:
        selection.save(folder)
        plot_to(selection, folder)
    if isinstance(model, PeftModel):  # that of sentence-transformers is about the whole model
        write_card(folder, selection, model.peft_config[model.active_adapters[0]], trainer.hub_model_id)


def update_output(trainer: Any, checkpoint: str) -> None:
    """Copy the adapter of a checkpoint to the output folder, as the parent does it before it pushes, with a card."""
    output = Path(trainer.args.output_dir)
    for path in Path(checkpoint).iterdir():
        if path.is_file() and not path.name.startswith(_NOT_OF_THE_ADAPTER):
            shutil.copy(path, output)
    copy_inner_adapter(checkpoint, output)
    save_findings(trainer, output)


def checkpoint_to_resume(trainer: Any, wanted: str | os.PathLike | bool | None) -> str | None:
    """The checkpoint that a run of a trainer is resumed from, or `None`. Logs which newer ones are passed over."""
    if wanted is None or wanted is False:
        return None
    found, passed = find_checkpoint(wanted, trainer.args.output_dir)
    if passed and trainer.is_world_process_zero():
        reasons = "".join(f"\n{name}: {reason}" for name, reason in passed.items())
        logger.warning(f"Resuming from {found}, because newer ones are not whole.{reasons}")
    return found


def log_restart(trainer: Any, checkpoint: str | None) -> None:
    """Say that a run starts anew because memory ran out, from a checkpoint or from its first step."""
    alone = trainer._callback.is_cut(trainer.model) and checkpoint is None
    logger.warning(
        f"Memory ran out; training starts again from {checkpoint or 'its first step'} with smaller batches."
        + (" The modules that were chosen stay, and are trained alone from there." if alone else "")
    )


def load_adapter(trainer: Any, checkpoint: str, parent: Callable[[str], None]) -> None:
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
    folder = "" if not shortcuts(model) else ADAPTER_FOLDER
    parent(str(Path(checkpoint, folder)))
    if shortcuts(model):
        load_shortcuts(model, checkpoint)
    # The parent loads the adapter with PEFT's default, which makes LoRA weights in half precision float32: the
    # resumed run would round otherwise than the run that made the checkpoint.
    for name, parameter in model.named_parameters():
        if parameter.dtype != dtypes[name]:
            parameter.data = parameter.data.to(dtypes[name])


def load_optimizer(trainer: Any, checkpoint: str | None, parent: Callable[[str | None], None]) -> None:
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
        # A group that the cut emptied has left the run, but an optimizer that is built anew may have it, empty.
        pruned = trainer._callback.is_cut(trainer.model)
        if not pruned or not remove_empty_groups(trainer.optimizer, trainer.lr_scheduler):
            raise
        parent(checkpoint)


def load_best_adapter(trainer: Any, parent: Callable[[], None]) -> None:
    """
    Load the weights of a trainer's best checkpoint.

    Args:
        trainer (`Trainer`): the trainer.
        parent (`Callable[[], None]`): loads the adapter that `state` calls the best, as the parent trainer does it.
    """
    best = trainer.state.best_model_checkpoint
    if best is None or not shortcuts(trainer.model):
        parent()
        return
    trainer.state.best_model_checkpoint = str(Path(best, ADAPTER_FOLDER))
    try:
        parent()
    finally:
        trainer.state.best_model_checkpoint = best
    load_shortcuts(trainer.model, best)
