"""What surrounds a run: several processes, a loss scaler, and who has to be told when the model changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..core.agreement import world_size


def _alone(values: Tensor) -> Tensor:
    return values


def _unscaled() -> float:
    return 1.0


def _nothing() -> None:
    return None


@dataclass(frozen=True)
class Runtime:
    """
    What a training loop adds to a run. The defaults are those of one process in float32 or bfloat16.

    Args:
        reduce (`Callable`, *optional*): averages a float32 CPU tensor over all processes, so that all of them take the
            same decisions. Defaults to the identity.
        loss_scale (`Callable`, *optional*): gives the factor by which the loss is multiplied before its gradient is
            taken, and by which the gradient is divided again: the loss scaler's, in float16. Defaults to 1.
        splits_batches (`bool`, *optional*, defaults to `False`): whether the loop splits its training batches into
            micro-batches where [`ArchitectureSearch`] wants them.
        caches_prefix (`bool`, *optional*, defaults to `False`): whether the loop keeps what the frozen layers compute
            where `prefix_cache` asks for it.
        compiled (`bool`, *optional*, defaults to `False`): whether training steps run what `torch.compile` made of the
            model. A run is given the model itself, whose own steps are not compiled.
        after_switch (`Callable`, *optional*): called when modules went on or off.
        after_prune (`Callable`, *optional*): called when modules have left the model.
    """

    reduce: Callable[[Tensor], Tensor] = _alone
    loss_scale: Callable[[], float] = _unscaled
    splits_batches: bool = False
    caches_prefix: bool = False
    compiled: bool = False
    after_switch: Callable[[], None] = _nothing
    after_prune: Callable[[], None] = _nothing


def check_reduces(runtime: Runtime) -> None:
    """Raise a `ValueError` if several processes would each choose for themselves."""
    if world_size() > 1 and runtime.reduce is _alone:
        raise ValueError(
            f"{world_size()} processes run, but what the modules are chosen by is not averaged over them, so each "
            "would keep other ones. Please pass `runtime=Runtime(reduce=...)` (`diffora_trainer.search.runtime`); "
            "with accelerate that is `lambda x: accelerator.reduce(x.to(accelerator.device), 'mean').cpu()`."
        )
