"""What a program has set PyTorch's defaults to changes nothing about a search."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch.utils.data import SequentialSampler

from diffora_trainer import Selection, SelectionRun
from diffora_trainer.core.budget import Budget
from diffora_trainer.methods.registry import get_method
from diffora_trainer.search.held_out import HeldOutBatches
from diffora_trainer.trainer.split import HeldOutSampler, SplitPlan, split_indices
from helpers.marks import mostly_slow
from helpers.models import llama
from helpers.options import make_config
from helpers.trainers import lora


@pytest.fixture(autouse=True)
def usual_defaults() -> Iterator[None]:
    yield
    torch.set_default_dtype(torch.float32)


def run_under(dtype: torch.dtype, **options: Any) -> Selection:
    """What a run of eight steps chooses, with PyTorch's default set once the model is built."""
    torch.manual_seed(0)
    tiny = llama()
    model = get_peft_model(tiny.model, lora(target_modules=tiny.target_modules, task_type=tiny.task_type))
    batches = [{key: value[[i, i + 1]] for key, value in tiny.batch.items()} for i in range(3)]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    torch.set_default_dtype(dtype)
    config = make_config(arch_warmup=2, discretize_at=5, fade_out=2, **options)
    run = SelectionRun(model, optimizer, config, lambda model, batch: model(**batch).loss, batches[1:], 8)
    for _ in range(8):
        run.before_step(batches[0])
        model(**batches[0]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        run.after_step()
    torch.set_default_dtype(torch.float32)
    assert run.selection is not None
    return run.selection


RUNS: dict[str, dict[str, Any]] = {
    name: {"method": name} for name in ("diffora", "sampled", "sigmoid", "softmax", "sora", "beamlora", "cka")
}
RUNS["components"] = {"selection_granularity": "component"}
RUNS["ranks"] = {"selection_granularity": "rank"}


@pytest.mark.parametrize("name", mostly_slow(RUNS, "diffora", "sampled", "sora", "components"))
def test_the_default_dtype_changes_no_choice(name: str) -> None:
    usual = run_under(torch.float32, **RUNS[name])
    for dtype in (torch.bfloat16, torch.float64):
        found = run_under(dtype, **RUNS[name])
        assert (found.ranks, found.scores) == (usual.ranks, usual.scores), dtype


def test_held_out_rows_are_drawn_whatever_the_default_device() -> None:
    """One on which no number can be read, as nothing can be drawn on a GPU by a generator of the CPU."""

    def drawn() -> tuple[Any, ...]:
        plan = SplitPlan(split_indices(24, 0.25, 3), 3)
        plan.set_prune_step(9, 6, 4)
        held_out = HeldOutBatches([{"row": row} for row in range(8)], list, batch_size=4, seed=0)
        return sorted(plan.held_out), list(HeldOutSampler(SequentialSampler(range(24)), plan, 24)), next(held_out)

    usual = drawn()
    matrix = get_method("sampled")(Budget([0, 0, 1, 1], [1, 1, 1, 1], ratio=0.5))
    with torch.device("meta"):
        assert drawn() == usual
        assert type(matrix)(matrix.budget).generator.device.type == "cpu"
