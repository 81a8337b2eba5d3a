"""AdaLoRA as PEFT has it, for the recipes that compare with it."""

from __future__ import annotations

from typing import Any

from peft import AdaLoraConfig
from transformers import TrainerCallback


def adalora_config(steps: int, start: int, **options: Any) -> AdaLoraConfig:
    """
    AdaLoRA that prunes at every step from a tenth to two thirds of a run.

    Args:
        steps (`int`): optimizer steps of the run.
        start (`int`): rank of each module at the start.
        **options: for `AdaLoraConfig`.
    """
    return AdaLoraConfig(init_r=start, tinit=steps // 10, tfinal=steps // 3, deltaT=1, total_step=steps, **options)


class AdaLoraUpdate(TrainerCallback):
    """Calls AdaLoRA's update, which no stock trainer does, and counts the calls in `count`."""

    def __init__(self) -> None:
        self.count = 0

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """After the optimizer's step and before the gradients are cleared, as PEFT asks."""
        model.base_model.update_and_allocate(state.global_step + 1)
        self.count += 1
