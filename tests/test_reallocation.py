"""Dynamic reallocation: what is off costs nothing and waits unchanged, and the set in force at the cut is kept."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    CUT,
    WARMUP,
    Probe,
    adapter,
    assert_continues,
    assert_same,
    lora,
    make_trainer,
    optimizer_state,
    search_config,
    snapshot,
    step_logs,
)
from models import llama
from peft import PeftModel, get_peft_model
from test_distributed import train
from test_proxies import make_search, pairs, warm
from test_resume import build
from torch import Tensor, nn
from transformers import HfArgumentParser, TrainerCallback
from trl.trainer.utils import use_adapter

from diffora_trainer import DiffoRAConfig, Selection, apply_selection
from diffora_trainer.adapters.grid import ModuleGrid, lora_layers
from diffora_trainer.core.selection import Allocation
from diffora_trainer.hub.plots import plot_selection
from diffora_trainer.methods.matrix import ScoreMatrix
from diffora_trainer.search.reallocation import Reallocation


DYNAMIC = {"method": "snip", "reallocate_every": 2, "selection_scope": "model", "score_batches": 2}
MOMENTS = [3, 5, 7]  # from the end of the warm-up, before the cut at step 8


def weights_of(model: nn.Module, name: str) -> list[str]:
    return [f"base_model.model.{name}.lora_{part}.default.weight" for part in "AB"]


def rotating(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores of which a third of the modules is best in turn, so that modules go, wait and come back."""

    def choose(self: ScoreMatrix) -> Tensor:
        return torch.arange(len(self.budget)) % 3 == self.steps % 3

    monkeypatch.setattr(ScoreMatrix, "choose", choose)


@pytest.fixture
def dynamic() -> tuple[Any, list[dict[str, Tensor]], Reallocation]:
    """A model, its batches, and a reallocation that has all modules on."""
    model, batches = warm()
    return model, batches, Reallocation(make_search(model, "snip", selection_scope="model"))


def test_what_is_off_is_not_there(dynamic: Any) -> None:
    """Outputs and gradients are those of a model that has no other LoRA than the modules that are on."""
    model, batches, reallocation = dynamic
    names = reallocation.search.grid.names
    on = torch.arange(len(names)) % 3 == 0
    kept = [name for name, yes in zip(names, on.tolist(), strict=True) if yes]
    reallocation.switch(on)
    plain = get_peft_model(llama().model, lora(target_modules=kept, task_type="CAUSAL_LM"))
    state = model.state_dict()
    plain.load_state_dict({name: state.get(name, state.get(_wrapped(name))) for name in plain.state_dict()})

    called: list[str] = []
    for name, layer in lora_layers(model, "default").items():
        layer.lora_A["default"].register_forward_hook(lambda *_, name=name: called.append(name))
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t.data_ptr()), t)[1], lambda t: t):
        outputs = model(**batches[0])
    expected = plain(**batches[0])
    assert torch.equal(outputs.logits, expected.logits) and set(called) == set(kept)
    outputs.loss.backward()
    expected.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert_same(gradients, {name: p.grad for name, p in plain.named_parameters() if p.grad is not None})
    assert len(gradients) == 2 * len(kept)
    parameters = dict(model.named_parameters())
    off = [parameters[weight] for name in names if name not in kept for weight in weights_of(model, name)]
    assert not {p.data_ptr() for p in off} & set(saved) and not any(p.requires_grad for p in off)


def _wrapped(name: str) -> str:
    """The name of a base weight in the model that has a LoRA there too."""
    head, _, last = name.rpartition(".")
    return f"{head}.base_layer.{last}"


def test_reference_passes_do_not_switch_on(dynamic: Any) -> None:
    """TRL takes the base model for a reference by disabling the adapters, or another adapter of the same layers."""
    model, batches, reallocation = dynamic
    model.eval()
    with torch.no_grad():
        everything = model(**batches[0]).logits
        with model.disable_adapter():
            base = model(**batches[0]).logits
        model.add_adapter("ref", lora(target_modules=llama().target_modules))
        for layer in lora_layers(model, "ref").values():
            nn.init.normal_(layer.lora_B["ref"].weight)
        with use_adapter(model, "ref"):
            reference = model(**batches[0]).logits
        reallocation.switch(torch.arange(len(reallocation.on)) % 2 == 0)
        half = model(**batches[0]).logits
        assert len({float(x.sum()) for x in (everything, base, reference, half)}) == 4
        with use_adapter(model, None):
            assert torch.equal(model(**batches[0]).logits, base)
        assert torch.equal(model(**batches[0]).logits, half)
        with use_adapter(model, "ref"):
            assert torch.equal(model(**batches[0]).logits, reference)
        assert torch.equal(model(**batches[0]).logits, half)
        assert reallocation.release() and not reallocation.release()
        assert torch.equal(model(**batches[0]).logits, everything)
    assert not any("forward" in vars(layer) for layer in lora_layers(model, "default").values())


