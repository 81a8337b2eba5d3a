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
    from torch import nn
    from transformers import Trainer, TrainerCallback

METHODS = ("all_linear", "q_and_v", "last_layers", "drawn_depth", "adalora", "diffora")


def parse(text: str) -> tuple[str, dict[str, Any]]:
    """`"diffora:max_step_time=0.6"` as a name and options."""
    name, options = split_options(text)
    if name not in METHODS:
        raise ValueError(f"There is no method {name!r}; known are {list(METHODS)}.")
    if name == "last_layers" and (set(options) != {"k"} or not isinstance(options["k"], int) or options["k"] < 1):
        raise ValueError(f"'last_layers' needs the number of layers, as in 'last_layers:k=4', got {text!r}.")
    if name == "drawn_depth" and (set(options) != {"whole"} or not 0 <= float(options["whole"]) <= 1):
        raise ValueError(f"'drawn_depth' needs the share of whole steps, as in 'drawn_depth:whole=0.5', got {text!r}.")
    if options and name not in ("last_layers", "drawn_depth", "diffora"):
        raise ValueError(f"The method {name!r} has no options, but you passed {text!r}.")
    return name, options


def check_schedule(training: dict[str, Any], longest: float) -> None:
    """
    Check that the learning rate of a step is the same in a run of any length.

    Args:
        training (`dict`): training arguments.
        longest (`float`): how many times the steps of all linear layers the others may make.

    Raises:
        ValueError: if they may make more, and the learning rate depends on how many they are.
    """
    schedule = str(training.get("lr_scheduler_type", "constant"))
    part = training.get("warmup_ratio") or training.get("warmup_steps") or 0
    even = schedule == "constant" or (schedule == "constant_with_warmup" and not 0 < part < 1)
    if longest > 1 and not even:
        raise ValueError(
            f"With `longest={longest:g}` all linear layers would go through `lr_scheduler_type={schedule!r}` in "
            "`max_steps`, and the others in more steps, so that equal steps would have unequal learning rates. Please "
            "pass `longest=1`, or a constant rate (its warm-up in whole steps)."
        )


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
    if name == "drawn_depth":
        model = get_peft_model(model, lora_config(task, None))
        return task.make_trainer(
            model, seed, training=training, callbacks=[drawn_depth(model, options["whole"], seed)]
        )
    ranks = None if name == "all_linear" else dict.fromkeys(modules_of(task, name, options), task.config.rank)
    return task.make_trainer(get_peft_model(model, lora_config(task, ranks)), seed, training=training)


def drawn_depth(model: nn.Module, whole: float, seed: int) -> TrainerCallback:
    """
    Ends the backward pass of most steps at a layer that is drawn, as DropBP (https://huggingface.co/papers/2402.17812)
    drops a part of it. LoRA below takes part in the forward pass and is not stepped.

    Args:
        model (`nn.Module`): a model whose layers are the longest list of modules in it.
        whole (`float`): share of the steps that go all the way.
        seed (`int`): of what is drawn.
    """
    import random

    from torch import nn
    from transformers import TrainerCallback

    layers = max((module for module in model.modules() if isinstance(module, nn.ModuleList)), key=len)
    random_numbers = random.Random(seed)

    class Drawn(TrainerCallback):
        def __init__(self) -> None:
            self.hook: Any = None

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if random_numbers.random() >= whole:
                lowest = layers[random_numbers.randrange(1, len(layers))]
                self.hook = lowest.register_forward_pre_hook(_detach, with_kwargs=True)

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if self.hook is not None:
                self.hook.remove()
                self.hook = None

    return Drawn()


def _detach(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    states = args[0] if args else kwargs["hidden_states"]
    if args:
        return (states.detach(), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": states.detach()}


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
