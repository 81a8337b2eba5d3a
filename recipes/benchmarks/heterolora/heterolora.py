# /// script
# requires-python = ">=3.10"
# dependencies = ["diffora-trainer", "trl", "peft", "datasets", "scikit-learn"]
# ///

"""
The setting of HeteroLoRA (https://huggingface.co/papers/2406.14956): an OPT with LoRA on the query and value
projections, where a fourth of the modules at four times the rank competes with all of them at the usual rank.

All rows have equal trainable LoRA parameters, but for the ceiling `lora:rank=32`. Loss, accuracy and F1 are those at
the end of training, on the validation set, which nothing was decided by.

# OPT-350M on MRPC from the Hub, on a GPU
```bash
python recipes/benchmarks/heterolora/heterolora.py --config recipes/benchmarks/heterolora/hub.yaml
```

# A small OPT, made and pre-trained on the spot, on local files of MRPC and SST-2, on a CPU, without the Hub
```bash
python recipes/benchmarks/heterolora/heterolora.py --config recipes/benchmarks/heterolora/small_mrpc.yaml
python recipes/benchmarks/heterolora/heterolora.py --config recipes/benchmarks/heterolora/small_sst2.yaml
```

# Other rows: any option of `DiffoRAConfig` after colons
```bash
python recipes/benchmarks/heterolora/heterolora.py --config recipes/benchmarks/heterolora/small_sst2.yaml \
    --methods lora snip:reallocate_epochs=0.5 snip:normalize_scores=true --seeds 0 1
```

# The table again, from one or more files of results
```bash
python recipes/benchmarks/heterolora/table.py recipes/benchmarks/heterolora/results/*.jsonl --output_dir tables
```

Each result is written as soon as it is there, and none is made twice: a run that was killed goes on where it stopped,
and one can add methods and seeds later.
"""

from __future__ import annotations

import dataclasses
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any


FOLDER = Path(__file__).resolve().parent
sys.path += [str(FOLDER), str(FOLDER.parent / "compare"), str(FOLDER.parent)]

from heterolora_options import HeteroLoRAConfig, parse_method  # noqa: E402
from result_files import Record, append, end_last_line, fingerprint, read_results, stamp  # noqa: E402
from small_opt import SmallModelConfig, small_opt_folder  # noqa: E402
from tasks import Task, TaskConfig  # noqa: E402


if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import nn
    from transformers import EvalPrediction, Trainer


class ClassificationTask(Task):
    """A task of two or more classes, with accuracy and, for two classes, F1 of the second one."""

    def __init__(self, config: TaskConfig) -> None:
        if config.label_column is None:
            raise ValueError("`label_column` is missing: this recipe classifies.")
        super().__init__(config)
        if self.labels is None:
            raise ValueError(f"The column {config.label_column!r} holds fractions; this recipe needs classes.")

    def steps_of_epoch(self) -> int:
        """Optimizer steps in an epoch, on one device."""
        batches = math.ceil(len(self.train_data) / self.config.training.get("per_device_train_batch_size", 8))
        return math.ceil(batches / self.config.training.get("gradient_accumulation_steps", 1))

    def majority(self) -> float:
        """The accuracy of a constant answer."""
        labels = list(self.eval_data["labels"])
        return max(labels.count(label) for label in set(labels)) / len(labels)

    def measure(self, trainer: Trainer) -> dict[str, float]:
        """Loss, accuracy and F1 on the data that nothing was decided by."""
        found = trainer.evaluate()
        return {name: float(found[f"eval_{name}"]) for name in ("loss", "accuracy", "f1") if f"eval_{name}" in found}

    def _measure(self, prediction: EvalPrediction) -> dict[str, float]:
        from sklearn.metrics import accuracy_score, f1_score

        scores = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
        guess, truth = scores.argmax(-1), prediction.label_ids
        measures = {"accuracy": float(accuracy_score(truth, guess))}
        if scores.shape[-1] == 2:
            measures["f1"] = float(f1_score(truth, guess, zero_division=0))
        return measures


def lora_config(task: Task, config: HeteroLoRAConfig, rank: int) -> LoraConfig:
    """LoRA of one rank on all target modules, at the same scale `alpha / r` for every rank."""
    from peft import LoraConfig

    return LoraConfig(
        r=rank,
        lora_alpha=round(task.config.alpha * rank),
        target_modules=list(config.target_modules),
        lora_dropout=task.config.lora_dropout,
        task_type="SEQ_CLS",
    )


def search_options(
    task: ClassificationTask, config: HeteroLoRAConfig, method: str, options: dict[str, Any], seed: int
) -> dict[str, Any]:
    """What is passed to [`~diffora_trainer.DiffoRAConfig`]: the paper's setting, and over it the options of a row."""
    options = dict(options)
    found = {"method": method, "selection_scope": "model", "selection_ratio": config.keep, "arch_seed": seed}
    if method != "diffora":  # the search has a schedule of its own
        found["discretize_at"] = config.warmup
    if (epochs := options.pop("reallocate_epochs", None)) is not None:
        found["reallocate_every"] = max(1, round(epochs * task.steps_of_epoch()))
        found["arch_warmup"] = config.warmup
        # The last step: the set in force at the end is the result.
        found["discretize_at"] = math.ceil(task.config.training["num_train_epochs"] * task.steps_of_epoch())
    return {**found, **options}


