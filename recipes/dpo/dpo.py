# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "diffora-trainer",
#     "trl",
#     "peft",
#     "datasets",
# ]
# ///

"""
Preference tuning with DPO that learns during training which LoRA modules to keep.

The trainer is `DPOTrainer` with `DiffoRAMixin` in front of it; any other subclass of `transformers.Trainer` is made in
the same way. The model without its adapter is the reference, so no second model is loaded. All arguments of
`trl.DPOConfig`, `trl.ModelConfig` and `diffora_trainer.DiffoRAConfig` are accepted, on the command line or in a YAML
file; the command line wins.

# Qwen2.5-0.5B-Instruct on UltraFeedback, both from the Hub
```bash
python recipes/dpo/dpo.py --config recipes/dpo/ultrafeedback.yaml
```

# Your own model and data (a .jsonl file with columns `chosen` and `rejected`, and `prompt` if it is not part of them)
```bash
python recipes/dpo/dpo.py \
    --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct \
    --dataset_name my_pairs.jsonl \
    --selection_ratio 0.5 \
    --lora_r 16 \
    --learning_rate 1.0e-5 \
    --num_train_epochs 1 \
    --output_dir Qwen2.5-0.5B-DPO-DiffoRA
```
"""

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset
from transformers.utils import is_torch_bf16_gpu_available
from trl import DPOConfig, DPOTrainer, ModelConfig, TrlParser, get_peft_config, get_quantization_config

from diffora_trainer import DiffoRAConfig, DiffoRAMixin


# How the `datasets` library names the reader of a file, by the end of the file's name without `.gz`.
FILE_READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


class DiffoRADPOTrainer(DiffoRAMixin, DPOTrainer):
    """A [`~trl.DPOTrainer`] that chooses its LoRA modules while it trains."""


