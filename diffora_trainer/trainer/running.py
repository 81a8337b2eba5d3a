"""The run of a trainer's loop, and what its model needs for one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..adapters.base import extra_sites_of, site_kind
from ..adapters.lora import peft_model
from ..adapters.pruning import own_config
from ..compat.trl import averages_adapter
from ..config import DiffoRAConfig
from ..methods.build import make_schedule
from ..methods.context import ScoreFunction
from ..search.run import SelectionRun
from ..search.runtime import Runtime
from ..search.search import ArchitectureSearch
from .compilation import compiles, model_changed
from .loss import architecture_loss, prepare_batch
from .micro_batches import can_split


if TYPE_CHECKING:
    from .types import SearchingTrainer


def complete_model(model: Any, config: DiffoRAConfig) -> Any:
    """The model with what a configuration puts into it: other kinds of site, and the Hub id of its base model."""
    for name, options in extra_sites_of(config).items():
        site_kind(name).install(model, options)
    _name_base_model(model, config)
    return model


def check_search(trainer: SearchingTrainer) -> None:
    """Raise if the modules of a trainer's model cannot be chosen among."""
    config, model = trainer.diffora_config, peft_model(trainer.model)
    loss_fn = lambda model, batch: model(**batch).loss  # noqa: E731
    search = ArchitectureSearch(model, config, loss_fn=loss_fn, score_function=trainer.score_function)
    if search.chooses_ranks and averages_adapter(trainer):
        raise ValueError(
            f"The teacher of {type(trainer).__name__} is a mean of the adapter over the steps, which cannot be taken "
            "of modules whose rank is another one after the choice. Please set `selection_granularity='module'`, so "
            "that whole modules are chosen, or another `teacher_model_kind` than 'ema'."
        )


def make_run(
    trainer: SearchingTrainer,
    model: nn.Module,
    optimizer: Any,
    scheduler: Any,
    total_steps: int,
    after_prune: Callable[[], None],
) -> SelectionRun:
    """
    The run of a trainer's loop.

    Args:
        trainer (`Trainer`): the trainer.
        model (`nn.Module`): its model.
        optimizer (`torch.optim.Optimizer`): the optimizer of the weights.
        scheduler: the learning rate scheduler.
        total_steps (`int`): optimizer steps of the loop.
        after_prune (`Callable`): called when modules have left the model.
    """
    config, model = trainer.diffora_config, peft_model(model)
    _name_base_model(model, config)
    trainer._set_prune_step(make_schedule(config, total_steps).prune)

    def mean(values: Tensor) -> Tensor:
        return trainer.accelerator.reduce(values.to(trainer.accelerator.device), reduction="mean").cpu()

    scaler = getattr(trainer.accelerator, "scaler", None)
    runtime = Runtime(
        splits_batches=can_split(trainer),
        caches_prefix=True,
        compiled=compiles(trainer),
        after_switch=lambda: model_changed(trainer),
        after_prune=after_prune,
    )
    if trainer.args.world_size > 1:
        runtime = replace(runtime, reduce=mean)
    if scaler is not None:
        runtime = replace(runtime, loss_scale=scaler.get_scale)
    return SelectionRun(
        model,
        optimizer,
        config,
        lambda model, batch: architecture_loss(trainer, model, batch),
        trainer._held_out.batches(comparable=not trainer._generates_for_loss),
        total_steps,
        scheduler=scheduler,
        score_function=None if trainer.score_function is None else _on_prepared(trainer, trainer.score_function),
        runtime=runtime,
    )


def _name_base_model(model: Any, config: DiffoRAConfig) -> None:
    """Write the Hub id of the base model that a configuration gives into those of the adapters."""
    model = peft_model(model)
    if config.base_model_id is not None:
        for name in list(getattr(model, "peft_config", ())):
            own_config(model, name).base_model_name_or_path = config.base_model_id


def _on_prepared(trainer: SearchingTrainer, score: ScoreFunction) -> ScoreFunction:
    """The user's score function, given batches as the loss takes them."""
    return lambda model, batches: score(model, [prepare_batch(trainer, batch) for batch in batches])
