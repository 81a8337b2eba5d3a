"""Say what a run would do before anything is trained: modules, phases, held-out rows, parameters and extra passes."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

from ..config import DiffoRAConfig
from ..core.grid import Grid
from ..core.schedule import Schedule
from ..methods.base import SelectionMethod
from ..methods.build import make_schedule


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `diffora plan`; what follows them are options of [`DiffoRAConfig`]."""
    parser.add_argument("model", help="folder or Hub id; of the model nothing but its configuration is read")
    parser.add_argument("--steps", type=int, required=True, help="optimizer steps of the run")
    parser.add_argument("--rows", type=int, help="rows of the training set")
    parser.add_argument("--batch_size", type=int, default=8, help="rows of a batch (8)")
    parser.add_argument("--r", type=int, default=8, help="rank of the LoRA (8)")
    parser.add_argument("--target_modules", nargs="+", help="as in a LoraConfig; by default all linear layers")
    parser.add_argument("--task", choices=["CAUSAL_LM", "SEQ_CLS"], default="CAUSAL_LM", help="what is trained")
    parser.epilog = "All options of DiffoRAConfig can follow, such as --selection_ratio 0.3."


def run(words: argparse.Namespace) -> None:
    """Print the plan."""
    from transformers import HfArgumentParser

    parser = HfArgumentParser(DiffoRAConfig, prog="diffora plan")  # type: ignore[arg-type]
    (config,) = parser.parse_args_into_dataclasses(words.options)
    print("\n".join(f"{head:9s} {text}" for head, text in describe(words, config)))


def describe(words: argparse.Namespace, config: DiffoRAConfig) -> list[tuple[str, str]]:
    """The plan: heads and lines."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig

    from ..search.search import ArchitectureSearch
    from ..serving.export import model_class

    found = AutoConfig.from_pretrained(words.model)
    with torch.device("meta"):
        targets = words.target_modules or "all-linear"
        lora = LoraConfig(r=words.r, target_modules=targets, task_type=words.task)
        model = get_peft_model(model_class(words.task).from_config(found), lora)
    search = ArchitectureSearch(model, config, loss_fn=lambda model, batch: model(**batch).loss)
    grid, method, schedule = search.grid, search.method, make_schedule(config, words.steps)
    lines = [("Modules", f"{grid.describe()}")]
    if search.told_budget is not None:
        limit = sum(search.told_budget.limits)
        text = f"{min(grid.ranks)} to {max(grid.ranks)} at first, then {method.name} gives ranks in all modules"
        lines += [("Ranks", text), ("Kept", f"at most {limit:,} LoRA parameters")]
    elif search.rank_plan is not None:
        ranks = search.ranks
        before, after = _parameters(grid, ranks), _parameters(grid, search.choice()[1])
        sizes = f"{after:,} LoRA parameters to the end" if before == after else f"{before:,} LoRA parameters"
        lines.append(("Ranks", f"{min(ranks)} to {max(ranks)} from the start, {sizes}"))
        if before != after:
            lines.append(("Kept", f"the best components, about {after:,} LoRA parameters"))
    elif config.limits_step:
        lines.append(("Kept", "as many modules as the limits of a step have room for, measured after the warm-up"))
    else:
        kept = [bool(keep) for keep in method.budget.discretize(torch.zeros(len(grid))).tolist()]
        left = [rank if keep else 0 for rank, keep in zip(grid.ranks, kept, strict=True)]
        text = f"{sum(kept)} of {len(kept)} modules, about {_parameters(grid, left):,} LoRA parameters"
        lines.append(("Kept", text))
    lines += _phases(schedule, method.searches, config)
    if words.rows is not None:
        held_out = f"{math.ceil(config.arch_split * words.rows):,} of {words.rows:,} rows"
        lines.append(("Held out", f"{held_out} until step {schedule.prune}"))
    return lines + _extra(config.arch_batch_size or words.batch_size, schedule, method, config)


def _parameters(grid: Grid, ranks: Sequence[int]) -> int:
    return sum(rank * site.cost for rank, site in zip(ranks, grid.sites, strict=True))


def _phases(schedule: Schedule, searches: bool, config: DiffoRAConfig) -> list[tuple[str, str]]:
    end, total = schedule.prune, schedule.total_steps
    if not searches:
        return [("Phases", f"all modules train until step {end} of {total}, then the chosen ones alone")]
    latest = " at the latest" if config.decide_early else ""
    lines = [("Phases", f"warm-up until step {schedule.warmup}, search until step {schedule.discretize}{latest}")]
    if schedule.fades:
        lines.append(("", f"the gates of what goes fade out until step {end}{latest}"))
    return [*lines, ("", f"the chosen modules alone until step {total}")]


def _extra(rows: int, schedule: Schedule, method: SelectionMethod, config: DiffoRAConfig) -> list[tuple[str, str]]:
    count = len(schedule.updates)
    if method.trains_gates:
        lines = [("Extra", "a gate for each component in the training steps until then")]
    elif method.searches:
        lines = [("Extra", f"{count} architecture steps of {rows} rows, a forward and a backward pass each")]
    else:
        lines = [("Extra", f"{count * getattr(method.options, 'score_batches', 1)} scoring passes of {rows} rows")]
    if config.limits_step:
        lines.append(("", "about ten passes of different depths, once, to measure what a step costs"))
    return [*lines, ("", "the held-out loss of 8 batches, a few times around the choice")]
