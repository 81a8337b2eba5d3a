"""The two-run form: a run that ends at the choice, and a second, stock one with the LoRA of the chosen modules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from transformers import Trainer
from trl import SFTTrainer

from diffora_trainer import DiffoRAConfig, SelectionRun, selected_lora_config
from diffora_trainer.cli import main
from helpers.adapted import lora_layers
from helpers.checks import adapter, assert_same, step_logs
from helpers.marks import mostly_slow
from helpers.trainers import CUT, causal_model, classifier, lora, make_trainer, saving_trainer


def shape_of(model: Any) -> dict[str, tuple[int, float, float]]:
    """Rank, scale and dropout of each LoRA of a model."""
    found = {}
    for name, layer in lora_layers(model, "default").items():
        dropout = getattr(layer.lora_dropout["default"], "p", 0.0)
        found[name] = (layer.lora_A["default"].out_features, layer.scaling["default"], dropout)
    return found


SEARCHES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "modules": ("cls", {"fade_out": 2}, {}),
    "ranks": ("sft", {"fade_out": 2, "selection_granularity": "rank"}, {"lora_dropout": 0.1}),
    "ranks, rsLoRA": ("sft", {"selection_granularity": "rank"}, {"use_rslora": True}),
    "ranks of its own": ("sft", {}, {"rank_pattern": {"q_proj": 6}, "alpha_pattern": {"q_proj": 3}}),
}


@pytest.mark.parametrize("name", mostly_slow(SEARCHES, "modules", "ranks"))
def test_a_run_ends_at_the_choice_and_a_stock_one_goes_on(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    task, search, of_lora = SEARCHES[name]
    config = lora(**of_lora)
    before = config.to_dict()
    trainer = make_trainer(tmp_path / "search", task, search={"search_only": True, **search}, peft_config=config)
    with caplog.at_level("INFO", logger="diffora_trainer"):
        trainer.train()
    assert trainer.state.global_step == CUT and trainer.selection is not None and trainer.selection.step == CUT
    assert "Stopping after the search" in caplog.text
    whole = make_trainer(tmp_path / "whole", task, search=search, peft_config=lora(**of_lora))
    whole.train()  # of which it is the first part
    assert whole.state.global_step == 12 and whole.selection.ranks == trainer.selection.ranks
    expected = {step: log for step, log in step_logs(whole).items() if step <= CUT}
    assert_same(step_logs(trainer), expected)
    trainer.save_model(str(tmp_path / "out"))
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "continued with" not in card and ("Nothing was trained after that" in card) != trainer.selection.in_ranks

    configs = [selected_lora_config(trainer), selected_lora_config(tmp_path / "out")]
    assert (
        main(["show", str(tmp_path / "out"), "--lora_config", str(tmp_path / "second" / "adapter_config.json")]) == 0
    )
    configs.append(PeftConfig.from_pretrained(tmp_path / "second"))
    for found in configs:
        assert type(found) is LoraConfig and not found.inference_mode
        base = causal_model() if task == "sft" else classifier().model
        assert shape_of(get_peft_model(base, found)) == shape_of(trainer.model)
    assert config.to_dict() == before
    assert configs[0] is not trainer.model.peft_config["default"]

    # Nothing of this package is in the second run, which trains from the start and learns.
    stock = make_stock(tmp_path / "stock", task, configs[1])
    start = adapter(stock.model)
    assert not any(weight.any() for key, weight in start.items() if "lora_B" in key)
    stock.train()
    assert stock.state.global_step == 12
    moved = [key for key, weight in adapter(stock.model).items() if not torch.equal(weight, start[key])]
    assert len([key for key in moved if "lora_B" in key]) == len(trainer.selection.selected)


def make_stock(folder: Path, task: str, config: LoraConfig) -> Any:
    if task == "sft":
        return make_trainer(folder, task, cls=SFTTrainer, peft_config=config)
    return make_trainer(folder, task, cls=Trainer, model=get_peft_model(classifier().model, config))


def test_it_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    """Before the choice it is resumed; after it the run can be taken up again, without the option, as one run."""
    whole = saving_trainer(tmp_path / "whole", "cls")
    whole.train()
    first = saving_trainer(tmp_path / "first", "cls", search={"search_only": True})
    first.train()
    assert first.state.global_step == CUT
    resumed = saving_trainer(tmp_path / "again", "cls", search={"search_only": True})
    resumed.train(resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-5"))
    assert resumed.state.global_step == CUT and resumed.selection.ranks == first.selection.ranks
    assert_same(adapter(resumed.model), adapter(first.model))
    resumed = saving_trainer(tmp_path / "finished", "cls", search={"search_only": True})
    resumed.train(resume_from_checkpoint=str(tmp_path / "first" / f"checkpoint-{CUT}"))
    assert resumed.state.global_step == CUT and resumed.selection == first.selection
    assert_same(adapter(resumed.model), adapter(first.model))
    for moment in (5, CUT):
        on = saving_trainer(tmp_path / str(moment), "cls")
        on.train(resume_from_checkpoint=str(tmp_path / "first" / f"checkpoint-{moment}"))
        assert on.state.global_step == 12
        assert_same(adapter(on.model), adapter(whole.model))


def test_a_loop_of_one_s_own_is_told() -> None:
    torch.manual_seed(0)
    tiny = classifier()
    model = get_peft_model(tiny.model, lora(task_type="SEQ_CLS"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    config = DiffoRAConfig(search_only=True, method="random", discretize_at=4)
    run = SelectionRun(model, optimizer, config, lambda model, batch: model(**batch).loss, [tiny.batch], 12)
    with pytest.raises(ValueError, match=r"SelectionRun has chosen no modules \(yet\).*train first"):
        selected_lora_config(run)
    steps = 0
    while not run.should_stop:
        run.before_step()
        model(**tiny.batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        run.after_step()
        steps += 1
    assert steps == 4 and run.selection is not None
    assert shape_of(get_peft_model(classifier().model, selected_lora_config(run))) == shape_of(model)


def test_what_cannot_be_handed_over(tmp_path: Path) -> None:
    for options in (
        {"weight_sharing": "layer"},
        {"prefix_cache": "memory"},
        {"extra_sites": {"shortcuts": {"kinds": ["residual1"]}}},
    ):
        with pytest.raises(ValueError, match=rf"`search_only=True` together with `{next(iter(options))}="):
            DiffoRAConfig(search_only=True, **options)
    with pytest.raises(TypeError, match="`search_only` must be a bool"):
        DiffoRAConfig(search_only=1)
    trainer = make_trainer(tmp_path, search={"method": "random", "weight_sharing": "layer"})
    with pytest.raises(ValueError, match=r"DiffoRATrainer has chosen no modules \(yet\)"):
        selected_lora_config(trainer)
    trainer.train()
    with pytest.raises(ValueError, match="share a pair.*which no `LoraConfig` can express"):
        selected_lora_config(trainer)
    with pytest.raises(ValueError, match="neither a folder here nor an adapter on the Hub"):
        selected_lora_config(tmp_path / "nothing")
    # A selection beside the configuration of another adapter.
    plain = make_trainer(tmp_path, search={"method": "random"})
    plain.model.save_pretrained(tmp_path / "other")
    plain.train()
    with pytest.raises(FileNotFoundError, match="no adapter_config.json"):
        plain.selection.save(tmp_path / "selection")
        selected_lora_config(tmp_path / "selection")
    plain.selection.save(tmp_path / "other")
    with pytest.raises(ValueError, match="which was not chosen: it is that of another adapter"):
        selected_lora_config(tmp_path / "other")
    with pytest.raises(TypeError, match="a `Selection`, which does not hold the ranks and scales.*the trainer, the "):
        selected_lora_config(plain.selection)
    for other in (None, {"r": 4}, plain.model):
        with pytest.raises(TypeError, match=f"{type(other).__name__}.*takes .*folder.*trainer.*`SelectionRun`"):
            selected_lora_config(other)