def test_scoring_leaves_no_trace(dynamic: Any) -> None:
    """Modules that are off are scored as they would be if they were on, also when the scoring fails."""
    model, batches, reallocation = dynamic
    expected = reallocation.search.score(batches)
    on = torch.arange(len(reallocation.on)) % 2 == 0
    reallocation.switch(on)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None

    def state() -> Any:
        flags = {
            name: (p.requires_grad, None if p.grad is None else p.grad.sum()) for name, p in model.named_parameters()
        }
        return snapshot(model), flags, torch.get_rng_state(), reallocation.on, [m.training for m in model.modules()]

    before = state()
    with pytest.raises(ValueError, match="input_ids"):
        reallocation.reallocate([*batches, {"labels": batches[0]["labels"]}], 1)
    assert_same(state(), before)
    assert not reallocation.history
    changed = reallocation.reallocate(batches, 1)
    assert torch.equal(torch.tensor(reallocation.history[0].scores), expected.float())
    assert torch.equal(reallocation.on, reallocation.search.matrix.choose())
    assert changed == int((reallocation.on != on).sum())
    assert_same(snapshot(model), before[0])
    assert torch.equal(torch.get_rng_state(), before[2])


def test_without_a_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop of one's own, and its state in another model."""
    rotating(monkeypatch)
    model, batches = warm()
    reallocation = Reallocation(make_search(model, "grad_norm", selection_scope="model"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], weight_decay=0.1)
    everything, outputs = pairs(model), []
    for step in range(1, 6):
        before = [[w.detach().clone() for w in weights] for weights in everything]
        model(**batches[step % 3]).loss.backward()
        optimizer.step()
        # A gradient of 0 is not none: the weights would decay.
        optimizer.zero_grad(set_to_none=False)
        for weights, old, on in zip(everything, before, reallocation.on.tolist(), strict=True):
            assert not on or not torch.equal(weights[1], old[1])
            assert on or all(map(torch.equal, weights, old))
        if step in (2, 3, 4):
            reallocation.reallocate(batches, step)
        if step == 4:
            other, _ = warm()
            other.load_state_dict(model.state_dict())
            restored = Reallocation(make_search(other, "grad_norm", selection_scope="model"))
            restored.load_state_list(json.loads(json.dumps(reallocation.state_list())))
            assert torch.equal(restored.on, reallocation.on) and restored.history == reallocation.history
            outputs = [m.eval()(**batches[0]).logits for m in (model, other)]
    assert torch.equal(*outputs)
    selection = reallocation.finish(5)
    assert selection.step == 5 and selection.kept == tuple(restored.on.tolist()) and len(selection.history) == 3
    weights = snapshot(model)
    apply_selection(model, selection, optimizer)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 2 * sum(selection.kept)
    assert_same(adapter(model), {name: weights[_in_model(name)] for name in adapter(model)})


def _in_model(name: str) -> str:
    return name.replace(".weight", ".default.weight")


def test_processes_that_disagree_stop(dynamic: Any) -> None:
    model, batches, _ = dynamic

    def reduce(values: Tensor) -> Tensor:  # scores agree, bits do not
        return values if values.dtype == torch.float64 else values / 2

    reallocation = Reallocation(make_search(model, "snip", reduce=reduce))
    with pytest.raises(ValueError, match="disagree on which modules to keep"):
        reallocation.reallocate(batches, 1)
    assert reallocation.on.all() and not reallocation.history


