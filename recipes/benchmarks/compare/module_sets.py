"""The modules that a method chooses from, and the sets of them that are chosen before training."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tasks import Task


if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import Tensor
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
            raise ValueError(f"No module of rank {self.rank} fits into {cap:,} parameters; raise the budget.")
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
