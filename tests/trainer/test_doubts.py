"""A choice that rests on nothing says so: in the log, in the selection and on the card."""

from __future__ import annotations

import html
import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor
from torch.nn import functional

from diffora_trainer import DiffoRAConfig, DiffoRATrainer, Selection, SelectionRun
from helpers.adapted import format_1, lora_layers
from helpers.checks import step_logs
from helpers.searches import gain_relaxation
from helpers.trainers import CUT, Probe, causal_model, classifier, lora, make_trainer, search_config


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        r.getMessage() for r in caplog.records if r.name.startswith("diffora_trainer") and r.levelname == "WARNING"
    ]


def assert_told(trainer: Any, folder: Path, caplog: pytest.LogCaptureFixture, pattern: str) -> None:
    """The sentence is logged once, is in the saved selection, and on the card."""
    (note,) = trainer.selection.notes
    assert re.search(pattern, note), note
    assert warnings_of(caplog).count(note) == 1
    trainer.save_model(folder)
    assert Selection.load(folder).notes == (note,)
    assert f"> [!WARNING]\n> {note}" in html.unescape((folder / "README.md").read_text())


@pytest.mark.parametrize("method", ["diffora", "sampled", "sigmoid", "softmax"])
def test_learning_rate_of_zero(method: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = make_trainer(tmp_path, args={"learning_rate": 0.0}, search={"method": method})
    trainer.train()
    assert_told(trainer, tmp_path / "saved", caplog, "choice is arbitrary.*gradient of exactly 0 in all 13 gates")


def test_optimizer_that_does_not_hold_the_lora_is_refused(tmp_path: Path) -> None:
    model = classifier().model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)  # of the weights that are there before the LoRA
    trainer = make_trainer(tmp_path, model=model, optimizers=(optimizer, None))
    with pytest.raises(
        ValueError, match="holds none of the 26 weights.*`get_peft_model`.*`optimizer_cls_and_kwargs=`"
    ):
        trainer.train()
    assert trainer.state.global_step == 0
    with pytest.raises(ValueError, match="holds none of the 26 weights"):  # in a loop of one's own
        SelectionRun(trainer.model, optimizer, search_config(), print, [{}], 12)


def test_optimizer_that_holds_a_part_of_the_lora(caplog: pytest.LogCaptureFixture) -> None:
    model = get_peft_model(classifier().model, lora(task_type="SEQ_CLS"))
    part = [weight for name, weight in model.named_parameters() if "lora_B" in name]
    SelectionRun(model, torch.optim.AdamW(part), search_config(), print, [{}], 12)
    assert "does not hold 13 of the 26 weights of the adapter" in "".join(warnings_of(caplog))
    caplog.clear()
    flat = [torch.nn.Parameter(torch.zeros(8))]  # as tools hold weights that lay them together: nothing can be told
    SelectionRun(model, torch.optim.AdamW(flat), search_config(), print, [{}], 12)
    assert not warnings_of(caplog)