def test_scoring_leaves_no_trace_in_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same choices the runs of all methods are one run, with dropout and accumulation."""
    rotating(monkeypatch)
    found = []
    for method in ("constant", "snip", "synflow", "alpha_test"):
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
        on = trainer._callback.reallocation.on.clone() if trainer._callback.reallocation else None
        seen[len(seen) + 1] = (snapshot(model), optimizer_state(model, optimizer), on)

    args = {"optim": optim, "weight_decay": 0.1, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    trainer = make_trainer(tmp_path, search=DYNAMIC, args=args)
    names = ModuleGrid.from_model(trainer.model).names
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
        reallocation = trainer._callback.reallocation
        trainable = sum(p.numel() for name, p in model.named_parameters() if p.requires_grad and ".lora_" in name)
        sets[trainer.state.global_step] = (None if reallocation is None else reallocation.on.tolist(), trainable)

    search = {**DYNAMIC, "max_trainable_parameters": cap, "reallocate_every": 1, "score_batches": 1}
    trainer = make_trainer(tmp_path, "sft", search=search, args={"learning_rate": 0.5})
    sizes = ModuleGrid.from_model(trainer.model).parameters
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
    assert log["diffora/held_out_loss_before_cut"] == log["diffora/held_out_loss_after_cut"]
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
        return {name: index for index, name in enumerate(ModuleGrid.from_model(model).names)}

    search = {**DYNAMIC, "method": "custom", "arch_batch_size": 1, "arch_split": 0.5}
    trainer = make_trainer(tmp_path, search=search, score_function=scores)
    trainer.train()
    assert len(read) == len(MOMENTS) and len({str(row) for rows in read for row in rows}) == 2 * len(MOMENTS)
    trainer = make_trainer(tmp_path / "constant", search={**DYNAMIC, "method": "constant"})
    trainer.train()
    assert len({entry.scores for entry in trainer.selection.history}) == len(MOMENTS)


@pytest.mark.parametrize("task", ["cls", "sft"])
def test_resumed_run_is_the_uninterrupted_run(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the warm-up, at a reallocation, between two, at the cut, and after it; with dropout and accumulation."""
    rotating(monkeypatch)
    whole = build(tmp_path / "whole", task, 2, search=DYNAMIC)
    whole.train()
    assert [entry.step for entry in whole.selection.history] == MOMENTS
    for step, phase in ((2, "warm-up"), (5, "search"), (CUT, "selected"), (10, "selected")):
        _resume(whole, task, tmp_path, step, phase)


def test_resumed_between_two_reallocations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rotating(monkeypatch)
    whole = build(tmp_path / "whole", "cls", 2, search={**DYNAMIC, "arch_warmup": 4})
    whole.train()
    assert [entry.step for entry in whole.selection.history] == [4, 6]
    _resume(whole, "cls", tmp_path, 5, "search", arch_warmup=4)


def _resume(whole: Any, task: str, folder: Path, step: int, phase: str, **search: Any) -> None:
    checkpoint = Path(whole.args.output_dir, f"checkpoint-{step}")
    state = json.loads((checkpoint / "diffora_state.json").read_text())
    assert state["phase"] == phase
    resumed = build(folder / str(step), task, 2, search={**DYNAMIC, **search})
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert_continues(resumed, whole, step)
    first, second = (optimizer_state(t.model, t.optimizer) for t in (whole, resumed))
    assert_same(first, second, f"moments from step {step}")


def test_damaged_history_is_refused(tmp_path: Path) -> None:
    whole = build(tmp_path / "whole", "cls", search=DYNAMIC)
    whole.train()
    path = Path(whole.args.output_dir, "checkpoint-5", "diffora_state.json")
    state = json.loads(path.read_text())
    assert [entry["step"] for entry in state["history"]] == [3, 5]
    first = state["history"][0]
    for history in (
        [],
        [{**first, "step": 9}],
        [{**first, "on": first["on"][1:]}],
        [{**first, "on": [False] * len(first["on"])}],
        [{**first, "on": first["on"][1:], "scores": first["scores"][1:]}],
        [3],
    ):
        path.write_text(json.dumps({**state, "history": history}))
        with pytest.raises(ValueError, match=r"diffora_state.json.*`history`"):
            build(tmp_path / "resumed", "cls", search=DYNAMIC).train(resume_from_checkpoint=str(path.parent))


