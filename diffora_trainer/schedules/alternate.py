"""The two factors of a LoRA trained in turn."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from accelerate.utils import parse_flag_from_env
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.training_args import ParallelMode

from ..adapters.gates import gates_active
from ..adapters.lora import peft_model
from ..adapters.optimizer import parameters_of
from ..compat.peft import frozen_adapters, is_kept_frozen, keep_frozen, keep_frozen_no_longer
from .base import FactorSchedule, check_every, lora_of


class AlternateFactors(FactorSchedule):
    """
    Trains `lora_B` and `lora_A` in turn: while one learns the other is frozen (RoLoRA,
    https://huggingface.co/papers/2409.02346). The rounds are counted from step 0, and the first is that of `lora_B`:
    as long as it is 0, `lora_A` has no gradient.

    The frozen factor has no gradient, so an optimizer leaves it alone, weight decay included, and keeps its moments
    and, in AdamW, its count of steps until its next turn. After the training both are trainable again.
    Where it is interrupted (by `KeyboardInterrupt`, or out of memory), one stays frozen, also where PEFT makes the
    adapter trainable: [`finish`] frees it, and so does the next trainer that is given an `AlternateFactors`.

    ```python
    trainer = SFTTrainer(model, peft_config=LoraConfig(), callbacks=[AlternateFactors(every=50)], ...)
    ```

    Args:
        every (`int`, *optional*, defaults to `100`): optimizer steps of each round.
    """

    def __init__(self, every: int = 100) -> None:
        self.every = check_every(every)

    def before_step(self, model: Any, optimizer: Any, step: int) -> None:
        model = lora_of(model)
        parts = _factors(model)
        if not all(parts.values()):
            raise ValueError(
                "The adapter of this model has no factors `lora_A` and `lora_B` that could be trained in turn: it is "
                f"of a `{type(model.peft_config[model.active_adapters[0]]).__name__}`, or what was made of it, as "
                "by LoRA-XS, trains something else in their place. Please use plain LoRA."
            )
        trained = parameters_of(optimizer)
        if left_out := [part for part, factors in parts.items() if not trained.issuperset(factors)]:
            raise ValueError(
                f"The optimizer does not hold all of the {left_out[0]} factors, which are to be trained in turn. "
                "Please make it of all LoRA parameters. Where an earlier run was interrupted, call `finish(model)` "
                "before."
            )
        if gates_active(model):
            return
        turn = "BA"[step // self.every % 2]
        # Trainers that take their reference from the base model switch the adapter off and on within a step.
        for layer, name in _adapters(model):
            keep_frozen(layer, name, _names("B" if turn == "A" else "A"))
        for part, factors in parts.items():
            for parameter in factors:
                parameter.requires_grad_(part == turn)
                if part != turn:
                    parameter.grad = None

    def check(self, args: TrainingArguments) -> None:
        if args.fsdp or parse_flag_from_env("ACCELERATE_USE_FSDP"):
            raise ValueError(
                "`AlternateFactors` freezes one factor at a time, which FSDP does not notice once it has sharded the "
                "model. Please train without FSDP, or without the schedule."
            )
        if args.parallel_mode == ParallelMode.DISTRIBUTED and args.ddp_find_unused_parameters is not True:
            raise ValueError(
                "`AlternateFactors` freezes one factor at a time, and distributed data parallelism would wait for its "
                "gradients. Please set `ddp_find_unused_parameters=True`."
            )

    def finish(self, model: Any) -> None:
        """
        Make both factors trainable again. Call this after an interrupted run, and in a loop of your own at its end.

        Args:
            model (`PeftModel`): the model.
        """
        model = lora_of(model)
        for layer, name in _adapters(model):
            keep_frozen_no_longer(layer, name)
        for factors in _factors(model).values():
            for parameter in factors:
                parameter.requires_grad_(True)

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._free(kwargs["model"])  # the optimizer is made, of what is trainable, before `on_train_begin`

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self._free(kwargs["model"])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.finish(kwargs["model"])

    def _free(self, model: Any) -> None:
        """Undo what an earlier run that was interrupted has left on a model."""
        model = peft_model(model)
        if isinstance(model, PeftModel) and any(is_kept_frozen(layer, name) for layer, name in _adapters(model)):
            self.finish(model)


def _adapters(model: Any) -> Iterator[tuple[LoraLayer, str]]:
    """
    The layers with the names of their adapters that are active, but of those that a choice has left frozen for good
    (`unselected="freeze"`).
    """
    active = set(model.active_adapters)
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            yield from ((layer, name) for name in sorted(active - frozen_adapters(layer)))


def _names(part: str) -> tuple[str, str]:
    """Where a layer holds the first or the second factor of its adapters."""
    return f"lora_{part}", f"lora_embedding_{part}"


def _factors(model: Any) -> dict[str, list[nn.Parameter]]:
    """The parameters of the first and of the second factor of these adapters."""
    found: dict[str, list[nn.Parameter]] = {"A": [], "B": []}
    for layer, adapter_name in _adapters(model):
        for part, factors in found.items():
            for held in (getattr(layer, name) for name in _names(part)):
                if adapter_name in held:
                    factor = held[adapter_name]
                    factors.extend([factor] if isinstance(factor, nn.Parameter) else factor.parameters())
    return {part: list(dict.fromkeys(factors)) for part, factors in found.items()}