@dataclass
class RecipeArguments:
    """
    Arguments of the recipe itself.

    Args:
        dataset_name (`str`, *optional*):
            Hub id of the data set, a local folder with a file for each split, or one local .jsonl, .json or .parquet
            file. Text files may be compressed (.jsonl.gz).
        dataset_config (`str`, *optional*):
            Configuration of the data set. Not used for local data.
        dataset_train_split (`str`, *optional*, defaults to `"train"`):
            Split to train on.
        dataset_test_split (`str`, *optional*, defaults to `"test"`):
            Split to evaluate on. If the data set has none of this name, `eval_fraction` of the training split is held
            out instead.
        eval_fraction (`float`, *optional*, defaults to `0.1`):
            Part of the training split that is held out when there is no split to evaluate on.
        max_train_samples (`int`, *optional*):
            Train on this many pairs at most.
        max_eval_samples (`int`, *optional*):
            Evaluate on this many pairs at most.
    """

    dataset_name: str | None = field(
        default=None, metadata={"help": "Hub id, a local folder, or a local .jsonl/.jsonl.gz/.json/.parquet file."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str = field(
        default="test",
        metadata={"help": "Split to evaluate on. If missing, `eval_fraction` of the training split is held out."},
    )
    eval_fraction: float = field(
        default=0.1, metadata={"help": "Part of the training split held out when there is no split to evaluate on."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on this many pairs at most."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on this many pairs at most."})


def load_data(args: RecipeArguments, seed: int) -> tuple[Dataset, Dataset]:
    """The training and the evaluation set."""
    if not args.dataset_name:
        raise ValueError("`dataset_name` is missing: a Hub id, or a local file or folder.")
    path = Path(args.dataset_name)
    reader = FILE_READERS.get(Path(path.stem if path.suffix == ".gz" else path).suffix.lower())
    if (reader or path.is_absolute() or args.dataset_name.startswith(".")) and not path.exists():
        raise FileNotFoundError(
            f"`dataset_name` looks like a local path, but there is no {path}. Please start the script in the folder "
            "that the path is relative to, or pass a Hub id such as `--dataset_name trl-lib/ultrafeedback_binarized`."
        )
    if reader and path.is_file():
        data = load_dataset(reader, data_files={args.dataset_train_split: str(path)})
    else:
        data = load_dataset(args.dataset_name, name=args.dataset_config)
    assert isinstance(data, DatasetDict)
    if args.dataset_train_split not in data:
        raise ValueError(
            f"The data set has no split {args.dataset_train_split!r}; it has {', '.join(map(repr, data))}. Choose one "
            "with `--dataset_train_split`."
        )
    train = data[args.dataset_train_split]
    if args.dataset_test_split in data and args.dataset_test_split != args.dataset_train_split:
        test = data[args.dataset_test_split]
    else:
        parts = train.train_test_split(test_size=args.eval_fraction, seed=seed)
        train, test = parts["train"], parts["test"]
    if args.max_train_samples is not None:
        train = train.shuffle(seed=seed).select(range(min(args.max_train_samples, len(train))))
    if args.max_eval_samples is not None:
        test = test.shuffle(seed=seed).select(range(min(args.max_eval_samples, len(test))))
    return train, test


def main(
    script_args: RecipeArguments,
    training_args: DPOConfig,
    model_args: ModelConfig,
    diffora_args: DiffoRAConfig,
) -> dict[str, Any]:
    """Run the recipe. Returns what is printed at the end."""
    # Data
    train_dataset, eval_dataset = load_data(script_args, seed=training_args.seed)

    # Model: the trainer loads it, with these arguments
    if not model_args.model_name_or_path:
        raise ValueError("`model_name_or_path` is missing: a Hub id or a local folder.")
    model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
    }
    training_args.model_init_kwargs = {**model_init_kwargs, **(training_args.model_init_kwargs or {})}

    # LoRA on every linear layer to start with, unless told otherwise: the trainer then learns which ones to keep.
    model_args.use_peft = True
    if model_args.lora_target_modules is None:
        model_args.lora_target_modules = "all-linear"

    # Trainer
    trainer = DiffoRADPOTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        peft_config=get_peft_config(model_args),
        quantization_config=get_quantization_config(model_args),
        diffora_config=diffora_args,
    )

    # Train and evaluate
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    metrics = trainer.evaluate()

    # Save and push to Hub
    trainer.save_model(training_args.output_dir)
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=None if Path(script_args.dataset_name).exists() else script_args.dataset_name)

    # Summary
    loss, accuracy, margin = (metrics[f"eval_{name}"] for name in ("loss", "rewards/accuracies", "rewards/margins"))
    lines = ["", "Chosen modules", trainer.selection.table(), "", f"DiffoRA {trainer.selection.summary()}."]
    lines += [
        f"Evaluation on {len(eval_dataset):,} pairs: loss {loss:.4f}, reward accuracy {accuracy:.4f}, "
        f"reward margin {margin:.4f}"
    ]
    lines += [f"Adapter: {training_args.output_dir}"]
    trainer.accelerator.print("\n".join(lines))

    if hasattr(trainer, "end"):  # finishes the trackers and the process group; newer transformers only
        trainer.end()
    return {
        "loss": loss,
        "reward_accuracy": accuracy,
        "reward_margin": margin,
        "selected": list(trainer.selection.selected),
    }


def make_parser(subparsers: argparse._SubParsersAction | None = None, prog: str | None = None) -> Any:
    """The parser of the recipe's arguments, alone or as a subcommand."""
    dataclass_types = (RecipeArguments, DPOConfig, ModelConfig, DiffoRAConfig)
    if subparsers is not None:
        parser = subparsers.add_parser("dpo", help="Run the DiffoRA DPO recipe", dataclass_types=dataclass_types)
    else:
        parser = TrlParser(dataclass_types, prog=prog)
    # `DPOConfig` turns bf16 on by itself and then refuses a machine without it: there, full precision is the default.
    if not is_torch_bf16_gpu_available():
        parser.set_defaults(bf16=False)
    return parser


if __name__ == "__main__":
    parser = make_parser()
    main(*parser.parse_args_and_config())
