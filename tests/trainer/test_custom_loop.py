"""A loop of one's own with a `SelectionRun`: it is the Trainer's run, and it can be interrupted anywhere."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DataCollatorWithPadding, Trainer

from diffora_trainer import Selection, SelectionRun
from diffora_trainer.search.held_out import HeldOutBatches
from helpers.adapted import adapted_names, base_weights
from helpers.checks import adapter, assert_same, optimizer_state, step_logs
from helpers.data import classification_dataset, tiny_tokenizer
from helpers.loops import SOURCES, STEPS, Loop, batches, loss_of, trained, with_defaults
from helpers.marks import mostly_slow
from helpers.trainers import CUT, WARMUP, make_trainer


HELD_OUT = classification_dataset(10, seed=9)

RUNS: dict[str, dict[str, Any]] = {
    "diffora": {"fade_out": 2, "selection_scope": "model"},
    "ranks": {"fade_out": 2, "selection_granularity": "rank"},
    "components": {"fade_out": 2, "selection_granularity": "component", "rank_margin": 2.0},
    "sampled": {"method": "sampled", "arch_every": 2},
    "sigmoid, second order": {"method": "sigmoid", "arch_order": 2},
    "softmax": {"method": "softmax", "max_trainable_parameters": 2000},
    "grad_norm": {"method": "grad_norm", "score_batches": 2},
    "random": {"method": "random"},
    "sharing": {"weight_sharing": "model"},
    "reallocation": {"method": "snip", "reallocate_every": 2, "score_batches": 2, "selection_scope": "model"},
}


def held_out() -> HeldOutBatches:
    """As a trainer reads an `arch_dataset`."""
    return HeldOutBatches(HELD_OUT, DataCollatorWithPadding(tiny_tokenizer()), batch_size=4, seed=0)


class Recording:
    """
    The batches of a Trainer's training steps, the random state before them, the number that the model divides their
    losses by, and the one that accelerate does, which is not 1 in transformers 5.2.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.batches: list[dict[str, Tensor]] = []
        self.counts: list[Any] = []
        self.divisor = trainer.accelerator.gradient_accumulation_steps
        self._step = trainer.training_step
        trainer.training_step = self

    def __call__(self, model: nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        if not self.batches:
            self.state = torch.get_rng_state()
        self.batches.append({name: value.clone() for name, value in inputs.items()})
        self.counts.append(kwargs["num_items_in_batch"] if "num_items_in_batch" in kwargs else args[0])
        return self._step(model, inputs, *args, **kwargs)


@pytest.mark.parametrize("accumulation", mostly_slow([1, 2], 2))
@pytest.mark.parametrize("name", RUNS)
def test_a_loop_of_ones_own_is_the_trainers_run(name: str, accumulation: int, tmp_path: Path) -> None:
    """Bit for bit, with dropout: losses, selection, weights and the optimizer's state."""
    trainer = make_trainer(
        tmp_path,
        args={
            "gradient_accumulation_steps": accumulation,
            "per_device_train_batch_size": 4 // accumulation,
            "weight_decay": 0.0,
            "optim": "adamw_torch",
        },
        train_dataset=classification_dataset(4 * STEPS),  # an epoch, in which no loader draws a seed again
        arch_dataset=HELD_OUT,
        search={"arch_batch_size": 4, **RUNS[name]},
    )
    recording = Recording(trainer)
    trainer.train()
    loop = Loop(with_defaults(**RUNS[name]), recording.batches, held_out(), recording.counts)
    loop.divisor = recording.divisor
    torch.set_rng_state(recording.state)
    loop.train()

    assert loop.run.selection == trainer.selection and loop.run.selection.step == CUT
    assert loop.run.phase == "selected" and not loop.run.gates_active
    assert_same(adapter(loop.model), adapter(trainer.model), "adapter")
    assert_same(
        optimizer_state(loop.model, loop.optimizer), optimizer_state(trainer.model, trainer.optimizer), "moments"
    )
    logged = [log["loss"] for log in step_logs(trainer).values()]
    assert loop.losses == pytest.approx(logged, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "source"),
    [
        *mostly_slow(
            (
                (name, source)
                for name in ("diffora", "sigmoid, second order", "grad_norm", "sharing", "reallocation")
                for source in ("list", "DataLoader", "iterator")
            ),
            ("diffora", "DataLoader"),
            ("grad_norm", "DataLoader"),
            ("reallocation", "iterator"),
        ),
        ("diffora", "DataLoader of a stream"),
    ],
)
def test_a_loop_goes_on_from_its_state(name: str, source: str) -> None:
    """In each phase, by a state that has been saved and read, with dropout and moments."""
    config, found = with_defaults(**RUNS[name]), batches(STEPS)
    whole = Loop(config, found, SOURCES[source]())
    phases, checkpoints = {}, {}
    for step in range(STEPS + 1):
        whole.train(step)
        phases[step], checkpoints[step] = whole.run.phase, whole.checkpoint()
    expected = {"warm-up", "selected"} if name == "grad_norm" else {"warm-up", "search", "selected"}
    assert set(phases.values()) == (expected | {"fade-out"} if name == "diffora" else expected)

    for step in (WARMUP - 1, WARMUP, WARMUP + 2, CUT - 1, CUT, CUT + 2):
        resumed = Loop(config, found, SOURCES[source]())
        resumed.resume(checkpoints[step])
        assert resumed.run.phase == phases[step] and resumed.run.step == step
        resumed.train()
        assert resumed.run.selection == whole.run.selection, step
        assert_same(resumed.losses, whole.losses[step:], f"losses from step {step}")
        assert_same(trained(resumed.model), trained(whole.model), f"weights from step {step}")


