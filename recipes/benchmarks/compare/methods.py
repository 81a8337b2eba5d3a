"""The methods of the comparison: which LoRA modules, of which rank, under a budget of trainable parameters."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml
from tasks import Task


if TYPE_CHECKING:
    from peft import LoraConfig, PeftConfig, PeftModel
    from torch import Tensor, nn
    from transformers import Trainer

Ranks = dict[str, int]
"""Module name to LoRA rank: the outcome of every method."""

SCORING_BATCHES = 32


@dataclass(frozen=True)
class Grid:
    """
    The modules to choose from.

    Args:
        names (`tuple[str, ...]`): in the order of the model's layers.
        widths (`tuple[int, ...]`): input plus output features: the trainable parameters of a LoRA of rank 1.
        rank (`int`): rank at full size.
        default_targets (`tuple[str, ...]`): ends of the names that PEFT adapts if nothing is said: usually q and v.
    """

    names: tuple[str, ...]
    widths: tuple[int, ...]
    rank: int
    default_targets: tuple[str, ...]

    @classmethod
    def of(cls, task: Task) -> Grid:
        """The grid of a task's model."""
        from peft import get_peft_model
        from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULTS

        from diffora_trainer.adapters.grid import AdapterGrid

        model = task.make_model(seed=0)
        targets = tuple(DEFAULTS.get(model.config.model_type, ()))
        grid = AdapterGrid.from_model(get_peft_model(model, lora_config(task, None))).grid
        return cls(
            names=grid.names,
            widths=tuple(parameters // task.config.rank for parameters in grid.parameters),
            rank=task.config.rank,
            default_targets=targets,
        )

    def cap(self, budget: float) -> int:
        """Trainable LoRA parameters under a budget in (0, 1]."""
        return int(budget * self.rank * sum(self.widths))

    def parameters(self, ranks: Ranks) -> int:
        """Trainable LoRA parameters of an allocation."""
        width = dict(zip(self.names, self.widths, strict=True))
        return sum(width[name] * rank for name, rank in ranks.items())

    def take(self, order: Sequence[str], cap: int) -> Ranks:
        """Modules of full rank in some order, passing over those that do not fit any more."""
        width = dict(zip(self.names, self.widths, strict=True))
        ranks, left = {}, cap
        for name in order:
            if (cost := width[name] * self.rank) <= left:
                ranks[name] = self.rank
                left -= cost
        if not ranks:
            raise ValueError(f"Not one module of rank {self.rank} fits into {cap:,} parameters; raise the budget.")
        return ranks

    def fill(self, names: Sequence[str], cap: int) -> Ranks:
        """
        All of the named modules, at the largest common rank that fits; what is left over goes into one rank more for
        some of them, evenly spread, so that the budget is used up to less than one module. If not even rank 1 fits
        everywhere, evenly spread modules get it.
        """
        width = dict(zip(self.names, self.widths, strict=True))
        common = cap // sum(width[name] for name in names)
        ranks = dict.fromkeys(names, common)
        left = cap - self.parameters(ranks)
        # Every module once, far apart from each other: steps of about the golden section.
        stride = max(1, round(len(names) * 0.618))
        while math.gcd(stride, len(names)) > 1:
            stride += 1
        for index in range(len(names)):
            name = names[index * stride % len(names)]
            if width[name] <= left:
                ranks[name] += 1
                left -= width[name]
        return {name: rank for name, rank in ranks.items() if rank}


def lora_config(task: Task, ranks: Ranks | None, **options: Any) -> LoraConfig:
    """A `LoraConfig` of an allocation, always at the same scale `alpha / r`; `None` is full rank on all layers."""
    from peft import LoraConfig

    rank, alpha = task.config.rank, task.config.alpha
    other = {} if ranks is None else {name: r for name, r in ranks.items() if r != rank}
    return LoraConfig(
        r=rank,
        lora_alpha=round(alpha * rank),
        rank_pattern={_exactly(name): r for name, r in other.items()},
        alpha_pattern={_exactly(name): alpha * r for name, r in other.items()},
        target_modules="all-linear" if ranks is None else list(ranks),
        lora_dropout=task.config.lora_dropout,
        task_type="SEQ_CLS" if task.is_classifier else "CAUSAL_LM",
        **options,
    )


def _exactly(name: str) -> str:
    # Patterns are matched at the end of a module's name: `layer.1.x` would be found in `layer.11.x` without this.
    return r"^(?:.*\.)?" + name.replace(".", r"\.")


def train_static(task: Task, ranks: Ranks, seed: int) -> dict[str, Any]:
    """A LoRA of the given modules and ranks, trained from scratch by the stock trainer."""
    return train_peft(task, lora_config(task, ranks), seed)


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
    trainer.train()
    if finish is not None:
        finish(model)
    return {"parameters": trainable_lora(trainer.model), **task.measure(trainer)}


def trainable_lora(model: nn.Module) -> int:
    """Trainable LoRA parameters; a new head is not counted."""
    return sum(p.numel() for name, p in model.named_parameters() if p.requires_grad and "lora_" in name)


# Fixed choices


def random_set(grid: Grid, cap: int, seed: int, draw: int) -> Ranks:
    """Modules at random."""
    order = list(grid.names)
    random.Random(f"{seed} {draw}").shuffle(order)
    return grid.take(order, cap)


def all_linear(grid: Grid, cap: int) -> Ranks:
    """Every linear layer, at the rank that fits."""
    return grid.fill(grid.names, cap)


def q_and_v(grid: Grid, cap: int) -> Ranks:
    """PEFT's default targets, at the rank that fits."""
    ends = tuple("." + target for target in grid.default_targets)
    names = [name for name in grid.names if name.endswith(ends)]
    if not ends or not names:
        raise ValueError("PEFT has no default target modules for this model, so there is no 'q_and_v'.")
    return grid.fill(names, cap)


def last_layers(grid: Grid, cap: int) -> Ranks:
    """The modules nearest to the output."""
    return grid.take(list(reversed(grid.names)), cap)


# Choices by the base model or by first gradients


def kappa_tune(task: Task, grid: Grid, cap: int) -> Ranks:
    """KappaTune (https://arxiv.org/abs/2506.16289) as PEFT has it: lowest condition numbers first."""
    from peft.helpers import KappaTuneSelector

    order = KappaTuneSelector(task.make_model(seed=0), show_progress=False).get_best_targets(top_p=1.0)
    return grid.take([name for name in order if name in grid.names], cap)


def grad_norm(task: Task, grid: Grid, cap: int, seed: int) -> tuple[Ranks, dict[str, float]]:
    """Largest norm of the LoRA's gradient before training (GRAD-NORM of HeteroLoRA, https://arxiv.org/abs/2406.14956)."""
    scores = _gradient_norms(task, grid, seed)
    return grid.take(sorted(grid.names, key=lambda name: -scores[name]), cap), scores


def _gradient_norms(task: Task, grid: Grid, seed: int) -> dict[str, float]:
    import torch
    from peft import get_peft_model
    from transformers import set_seed

    from diffora_trainer.adapters.base import find_sites

    model = task.make_model(seed)
    set_seed(seed)
    model = get_peft_model(model, lora_config(task, None))
    trainer = task.make_trainer(model, seed)
    model.eval()  # dropout would be noise
    for batch in _first_batches(trainer):
        loss = trainer.compute_loss(model, trainer._prepare_inputs(batch))
        (loss / SCORING_BATCHES).backward()
    return {
        name: sum(float(torch.linalg.norm(p.grad.float())) for p in site.parameters)  # type: ignore[union-attr]
        for name, site in find_sites(model, "default").items()
    }


def _first_batches(trainer: Trainer) -> Iterator[dict[str, Tensor]]:
    done = 0
    while True:
        for batch in trainer.get_train_dataloader():
            if done == SCORING_BATCHES:
                return
            done += 1
            yield batch


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
    from diffora_trainer import DiffoRAConfig

    trainer = task.make_trainer(
        task.make_model(seed),
        seed,
        search=True,
        peft_config=lora_config(task, None),
        diffora_config=DiffoRAConfig(**{"max_trainable_parameters": cap, "arch_seed": seed, **options}),
    )
    trainer.train()
    selection = trainer.selection
    report: dict[str, float] = {}
    for entry in trainer.state.log_history:
        report.update({key: value for key, value in entry.items() if key.startswith("diffora/held_out_loss")})
    result = task.measure(trainer)
    scores = dict(zip(selection.modules, selection.scores, strict=True))
    # Of equal scores those that were not chosen come first.
    upwards = sorted(grid.names, key=lambda name: (scores[name], name in selection.selected))
    return dict.fromkeys(selection.selected, grid.rank), {
        "parameters": selection.trainable_parameters,
        **result,
        "before_closing": report.get("diffora/held_out_loss_before_closing"),
        "before_cut": report.get("diffora/held_out_loss_before_cut"),
        "after_cut": report.get("diffora/held_out_loss_after_cut"),
        "scores": {name: float(f"{score:.5g}") for name, score in scores.items()},
        "worst": grid.take(upwards, cap),
    }


def _base_name(name: str) -> str:
    return name.removeprefix("base_model.model.")


# All of them


def parse_method(text: str) -> tuple[str, dict[str, Any]]:
    """`"diffora:relaxation=sampled:arch_every=4"` as a name and options."""
    name, *options = text.split(":")
    if name not in METHODS:
        raise ValueError(f"There is no method {name!r}; known are {sorted(METHODS)}.")
    if options and name not in ("diffora", "adalora"):
        raise ValueError(f"The method {name!r} has no options, but you passed {text!r}.")
    pairs = dict(option.split("=", 1) for option in options)
    return name, {key: yaml.safe_load(value) for key, value in pairs.items()}


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
    return {**train_static(task, ranks, seed), "ranks": ranks, **extra}