def train_lora(task: ClassificationTask, config: HeteroLoRAConfig, rank: int, seed: int) -> Record:
    """LoRA on all target modules by the stock trainer."""
    from methods import train_peft

    return train_peft(task, lora_config(task, config, rank), seed)


def train_choice(
    task: ClassificationTask, config: HeteroLoRAConfig, method: str, options: dict[str, Any], seed: int
) -> Record:
    """A run that chooses modules of the higher rank."""
    from diffora_trainer import DiffoRAConfig

    trainer = task.make_trainer(
        task.make_model(seed),
        seed,
        search=True,
        peft_config=lora_config(task, config, high_rank(task.config.rank, config.keep)),
        diffora_config=DiffoRAConfig(**search_options(task, config, method, options, seed)),
        arch_dataset=task.train_data if method != "diffora" and config.score_rows == "train" else None,
    )
    trainer.train()
    selection = trainer.selection
    record = {
        "parameters": trainable_adapter(trainer.model),
        **task.measure(trainer),
        "modules": len(selection.modules),
        "chosen": list(selection.selected),
        "scores": {
            name: float(f"{score:.5g}") for name, score in zip(selection.modules, selection.scores, strict=True)
        },
    }
    if selection.history:
        sets = [entry.on for entry in selection.history]
        record["allocations"] = [entry.step for entry in selection.history]
        record["changes"] = [
            sum(a and not b for a, b in zip(new, old, strict=True)) for old, new in zip(sets, sets[1:], strict=False)
        ]
        record["frequency"] = {
            name: round(sum(times) / len(sets), 4)
            for name, times in zip(selection.modules, zip(*sets, strict=True), strict=True)
        }
    return record


def high_rank(rank: int, keep: float) -> int:
    """
    The rank at which a part `keep` of the modules has the parameters of all of them at `rank`.

    Raises:
        ValueError: if it is not a whole number, so that rows would not be equal.
    """
    high = rank / keep
    if abs(high - round(high)) > 1e-6:
        raise ValueError(f"`rank={rank}` and `keep={keep}` ask for a rank of {high:.3f}; it must be a whole number.")
    return round(high)


def trainable_adapter(model: nn.Module) -> int:
    """Trainable parameters; a new head is not counted."""
    return sum(p.numel() for name, p in model.named_parameters() if p.requires_grad and "modules_to_save" not in name)


def missing_jobs(config: HeteroLoRAConfig, path: Path, mark: str) -> Iterator[tuple[str, int]]:
    """Method and seed of the results that are not there, seed by seed, so that a table can be made early."""
    for seed in config.seeds:
        for method in config.methods:
            # Read anew each time: another process may have made it.
            done = {(r["method"], r["seed"]) for r in read_results(path) if r["fingerprint"] == mark}
            if (method, seed) not in done:
                yield method, seed


def run_all(task_config: TaskConfig, config: HeteroLoRAConfig, small: SmallModelConfig) -> Path:
    """
    Make all results that are missing. Returns the file.

    A run that fails is named and left out, and tried again the next time; if there is no result at all, the first
    failure is raised.

    Raises:
        ValueError: if the file holds results on other data, or the settings do not fit.
    """
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "results.jsonl"
    if "num_train_epochs" not in task_config.training or "max_steps" in task_config.training:
        raise ValueError("`training` must name `num_train_epochs`, not `max_steps`: choices are made by epochs.")
    high_rank(task_config.rank, config.keep)
    mark = fingerprint(
        task_config,
        target_modules=config.target_modules,
        keep=config.keep,
        warmup=config.warmup,
        score_rows=config.score_rows,
        small=dataclasses.asdict(small) if task_config.model == "small" else None,
    )
    end_last_line(path)
    model = small_opt_folder(small) if task_config.model == "small" else task_config.model
    task = ClassificationTask(dataclasses.replace(task_config, model=model))
    head = stamp(path, mark, task)
    failures: list[Exception] = []
    for method, seed in missing_jobs(config, path, mark):
        started = time.perf_counter()
        name, options = parse_method(method)
        try:
            if name == "lora":
                result = train_lora(task, config, options.get("rank", task_config.rank), seed)
            else:
                result = train_choice(task, config, name, options, seed)
        except Exception as error:  # such as scores that tie: the other rows must not wait for this one
            failures.append(error)
            print(f"FAILED: {method}, seed {seed}: {error}", flush=True)
            continue
        record = {**head, "task": task.name, "method": method, "seed": seed, **result}
        record |= {"majority": round(task.majority(), 4), "seconds": round(time.perf_counter() - started, 1)}
        append(path, record)
        print(
            f"{task.name} {method}, seed {seed}: loss {record['loss']:.4f}, accuracy {record['accuracy']:.4f}, "
            f"{record['parameters']:,} parameters, {record['seconds']:.0f} s",
            flush=True,
        )
    if failures and not read_results(path):
        raise failures[0]
    return path


def make_parser(prog: str | None = None) -> Any:
    """The parser of the command line and the YAML file."""
    from diffora_trainer.cli.parser import ConfigParser

    return ConfigParser((TaskConfig, HeteroLoRAConfig, SmallModelConfig), prog=prog)


def main(task: TaskConfig, config: HeteroLoRAConfig, small: SmallModelConfig) -> str:
    """Make what is missing, and show the table. Returns it."""
    # Waiting threads of small operations cost more than they save.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    path = run_all(task, config, small)
    from table import write_table

    return write_table([path], Path(config.output_dir))


if __name__ == "__main__":
    print(main(*make_parser().parse_args_and_config()))
