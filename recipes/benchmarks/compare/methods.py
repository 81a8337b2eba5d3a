"""The methods of the comparison: how each one trains, under a budget of trainable parameters."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import yaml
from module_sets import Grid, Ranks, all_linear, grad_norm, kappa_tune, last_layers, lora_config, q_and_v, random_set
from tasks import Task


if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from torch import Tensor, nn
    from transformers import Trainer

    from diffora_trainer import DiffoRAConfig


def train_static(task: Task, ranks: Ranks, seed: int, **arguments: Any) -> dict[str, Any]:
    """A LoRA of the given modules and ranks, trained from scratch by the stock trainer."""
    return train_peft(task, lora_config(task, ranks), seed, **arguments)


def train_peft(
    task: Task,
    config: PeftConfig,
    seed: int,
    prepare: Callable[[PeftModel], None] | None = None,
    finish: Callable[[PeftModel], None] | None = None,
    **arguments: Any,
) -> dict[str, Any]:
    """
    A run of the stock trainer, and what it ends with.

    Args:
        task ([`Task`]): what is trained.
        config (`PeftConfig`): the adapter.
        seed (`int`): of the head, the adapter and the training.
        prepare, finish (`Callable`, *optional*): called with the model before and after the training.
        **arguments: for [`Task.make_trainer`].
    """
    from peft import get_peft_model
    from transformers import set_seed

    model = task.make_model(seed)
    set_seed(seed)
    model = get_peft_model(model, config)
    if prepare is not None:
        prepare(model)
    trainer = task.make_trainer(model, seed, **arguments)
    used = train(trainer)
    if finish is not None:
        finish(model)
    return {"parameters": trainable_lora(trainer.model), **used, **task.measure(trainer)}


def train(trainer: Trainer) -> dict[str, float]:
    """Train, and say how long the processor was busy with it: other programs on the machine lengthen that little."""
    started = time.process_time()
    trainer.train()
    return {"cpu_seconds": round(time.process_time() - started, 2)}


def trainable_lora(model: nn.Module) -> int:
    """Trainable LoRA parameters; a new head is not counted."""
    return sum(p.numel() for name, p in model.named_parameters() if p.requires_grad and "lora_" in name)


# Methods that train in a way of their own


def train_eva(task: Task, grid: Grid, cap: int, seed: int) -> tuple[Ranks, dict[str, Any]]:
    """
    EVA (https://arxiv.org/abs/2410.07170) as PEFT has it: `lora_A` starts as principal directions of the layer's
    input, and rank goes where they explain most.

    PEFT keeps the sum of all ranks, whatever their modules cost, and cannot start below rank 1. So it is given one
    rank more than fits, and the last direction of the module with most of them is dropped until the parameters fit.
    """
    from peft import EvaConfig, initialize_lora_eva_weights
    from peft.tuners.lora.eva import get_eva_state_dict

    start = min(grid.rank, cap // sum(grid.widths) + 1)
    ranks: Ranks = {}

    def prepare(model: PeftModel) -> None:
        trainer = task.make_trainer(model, seed)
        directions = get_eva_state_dict(
            model, _Inputs(trainer), prepare_layer_inputs_fn=_unpadded, show_progress_bar=False
        )
        ranks.update({_base_name(name): len(rows) for name, rows in directions.items()})
        while grid.parameters(ranks) > cap:
            ranks[max(ranks, key=lambda name: ranks[name])] -= 1
        kept = {name: rows[: ranks[_base_name(name)]] for name, rows in directions.items()}
        initialize_lora_eva_weights(model, eva_state_dict=kept)

    config = lora_config(
        task, dict.fromkeys(grid.names, start), init_lora_weights="eva", eva_config=EvaConfig(use_label_mask=False)
    )
    result = train_peft(task, config, seed, prepare)
    return {name: rank for name, rank in ranks.items() if rank}, result


class _Inputs:
    """A trainer's training batches without what the model makes a loss of."""

    def __init__(self, trainer: Trainer) -> None:
        self.batches = trainer.get_train_dataloader()

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for batch in self.batches:
            yield {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in batch}


def _unpadded(layer_input: Any, positions: Tensor, layer_name: str) -> Tensor:
    from peft.tuners.lora.eva import prepare_layer_inputs_fn_language_modeling

    states = layer_input if hasattr(layer_input, "ndim") else layer_input[0]
    # A pooler has one vector a text, and no padding among them. PEFT takes a `view` of what it is given.
    return (
        states.contiguous()
        if states.ndim == 2
        else prepare_layer_inputs_fn_language_modeling(states, positions, layer_name)
    )


def train_adalora(
    task: Task, grid: Grid, cap: int, seed: int, training: dict[str, Any]
) -> tuple[Ranks, dict[str, Any]]:
    """
    AdaLoRA (https://arxiv.org/abs/2303.10512) as PEFT has it, with its update called at every step. It starts at one
    and a half times the budget, prunes from a tenth to two thirds of the run, and goes on with what is left. Its
    singular values start at 0 between small factors, so that it learns slowly at a learning rate that suits LoRA:
    `adalora:learning_rate=0.01` gives it one of its own.
    """
    from adalora import AdaLoraUpdate, adalora_config

    steps = task.config.training["max_steps"]
    count = round(cap * len(grid.names) / sum(grid.widths))  # ranks in all
    start = max(1, -(-3 * count // (2 * len(grid.names))))
    config = adalora_config(
        steps,
        start,
        target_r=1,  # a whole number a module; the true total is set below
        lora_alpha=round(task.config.alpha * start),  # PEFT divides it by `init_r`
        target_modules=list(grid.names),
        lora_dropout=task.config.lora_dropout,
        task_type="SEQ_CLS" if task.is_classifier else "CAUSAL_LM",
    )
    found: Ranks = {}
    update = AdaLoraUpdate()

    def prepare(model: PeftModel) -> None:
        model.base_model.rankallocator.target_bgt = count

    def finish(model: PeftModel) -> None:
        pattern = model.peft_config["default"].rank_pattern
        ranks = {_base_name(name.split(".lora_")[0]): int(sum(kept)) for name, kept in pattern.items()}
        found.update({name: rank for name, rank in ranks.items() if rank})
        model.peft_config["default"].orth_reg_weight = 0.0  # no part of the loss that is compared

    result = train_peft(task, config, seed, prepare, finish, callbacks=[update], training=training)
    if update.count != steps:
        raise RuntimeError(f"AdaLoRA's update was called {update.count} times in {steps} steps.")
    return found, {**result, "parameters": grid.parameters(found)}


def train_diffora(
    task: Task, grid: Grid, cap: int, seed: int, options: dict[str, Any]
) -> tuple[Ranks, dict[str, Any]]:
    """The search of this project, in one run of as many steps as all others have."""
    trainer = task.make_trainer(
        task.make_model(seed),
        seed,
        search=True,
        peft_config=lora_config(task, None),
        diffora_config=our_config(options, cap, seed),
    )
    used = train(trainer)
    selection = trainer.selection
    report: dict[str, float] = {}
    for entry in trainer.state.log_history:
        report.update({key: value for key, value in entry.items() if key.startswith("diffora/held_out_loss")})
    result = task.measure(trainer)
    scores = dict(zip(selection.modules, selection.scores, strict=True))
    # Of equal scores those that were not chosen come first.
    upwards = sorted(grid.names, key=lambda name: (scores[name], name in selection.selected))
    return {name: rank for name, rank in zip(selection.modules, selection.ranks, strict=True) if rank}, {
        "parameters": selection.trainable_parameters,
        "confidence": selection.confidence,
        "notes": list(selection.notes),
        **used,
        **result,
        "before_closing": report.get("diffora/held_out_loss_before_fade_out"),
        "before_cut": report.get("diffora/held_out_loss_before_pruning"),
        "after_cut": report.get("diffora/held_out_loss_after_pruning"),
        "scores": {name: float(f"{score:.5g}") for name, score in scores.items()},
        "worst": grid.take(upwards, cap),
    }


def our_config(options: dict[str, Any], cap: int, seed: int = 0) -> DiffoRAConfig:
    """The configuration of a run of `diffora` with some options."""
    from diffora_trainer import DiffoRAConfig

    return DiffoRAConfig(max_trainable_parameters=cap, **{"arch_seed": seed, **grouped(options)})


def grouped(options: dict[str, Any]) -> dict[str, Any]:
    """Options of a configuration in which those of its method stood beside the others."""
    from diffora_trainer.methods.registry import get_method

    name = options.get("method", "diffora")
    if not isinstance(name, str):
        raise ValueError(
            f"You passed `method={name!r}`, which is not the name of a method. To run several, leave their braces "
            "unquoted, so that the shell makes a word of each."
        )
    method = get_method(name)
    known = {field.name for field in fields(method.Options)}
    of_method = {name: value for name, value in options.items() if name in known}
    others = {name: value for name, value in options.items() if name not in known}
    return {**others, "method_options": of_method} if of_method else others


def _base_name(name: str) -> str:
    return name.removeprefix("base_model.model.")


# All of them


def parse_method(text: str) -> tuple[str, dict[str, Any]]:
    """`"diffora:method=sampled:arch_every=4"` as a name and options."""
    name, options = split_options(text)
    if name not in METHODS:
        raise ValueError(f"There is no method {name!r}; known are {sorted(METHODS)}.")
    part_of_steps(text)
    options.pop("steps", None)
    if set(options) - {"held_out_order"} and name not in ("diffora", "adalora"):
        raise ValueError(f"The method {name!r} has no such options, but you passed {text!r}.")
    if "held_out_order" in options and name not in FIXED:
        raise ValueError(f"`held_out_order` is for methods that choose before training, but you passed {text!r}.")
    return name, options


def part_of_steps(text: str) -> float:
    """
    The part of `max_steps` that a method makes: `"diffora:steps=0.8"`. For comparisons at equal time.

    Raises:
        ValueError: if it is not positive.
    """
    part = split_options(text)[1].get("steps", 1.0)
    if not isinstance(part, (int, float)) or isinstance(part, bool) or not part > 0:
        raise ValueError(f"`steps` is a part of `max_steps`, such as 0.8 or 1.25, but you passed {text!r}.")
    return float(part)


def split_options(text: str) -> tuple[str, dict[str, Any]]:
    """A name, and the options that follow it after colons, read as YAML."""
    name, *options = text.split(":")
    pairs = dict(option.split("=", 1) for option in options)
    return name, {key: yaml.safe_load(value) for key, value in pairs.items()}


def has_own_rate(text: str) -> bool:
    """Whether a method names its learning rate, as `"adalora:learning_rate=0.01"` does."""
    name, options = split_options(text)
    return name == "adalora" and "learning_rate" in options


def rate_of(record: dict[str, Any]) -> float | None:
    """Which of the learning rates that were compared a record is of; none for a run at a rate of its own."""
    own = record["reading"] == "run" and has_own_rate(record["method"])
    return None if own else record.get("learning_rate")


FIXED = ("random", "all_linear", "q_and_v", "last_layers", "kappa_tune", "grad_norm", "full")
"""Methods that choose before training: their one run is both the choice and the run."""
ADAPTIVE = ("eva", "adalora", "diffora")
"""Methods with a run of their own, whose modules and ranks are trained once more for the choice."""
METHODS = (*FIXED, *ADAPTIVE)


def is_adaptive(method: str) -> bool:
    """Whether a method, named with or without options, has a run of its own besides its choice."""
    return parse_method(method)[0] in ADAPTIVE


def run_method(task: Task, grid: Grid, method: str, budget: float, seed: int, draw: int = 0) -> dict[str, Any]:
    """One run of a method. Returns loss, metric, parameters and ranks."""
    name, options = parse_method(method)
    cap = grid.cap(budget)
    if name in ADAPTIVE:
        if name == "diffora":
            ranks, result = train_diffora(task, grid, cap, seed, options)
        elif name == "adalora":
            ranks, result = train_adalora(task, grid, cap, seed, options)
        else:
            ranks, result = train_eva(task, grid, cap, seed)
        return {**result, "ranks": ranks}
    extra: dict[str, Any] = {}
    if name == "full":
        ranks = dict.fromkeys(grid.names, grid.rank)
    elif name == "random":
        ranks = random_set(grid, cap, seed, draw)
    elif name == "grad_norm":
        ranks, extra["scores"] = grad_norm(task, grid, cap, seed)
    elif name == "kappa_tune":
        ranks = kappa_tune(task, grid, cap)
    else:
        ranks = {"all_linear": all_linear, "q_and_v": q_and_v, "last_layers": last_layers}[name](grid, cap)
    return {**train_static(task, ranks, seed, **options), "ranks": ranks, **extra}
