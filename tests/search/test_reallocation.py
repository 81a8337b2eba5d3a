"""Dynamic reallocation: what is off costs nothing and waits unchanged, and the set in force at the cut is kept."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from peft import get_peft_model
from torch import Tensor, nn
from transformers import HfArgumentParser
from trl.trainer.utils import use_adapter

from diffora_trainer import DiffoRAConfig, Selection, apply_selection
from diffora_trainer.core.allocation import Allocation
from diffora_trainer.methods.build import make_schedule, method_of
from diffora_trainer.search.reallocation import Reallocation
from helpers.adapted import lora_layers
from helpers.checks import adapter, assert_same, snapshot
from helpers.models import llama
from helpers.options import make_config
from helpers.reallocation import DYNAMIC, MOMENTS, rotating, weights_of
from helpers.searches import make_search, pairs, warm
from helpers.trainers import lora, make_trainer, search_config


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
            model.merge_adapter()  # which the modules that are off have no part in
            torch.testing.assert_close(model(**batches[0]).logits, reference)
            model.unmerge_adapter()
        with pytest.raises(ValueError, match=r"is off \(`reallocate_every`\), and merged.*unmerge_adapter"):
            model.merge_adapter()
        model.unmerge_adapter()
        torch.testing.assert_close(model(**batches[0]).logits, half)
        assert reallocation.release() and not reallocation.release()
        torch.testing.assert_close(model(**batches[0]).logits, everything)
    for layer in lora_layers(model, "default").values():
        assert not {"forward", "merge"} & set(vars(layer))


def test_hooks_of_a_model_spread_over_devices_are_put_back(dynamic: Any) -> None:
    """Accelerate puts a `forward` of its own on each module, which moves the inputs to its device."""
    model, batches, reallocation = dynamic
    on = torch.ones(len(reallocation.on), dtype=torch.bool)
    layer: Any = next(iter(lora_layers(model, "default").values()))
    called: list[Any] = []

    class Moves(ModelHook):
        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            called.append(module)
            return args, kwargs

    add_hook_to_module(layer, Moves())
    hooked = vars(layer)["forward"]
    expected = model(**batches[0]).logits
    for number, switched in enumerate([torch.arange(len(on)) > 0, on], start=1):
        reallocation.switch(switched)
        model(**batches[0])
        assert (vars(layer)["forward"] is hooked) == bool(switched[0]) and called == [layer] * number
    assert model(**batches[0]).logits.equal(expected)


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
    assert torch.equal(reallocation.on, reallocation.search.method.discretize())
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
            records = json.loads(json.dumps([asdict(entry) for entry in reallocation.history]))
            restored.restore([Allocation.from_dict(record) for record in records])
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


def test_history_through_json(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, search=DYNAMIC)
    trainer.train()
    selection = trainer.selection
    data = json.loads(selection.to_json())
    assert Selection.from_json(json.dumps(data)) == selection
    assert data["frequency"] == list(selection.frequency)
    data.update(history=[], frequency=[])
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
    config = make_config(method="snip", reallocate_every=0.2, discretize_at=0.999)
    assert make_config(**json.loads(json.dumps(config.to_dict()))) == config
    schedule = make_schedule(config, 100)
    assert (schedule.warmup, schedule.prune) == (5, 100) and list(schedule.updates) == [5, 25, 45, 65, 85]
    assert list(make_schedule(search_config(**DYNAMIC), 12).updates) == MOMENTS
    assert list(make_schedule(DiffoRAConfig(method="snip"), 100).updates) == [25]
    short = make_config(method="snip", reallocate_every=0.01, discretize_at=0.5)
    assert list(make_schedule(short, 3).updates) == [1]
    (parsed,) = HfArgumentParser(DiffoRAConfig).parse_args_into_dataclasses(
        ["--method", "snip", "--method_options", '{"reallocate_every": 0.2}', "--discretize_at", "0.999"]
    )
    assert parsed == config
    for options, message in (
        ({"reallocate_every": 2}, "`reallocate_every` with `method='diffora'`"),
        ({"reallocate_every": 2, "method": "snip", "weight_sharing": "layer"}, "`weight_sharing='none'`"),
        ({"reallocate_every": 0.2, "method": "snip"}, "chosen once and never anew.*0.999"),
        ({"reallocate_every": 5, "method": "snip", "arch_warmup": 0, "discretize_at": 5}, "chosen once"),
        ({"reallocate_every": 0, "method": "snip"}, "`reallocate_every=0.0`.*neither"),
        ({"reallocate_every": 1.5, "method": "snip"}, "neither"),
        (
            {"reallocate_every": 0.1, "method": "snip", "arch_warmup": 0.3},
            "pruned before the search starts|never anew",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            method_of(make_config(**options))
    with pytest.raises(TypeError, match="`reallocate_every` must be a number"):
        method_of(make_config(method="snip", reallocate_every="2"))


def test_refusals(dynamic: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffora_trainer.trainer import checks as trainer_utils

    model, _, reallocation = dynamic
    with pytest.raises(ValueError, match="call `reallocate` before"):
        reallocation.finish()
    with pytest.raises(ValueError, match="not one of 14 modules"):
        reallocation.restore([Allocation(1, (1.0,), (True,))])
    with pytest.raises(ValueError, match="method='diffora'`, which scores nothing"):
        Reallocation(make_search(model, "diffora"))
    trainer = make_trainer(tmp_path, search={**DYNAMIC, "method": "random"})
    plugin = type("Plugin", (), {"fsdp_version": 2, "activation_checkpointing": False})()
    plugin.state_dict_type = "StateDictType.FULL_STATE_DICT"
    trainer.is_fsdp_enabled = True
    monkeypatch.setattr(type(trainer.accelerator.state), "fsdp_plugin", plugin, raising=False)
    with pytest.raises(ValueError, match="`reallocate_every=2.0` with FSDP.*ddp.yaml"):
        trainer_utils.check_trainer(trainer)
