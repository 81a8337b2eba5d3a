"""What the layers below the lowest LoRA compute is kept for each row: the same training, with fewer passes."""

from __future__ import annotations

import copy
import errno
import logging
import os
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import Trainer

from diffora_trainer.prefix import DiskStore, MemoryStore, PrefixCache
from diffora_trainer.prefix.rows import KeyedCollator, rows_of, take_rows_along
from helpers.checks import adapter, step_logs
from helpers.data import lm_dataset
from helpers.depth import LAYERS, NOT_REENTRANT, deep, layer_of, layers_of, trainer_of
from helpers.marks import mostly_slow
from helpers.models import moe
from helpers.rollouts import rollout_trainer
from helpers.trainers import CUT, VOCABULARY, lora, make_trainer


STEPS = 40
LOWEST = 2


def without_dropout(model: Any) -> Any:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    model.config.attention_dropout = model.config.attention_probs_dropout_prob = 0.0
    return model


class Rows:
    """How many rows each layer computes in training mode after the pruning."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.seen: Counter[int] = Counter()
        for index, layer in enumerate(layers_of(trainer.model)):
            layer.register_forward_hook(lambda layer, args, output, index=index: self._note(index, output))

    def _note(self, index: int, output: Any) -> None:
        states = output[0] if isinstance(output, tuple) else output
        # With the states of the cache a layer is called and gives them, but does not compute.
        if self.trainer.state.global_step >= CUT and "forward" not in vars(layers_of(self.trainer.model)[index]):
            self.seen[index] += states.shape[0]


def make(folder: Path, kind: str, task: str, args: dict[str, Any] | None = None, **search: Any) -> Trainer:
    model = without_dropout(deep(kind, task))
    return trainer_of(folder, task, model, {"max_steps": STEPS, **(args or {})}, search=search)


def losses(trainer: Trainer) -> list[float]:
    return [log["loss"] for log in step_logs(trainer).values()]


def assert_close(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert list(first) == list(second)
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "task", "where"),
    mostly_slow(
        (
            (kind, task, where)
            for kind, task in (("llama", "sft"), ("gpt2", "sft"), ("bert", "cls"), ("llama", "cls"))
            for where in ("memory", "disk")
        ),
        ("llama", "sft", "disk"),
        ("gpt2", "sft", "memory"),
        ("bert", "cls", "memory"),
    ),
)
def test_the_same_training_with_each_row_once_below_the_lowest_lora(
    kind: str, task: str, where: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = NOT_REENTRANT if where == "disk" and kind != "bert" else {}
    plain = make(tmp_path / "plain", kind, task, args)
    plain.train()
    cached = make(tmp_path / "cached", kind, task, args, prefix_cache=where)
    rows = Rows(cached)
    batches = []

    def noted(batch: Any) -> Any:
        batches.append(take_rows_along(batch))
        return batches[-1]

    monkeypatch.setattr("diffora_trainer.trainer.prefix.take_rows_along", noted)
    with caplog.at_level(logging.INFO, "diffora_trainer"):
        cached.train()
    assert min(map(layer_of, cached.selection.selected)) == LOWEST
    assert losses(cached) == pytest.approx(losses(plain), rel=2e-4)
    assert losses(cached)[:CUT] == losses(plain)[:CUT]
    assert_close(adapter(cached.model), adapter(plain.model))
    count = len(cached.train_dataset)
    trained = (STEPS - CUT) * cached.args.per_device_train_batch_size
    assert trained > 2 * count
    # On top of each row once there are the passes in which it is tried out.
    for index in range(LOWEST):
        assert count <= rows.seen[index] <= count + 5 * cached.args.per_device_train_batch_size < trained
    if not args:  # with checkpointing layers are run again in the backward pass
        assert all(rows.seen[index] >= trained for index in range(LOWEST, LAYERS))
    layer = {"llama": "model.layers", "gpt2": "transformer.h", "bert": "bert.encoder.layer"}[kind]
    assert f"below {layer}.{LOWEST} compute is kept" in caplog.text and "% of the rows were found" in caplog.text
    assert not list((tmp_path / "cached").glob("tmp*"))  # nothing is left on the disk
    # Rows are known since they were collated, so that nothing is fetched back from a GPU.
    assert len(batches) == STEPS and all(len(found) == cached.args.per_device_train_batch_size for found in batches)
    # Evaluation and what is saved know nothing of it.
    found = [trainer.evaluate(trainer.train_dataset)["eval_loss"] for trainer in (cached, plain)]
    assert found[0] == pytest.approx(found[1], rel=1e-3)


@pytest.mark.parametrize("written", [0.5, None])
def test_a_full_disk_keeps_what_is_there(
    written: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether a part of the row was still written, or nothing."""
    torch.manual_seed(0)
    store = DiskStore(2**20, tmp_path)
    rows = {b"first": torch.randn(5, 8), b"second": torch.randn(3, 8).bfloat16()}
    assert all(store.put(key, row) for key, row in rows.items())
    used, write = store.used, os.pwrite

    def full(file: int, data: Any, place: int) -> int:
        if written is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(file, data[: int(written * len(data))], place)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        assert not store.put(b"third", torch.randn(4, 8))
    assert not store.put(b"fourth", torch.randn(1, 8))  # though there is room again
    assert b"third" not in store and b"fourth" not in store
    assert len(store) == 2 and store.used == used
    for key, row in rows.items():
        assert store.get(key).dtype == row.dtype and store.get(key).equal(row)
    store.close()


