"""Fine-tune a language model with `DiffoRASFTTrainer`."""

from __future__ import annotations

import argparse

from . import train


def run(words: argparse.Namespace) -> None:
    """Train, with all arguments of `SFTConfig`, `ModelConfig` and `DiffoRAConfig`."""
    from trl import SFTConfig  # type: ignore[attr-defined]

    from ..trainer.sft import DiffoRASFTTrainer

    train.run(DiffoRASFTTrainer, train.make_parser(SFTConfig, "diffora sft"), words.options)