@pytest.mark.parametrize("ratio", [0.5, 0.9])
def test_kernel_that_does_not_call_lora_a(ratio: float, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As the fused kernels of other tools do: the LoRA is trained, and its gate sees nothing."""
    model = get_peft_model(causal_model(), lora(task_type="CAUSAL_LM"))
    layers = lora_layers(model, "default")
    fused = [name for name in layers if name.endswith(("q_proj", "k_proj"))]
    for name in fused:

        def forward(x: Tensor, layer: Any = layers[name]) -> Tensor:
            inner = functional.linear(x, layer.lora_A["default"].weight)
            return layer.base_layer(x) + functional.linear(inner, layer.lora_B["default"].weight) * 2

        layers[name].forward = forward  # type: ignore[method-assign]
    trainer = make_trainer(tmp_path, "sft", model=model, peft_config=None, search={"selection_ratio": ratio})
    trainer.train()
    assert re.search("gates of 4 of 14 modules never had a gradient.*q_proj.*fused", trainer.selection.notes[0])
    if ratio == 0.5:  # none of these is kept
        assert_told(trainer, tmp_path / "saved", caplog, "ranked without evidence. They")
        return
    grid, kept = trainer.selection.grid, set(trainer.selection.selected)
    sizes = {name: size for name, size in zip(grid.names, grid.parameters, strict=True) if name in kept}
    theirs = sum(size for name, size in sizes.items() if name.endswith(("q_proj", "k_proj"))) / sum(sizes.values())
    assert theirs > 0
    assert f"without evidence; {theirs:.0%} of the parameters that are kept are theirs." in trainer.selection.notes[0]


def test_student_that_is_its_own_teacher(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """There is nothing to learn: what the optimizer makes of rounding errors can only raise the loss."""

    class Distilled(DiffoRATrainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
            inputs = {name: value for name, value in inputs.items() if name != "labels"}
            with torch.no_grad(), model.disable_adapter():
                teacher = model(**inputs).logits.softmax(-1)
            return functional.kl_div(model(**inputs).logits.log_softmax(-1), teacher, reduction="batchmean")

    model = classifier().model.eval()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    make = {"model": model, "peft_config": lora(exclude_modules=["classifier"], modules_to_save=[])}
    trainer = make_trainer(tmp_path, cls=Distilled, **make)
    trainer.train()
    assert_told(trainer, tmp_path / "saved", caplog, "LoRA did not lower the held-out loss.*all 13 modules")


def test_nothing_to_choose(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    seen: list[str] = []
    trainer = make_trainer(tmp_path, peft_config=lora(target_modules=["query"]))
    trainer.add_callback(Probe(lambda **kwargs: seen.extend(warnings_of(caplog)), 1))
    trainer.train()
    assert trainer.selection.selected == trainer.selection.modules
    assert any("nothing to choose" in line and "selection_scope='model'" in line for line in seen)  # before it is paid
    assert_told(trainer, tmp_path / "saved", caplog, "nothing to choose: the budget keeps all 2.*each layer")


@pytest.mark.parametrize(
    ("steps", "search"),
    [(3, {}), (20, {}), (60, {"fade_out": 0.3}), (60, {"arch_warmup": 0.24})],
    ids=["a first try", "a short run", "a long fade-out", "a long warm-up"],
)
def test_one_architecture_step(
    steps: int, search: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[str] = []
    trainer = make_trainer(tmp_path, args={"max_steps": steps}, diffora_config=DiffoRAConfig(**search))
    trainer.add_callback(Probe(lambda **kwargs: seen.extend(warnings_of(caplog)), 1))
    trainer.train()
    assert any("makes one architecture step" in line and "`discretize_at`" in line for line in seen)
    assert trainer.selection.confidence is None
    assert_told(trainer, tmp_path / "saved", caplog, "too few steps to compare two halves.*from a random one")


def test_a_sound_choice_is_not_doubted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = make_trainer(tmp_path)
    trainer.train()
    assert trainer.selection.notes == ()
    assert all(line.startswith("No module was kept of") for line in warnings_of(caplog))
    trainer.save_model(tmp_path / "saved")
    assert "[!WARNING]" not in (tmp_path / "saved" / "README.md").read_text()


def test_ranking_tells_all_modules_apart(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, "sft", search={"selection_scope": "model"})
    trainer.train()
    selection = trainer.selection
    ranking = selection.ranking()
    assert sorted(ranking) == sorted(selection.modules)
    assert set(ranking[: len(selection.selected)]) == set(selection.selected)
    assert len(set(zip(selection.scores, selection.gains, strict=True))) == len(selection.modules) == 14
    path = selection.save(tmp_path)
    assert Selection.load(path).ranking() == ranking
    # One that was saved before the gains were kept is read, and ranks by its scores.
    old = Selection.from_json(json.dumps(format_1(selection)))
    assert old.kept == selection.kept and old.gains == old.scores and old.parameters == selection.parameters
    assert set(old.ranking()[: len(old.selected)]) == set(old.selected)


def test_relaxation_of_another_package_is_closed_before_the_cut(tmp_path: Path) -> None:
    """It says itself that its weights train with open gates; no list of names does."""
    search = {"method": "gain", "fade_out": 2}
    with gain_relaxation(trains_open=True):
        trainer = make_trainer(tmp_path, search=search)
        trainer.train()
    logs = step_logs(trainer)
    assert "diffora/held_out_loss_before_fade_out" in logs[CUT - 2]
    assert logs[CUT]["diffora/gap"] == pytest.approx(0, abs=1e-5)  # the gates had fallen to 0 by then
    with gain_relaxation(training_gates=lambda self: None), pytest.raises(TypeError, match="trains_open = True"):
        make_trainer(tmp_path, search=search).train()


def test_line_at_the_pruning_compares_with_the_loss_before_gates_faded_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "diffora_trainer")
    trainer = make_trainer(tmp_path, search={"fade_out": 2})
    trainer.train()
    logs = step_logs(trainer)
    before = logs[CUT - 2]["diffora/held_out_loss_before_fade_out"]
    after = logs[CUT]["diffora/held_out_loss_after_pruning"]
    assert f"Held-out loss {before:.4f} before the fade-out, {after:.4f} after pruning." in caplog.text

    trainer = make_trainer(tmp_path)  # without a closing
    trainer.train()
    before = step_logs(trainer)[CUT]["diffora/held_out_loss_before_pruning"]
    assert f"Held-out loss {before:.4f} just before pruning, " in caplog.text
