"""Which checkpoints can be resumed from, and what is said of the others."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer, TrainerCallback

from diffora_trainer.trainer.checkpoint import atomic_checkpoint, check_checkpoint, newest_checkpoint
from helpers.checks import adapter, assert_same, step_logs
from helpers.data import classification_dataset
from helpers.trainers import SaveAt, classifier, lora, make_trainer


STATE, TENSORS = "diffora_state.json", "diffora_state.safetensors"
SAVING = {"save_strategy": "steps", "save_steps": 1000}


def build(folder: Path, **kwargs: Any) -> Trainer:
    """Saves at steps 2 (in the warm-up), 5 (gates are closing), 8 (the cut) and 10."""
    kwargs["args"] = {**SAVING, **kwargs.pop("args", {})}
    return make_trainer(folder, **{"search": {"fade_out": 4}, "callbacks": [SaveAt()], **kwargs})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    trainer = build(tmp_path_factory.mktemp("run"))
    trainer.train()
    return trainer


def edit(change: Callable[[dict[str, Any]], Any], name: str = STATE) -> Callable[[Path], None]:
    """Damage to a JSON file."""

    def damage(checkpoint: Path) -> None:
        content = json.loads((checkpoint / name).read_text())
        content = change(content) or content
        (checkpoint / name).write_text(json.dumps(content))

    return damage


def put(key: str, value: object) -> Callable[[Path], None]:
    return edit(lambda state: state.update({key: value}))


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    """Damage to the matrix, which the size in the JSON file does not give away."""

    def damage(checkpoint: Path) -> None:
        content = load_file(checkpoint / TENSORS)
        change(content)
        save_file(content, checkpoint / TENSORS)
        put("tensor_bytes", (checkpoint / TENSORS).stat().st_size)(checkpoint)

    return damage


def cut_short(name: str, left: float = 0.9) -> Callable[[Path], None]:
    def damage(checkpoint: Path) -> None:
        content = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(content[: int(len(content) * left)])

    return damage


def remove(name: str) -> Callable[[Path], None]:
    return lambda checkpoint: (checkpoint / name).unlink()


def replace(old: str, new: str) -> Callable[[Path], None]:
    return lambda checkpoint: (
        (checkpoint / STATE).write_text((checkpoint / STATE).read_text().replace(old, new)) and None
    )


def other_selection(checkpoint: Path) -> None:
    """A selection that is well-formed and keeps other modules."""

    def flip(state: dict[str, Any]) -> None:
        selection = json.loads(state["selection"])
        for module in selection["modules"]:
            module["kept_rank"] = 0 if module["kept"] else module["rank"]
            module["kept"] = not module["kept"]
        state["selection"] = json.dumps(selection)

    edit(flip)(checkpoint)


def rename(state: dict[str, Any]) -> None:
    state["modules"][0] += "_else"


ALWAYS = ("format", "tensor_bytes", "phase", "step", "config", "began_pruned", "base_model")
SEARCHING = ("warmup", "discretize", "prune", "modules", "held_out_position", "held_out_rows", "skipped_steps", "kept")
FILES = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "adapter_model.safetensors")

DAMAGES: dict[str, list[tuple[Callable[[Path], None], str]]] = {
    "search": [
        *((edit(lambda state, key=key: state.pop(key)), STATE) for key in (*ALWAYS, *SEARCHING, "losses", "costs")),
        *((put(key, {"no": "value"}), STATE) for key in (*ALWAYS[:4], "began_pruned", *SEARCHING, "losses", "costs")),
        *((put(key, -1), STATE) for key in ("held_out_position", "skipped_steps", "warmup", "step")),
        (put("phase", "later"), STATE),
        (put("phase", "warm-up"), STATE),  # at step 5, and the warm-up ended at step 3
        (put("step", 6), STATE),
        (put("held_out_position", 1.5), STATE),
        (put("held_out_position", True), STATE),
        (put("losses", [float("nan")]), STATE),
        (edit(lambda state: state.update(losses=["x"])), STATE),
        (put("kept", None), STATE),
        (put("kept", [True]), STATE),
        (put("kept", [1] * 14), STATE),
        (put("costs", {"time": {"all_modules": 1.0}, "memory": None}), STATE),
        (edit(rename), "made for other LoRA modules"),
        (edit(lambda state: [state]), STATE),
        (lambda checkpoint: (checkpoint / STATE).write_text(""), STATE),
        (lambda checkpoint: (checkpoint / STATE).write_bytes(bytes(range(256))), STATE),
        (replace('"skipped_steps": 0', '"skipped_steps": 1e999'), STATE),
        (tensors(lambda m: m.update(values=m["values"][:-1].clone())), TENSORS),
        (tensors(lambda m: m.update(values=m["values"].half())), TENSORS),
        (tensors(lambda m: m["gains"].fill_(float("nan"))), TENSORS),
        (tensors(lambda m: m.pop("gains")), TENSORS),
        (tensors(lambda m: m.update(more=torch.zeros(2))), TENSORS),
        (tensors(lambda m: m["steps"].fill_(-2)), TENSORS),
        (tensors(lambda m: m.update(generator=m["generator"][:-1].clone())), TENSORS),
        (tensors(lambda m: m["generator"].fill_(255)), TENSORS),
        (lambda checkpoint: (checkpoint / TENSORS).write_bytes(b"\xff" * 5424), TENSORS),
    ],
    "selected": [
        *((edit(lambda state, key=key: state.pop(key)), STATE) for key in (*ALWAYS, "selection")),
        (put("selection", None), STATE),
        (put("selection", "{"), STATE),
        (put("selection", "{}"), STATE),
        (other_selection, r"adapter_model\.safetensors.*does not fit diffora_state"),
        (edit(lambda state: state["config"].update(arch_split=0.3)), "arch_split"),
    ],
}  # fmt: skip
for common in DAMAGES.values():
    common += [(remove(name), name) for name in (*FILES, STATE, TENSORS, "adapter_config.json")]
    common += [(cut_short(name), name) for name in (*FILES, STATE, TENSORS, "adapter_config.json")]
    common += [(cut_short(name, 0.1), name) for name in FILES] + [(cut_short(name, 0), name) for name in FILES]
    common += [
        (edit(lambda state: state.update(global_step=3), "trainer_state.json"), "trainer_state.json"),
        (edit(lambda config: config.update(lora_alpha=9), "adapter_config.json"), "lora_alpha"),
    ]


@pytest.mark.parametrize("moment", DAMAGES)
def test_every_damage_is_named(moment: str, whole: Trainer, tmp_path: Path) -> None:
    """Nothing is resumed from a damaged checkpoint, and a refusal leaves nothing behind in the trainer."""
    source = Path(whole.args.output_dir, {"search": "checkpoint-5", "selected": "checkpoint-10"}[moment])
    trainer = build(tmp_path / "resumed")
    for number, (damage, message) in enumerate(DAMAGES[moment]):
        checkpoint = tmp_path / str(number) / source.name
        shutil.copytree(source, checkpoint)
        damage(checkpoint)
        with pytest.raises(Exception) as error:
            trainer.train(resume_from_checkpoint=str(checkpoint))
        assert error.type is ValueError, (number, message, error.value)
        error.match(message)
        assert "lease" in str(error.value)  # what to do

    trainer.train(resume_from_checkpoint=str(source))
    assert trainer.selection == whole.selection
    assert_same(adapter(trainer.model), adapter(whole.model))


def test_checkpoint_of_another_model_is_refused(whole: Trainer, tmp_path: Path) -> None:
    def larger() -> nn.Module:
        model = classifier().model
        model.resize_token_embeddings(model.config.vocab_size + 8)
        return model

    cases = {
        "another base model": {"model": larger},
        "for another base model.*Llama": {"model": lambda: classifier("llama").model},
        "adapter_model.safetensors.*saved: .4, .*needed: .8, ": {"peft_config": lora(r=8)},
        "`lora_alpha`": {"peft_config": lora(lora_alpha=16)},
        "`use_rslora`": {"peft_config": lora(use_rslora=True)},
        "other LoRA modules": {"peft_config": lora(target_modules=["query", "value"])},
    }
    for step in (5, 10):
        for message, change in cases.items():
            if message == "other LoRA modules" and step == 10:
                continue
            trainer = build(tmp_path, **change)
            with pytest.raises(ValueError, match=f"(?s){message}.*Please resume with the model"):
                trainer.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-{step}")


def test_ranks_at_another_scaling_are_refused(tmp_path: Path) -> None:
    """After a choice of ranks `lora_alpha` of the checkpoint is no longer the one that the run was started with."""
    search = {"method": "adalora", "selection_ratio": 0.4, "score_batches": 1}
    build(tmp_path, search=search).train()
    for change in ({"lora_alpha": 16}, {"use_rslora": True}):
        resumed = build(tmp_path / "resumed", search=search, peft_config=lora(**change))
        with pytest.raises(ValueError, match="the scaling of the LoRA differ.*Please resume with the model"):
            resumed.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-10")


def test_newest_whole_checkpoint_is_taken(whole: Trainer, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole.args.output_dir, run)
    remove("trainer_state.json")(run / "checkpoint-10")  # its saving was interrupted
    remove("optimizer.pt")(run / "checkpoint-8")  # its deletion was
    shutil.copytree(run / "checkpoint-2", run / "checkpoint-two")
    before = sorted(run.rglob("*"))

    trainer = build(run)
    begun = []
    trainer.add_callback(
        type("Begin", (TrainerCallback,), {"on_train_begin": lambda _, a, s, c, **k: begun.append(s.global_step)})
    )
    with caplog.at_level(logging.WARNING, "diffora_trainer"):
        assert newest_checkpoint(run)[0] == str(run / "checkpoint-5")
        with pytest.raises(
            ValueError, match="(?s)checkpoint-8.*optimizer.pt.*newest whole one beside it is .*checkpoint-5"
        ):
            trainer.train(resume_from_checkpoint=run / "checkpoint-8")
        assert sorted(run.rglob("*")) == before
        trainer.train(resume_from_checkpoint=True)
    (warning,) = [record.message for record in caplog.records if "not whole" in record.message]
    assert all(
        text in warning for text in ("checkpoint-5", "checkpoint-8", "optimizer.pt", "checkpoint-10", "trainer_state")
    )
    assert begun == [5]
    assert_same(adapter(trainer.model), adapter(whole.model))
    assert_same(step_logs(trainer)[12], step_logs(whole)[12])
    check_checkpoint(run / "checkpoint-10")  # written anew


def test_no_whole_checkpoint_is_an_error(tmp_path: Path) -> None:
    trainer = build(tmp_path / "run")
    with pytest.raises(ValueError, match="resume_from_checkpoint=True.*no valid checkpoint"):
        trainer.train(resume_from_checkpoint=True)
    (tmp_path / "run/checkpoint-4").mkdir(parents=True)
    with pytest.raises(ValueError, match="(?s)no valid checkpoint.*start a new run.*checkpoint-4.*trainer_state.json"):
        trainer.train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="no checkpoint folder"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "nowhere"))


def test_checkpoint_that_is_written_over_is_not_whole_meanwhile(tmp_path: Path, monkeypatch) -> None:
    def run(**args: Any) -> Trainer:
        trainer = make_trainer(
            tmp_path, args={**SAVING, "save_steps": 2, "max_steps": 4, **args}, search={"discretize_at": 4}
        )
        return trainer

    run().train()
    check_checkpoint(tmp_path / "checkpoint-2")
    found = []
    for hook in ("save_model", "_save_optimizer_and_scheduler", "_save_rng_state"):
        trainer = run(learning_rate=1e-3)
        parent = getattr(trainer, hook)

        def stop(*args: Any, parent=parent, **kwargs: Any) -> None:
            parent(*args, **kwargs)
            found.append((tmp_path / "checkpoint-2/trainer_state.json").exists())
            raise KeyboardInterrupt

        monkeypatch.setattr(trainer, hook, stop)
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        assert newest_checkpoint(tmp_path)[0] == str(tmp_path / "checkpoint-4")  # of the first run
        with pytest.raises(ValueError, match="trainer_state.json"):
            check_checkpoint(tmp_path / "checkpoint-2")
    assert found == [False] * 3


def test_only_an_error_of_writing_is_told_as_one(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-2"
    for error, told in (
        (OSError(28, "No space left on device"), True),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"), True),
        (RuntimeError("CUDA out of memory. Tried"), False),
        (KeyError("x"), False),
    ):
        with pytest.raises(OSError if told else type(error)) as caught, atomic_checkpoint(folder, True):
            raise error
        assert (caught.value is not error) is told
        assert not told or all(
            text in str(caught.value) for text in ("checkpoint-2", str(error), "bytes free", "make room")
        )
    with pytest.raises(ConnectionError), atomic_checkpoint(folder, True):  # the upload that follows the writing
        folder.mkdir()
        (folder / "trainer_state.json").write_text('{"global_step": 2}')
        raise ConnectionError


def test_checkpoints_of_the_model_alone(tmp_path: Path) -> None:
    """`save_only_model=True` keeps what can be used, and what it cannot do is said."""
    trainer = make_trainer(
        tmp_path,
        args={
            "save_strategy": "steps",
            "eval_strategy": "steps",
            "save_steps": 2,
            "eval_steps": 2,
            "save_only_model": True,
            "load_best_model_at_end": True,
        },
        eval_dataset=classification_dataset(8, seed=5),
    )
    losses = {2: 0.1, 4: 0.2, 6: 0.3, 8: 0.8, 10: 0.5, 12: 0.7}
    trainer.evaluate = lambda *args, **kwargs: {"eval_loss": losses[trainer.state.global_step]}
    trainer.train()
    best = tmp_path / "checkpoint-10"
    assert Path(trainer.state.best_model_checkpoint) == best
    assert_same(
        dict(sorted(adapter(trainer.model).items())),
        dict(sorted(load_file(best / "adapter_model.safetensors").items())),
    )
    assert not list(tmp_path.rglob("diffora_state*")) and (best / "diffora_selection.json").is_file()
    for wanted in (True, str(best)):
        with pytest.raises(ValueError, match="(?s)save_only_model=True.*please start a new run"):
            make_trainer(tmp_path).train(resume_from_checkpoint=wanted)


def test_named_adapter_resumes(tmp_path: Path) -> None:
    """PEFT saves an adapter of another name than "default" in a folder of its own."""

    def run(folder: Path) -> Trainer:
        torch.manual_seed(0)
        model = get_peft_model(classifier("llama").model, lora(task_type="SEQ_CLS"), adapter_name="mine")
        return build(folder, model=model, peft_config=None)

    whole = run(tmp_path / "whole")
    whole.train()
    resumed = run(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=f"{tmp_path}/whole/checkpoint-5")
    assert resumed.selection == whole.selection
    assert_same(step_logs(resumed)[12], step_logs(whole)[12])
