# /// script
# dependencies = ["diffora-trainer"]
# ///
"""Evidence for the defaults: variants of the search on a classification task, several seeds, equal steps.

Each run trains a LoRA on all linear layers under a variant's gates, cuts at a quarter of the run, and goes on with the
chosen modules; the validation set is read once, at the end. `chance` cuts at random at the same step, `all` never
cuts.

```bash
python recipes/benchmarks/ablation/ablation.py --variants budget,sampled,chance,all --seeds 0,1,2 --out ablation.jsonl
python recipes/benchmarks/ablation/ablation.py --table ablation.jsonl
```

A run that is in the file already is not made again, so a killed ablation goes on where it stopped.
"""

import argparse
import gzip
import json
import math
import statistics
import sys
import time
from collections import defaultdict
from functools import lru_cache
from itertools import islice
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer, get_linear_schedule_with_warmup

from diffora_trainer import ArchitectureSearch, DiffoRAConfig, GradientMethod, apply_selection, register_method
from diffora_trainer.methods.build import make_schedule
from diffora_trainer.methods.frank_wolfe import FrankWolfe


sys.path += [str(Path(__file__).resolve().parents[i]) for i in (1, 2)]  # for `workers` and `embedded`

from embedded import minilm_folder  # noqa: E402
from workers import processes  # noqa: E402


TASKS = {"sst2": ("sentence",), "mrpc": ("sentence1", "sentence2")}


@register_method("chance")
class ChanceMatrix(GradientMethod):
    """The control: random scores; the weights train with all gates open."""

    def __init__(self, budget, learning_rate=None, seed=0) -> None:
        super().__init__(budget, learning_rate, seed)
        self._scores = torch.rand(len(budget), generator=self.generator)

    def values(self) -> Tensor:
        return self._scores.clone()

    def training_gates(self) -> Tensor | None:
        return None

    def evaluation_gates(self) -> Tensor | None:
        return None

    def step(self, gradient: Tensor) -> None:
        self.steps += 1

    def _tensors(self) -> dict[str, Tensor]:
        return {"scores": self._scores}


class Masked:
    """
    The weights train under gates in {0, 1}, drawn at the target ratio, and are evaluated under the present
    choice.
    """

    def training_gates(self) -> Tensor:
        return torch.bernoulli(self.budget.share.float(), generator=self.generator)

    def evaluation_gates(self) -> Tensor:
        return self.discretize().float()


@register_method("chance_masked")
class ChanceMaskedMatrix(Masked, ChanceMatrix):
    """Chance, with masked training: what the masks alone are worth."""


@register_method("budget_masked")
class BudgetMaskedMatrix(Masked, FrankWolfe):
    """The default relaxation with masked training."""


@register_method("budget_zero")
class BudgetZeroMatrix(FrankWolfe):
    """Frank-Wolfe from the empty set instead of the uniform matrix."""

    def __init__(self, budget, learning_rate=None, seed=0) -> None:
        super().__init__(budget, learning_rate, seed)
        self._values.zero_()


@register_method("budget_one")
class BudgetOneMatrix(FrankWolfe):
    """The gradient is taken with all gates at 1: what plain first-order DARTS follows."""

    def search_gates(self) -> Tensor:
        return torch.ones(len(self.budget))


@register_method("budget_drawn")
class BudgetDrawnMatrix(FrankWolfe):
    """The gradient is taken at gates drawn from the matrix instead of at the matrix itself."""

    def search_gates(self) -> Tensor:
        return torch.bernoulli(self._values, generator=self.generator)


@lru_cache
def encode(
    path: Path, columns: tuple[str, ...], model: str, length: int, limit: int, device: str
) -> tuple[Tensor, ...]:
    """A split as tensors: input ids, attention mask, token types and labels."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in islice(file, limit)]
    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = [[row[column] for row in rows] for column in columns]
    batch = tokenizer(*texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    labels = torch.tensor([row["label"] for row in rows])
    keys = ("input_ids", "attention_mask", "token_type_ids")
    return (*(batch[key].to(device) for key in keys), labels.to(device))


def batch_of(data: tuple[Tensor, ...], rows: Tensor) -> dict[str, Tensor]:
    """Some rows as the model's arguments, cut to the longest."""
    ids, mask, types, labels = (tensor[rows] for tensor in data)
    longest = int(mask.sum(1).max())
    return {
        "input_ids": ids[:, :longest],
        "attention_mask": mask[:, :longest],
        "token_type_ids": types[:, :longest],
        "labels": labels,
    }


