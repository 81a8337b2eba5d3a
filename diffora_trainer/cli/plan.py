"""Say what a run would do before anything is trained: modules, phases, held-out rows, parameters and extra passes."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..compat.transformers import readable_help
from ..config import DiffoRAConfig
from ..core.grid import Grid
from ..core.schedule import Schedule
from ..methods.build import make_schedule
from .train import checked, checked_model_name, model_options, parser_of


if TYPE_CHECKING:
    from ..search.search import ArchitectureSearch


@dataclass
class PlanArguments:
    """
    What a plan has to know of a training, by the names that the commands which train have for it.

    Args:
        max_steps (`int`, *optional*):
            Optimizer steps of the run.
        rows (`int`, *optional*):
            Rows of the training set.
        per_device_train_batch_size (`int`, *optional*, defaults to `8`):
            Rows of a batch.
    """

    max_steps: int | None = field(default=None, metadata={"aliases": ["--steps"], "help": "Optimizer steps."})
    rows: int | None = field(default=None, metadata={"help": "Rows of the training set."})
    per_device_train_batch_size: int = field(
        default=8, metadata={"aliases": ["--batch_size"], "help": "Rows of a batch."}
    )


def make_parser() -> Any:
    """The parser of `diffora plan`: of a file that is made for a run it takes what the plan reads."""
    parser = parser_of(PlanArguments, prog="diffora plan")
    parser.refuses_others = False
    parser.usage = "diffora plan MODEL --max_steps N [options], or diffora plan --config x.yaml [options]"
    shorter: dict[str, Any] = {"default": argparse.SUPPRESS, "help": "The same, shorter."}
    parser.add_argument("--r", dest="lora_r", type=int, **shorter)
    parser.add_argument("--target_modules", dest="lora_target_modules", nargs="+", **shorter)
    parser.add_argument("--task", dest="lora_task_type", choices=["CAUSAL_LM", "SEQ_CLS"], **shorter)
    readable_help(parser)
    return parser


def read_arguments(words: Sequence[str]) -> tuple[PlanArguments, Any, DiffoRAConfig]:
    """
    What is planned, out of the words of a command line and the YAML file that they name.

    Args:
        words (`Sequence[str]`): of the command line. One that belongs to no argument is the model.

    Raises:
        ValueError: if a value is wrong or of the wrong type, or the file holds no arguments.
    """
    parser = make_parser()
    others: list[str] = []

    def parse() -> list[Any]:
        *found, left = parser.parse_args_and_config(list(words), return_remaining_strings=True)
        others.extend(left)
        return found

    args, model_args, config = checked(parse)
    if others and (len(others) > 1 or others[0].startswith("-")):
        raise ValueError(f"There is no such argument: {' '.join(others)}. `diffora plan --help` lists all of them.")
    if others:
        model_args.model_name_or_path = others[0]
    return args, model_args, config


def run(words: argparse.Namespace) -> None:
    """Print the plan."""
    print("\n".join(f"{head:9s} {text}" for head, text in describe(*read_arguments(words.options))))


def describe(args: PlanArguments, model_args: Any, config: DiffoRAConfig) -> list[tuple[str, str]]:
    """The plan: heads and lines. Of the model nothing but its configuration is read."""
    import torch
    from peft import get_peft_model
    from transformers import AutoConfig

    from ..search.base import choice_of
    from ..search.search import ArchitectureSearch
    from ..serving.loading import model_class, on_meta

    batch_size, rows = args.per_device_train_batch_size, args.rows
    if batch_size < 1:
        raise ValueError(f"`per_device_train_batch_size` is {batch_size}, but a batch has at least one row.")
    if args.max_steps is None or args.max_steps < 1:
        raise ValueError(
            "A plan is made for a number of optimizer steps, and not of epochs. Please pass it, such as "
            "`--max_steps 300`."
        )
    name = checked_model_name(model_args.model_name_or_path)
    model_args.load_in_4bit = model_args.load_in_8bit = False  # the plan is the same, and needs no bitsandbytes
    options, lora = model_options(model_args)
    found = AutoConfig.from_pretrained(name, revision=options["revision"])
    with torch.device("meta"):
        model = get_peft_model(on_meta(model_class(lora.task_type, found), found), lora)
    search = ArchitectureSearch(model, config, loss_fn=lambda model, batch: model(**batch).loss)
    grid, method, schedule = search.grid, search.method, make_schedule(config, args.max_steps)
    lines = [("Modules", f"{grid.describe()}")]
    if search.component_budget is not None:
        limit = sum(search.component_budget.limits)
        text = f"{min(grid.ranks)} to {max(grid.ranks)} at first, then {method.name} gives ranks in all modules"
        lines += [("Ranks", text), ("Kept", f"at most {limit:,} LoRA parameters")]
    elif search.rank_plan is not None:
        ranks = search.ranks
        before, after = _parameters(grid, ranks), _parameters(grid, choice_of(search)[1])
        sizes = f"{after:,} LoRA parameters to the end" if before == after else f"{before:,} LoRA parameters"
        lines.append(("Ranks", f"{min(ranks)} to {max(ranks)} from the start, {sizes}"))
        if before != after:
            lines.append(("Kept", f"the best components, about {after:,} LoRA parameters"))
    elif config.limits_step:
        lines.append(("Kept", "as many modules as the limits of a step have room for, measured after the warm-up"))
    else:
        kept = [bool(keep) for keep in method.budget.of_equals().tolist()]
        left = [rank if keep else 0 for rank, keep in zip(grid.ranks, kept, strict=True)]
        text = f"{sum(kept)} of {len(kept)} modules, about {_parameters(grid, left):,} LoRA parameters"
        lines.append(("Kept", text))
    lines += _phases(schedule, search)
    held_out = None
    if rows is not None:
        held_out = math.ceil(config.arch_split * rows)
        if held_out >= rows:
            raise ValueError(
                f"You passed `--rows {rows}`, of which `arch_split={config.arch_split}` holds out {held_out}, "
                "so that no row is left to train on. Please pass more rows, or a smaller `arch_split`."
            )
        lines.append(("Held out", f"{held_out:,} of {rows:,} rows until step {schedule.prune}"))
    return lines + _extra(config.arch_batch_size or batch_size, held_out, schedule, search)


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
    elif search.chooses_ranks:
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
    elif not method.reads_data:
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
