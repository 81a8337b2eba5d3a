# /// script
# requires-python = ">=3.10"
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
import sys
from pathlib import Path
from typing import Any

from transformers.utils import is_torch_bf16_gpu_available
from trl import DPOConfig, DPOTrainer, ModelConfig

from diffora_trainer import DiffoRAConfig, DiffoRAMixin
from diffora_trainer.cli.parser import ConfigParser
from diffora_trainer.cli.train import prepare_model


sys.path.append(str(Path(__file__).resolve().parents[1]))  # for `splits`

from splits import DataArguments, load_splits  # noqa: E402


class DiffoRADPOTrainer(DiffoRAMixin, DPOTrainer):
    """A [`~trl.DPOTrainer`] that chooses its LoRA modules while it trains."""


def main(
    script_args: DataArguments,
    training_args: DPOConfig,
    model_args: ModelConfig,
    diffora_args: DiffoRAConfig,
) -> dict[str, Any]:
    """Run the recipe. Returns what is printed at the end."""
    # Data
    train_dataset, eval_dataset = load_splits(script_args, seed=training_args.seed)

    # Model: the trainer loads it, with these arguments
    # LoRA on every linear layer to start with, unless told otherwise: the trainer then learns which ones to keep
    peft_config = prepare_model(training_args, model_args)

    # Trainer
    trainer = DiffoRADPOTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        peft_config=peft_config,
        diffora_config=diffora_args,
    )

    # Train, save, and evaluate: what goes wrong in the evaluation must not cost the training
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model(training_args.output_dir)
    metrics = trainer.evaluate()

    # Save once more, for the report holds the evaluation now, and push to Hub
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
    dataclass_types = (DataArguments, DPOConfig, ModelConfig, DiffoRAConfig)
    if subparsers is not None:
        parser = subparsers.add_parser("dpo", help="Run the DiffoRA DPO recipe", dataclass_types=dataclass_types)
    else:
        parser = ConfigParser(dataclass_types, prog=prog)
    # `DPOConfig` turns bf16 on by itself and then refuses a machine without it: there, full precision is the default.
    if not is_torch_bf16_gpu_available():
        parser.set_defaults(bf16=False)
    return parser


if __name__ == "__main__":
    parser = make_parser()
    main(*parser.parse_args_and_config())
