"""The trainer for what `transformers.Trainer` trains."""

from __future__ import annotations

from transformers import Trainer

from .mixin import DiffoRAMixin


class DiffoRATrainer(DiffoRAMixin, Trainer):
    """
    A [`~transformers.Trainer`] that chooses its LoRA modules while it trains. It takes all that `Trainer` takes, and
    `peft_config`, `diffora_config`, `arch_dataset` and `score_function`; see [`DiffoRAMixin`].

    ```python
    trainer = DiffoRATrainer(
        model=AutoModelForSequenceClassification.from_pretrained("roberta-base", num_labels=2),
        args=TrainingArguments("out", num_train_epochs=3),
        train_dataset=dataset,
        diffora_config=DiffoRAConfig(selection_ratio=0.5),
    )
    trainer.train()
    print(trainer.selection.table())
    ```
    """