def test_interrupted_run_starts_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second training of the same trainer begins with all modules on."""
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
    assert not trainer._callback.reallocation.on.all()
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
        assert set(ModuleGrid.from_model(trainer.model).names) == set(selection.selected)
        assert selection.history[-1].step == at - 1


def test_with_a_budget_of_time(tmp_path: Path) -> None:
    search = {**DYNAMIC, "cost": "time", "selection_ratio": 0.25}
    trainer = make_trainer(tmp_path, "sft", search=search)
    trainer.train()
    selection = trainer.selection
    assert len(selection.history) == 3 and selection.kept == selection.history[-1].on
    assert selection.times["before_cut"] > 0


def test_history_through_json(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, search=DYNAMIC)
    trainer.train()
    selection = trainer.selection
    data = json.loads(selection.to_json())
    assert Selection.from_json(json.dumps(data)) == selection
    assert data["frequency"] == list(selection.frequency)
    del data["history"], data["frequency"]  # as written before there was one
    old = Selection.from_json(json.dumps(data))
    assert old == replace(selection, history=()) and old.frequency == ()
    entry = selection.history[0]
    for history in (
        [{}],
        3,
        [{"step": 1, "scores": [math.inf] * len(entry.on), "on": list(entry.on)}],
        [{"step": 1, "scores": list(entry.scores)[1:], "on": list(entry.on)}],
        [{"step": 1, "scores": list(entry.scores), "on": [1.0] * len(entry.on)}],
        [{"step": 1, "scores": list(entry.scores), "on": [False] * len(entry.on)}],
    ):
        with pytest.raises(ValueError, match="not a selection saved by"):
            Selection.from_json(json.dumps({**data, "history": history}))
    with pytest.raises(ValueError, match="history of another number"):
        replace(selection, history=(Allocation(1, entry.scores[1:], entry.on[1:]),))


def test_config() -> None:
    config = DiffoRAConfig(method="snip", reallocate_every=0.2, discretize_at=0.999)
    assert DiffoRAConfig(**json.loads(json.dumps(config.to_dict()))) == config
    assert config.schedule(100) == (5, 100) and list(config.reallocations(100)) == [5, 25, 45, 65, 85]
    assert list(search_config(**DYNAMIC).reallocations(12)) == MOMENTS
    assert not DiffoRAConfig(method="snip").reallocations(100)
    assert list(DiffoRAConfig(method="snip", reallocate_every=0.01, discretize_at=0.5).reallocations(3)) == [1]
    (parsed,) = HfArgumentParser(DiffoRAConfig).parse_args_into_dataclasses(
        ["--method", "snip", "--reallocate_every", "0.2", "--discretize_at", "0.999"]
    )
    assert parsed == config
    for options, message in (
        ({"reallocate_every": 2}, "`reallocate_every=2.0` with `method='diffora'`"),
        ({"reallocate_every": 2, "method": "snip", "weight_sharing": "layer"}, "`weight_sharing='none'`"),
        ({"reallocate_every": 0.2, "method": "snip"}, "chosen once and never anew.*0.999"),
        ({"reallocate_every": 5, "method": "snip", "arch_warmup": 0, "discretize_at": 5}, "chosen once"),
        ({"reallocate_every": 0, "method": "snip"}, "`reallocate_every=0.0`.*neither"),
        ({"reallocate_every": 1.5, "method": "snip"}, "neither"),
        ({"reallocate_every": 0.1, "method": "snip", "arch_warmup": 0.3}, "cut before the search starts|never anew"),
    ):
        with pytest.raises(ValueError, match=message):
            DiffoRAConfig(**options)
    with pytest.raises(TypeError, match="`reallocate_every` must be a number"):
        DiffoRAConfig(method="snip", reallocate_every="2")


def test_refusals(dynamic: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffora_trainer.trainer import checks as trainer_utils

    model, _, reallocation = dynamic
    with pytest.raises(ValueError, match="call `reallocate` before"):
        reallocation.finish()
    with pytest.raises(ValueError, match="not one of 14 modules"):
        reallocation.load_state_list([{"step": 1, "scores": [1.0], "on": [True]}])
    with pytest.raises(ValueError, match="method='diffora'`, which scores nothing"):
        Reallocation(make_search(model, "diffora"))
    trainer = make_trainer(tmp_path, search={**DYNAMIC, "method": "constant"})
    plugin = type("Plugin", (), {"fsdp_version": 2, "activation_checkpointing": False})()
    plugin.state_dict_type = "StateDictType.FULL_STATE_DICT"
    trainer.is_fsdp_enabled = True
    monkeypatch.setattr(type(trainer.accelerator.state), "fsdp_plugin", plugin, raising=False)
    with pytest.raises(ValueError, match="`reallocate_every=2.0` with FSDP.*ddp.yaml"):
        trainer_utils.check_trainer(trainer)


@pytest.mark.slow
def test_two_processes_reallocate_as_one(tmp_path: Path) -> None:
    """With gradient accumulation, and without a search for unused parameters: as one process on the same rows."""
    search = {**DYNAMIC, "method": "constant", "reallocate_every": 1, "selection_ratio": 0.25}
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
