"""A chain of LoRAs: train one, keep it, and start another."""

from __future__ import annotations

from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments

from ..adapters.chain import Chain
from ..adapters.gates import gates_active
from .base import FactorSchedule, check_every, lora_of


class ChainedLoRA(FactorSchedule):
    """
    Trains a chain of LoRAs, one after the other: after `every` steps the present one is frozen, as if it had been
    merged into the base weights, and a new one of the same rank starts, with an optimizer state of its own.

    - RAC-LoRA (https://huggingface.co/papers/2410.08305): `ChainedLoRA(every, train_a=False)`. `lora_A` of each is
      drawn at random and frozen, and `lora_B` is trained.
    - XGBLoRA (https://huggingface.co/papers/2410.19694): `LoraConfig(r=1)` with `ChainedLoRA(every)`: each round is
      one boosting step of rank 1.

    The base weights are not changed. Of `k` rounds the adapter is at all times one plain LoRA of rank `k * r`, the sum
    of them at an unchanged scaling, which plain PEFT saves and loads (`r` and `lora_alpha` of its configuration grow).
    `merge_and_unload()` of PEFT merges it. To resume from a checkpoint, build the model and the trainer as for a new
    run.

    ```python
    trainer = SFTTrainer(model, peft_config=LoraConfig(r=1), callbacks=[ChainedLoRA(every=50)], ...)
    ```

    Args:
        every (`int`): optimizer steps of each round. A search of this package comes before the first one, which then
            ends at the next multiple of `every`.
        train_a (`bool`, *optional*, defaults to `True`): whether `lora_A` is trained too.
        max_rank (`int`, *optional*, defaults to `256`): the largest rank that the adapter may grow to. A training in
            which it would grow beyond is refused before its first step.
        seed (`int`, *optional*, defaults to `0`): what `lora_A` of each round is drawn from, with the number of the
            step.
    """

    def __init__(self, every: int, train_a: bool = True, max_rank: int = 256, seed: int = 0) -> None:
        self.every = check_every(every)
        self.train_a, self.max_rank, self.seed = train_a, max_rank, seed
        self._chain: Chain | None = None
        self._last_step: int | None = None

    def attach(self, model: Any) -> Chain:
        """
        Let the adapter of a model be the first round, and return its chain. A loop of your own calls this before it
        loads the weights of a checkpoint, which may hold more rounds; a trainer that is built with the callback does
        so by itself.
        """
        model = lora_of(model)
        if self._chain is None or self._chain.model is not model:
            self._chain, self._last_step = Chain(model, self.train_a), None
        return self._chain

    def before_step(self, model: Any, optimizer: Any, step: int) -> None:
        chain = self.attach(model)
        if gates_active(chain.model) or step == self._last_step:
            return
        self._last_step = step
        if step and step % self.every == 0:
            self._check_rank(chain.rank + chain.rank_of_round)
            chain.add_round(optimizer, (self.seed * 1_000_003 + step) % 2**63)
        else:
            chain.train_last(optimizer)

    def check(self, args: TrainingArguments) -> None:
        if args.world_size > 1:
            raise ValueError(
                f"`ChainedLoRA` makes new parameters after each round, which {args.world_size} processes that train "
                "together would not notice. Please train on one device."
            )
        if args.load_best_model_at_end:
            raise ValueError(
                "`load_best_model_at_end` would load a checkpoint of fewer rounds into the grown adapter of "
                "`ChainedLoRA`, where it does not fit. Please leave it out, and keep `metric_for_best_model`: "
                "`trainer.state.best_model_checkpoint` is then the folder of an adapter that plain PEFT loads."
            )

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if kwargs.get("model") is not None:
            self.attach(kwargs["model"])

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        chain = self.attach(kwargs["model"])
        self._last_step = None
        rounds = 1 + (state.max_steps - 1) // self.every
        self._check_rank(rounds * chain.rank_of_round)

    def _check_rank(self, rank: int) -> None:
        if rank > self.max_rank:
            raise ValueError(
                f"With a round every {self.every} steps the adapter would grow to rank {rank}, above "
                f"`max_rank={self.max_rank}`. Please use longer rounds, a smaller `r`, or a larger `max_rank`."
            )
