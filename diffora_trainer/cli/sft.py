"""Fine-tune a language model with `DiffoRASFTTrainer`."""

from __future__ import annotations

import argparse

from . import train


FORMS = (("input_ids",), ("prompt", "completion"), ("messages",), ("conversations",), (train.TEXT_FIELD,))
"""The columns of data that TRL's SFT trainer reads."""


def run(words: argparse.Namespace) -> None:
    """Train, with all arguments of `SFTConfig`, `ModelConfig` and `DiffoRAConfig`."""
    from trl import SFTConfig  # type: ignore[attr-defined]

    from ..trainer.sft import DiffoRASFTTrainer

    train.run(DiffoRASFTTrainer, train.make_parser(SFTConfig, "diffora sft"), words.options, FORMS)
