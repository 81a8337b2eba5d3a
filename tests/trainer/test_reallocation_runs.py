"""Runs that switch modules off and on again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import TrainerCallback

from diffora_trainer import Selection
from diffora_trainer.adapters.grid import AdapterGrid
from diffora_trainer.hub.plots import plot_selection
from helpers.adapted import lora_layers
from helpers.checks import adapter, assert_continues, assert_same, optimizer_state, snapshot, step_logs
from helpers.marks import mostly_slow
from helpers.processes import train
from helpers.reallocation import DYNAMIC, MOMENTS, rotating, weights_of
from helpers.trainers import CUT, WARMUP, Probe, make_trainer, running, saving_trainer


def test_scoring_leaves_no_trace_in_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same choices the runs of all methods are one run, with dropout and accumulation."""
    rotating(monkeypatch)
    found = []
    for method in ("random", "snip", "synflow", "alpha_test"):
        args = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
        trainer = make_trainer(tmp_path / method, "sft", search={**DYNAMIC, "method": method}, args=args)
        trainer.train()
        state = optimizer_state(trainer.model, trainer.optimizer)
        found.append((step_logs(trainer, ("diffora/score",)), adapter(trainer.model), state))
        assert_same(found[-1], found[0], method)


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "adafactor"])
def test_what_is_off_waits(optim: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, moments and step counters, with weight decay; then it trains on. In steps of two batches."""
    rotating(monkeypatch)
    seen: dict[int, Any] = {}

    def look(model: Any, optimizer: Any, **kwargs: Any) -> None:
        on = running(trainer).reallocation.on.clone() if running(trainer) else None
        seen[len(seen) + 1] = (snapshot(model), optimizer_state(model, optimizer), on)

    args = {"optim": optim, "weight_decay": 0.1, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    trainer = make_trainer(tmp_path, search=DYNAMIC, args=args)
    names = AdapterGrid.from_model(trainer.model).grid.names
    trainer.add_callback(Probe(look))
    trainer.train()

    waited, back = 0, 0
    for step in range(WARMUP, CUT - 1):
        (weights, moments, on), (later, later_moments, _) = seen[step], seen[step + 1]
        for index, name in enumerate(names):
            for weight in weights_of(trainer.model, name):
                still = torch.equal(weights[weight], later[weight])
                assert still != bool(on[index]), f"{weight} in step {step + 1}"
                if on[index]:
                    assert int(later_moments[weight]["step"]) == int(moments[weight]["step"]) + 1
                    back += int(moments[weight]["step"]) < step
                else:
                    assert_same(later_moments[weight], moments[weight], weight)
                    waited += 1
    assert waited and back


def test_run(tmp_path: Path) -> None:
    """The budget holds at each reallocation, and what is on at the cut is kept and nothing jumps there."""
    cap = 3000
    sets: dict[int, Any] = {}

    def look(model: Any, **kwargs: Any) -> None:
        run = running(trainer)
        trainable = sum(p.numel() for name, p in model.named_parameters() if p.requires_grad and ".lora_" in name)
        sets[trainer.state.global_step] = (None if run is None else run.reallocation.on.tolist(), trainable)

    search = {**DYNAMIC, "max_trainable_parameters": cap, "reallocate_every": 1, "score_batches": 1}
    trainer = make_trainer(tmp_path, "sft", search=search, args={"learning_rate": 0.5})
    sizes = AdapterGrid.from_model(trainer.model).grid.parameters
    trainer.add_callback(Probe(look))
    trainer.train()
    trainer.save_model()

    selection = trainer.selection
    assert [entry.step for entry in selection.history] == list(range(WARMUP, CUT))
    assert len({entry.on for entry in selection.history}) > 1 and len({e.scores for e in selection.history}) == 5
    for entry in selection.history:
        cost = sum(size for size, on in zip(sizes, entry.on, strict=True) if on)
        assert sets[entry.step] == (list(entry.on), cost)
        left = [size for size, on in zip(sizes, entry.on, strict=True) if not on]
        assert cap - min(left) < cost <= cap
    final = selection.history[-1]
    assert (selection.kept, selection.scores, selection.step) == (final.on, final.scores, CUT)
    assert selection.frequency == tuple(sum(e.on[i] for e in selection.history) / 5 for i in range(len(sizes)))
    assert 0 < min(f for f in selection.frequency if f) < 1
    log = step_logs(trainer)[CUT]
    assert log["diffora/held_out_loss_before_pruning"] == log["diffora/held_out_loss_after_pruning"]
    assert step_logs(trainer)[4]["diffora/switched_modules"] >= 0
    assert Selection.load(tmp_path) == selection
    plain = plot_selection(replace(selection, history=()), tmp_path / "plain.png")
    assert (tmp_path / "dam.png").read_bytes() == plot_selection(selection, tmp_path / "again.png").read_bytes()
    assert (tmp_path / "dam.png").read_bytes() != plain.read_bytes()
    card = (tmp_path / "README.md").read_text()
    assert "made 5 times, from step 3 to step 7" in card
    assert "| `arch_warmup` | 3.0 |" in card and "| `reallocate_every` | 1.0 |" in card
    model = PeftModel.from_pretrained(make_trainer(tmp_path / "other", "sft").model.unload(), tmp_path)
    assert set(lora_layers(model, "default")) == set(selection.selected)


def test_batches_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each reallocation reads other rows, and the random control draws another order."""
    read: list[list[list[int]]] = []

    def scores(model: Any, batches: list[dict[str, Tensor]]) -> dict[str, float]:
        read.append([row for batch in batches for row in batch["input_ids"].tolist()])
        return {name: index for index, name in enumerate(AdapterGrid.from_model(model).grid.names)}

    search = {**DYNAMIC, "method": "custom", "arch_batch_size": 1, "arch_split": 0.5}
    trainer = make_trainer(tmp_path, search=search, score_function=scores)
    trainer.train()
    assert len(read) == len(MOMENTS) and len({str(row) for rows in read for row in rows}) == 2 * len(MOMENTS)
    trainer = make_trainer(tmp_path / "random", search={**DYNAMIC, "method": "random"})
    trainer.train()
    assert len({entry.scores for entry in trainer.selection.history}) == len(MOMENTS)


@pytest.mark.parametrize("task", mostly_slow(["cls", "sft"], "sft"))
def test_resumed_run_is_the_uninterrupted_run(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the warm-up, at a reallocation, between two, at the cut, and after it; with dropout and accumulation."""
    rotating(monkeypatch)
    whole = saving_trainer(tmp_path / "whole", task, 2, search=DYNAMIC)
    whole.train()
    assert [entry.step for entry in whole.selection.history] == MOMENTS
    for step, phase in ((2, "warm-up"), (5, "search"), (CUT, "selected"), (10, "selected")):
        _resume(whole, task, tmp_path, step, phase)


def test_resumed_between_two_reallocations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rotating(monkeypatch)
    whole = saving_trainer(tmp_path / "whole", "cls", 2, search={**DYNAMIC, "arch_warmup": 4})
    whole.train()
    assert [entry.step for entry in whole.selection.history] == [4, 6]
    _resume(whole, "cls", tmp_path, 5, "search", arch_warmup=4)


def _resume(whole: Any, task: str, folder: Path, step: int, phase: str, **search: Any) -> None:
    checkpoint = Path(whole.args.output_dir, f"checkpoint-{step}")
    state = json.loads((checkpoint / "diffora_state.json").read_text())
    assert state["phase"] == phase
    resumed = saving_trainer(folder / str(step), task, 2, search={**DYNAMIC, **search})
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert_continues(resumed, whole, step)
    first, second = (optimizer_state(t.model, t.optimizer) for t in (whole, resumed))
    assert_same(first, second, f"moments from step {step}")


def test_damaged_history_is_refused(tmp_path: Path) -> None:
    whole = saving_trainer(tmp_path / "whole", "cls", search=DYNAMIC)
    whole.train()
    path = Path(whole.args.output_dir, "checkpoint-5", "diffora_state.json")
    state = json.loads(path.read_text())
    assert [entry["step"] for entry in state["history"]] == [3, 5]
    first = state["history"][0]
    for history in (
        [{**first, "step": 9}],
        [{**first, "on": first["on"][1:]}],
        [{**first, "on": [False] * len(first["on"])}],
        [{**first, "on": first["on"][1:], "scores": first["scores"][1:]}],
        [3],
    ):
        path.write_text(json.dumps({**state, "history": history}))
        with pytest.raises(ValueError, match=r"diffora_state.json.*`history`"):
            saving_trainer(tmp_path / "resumed", "cls", search=DYNAMIC).train(resume_from_checkpoint=str(path.parent))
    path.write_text(json.dumps({**state, "history": []}))
    with pytest.raises(ValueError, match="does not fit this run: whether modules were chosen anew"):
        saving_trainer(tmp_path / "resumed", "cls", search=DYNAMIC).train(resume_from_checkpoint=str(path.parent))


def test_interrupted_run_starts_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interruption switches all modules on, and with them a second training of the same trainer begins."""
    rotating(monkeypatch)

    class Interrupt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 4:
                raise KeyboardInterrupt

    trainer = make_trainer(tmp_path, search=DYNAMIC)
    interrupt = Interrupt()
    trainer.add_callback(interrupt)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    left = running(trainer).reallocation
    assert not all(left.history[-1].on) and left.on.all() and all(site.enabled for site in left.search.adapters.sites)
    trainer.remove_callback(interrupt)
    trainer.train()
    assert [entry.step for entry in trainer.selection.history] == MOMENTS
    assert all(p.requires_grad for name, p in trainer.model.named_parameters() if ".lora_" in name)


def test_run_that_ends_early_keeps_what_is_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step >= 6

    for at, search in ((6, {}), (12, {"discretize_at": 0.999})):
        trainer = make_trainer(tmp_path, search={**DYNAMIC, "arch_warmup": 0.25, "discretize_at": 0.9, **search})
        if at == 6:
            trainer.add_callback(Stop())
        trainer.train()
        selection = trainer.selection
        assert selection.step == at and selection.kept == selection.history[-1].on
        assert set(AdapterGrid.from_model(trainer.model).grid.names) == set(selection.selected)
        assert selection.history[-1].step == at - 1


def test_with_a_budget_of_time(tmp_path: Path) -> None:
    search = {**DYNAMIC, "max_step_time": 1.0, "selection_ratio": 0.25}
    trainer = make_trainer(tmp_path, "sft", search=search)
    trainer.train()
    selection = trainer.selection
    assert len(selection.history) == 3 and selection.kept == selection.history[-1].on
    assert selection.times["before_pruning"] > 0


@pytest.mark.slow
def test_two_processes_reallocate_as_one(tmp_path: Path) -> None:
    """With gradient accumulation, and without a search for unused parameters: as one process on the same rows."""
    search = {**DYNAMIC, "method": "random", "reallocate_every": 1, "selection_ratio": 0.25}
    alone = train(None, tmp_path / "alone", search=search)[0]
    reports = train("ddp", tmp_path / "two", search=search, args={"ddp_find_unused_parameters": False})
    assert reports[0] == reports[1] and all(reports[0]["moved"])
    history = Selection.load(tmp_path / "two").history
    assert len({entry.on for entry in history}) == 5 and history == Selection.load(tmp_path / "alone").history
    assert reports[0]["losses"] == pytest.approx(alone["losses"], abs=1e-4)
    for name, weights in alone["weights"].items():
        assert reports[0]["weights"][name] == pytest.approx(weights, abs=1e-4), name
    assert reports[0]["optimized"] == reports[0]["trainable"]


@pytest.mark.slow
def test_two_processes_resume(tmp_path: Path) -> None:
    """At a reallocation by the gradients of both processes, with dropout."""
    search = {**DYNAMIC, "reallocate_every": 1, "selection_ratio": 0.25, "score_batches": 1}
    args = {"ddp_find_unused_parameters": False, "learning_rate": 0.1}
    run = {"search": search, "args": args, "dropout": 0.1}
    whole = train("ddp", tmp_path / "whole", save_at=[5], **run)
    history = Selection.load(tmp_path / "whole").history
    assert whole[0] == whole[1] and len({entry.on for entry in history}) > 1
    resumed = train("ddp", tmp_path / "resumed", resume=f"{tmp_path}/whole/checkpoint-5", **run)
    for key in ("losses", "scores", "selected", "weights"):
        assert [r[key] for r in resumed] == [w[key] for w in whole], key
    assert Selection.load(tmp_path / "resumed").history == history
