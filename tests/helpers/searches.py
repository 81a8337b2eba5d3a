"""Searches without a Trainer, and what they are compared with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn

from diffora_trainer import ArchitectureSearch, SelectionRun
from diffora_trainer.adapters.grid import AdapterGrid
from diffora_trainer.core.budget import Budget
from diffora_trainer.methods.base import GradientMethod
from diffora_trainer.methods.ranks import RankMethod
from diffora_trainer.methods.registry import register_method, unregister_method
from diffora_trainer.search.runtime import Runtime
from helpers.models import llama
from helpers.options import make_config
from helpers.trainers import lora


@contextmanager
def gain_relaxation(**attributes: object) -> Iterator[type[GradientMethod]]:
    """A relaxation of a user's own, `"gain"`, for a while."""

    @register_method("gain")
    class GainMatrix(GradientMethod):
        """The plain sum of all gains."""

        default_learning_rate = 0.5

        def __init__(self, budget: Budget, learning_rate: float | None = None, seed: int = 0) -> None:
            super().__init__(budget, learning_rate, seed)
            self._sum = torch.zeros(len(budget))

        def values(self) -> Tensor:
            return self.budget.calibrate(self._sum)

        def step(self, gradient: Tensor) -> None:
            self.steps += 1
            self._sum -= self.learning_rate * gradient

        def _tensors(self) -> dict[str, Tensor]:
            return {"sum": self._sum}

    for name, value in attributes.items():
        setattr(GainMatrix, name, value)
    try:
        yield GainMatrix
    finally:
        unregister_method("gain")


def warm(tiny: Any = None, spread: float = 0.3) -> tuple[Any, list[dict[str, Tensor]]]:
    """A model whose `lora_B` is no longer 0, and three batches for it."""
    tiny = tiny or llama()
    model = get_peft_model(tiny.model, lora(target_modules=tiny.target_modules, task_type=tiny.task_type))
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=spread * float(torch.rand(())))
    batches = [{key: value[[i, i + 1]] for key, value in tiny.batch.items()} for i in range(3)]
    return model, batches


def half_warm(tiny: Any = None) -> tuple[Any, list[dict[str, Tensor]]]:
    """As [`warm`], with half of the rank: beams begin so, and an adapter that has learned more is refused."""
    model, batches = warm(tiny)
    for _, b in pairs(model):
        b.data[:, 2:] = 0.0
    return model, batches


def model_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch).loss


def make_steps(run: SelectionRun, model: Any, batches: list[Any], optimizer: Any, steps: int) -> None:
    """Training steps of a run, on one batch after the other."""
    for step in range(steps):
        run.before_step()
        model_loss(model, batches[step % len(batches)]).backward()
        optimizer.step()
        optimizer.zero_grad()
        run.after_step()


def make_search(model: nn.Module, method: str, loss_fn: Any = model_loss, **options: Any) -> ArchitectureSearch:
    function = options.pop("score_function", None)
    runtime = Runtime(**{name: options.pop(name) for name in ("loss_scale", "reduce") if name in options})
    config = make_config(method=method, **options)
    search = ArchitectureSearch(model, config, loss_fn=loss_fn, score_function=function, runtime=runtime)
    search.begin()
    return search


def pairs(model: nn.Module) -> list[list[nn.Parameter]]:
    """`lora_A` and `lora_B` of each module in the grid's order, by their names."""
    weights = dict(model.named_parameters())
    names = AdapterGrid.from_model(model).grid.names
    return [[weights[f"base_model.model.{name}.lora_{x}.default.weight"] for x in "AB"] for name in names]


def by_hand(
    method: str,
    model: nn.Module,
    batches: list[dict[str, Tensor]],
    matrices: Callable[[nn.Module], list[list[nn.Parameter]]] = pairs,
) -> list[float]:
    """The formula for the pairs of matrices on a copy of the model, with `backward`."""
    model = copy.deepcopy(model).eval()
    if method == "synflow":
        for tensor in model.state_dict().values():
            tensor.abs_()
        size = model.get_input_embeddings().embedding_dim
        # A length of 32, or half of the positions that the model has.
        length = min(32, model.config.max_position_embeddings // 2)
        output = model(inputs_embeds=torch.ones(1, length, size), attention_mask=torch.ones(1, length).long())
        output.logits.sum().backward()
    else:
        (sum(model_loss(model, batch) for batch in batches) / len(batches)).backward()
    if method == "grad_norm":
        return [sum(float(w.grad.norm()) for w in pair) for pair in matrices(model)]
    return [sum((w * w.grad).abs().sum().item() for w in pair) for pair in matrices(model)]


def gradients_of(search: ArchitectureSearch) -> list[Tensor]:
    """The gradients that reach the matrix from here on."""
    seen: list[Tensor] = []
    step = search.method.step
    search.method.step = lambda gradient: seen.append(gradient) or step(gradient)  # type: ignore[method-assign]
    return seen


def components(search: ArchitectureSearch) -> list[Tensor]:
    """What each component was found to be worth, module by module."""
    assert isinstance(search.method, RankMethod)
    return search.method.split(search.method.component_scores())
