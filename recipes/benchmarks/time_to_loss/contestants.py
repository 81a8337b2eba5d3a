"""The methods whose time is taken: how each one's trainer is made."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any


sys.path += [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[1] / "compare")]

from methods import grouped, split_options  # noqa: E402
from module_sets import Grid, lora_config  # noqa: E402
from tasks import Task  # noqa: E402


if TYPE_CHECKING:
    from transformers import Trainer

METHODS = ("all_linear", "q_and_v", "last_layers", "adalora", "diffora")


def parse(text: str) -> tuple[str, dict[str, Any]]:
    """`"diffora:max_step_time=0.6"` as a name and options."""
    name, options = split_options(text)
    if name not in METHODS:
        raise ValueError(f"There is no method {name!r}; known are {list(METHODS)}.")
    if name == "last_layers" and (set(options) != {"k"} or not isinstance(options["k"], int) or options["k"] < 1):
        raise ValueError(f"'last_layers' needs the number of layers, as in 'last_layers:k=4', got {text!r}.")
    if options and name not in ("last_layers", "diffora"):
        raise ValueError(f"The method {name!r} has no options, but you passed {text!r}.")
    return name, options


def make_trainer(task: Task, method: str, seed: int, steps: int, longest: int) -> Trainer:
    """
    The trainer of a method.

    Args:
        task ([`Task`]): what is trained.
        method (`str`): see [`parse`].
        seed (`int`): of head, adapter and training.
        steps (`int`): how many steps LoRA on all linear layers makes: what a search is a part of.
        longest (`int`): how many this one may make.
    """
    from peft import get_peft_model
    from transformers import set_seed

    name, options = parse(method)
    model = task.make_model(seed)
    training = {"lr_scheduler_type": "constant", **task.config.training, "max_steps": longest}
    if name == "diffora":
        from diffora_trainer import DiffoRAConfig

        config = DiffoRAConfig(**moments(grouped(options), steps))
        return task.make_trainer(
            model, seed, search=True, training=training, peft_config=lora_config(task, None), diffora_config=config
        )
    set_seed(seed)
    if name == "adalora":
        from adalora import AdaLoraUpdate, adalora_config

        rank = task.config.rank
        config = adalora_config(
            steps,
            -(-3 * rank // 2),
            target_r=rank,
            lora_alpha=round(task.config.alpha * -(-3 * rank // 2)),
            target_modules="all-linear",
            task_type="SEQ_CLS" if task.is_classifier else "CAUSAL_LM",
        )
        return task.make_trainer(get_peft_model(model, config), seed, training=training, callbacks=[AdaLoraUpdate()])
    ranks = None if name == "all_linear" else dict.fromkeys(modules_of(task, name, options), task.config.rank)
    return task.make_trainer(get_peft_model(model, lora_config(task, ranks)), seed, training=training)


@contextmanager
def plain_loss(trainer: Trainer) -> Iterator[None]:
    """For a while without what AdaLoRA adds to its loss, also in evaluation."""
    configs = [c for c in getattr(trainer.model, "peft_config", {}).values() if hasattr(c, "orth_reg_weight")]
    weights = [config.orth_reg_weight for config in configs]
    for config in configs:
        config.orth_reg_weight = 0.0
    try:
        yield
    finally:
        for config, weight in zip(configs, weights, strict=True):
            config.orth_reg_weight = weight


def modules_of(task: Task, name: str, options: dict[str, Any]) -> list[str]:
    """Names of the modules of a fixed choice."""
    grid = Grid.of(task)
    if name == "q_and_v":
        ends = tuple("." + target for target in grid.default_targets)
        found = [module for module in grid.names if ends and module.endswith(ends)]
    else:
        from diffora_trainer.core.grid import OTHER_ROW
        from diffora_trainer.core.grid import Grid as Places

        places = Places.arrange([(module, 1, 1, "lora") for module in grid.names])
        layers = [row for row in places.rows if row != OTHER_ROW]
        wanted = {OTHER_ROW, *layers[-options["k"] :]}  # what is outside of the layers stands after them
        found = [site.name for site in places.sites if places.rows[site.row] in wanted]
    if not found:
        raise ValueError(f"This model has no modules for {name!r}.")
    return found


def moments(options: dict[str, Any], steps: int) -> dict[str, Any]:
    """Options in which what happens at parts of a run of so many steps is said in steps, for runs that are longer."""
    from diffora_trainer import DiffoRAConfig

    config = DiffoRAConfig(**options)
    found = {name: getattr(config, name) for name in ("discretize_at", "arch_warmup", "fade_out")}
    return {**options, **{name: max(1, round(at * steps)) if 0 < at < 1 else at for name, at in found.items()}}