@pytest.mark.parametrize("evaluated", [False, True])
def test_what_is_random_is_not_kept(evaluated: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Nor after an evaluation at the step of the pruning, which leaves the model in a mode that draws nothing."""
    args = {"max_steps": CUT + 4, **({"eval_strategy": "steps", "eval_steps": CUT} if evaluated else {})}
    given = {"eval_dataset": lm_dataset(4, seed=9)} if evaluated else {}
    runs = []
    for where in ("none", "memory"):
        trainer = trainer_of(
            tmp_path / where, "sft", deep("llama", "sft"), args, search={"prefix_cache": where}, **given
        )
        trainer.train()
        runs.append((losses(trainer), adapter(trainer.model)))
    assert runs[0][0] == runs[1][0]  # trying it out left no trace in the random numbers
    for name, tensor in runs[0][1].items():
        assert torch.equal(tensor, runs[1][1][name])
    assert "draw random numbers" in caplog.text


def test_nothing_is_kept_where_the_first_layer_is_trained_or_rows_depend_on_each_other(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = make(tmp_path, "llama", "sft", {"max_steps": CUT + 2}, prefix_cache="memory", selection_ratio=1.0)
    whole.train()
    assert "the lowest layer, is trained" in caplog.text

    class Mixing(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, hidden_states: Tensor) -> Tensor:
            return self.inner(hidden_states) + hidden_states.mean(dim=0, keepdim=True)

    runs = []
    for where in ("none", "memory"):
        trainer = make(tmp_path / where, "llama", "sft", {"max_steps": CUT + 4}, prefix_cache=where)
        layer = layers_of(trainer.model)[0]
        layer.input_layernorm = Mixing(layer.input_layernorm)
        trainer.train()
        runs.append(losses(trainer))
    assert runs[0] == runs[1]
    assert "depends on the others of its batch" in caplog.text


def test_a_full_cache_and_accumulation_and_a_resumed_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    args = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "save_strategy": "steps"}
    args = {**args, "save_steps": CUT + 9}
    plain = make(tmp_path / "plain", "llama", "sft", args)
    plain.train()
    full = make(tmp_path / "full", "llama", "sft", args, prefix_cache="memory", prefix_cache_gib=1e-5)
    full.train()
    assert "The prefix cache is full" in caplog.text and caplog.text.count("is full") == 1
    assert losses(full) == pytest.approx(losses(plain), rel=2e-4)
    resumed = make(tmp_path / "full", "llama", "sft", args, prefix_cache="disk")
    resumed.train(resume_from_checkpoint=str(tmp_path / "full" / f"checkpoint-{CUT + 9}"))
    assert losses(resumed)[-5:] == pytest.approx(losses(plain)[-5:], rel=2e-4)
    assert_close(adapter(resumed.model), adapter(plain.model))


def test_rows_of_equal_tokens_and_other_labels_or_places_are_not_taken_for_each_other() -> None:
    tokens = torch.tensor([[5, 6, 7, 0, 0], [5, 6, 7, 0, 0], [0, 0, 5, 6, 7], [5, 6, 7, 0, 0]])
    mask = (tokens != 0).long()
    labels = torch.tensor([1, 1, 1, 2])
    rows = rows_of({"input_ids": tokens, "attention_mask": mask, "labels": labels})
    assert rows is not None and [(row.start, row.stop) for row in rows] == [(0, 3), (0, 3), (2, 5), (0, 3)]
    assert rows[0].key == rows[1].key and len({row.key for row in rows}) == 3
    # In a batch of other padding it is the same row; a mask with a gap is another one.
    first = {"labels": labels[:1]}
    wider = rows_of({"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3).long(), **first})
    assert wider is not None and wider[0].key == rows[0].key
    gap = rows_of({"input_ids": tokens[:1], "attention_mask": torch.tensor([[1, 0, 1, 0, 0]]), **first})
    assert gap is not None and gap[0].key != rows[0].key and (gap[0].start, gap[0].stop) == (0, 5)
    assert rows_of([tokens]) is None and rows_of({"input_ids": tokens, "pixel_values": torch.ones(7, 3)}) is None


def test_refused_where_no_row_comes_again(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="prefix_cache='memory'.*GRPO.*no row comes again"):
        rollout_trainer(tmp_path, search={"prefix_cache": "memory"})


def test_the_auxiliary_loss_of_routers_is_of_all_layers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """That of the others alone would pass for a rounded one, so small it is."""

    def build(where: str, coefficient: float) -> Trainer:
        model = without_dropout(moe(VOCABULARY).model)
        model.config.output_router_logits = True
        model.config.router_aux_loss_coef = model.router_aux_loss_coef = coefficient
        adapter = lora(target_modules=["q_proj", "v_proj"], layers_to_transform=[1])
        args, search = {"max_steps": CUT + 4}, {"prefix_cache": where}
        return make_trainer(tmp_path, "sft", model=model, args=args, search=search, peft_config=adapter)

    runs = [build(where, 0.001) for where in ("none", "memory")]
    for trainer in runs:
        trainer.train()
    assert losses(runs[0]) == losses(runs[1])
    assert "The prefix cache is off: the model returns an auxiliary loss of its routers (aux_loss)" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO, "diffora_trainer"):
        build("memory", 0.0).train()
    assert "% of the rows were found" in caplog.text


@pytest.mark.parametrize("other_rows", [False, True])
def test_a_step_that_runs_the_layers_on_other_rows_too_is_found_out(other_rows: bool) -> None:
    """However little they add to the loss: of contrastive losses, or references without what is frozen."""
    adapter = lora(target_modules=["q_proj", "v_proj"], layers_to_transform=[2, 3])
    model = get_peft_model(without_dropout(deep("llama", "sft")), adapter).train()

    def loss_fn(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        loss = model(**batch).loss
        second = {name: value.flip(0) if other_rows else value for name, value in batch.items()}
        with torch.no_grad(), model.disable_adapter():
            reference = model(**second).loss
        return loss + 1e-6 * reference

    tokens = torch.randint(3, 30, (4, 12), generator=torch.Generator().manual_seed(3))
    batch = {"input_ids": tokens, "labels": tokens}
    cache = PrefixCache(model, loss_fn, MemoryStore(2**20))
    with cache.replay(batch):
        loss_fn(model, batch).backward()
    assert (cache.off is None) != other_rows and len(cache.store) == (0 if other_rows else 4)
    assert not other_rows or "runs the frozen layers 2 times, not always on the same rows" in str(cache.off)


@pytest.mark.parametrize("reads", [1, 2])
def test_a_loss_that_reads_a_layer_below_the_last_frozen_one_is_found_out(reads: int) -> None:
    """However little that adds to the loss; two layers are frozen."""
    adapter = lora(target_modules=["q_proj", "v_proj"], layers_to_transform=[2, 3])
    model = get_peft_model(without_dropout(deep("llama", "sft")), adapter).train()

    def loss_fn(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        output = model(**batch, output_hidden_states=True)
        return output.loss + 1e-6 * output.hidden_states[reads].mean()

    tokens = torch.randint(3, 30, (4, 12), generator=torch.Generator().manual_seed(3))
    cache = PrefixCache(model, loss_fn, MemoryStore(2**20))
    with cache.replay({"input_ids": tokens, "labels": tokens}):
        pass
    assert (cache.off is None) == (reads == 2)
    assert reads == 2 or "reads what the frozen layers give before the last of them" in str(cache.off)


def test_packed_rows_are_said_to_be_packed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    args = {"packing": True, "max_length": 64, "max_steps": CUT + 2}
    trainer = make(tmp_path, "llama", "sft", args, prefix_cache="memory")
    named = "cu_seq_lens_q" in trainer.data_collator([trainer.train_dataset[0]])  # not by TRL 0.28
    trainer.train()
    assert ("The prefix cache is off: the rows of a batch are packed into one" in caplog.text) == named
    assert ("packing_strategy='wrapped'" in caplog.text) == named
    caplog.clear()
    with caplog.at_level(logging.INFO, "diffora_trainer"):
        args = {**args, "packing_strategy": "wrapped", "max_steps": STEPS}
        make(tmp_path, "llama", "sft", args, prefix_cache="memory").train()
    assert "% of the rows were found" in caplog.text


def test_a_collator_that_keeps_rows_is_read_and_copied_as_the_one_inside() -> None:
    class Collator:
        names = ("label",)

        def __call__(self, examples: Any) -> Any:
            return examples

    keyed = KeyedCollator(Collator())
    assert keyed.names == copy.deepcopy(keyed).names == ("label",)
    plain = KeyedCollator(dict)
    assert pickle.loads(pickle.dumps(plain)).collate is dict
    with pytest.raises(AttributeError, match="other"):
        _ = keyed.other
