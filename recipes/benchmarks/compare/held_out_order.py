"""The order in which a search reads its training rows, for methods that hold nothing out."""

from __future__ import annotations

from typing import Any

from transformers import Trainer, TrainerCallback

from diffora_trainer import DiffoRAConfig
from diffora_trainer.methods.build import make_schedule
from diffora_trainer.trainer.held_out import HeldOutData


class HeldOutOrderTrainer(Trainer):
    """
    A stock trainer that puts off the rows that `DiffoRATrainer` holds out with its defaults, so that both train on the
    same batches. Where the order has a pattern (`train_sampling_strategy="group_by_length"` goes from long to short
    rows again and again), taking rows out moves all that follows, which is not a matter of chance.
    """

    arch_dataset = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.diffora_config = DiffoRAConfig(arch_seed=self.args.seed)
        self.held_out = HeldOutData(self)
        self.add_callback(_SetPruneStep(self))

    def get_train_dataloader(self) -> Any:
        return self.held_out.train_dataloader(super().get_train_dataloader)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return self.held_out.train_sampler(super()._get_train_sampler(train_dataset))


class _SetPruneStep(TrainerCallback):
    def __init__(self, trainer: HeldOutOrderTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        schedule = make_schedule(self.trainer.diffora_config, state.max_steps)
        self.trainer.held_out.set_prune_step(schedule.prune, given_back=False)
