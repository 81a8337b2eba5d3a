"""The training and the evaluation set of a recipe: those of the command `diffora`."""

from diffora_trainer.cli.data import FILE_READERS, DataArguments, limit_splits, load_splits


__all__ = ["FILE_READERS", "DataArguments", "limit_splits", "load_splits"]
