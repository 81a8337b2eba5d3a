"""Train a language model on preferences with TRL's DPO trainer and a search."""

from __future__ import annotations

import argparse

from . import train


FORMS = (("prompt", "chosen", "rejected"), ("chosen", "rejected"))
"""The columns of data that TRL's DPO trainer reads: where there is no prompt, both answers begin with it."""


def run(words: argparse.Namespace) -> None:
    """Train, with all arguments of `DPOConfig`, `ModelConfig` and `DiffoRAConfig`."""
    from trl import DPOConfig, DPOTrainer  # type: ignore[attr-defined]

    from ..trainer.mixin import DiffoRAMixin

    class DiffoRADPOTrainer(DiffoRAMixin, DPOTrainer):
        """A [`~trl.DPOTrainer`] that chooses its LoRA modules while it trains."""

    train.run(DiffoRADPOTrainer, train.make_parser(DPOConfig, "diffora dpo"), words.options, FORMS)