def test_a_state_of_something_else_is_refused() -> None:
    config, found = with_defaults(), batches(STEPS)
    loop = Loop(config, found, SOURCES["list"]())
    loop.train(5)
    state = loop.checkpoint()["run"]
    for options, reason in (
        ({"method": "sampled"}, "`method` saved: 'diffora', now: 'sampled'"),
        ({"discretize_at": 9}, "`discretize_at` saved: "),
        ({"arch_warmup": 2}, "`arch_warmup` saved: "),
        ({"arch_every": 2}, r"`method_options\['arch_every'\]` saved: 1, now: 2"),
    ):
        other = Loop(with_defaults(**options), found, SOURCES["list"]())
        with pytest.raises(ValueError, match=f"does not fit this run.*{reason}"):
            other.run.load_state_dict(copy.deepcopy(state))
    with pytest.raises(ValueError, match="before the first step.*make a new run"):
        loop.run.load_state_dict(state)
    with pytest.raises(ValueError, match="`modules`"):
        Loop(config, found, SOURCES["list"]()).run.load_state_dict({**state, "run": {**state["run"], "modules": [1]}})
    with pytest.raises(ValueError, match="come to an end"):
        Loop(config, found, iter(batches(1, seed=3))).train()
    with pytest.raises(TypeError, match="held_out_batches.*a list of them"):
        Loop(config, found, {"input_ids": 1})


def test_a_loop_that_ends_early_chooses_then() -> None:
    loop = Loop(with_defaults(fade_out=2), batches(STEPS), SOURCES["list"]())
    loop.train(5)
    assert loop.run.selection is None and loop.run.finish() and not loop.run.finish()
    assert isinstance(loop.run.selection, Selection) and loop.run.selection.step == 5
    loop = Loop(with_defaults(), batches(STEPS), SOURCES["list"]())
    loop.train(2)
    before = trained(loop.model)
    assert not loop.run.finish() and loop.run.selection is None and not loop.run.gates_active
    assert_same(trained(loop.model), before)


def test_one_run_after_another_prunes_twice(tmp_path: Path) -> None:
    """The second chooses among what the first has left, and a checkpoint of both goes on bit for bit."""
    found, sources = batches(STEPS), [SOURCES["list"], SOURCES["iterator"]]
    configs = [
        with_defaults(selection_scope="model", selection_ratio=ratio, arch_warmup=warmup, discretize_at=until)
        for ratio, warmup, until in ((0.6, WARMUP, 5), (0.5, 1, 4))
    ]

    def second(loop: Loop) -> SelectionRun:
        return SelectionRun(
            loop.model, loop.optimizer, configs[1], loss_of, sources[1](), STEPS - 5, scheduler=loop.scheduler
        )

    whole = Loop(configs[0], found, sources[0]())
    pre_trained = {name: value for name, value in base_weights(whole.model).items() if "classifier" not in name}
    whole.train(5)
    first = whole.run
    assert first.selection is not None
    halfway = whole.checkpoint()
    whole.run = second(whole)
    whole.batches = found[5:]
    whole.train(2)
    later = whole.checkpoint()
    whole.train(STEPS - 5)
    assert set(whole.run.search.grid.names) == set(first.selection.selected) > set(whole.run.selection.selected)
    assert set(whole.run.selection.selected) == adapted_names(whole.model)
    held = [p for group in whole.optimizer.param_groups for p in group["params"]]
    assert set(held) == {p for p in whole.model.parameters() if p.requires_grad}
    assert_same({name: base_weights(whole.model)[name] for name in pre_trained}, pre_trained)

    resumed = Loop(configs[0], found, sources[0]())
    resumed.run.load_state_dict(halfway["run"])  # what the first run has pruned leaves
    resumed.run = second(resumed)
    resumed.batches = found[5:]
    resumed.resume(later)
    resumed.train(STEPS - 5)
    assert resumed.run.selection == whole.run.selection
    assert_same(trained(resumed.model), trained(whole.model))
