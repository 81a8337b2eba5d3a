"""Training steps of a compiled model (`torch_compile=True`): when it is refused, and when it is compiled anew."""

from __future__ import annotations

from typing import TYPE_CHECKING

from accelerate.utils import DynamoBackend

from ..adapters.compiled import drop_graphs
from ..adapters.distributed import rebuild_ddp
from ..compat.torch import uncompiled
from ..logging import get_logger


if TYPE_CHECKING:
    from .types import SearchingTrainer


logger = get_logger(__name__)


def compiles(trainer: SearchingTrainer) -> bool:
    """Whether the training steps of a trainer run a compiled model: by its arguments, or by those of the launcher."""
    plugin = trainer.accelerator.state.dynamo_plugin
    return bool(trainer.args.torch_compile or plugin.backend != DynamoBackend.NO)


def check_compilation(trainer: SearchingTrainer) -> None:
    """
    Raise a `ValueError` if a compiled model could not be searched. accelerate compiles what the training steps run, a
    wrapper around the model; the passes of the search run the model itself.
    """
    if not compiles(trainer):
        return
    config = trainer.diffora_config
    out = "Please train without compilation, or search first and compile a second run (`search_only=True`)."
    if trainer.is_fsdp_enabled:
        raise ValueError(
            "You asked for `torch_compile` together with FSDP, where the compiled model takes the place of the "
            f"trainer's own, so that the search would find no PEFT model. {out}"
        )
    if getattr(trainer.accelerator.state.dynamo_plugin, "use_regional_compilation", False):
        raise ValueError(
            "You asked for accelerate's regional compilation, which trains a copy of the model's tree, from which "
            "modules would not be pruned. Please compile the whole model (`torch_compile=True`, or "
            "`--dynamo_backend` without `--dynamo_use_regional_compilation`)."
        )
    if config.prefix_cache != "none":
        raise ValueError(
            f"You passed `prefix_cache={config.prefix_cache!r}` together with `torch_compile`, whose graphs would run "
            "the frozen layers all the same. Please leave one of them out."
        )
    if config.limits_step:
        logger.warning(
            "`max_step_time` and `max_step_memory` are measured without compilation, as parts of a step that is not "
            "compiled. What they are of a compiled step is not measured."
        )


def recompile(trainer: SearchingTrainer) -> None:
    """Have the model of a trainer compiled anew at its next step, if it is compiled."""
    if compiles(trainer):
        drop_graphs()


def model_changed(trainer: SearchingTrainer) -> None:
    """Have what wraps the model of a trainer notice that modules left it, went off or came on."""
    rebuild_ddp(uncompiled(trainer.model_wrapped), trainer.accelerator.ddp_handler)
    recompile(trainer)