def parse_variant(variant: str) -> dict:
    """`budget:every=4:fold=0` as options."""
    name, *options = variant.split(":")
    settings = dict(option.split("=") for option in options)
    return {"relaxation": name, **settings}


def run(job: dict) -> dict:
    """One run; returns its record."""
    settings = parse_variant(job["variant"])
    device = job["device"]
    torch.manual_seed(job["seed"])
    length = 64 if job["task"] == "sst2" else 96
    train, validation = (
        encode(
            Path(job["data"], job["task"], f"{split}.jsonl.gz"),
            TASKS[job["task"]],
            job["model"],
            length,
            job["rows"],
            device,
        )
        for split in ("train", "validation")
    )
    model = AutoModelForSequenceClassification.from_pretrained(job["model"], num_labels=2, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="SEQ_CLS")).to(
        device
    )
    steps, every = job["steps"], int(settings.get("every", 2))
    config = DiffoRAConfig(
        selection_ratio=job["ratio"],
        selection_scope=job["scope"],
        discretize_at=float(settings.get("cut", 0.25)),
        arch_warmup=float(settings.get("warmup", 0.05)),
        arch_every=every,
        method="chance" if settings["relaxation"] == "all" else settings["relaxation"],
        arch_learning_rate=float(settings["lr"]) if "lr" in settings else None,
        fold_gates=settings.get("fold", "1") == "1",
        arch_seed=job["seed"],
    )
    search = None
    if settings["relaxation"] != "all":
        search = ArchitectureSearch(model, config, loss_fn=lambda model, batch: model(**batch).loss)
        search.begin()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3, weight_decay=0.0)
    scheduler = get_linear_schedule_with_warmup(optimizer, 0, steps)
    schedule = make_schedule(config, steps)
    warmup, cut = schedule.warmup, schedule.prune
    generator = torch.Generator().manual_seed(job["seed"])
    order = torch.randperm(len(train[-1]), generator=generator)
    # Of its own, so that all variants train on the same batches.
    held_out_order = torch.Generator().manual_seed(job["seed"])
    held_out, order = order[: len(order) // 10], order[len(order) // 10 :]
    record, started = dict(job), time.time()
    for step in range(1, steps + 1):
        rows = order[torch.randint(len(order), (job["batch"],), generator=generator)]
        model.train()
        if search is not None and search.gates.attached:
            search.draw_gates()
        model(**batch_of(train, rows)).loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        if search is not None and warmup < step <= cut:
            if not isinstance(search.method, ChanceMatrix) and (step - warmup - 1) % every == 0:
                rows = held_out[torch.randint(len(held_out), (job["batch"],), generator=held_out_order)]
                search.step(batch_of(train, rows))
            if step == cut:
                checks = [batch_of(train, rows) for rows in held_out[:512].split(64)]
                before = search.held_out_loss(checks, relaxed=True)
                selection = search.finish(step)
                apply_selection(model, selection, optimizer, scheduler)
                record.update(
                    gap=search.held_out_loss(checks) - before,
                    before=before,
                    selected=selection.selected,
                    lora_parameters=selection.trainable_parameters,
                )
    model.eval()
    loss = correct = 0.0
    with torch.no_grad():
        for rows in torch.arange(len(validation[-1])).split(128):
            batch = batch_of(validation, rows)
            output = model(**batch)
            loss += float(output.loss) * len(rows)
            correct += int((output.logits.argmax(-1) == batch["labels"]).sum())
    count = len(validation[-1])
    return {**record, "loss": loss / count, "accuracy": correct / count, "seconds": time.time() - started}


def table(path: str) -> str:
    """Means over seeds, with standard errors, and differences to `chance` on the same seeds."""
    groups: dict[tuple, dict[str, dict[int, dict]]] = defaultdict(lambda: defaultdict(dict))
    for line in Path(path).read_text().splitlines():
        record = json.loads(line)
        groups[record["task"], record["scope"], record["ratio"]][record["variant"]][record["seed"]] = record
    lines = []
    for (task, scope, ratio), variants in sorted(groups.items()):
        lines += [f"\n### {task}, {scope}, ratio {ratio:.3g}\n"]
        lines += ["| variant | seeds | validation loss | vs chance | accuracy | gap at the cut | overlap of seeds |"]
        lines += ["| --- | --- | --- | --- | --- | --- | --- |"]
        chance = variants.get("chance", {})
        for name, runs in sorted(variants.items(), key=lambda item: _mean(item[1].values(), "loss")):
            paired = [run["loss"] - chance[seed]["loss"] for seed, run in runs.items() if seed in chance]
            gaps = [run["gap"] for run in runs.values() if "gap" in run]
            lines.append(
                f"| {name} | {len(runs)} | {_mean(runs.values(), 'loss'):.4f} | "
                f"{statistics.fmean(paired):+.4f} ± {_error(paired):.4f} | {_mean(runs.values(), 'accuracy'):.4f} | "
                f"{statistics.fmean(gaps) if gaps else float('nan'):+.4f} | {_overlap(runs):.2f} |"
                if paired
                else f"| {name} | {len(runs)} | {_mean(runs.values(), 'loss'):.4f} | | | | |"
            )
    return "\n".join(lines)


def _mean(runs, key: str) -> float:
    return statistics.fmean(run[key] for run in runs)


def _error(values: list[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else float("nan")


def _overlap(runs: dict[int, dict]) -> float:
    """Mean share of the chosen modules that two seeds have in common."""
    sets = [set(run["selected"]) for run in runs.values() if "selected" in run]
    pairs = [len(a & b) / len(a) for i, a in enumerate(sets) for b in sets[:i]]
    return statistics.fmean(pairs) if pairs else float("nan")


def _worker(job: dict) -> dict:
    torch.set_num_threads(1)
    return run(job)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", help="only print the table of a results file")
    parser.add_argument("--model", default=None, help="an encoder; by default the packaged MiniLM")
    parser.add_argument("--data", default="../shared/data", help="folder with <task>/{train,validation}.jsonl.gz")
    parser.add_argument("--task", default="sst2", help="comma-separated names")
    parser.add_argument("--variants", default="budget,budget_masked,sampled,sigmoid,softmax,chance,all")
    parser.add_argument("--budgets", default="layer:0.5,model:0.16667", help="comma-separated scope:ratio")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rows", type=int, default=10_000, help="rows of a split to use at most")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--out", default="ablation.jsonl")
    args = parser.parse_args()
    if args.table:
        print(table(args.table))
        return
    if args.model is None:
        args.model = minilm_folder()
    done = set()
    if Path(args.out).is_file():
        for line in Path(args.out).read_text().splitlines():
            done.add(_key(json.loads(line)))
    jobs = []
    for seed in args.seeds.split(","):
        for task in args.task.split(","):
            for budget in args.budgets.split(","):
                for variant in args.variants.split(","):
                    scope, ratio = budget.split(":")
                    job = {"task": task, "variant": variant, "scope": scope, "ratio": float(ratio), "seed": int(seed)}
                    job |= {"steps": args.steps, "batch": args.batch, "model": args.model, "data": args.data}
                    job["rows"] = args.rows
                    job["device"] = "cuda" if torch.cuda.is_available() else "cpu"
                    if _key(job) not in done:
                        jobs.append(job)
    with processes(args.workers) as work, open(args.out, "a") as file:
        for record in work(_worker, jobs):
            record.pop("data"), record.pop("model")
            file.write(json.dumps(record) + "\n")
            file.flush()
    print(table(args.out))


def _key(record: dict) -> tuple:
    return tuple(record[name] for name in ("task", "variant", "scope", "ratio", "seed", "steps", "batch"))


if __name__ == "__main__":
    main()
