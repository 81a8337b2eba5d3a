"""The trainer for supervised fine-tuning. A module of its own, so that the other trainers do not need TRL."""

from __future__ import annotations

from trl.trainer.sft_trainer import SFTTrainer

from .mixin import DiffoRAMixin


class DiffoRASFTTrainer(DiffoRAMixin, SFTTrainer):
    """
    A [`~trl.SFTTrainer`] that chooses its LoRA modules while it trains. It takes all that `SFTTrainer` takes, and
    `diffora_config`, `arch_dataset` and `score_function`; see [`DiffoRAMixin`].

    ```python
    trainer = DiffoRASFTTrainer(
        model="HuggingFaceTB/SmolLM2-135M-Instruct",
        args=SFTConfig("out", max_steps=300),
        train_dataset=dataset,
        diffora_config=DiffoRAConfig(selection_ratio=0.5),
    )
    trainer.train()
    ```
    """
