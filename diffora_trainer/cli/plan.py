"""Say what a run would do before anything is trained: modules, phases, held-out rows, parameters and extra passes."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..config import DiffoRAConfig
from ..core.grid import Grid
from ..core.schedule import Schedule
from ..methods.base import ScoreMethod
from ..methods.build import make_schedule
from .train import checked, initial_lora


if TYPE_CHECKING:
    from ..search.search import ArchitectureSearch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `diffora plan`; what follows them are options of [`DiffoRAConfig`]."""
    parser.add_argument("model", help="folder or Hub id; of the model nothing but its configuration is read")
    parser.add_argument("--steps", type=int, required=True, help="optimizer steps of the run")
    parser.add_argument("--rows", type=int, help="rows of the training set")
    parser.add_argument("--batch_size", type=int, default=8, help="rows of a batch (8)")
    parser.add_argument("--r", "--lora_r", type=int, help="rank of the LoRA; by default TRL's, as in a run")
    parser.add_argument(
        "--target_modules", "--lora_target_modules", nargs="+", help="as in a LoraConfig; by default all linear layers"
    )
    parser.add_argument("--task", choices=["CAUSAL_LM", "SEQ_CLS"], default="CAUSAL_LM", help="what is trained")
    parser.epilog = "All options of DiffoRAConfig can follow, such as --selection_ratio 0.3."


def run(words: argparse.Namespace) -> None:
    """Print the plan."""
    from transformers import HfArgumentParser

    parser = HfArgumentParser(DiffoRAConfig, prog="diffora plan")  # type: ignore[arg-type]
    (config,) = checked(lambda: parser.parse_args_into_dataclasses(words.options))
    print("\n".join(f"{head:9s} {text}" for head, text in describe(words, config)))


def describe(words: argparse.Namespace, config: DiffoRAConfig) -> list[tuple[str, str]]:
    """The plan: heads and lines."""
    import torch
    from peft import get_peft_model
    from transformers import AutoConfig

    from ..search.search import ArchitectureSearch
    from ..serving.loading import model_class, on_meta

    if words.batch_size < 1:
        raise ValueError(f"You passed `--batch_size {words.batch_size}`, but a batch has at least one row.")
    found = AutoConfig.from_pretrained(words.model)
    lora = initial_lora(words.task, words.r, words.target_modules)
    with torch.device("meta"):
        model = get_peft_model(on_meta(model_class(words.task, found), found), lora)
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
        kept = [bool(keep) for keep in method.budget.discretize(torch.zeros(len(grid), dtype=torch.float32)).tolist()]
        left = [rank if keep else 0 for rank, keep in zip(grid.ranks, kept, strict=True)]
        text = f"{sum(kept)} of {len(kept)} modules, about {_parameters(grid, left):,} LoRA parameters"
        lines.append(("Kept", text))
    lines += _phases(schedule, search)
    held_out = None
    if words.rows is not None:
        held_out = math.ceil(config.arch_split * words.rows)
        if held_out >= words.rows:
            raise ValueError(
                f"You passed `--rows {words.rows}`, of which `arch_split={config.arch_split}` holds out {held_out}, "
                "so that no row is left to train on. Please pass more rows, or a smaller `arch_split`."
            )
        lines.append(("Held out", f"{held_out:,} of {words.rows:,} rows until step {schedule.prune}"))
    return lines + _extra(config.arch_batch_size or words.batch_size, held_out, schedule, search)


def _parameters(grid: Grid, ranks: Sequence[int]) -> int:
    return sum(rank * site.cost for rank, site in zip(ranks, grid.sites, strict=True))


def _phases(schedule: Schedule, search: ArchitectureSearch) -> list[tuple[str, str]]:
    """When what happens, as [`~diffora_trainer.search.messages.plan`] says it in the log of a run."""
    end, total, method, config = schedule.prune, schedule.total_steps, search.method, search.config
    latest = " at the latest" if config.decide_early and method.searches else ""
    if method.options.reallocate_every is not None:
        times = f"{len(schedule.updates)} times, every {schedule.updates.step} steps"
        phases = [
            f"all modules train until step {schedule.warmup}",
            f"they are scored {times}, and the chosen ones are on in between, until step {end}",
        ]
    elif method.searches:
        phases = [f"warm-up until step {schedule.warmup}, search until step {schedule.discretize}{latest}"]
        if schedule.fades:
            phases.append(f"the gates of the pruned modules fade out until step {end}{latest}")
    elif end == 0:
        phases = ["all modules are scored before the first step"]
    else:
        gated = ", with a gate for each component" if method.trains_gates else ""
        phases = [f"all modules train until step {end}{gated}"]
    if config.search_only:
        phases.append(f"the run ends there, at the choice, and not at step {total} (search_only)")
    elif search.freezes:
        phases.append(f"the chosen modules train on until step {total}, and the others stay as they are")
    elif search.rank_plan is not None or search.told_budget is not None:
        phases.append(f"the chosen ranks alone until step {total}")
    else:
        phases.append(f"the chosen modules alone until step {total}")
    return list(zip(["Phases", *[""] * len(phases)], phases, strict=False))


def _extra(
    batch_size: int, held_out: int | None, schedule: Schedule, search: ArchitectureSearch
) -> list[tuple[str, str]]:
    """What the choice costs; `held_out` rows, if that is known."""
    count, method = len(schedule.updates), search.method
    rows = batch_size if held_out is None else min(batch_size, held_out)
    if method.trains_gates:
        lines = [("Extra", "a gate for each component in the training steps until then")]
    elif method.searches:
        lines = [("Extra", f"{count} architecture steps of {rows} rows, a forward and a backward pass each")]
    elif not (isinstance(method, ScoreMethod) and method.reads_data):
        lines = [("Extra", f"no scoring passes: {method.name} reads no rows")]
    else:
        batches = method.options.score_batches
        if held_out is not None:  # each row is read once
            batches = min(batches, max(1, held_out // rows))
        least, most = (count * passes for passes in method.num_passes(batches, search.grid, search.adapters.sites))
        passes = f"{least:,}" if least == most else f"{least:,} to {most:,}"
        lines = [("Extra", f"{passes} scoring passes of {rows} rows")]
    if search.config.limits_step:
        lines.append(("", "about ten passes of different depths, once, to measure what a step costs"))
    if method.searches or not search.keeps_function:
        lines.append(("", "the held-out loss of 8 batches, a few times around the choice"))
    return lines
