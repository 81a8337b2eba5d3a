"""Batches that are split until the pruning: the same training, with less memory."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import DataCollatorForLanguageModeling
from trl import DPOConfig, DPOTrainer

from diffora_trainer import ArchitectureSearch, DiffoRAConfig, DiffoRAMixin, DiffoRATrainer
from diffora_trainer.search.memory import peak_bytes
from diffora_trainer.search.micro_batches import MicroBatches
from diffora_trainer.search.runtime import Runtime
from helpers.checks import step_logs
from helpers.data import preference_dataset, tiny_tokenizer, token_rows
from helpers.marks import mostly_slow
from helpers.models import moe
from helpers.threads import in_two_processes
from helpers.trainers import (
    CUT,
    VOCABULARY,
    WARMUP,
    arguments,
    causal_model,
    deep_model,
    lora,
    make_trainer,
    search_config,
)


STILL = {"attention_dropout": 0.0}


def setting(task: str) -> dict[str, Any]:
    if task == "lm":  # the stock trainer divides by the labels of all accumulated batches
        return {
            "model": causal_model(**STILL),
            "train_dataset": token_rows(),
            "data_collator": DataCollatorForLanguageModeling(tiny_tokenizer(), mlm=False),
        }
    return {"model": causal_model(**STILL)} if task == "sft" else {}


@pytest.mark.parametrize(
    ("task", "accumulation"),
    mostly_slow(((task, count) for task in ("lm", "sft", "llama") for count in (1, 2)), ("sft", 2), ("llama", 1)),
)
def test_a_run_is_the_same_up_to_rounding(tmp_path: Path, task: str, accumulation: int) -> None:
    runs = {}
    for parts in (1, 2, 3):
        rows: list[tuple[str, int]] = []
        trainer = make_trainer(
            tmp_path / str(parts),
            task if task != "lm" else "cls",
            search={"search_micro_batches": parts},
            args={"gradient_accumulation_steps": accumulation, "max_steps": 12, "optim": "sgd", "learning_rate": 0.5},
            **setting(task),
        )

        def note(module: nn.Module, args: Any, kwargs: Any, trainer: Any = trainer, rows: Any = rows) -> None:
            if torch.is_grad_enabled():
                rows.append(("selected" if trainer.selection else "search", len(kwargs["input_ids"])))

        trainer.model.register_forward_pre_hook(note, with_kwargs=True)
        trainer.train()
        whole = trainer.args.per_device_train_batch_size
        assert max(count for phase, count in rows if phase == "search") == -(-whole // parts)
        assert max(count for phase, count in rows if phase == "selected") == whole  # as soon as modules are pruned
        runs[parts] = trainer
    for parts in (2, 3):
        logs = [step_logs(runs[one]) for one in (1, parts)]
        for step in logs[0]:
            for name in ("loss", "grad_norm", "diffora/arch_loss", "diffora/gate_mean"):
                if name in logs[0][step]:
                    assert float(logs[1][step][name]) == pytest.approx(float(logs[0][step][name]), rel=2e-4), (
                        step,
                        name,
                    )
        assert runs[parts].selection.selected == runs[1].selection.selected
        assert runs[parts].selection.gains == pytest.approx(runs[1].selection.gains, rel=1e-2, abs=1e-5)


def test_a_resumed_run_equals_the_whole(tmp_path: Path) -> None:
    options = {"search": {"search_micro_batches": 2}, "args": {"save_strategy": "steps", "save_steps": 1}}
    whole = make_trainer(tmp_path, "sft", **options)
    whole.train()
    for step in (WARMUP, CUT - 1):
        resumed = make_trainer(tmp_path, "sft", **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        for (name, ours), (_, theirs) in zip(
            resumed.model.named_parameters(), whole.model.named_parameters(), strict=True
        ):
            assert torch.equal(ours, theirs), name


class Contrastive(DiffoRATrainer):
    """Compares the rows of a batch with each other."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        logits = model(**{name: value for name, value in inputs.items() if name != "labels"}).logits
        similar = logits @ logits.T
        return nn.functional.cross_entropy(similar, torch.arange(len(logits)))


def test_rows_that_are_compared_with_each_other_are_not_split(tmp_path: Path, caplog) -> None:
    trainer = make_trainer(tmp_path, cls=Contrastive, search={"search_micro_batches": 2})
    with pytest.raises(ValueError, match="search_micro_batches=2.*neither the sum nor a mean.*gradient_accumulation"):
        trainer.train()
    runs = []
    for limits in ({"max_step_memory": 0.9}, {"max_step_memory": 0.9, "search_micro_batches": 1}):
        trainer = make_trainer(tmp_path, cls=Contrastive, search=limits)
        trainer.train()
        runs.append([log["loss"] for log in step_logs(trainer).values()])
    assert runs[0] == runs[1]  # nobody asked for it, so it is said
    assert caplog.text.count("not split into micro-batches: the loss of a batch") == 2  # of training and held-out ones


def mixture_of_experts(coefficient: float) -> nn.Module:
    model = moe(VOCABULARY).model
    model.config.output_router_logits = True
    model.config.router_aux_loss_coef = model.router_aux_loss_coef = coefficient
    return model


def test_the_auxiliary_loss_of_routers_is_not_split(tmp_path: Path, caplog) -> None:
    """It is no sum over rows, and each part would add one. With its usual coefficient it is as small as rounding."""

    def build(coefficient: float, **search: Any) -> Any:
        options = {"peft_config": lora(target_modules=["q_proj", "v_proj"]), "search": search}
        return make_trainer(tmp_path, "sft", model=mixture_of_experts(coefficient), **options)

    routers = {"model": mixture_of_experts(0.001), "peft_config": lora(target_modules=["q_proj", "v_proj"])}
    plain = make_trainer(tmp_path, search={"search_micro_batches": 2}, **{**setting("lm"), **routers})
    for trainer in (plain, build(0.001, search_micro_batches=2)):
        with pytest.raises(ValueError, match=r"search_micro_batches=2.*auxiliary loss of its routers \(aux_loss\)"):
            trainer.train()
    runs = []
    for limits in ({"max_step_memory": 0.99}, {"max_step_memory": 0.99, "search_micro_batches": 1}):
        trainer = build(0.001, **limits)
        trainer.train()
        runs.append([log["loss"] for log in step_logs(trainer).values()])
    assert runs[0] == runs[1]  # nobody asked for it, so it is said
    assert caplog.text.count("not split into micro-batches: the model returns an auxiliary loss") == 2
    whole, split = (build(0.0, search_micro_batches=parts) for parts in (1, 2))  # without it nothing stands in the way
    for trainer in (whole, split):
        trainer.train()
    for step, log in step_logs(whole).items():
        assert step_logs(split)[step]["loss"] == pytest.approx(log["loss"], rel=2e-4)


@pytest.mark.slow
def test_a_memory_limit_holds_for_the_whole_run(tmp_path: Path) -> None:
    """Counted in the real steps of the trainer, the same batches with and without a limit."""
    peaks: dict[str, dict[str, list[int]]] = {}
    for name, search in (("all", {}), ("limited", {"max_step_memory": 0.4})):
        trainer = make_trainer(
            tmp_path / name,
            search=search,
            model=deep_model(),
            train_dataset=token_rows(48),
            data_collator=DataCollatorForLanguageModeling(tiny_tokenizer(), mlm=False),
            args={"per_device_train_batch_size": 6},
        )
        found = peaks[name] = {"search": [], "selected": []}

        def counted(*args: Any, trainer: Any = trainer, step: Any = trainer.training_step, found: Any = found) -> Any:
            result: list[Any] = []
            trainer.model.zero_grad()
            found["selected" if trainer.selection else "search"].append(peak_bytes(lambda: result.append(step(*args))))
            return result[0]

        trainer.training_step = counted
        trainer.train()
    # Beside what grows with the rows there are the gradients of the LoRA weights.
    assert max(peaks["limited"]["search"]) < 0.5 * max(peaks["all"]["search"])
    assert max(peaks["limited"]["selected"]) < 0.5 * max(peaks["all"]["search"])


def test_the_architecture_gradient_of_a_loop_of_one_s_own(tmp_path: Path) -> None:
    tokens = torch.randint(3, 30, (5, 12), generator=torch.Generator().manual_seed(3))
    labels = tokens.clone()
    for row in range(5):
        labels[row, : 2 * row] = -100
    gradients = []
    for parts in (1, 2, 5):
        torch.manual_seed(0)
        model = get_peft_model(causal_model(**STILL), lora())
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        config = DiffoRAConfig(search_micro_batches=parts)
        search = ArchitectureSearch(model, config, loss_fn=lambda m, b: m(**b).loss)
        search.begin()
        loss = search.step({"input_ids": tokens, "labels": labels})
        gradients.append((loss, search.select().gains))
    for loss, gains in gradients[1:]:
        assert loss == pytest.approx(gradients[0][0], rel=1e-5)
        assert gains == pytest.approx(gradients[0][1], rel=1e-3, abs=1e-7)


def test_the_auxiliary_loss_of_routers_in_a_loop_of_one_s_own() -> None:
    tokens = torch.randint(3, 30, (4, 12), generator=torch.Generator().manual_seed(3))
    for coefficient, refused in ((0.001, True), (0.0, False)):
        model = get_peft_model(mixture_of_experts(coefficient), lora(target_modules=["q_proj", "v_proj"]))
        config = DiffoRAConfig(search_micro_batches=2)
        search = ArchitectureSearch(model, config, loss_fn=lambda m, b: m(**b).loss)
        search.begin()
        with pytest.raises(ValueError, match="auxiliary loss of its routers") if refused else nullcontext():
            search.step({"input_ids": tokens, "labels": tokens})
        assert not model._forward_hooks and not model.get_base_model()._forward_hooks


def test_how_the_losses_of_parts_add_up_is_found_out() -> None:
    rows = torch.tensor([1.0, 2.0, 4.0, 8.0])
    labels = torch.tensor([[1, 1, 1], [1, 1, -100], [1, -100, -100], [1, 1, 1]])
    counts = (labels[:, 1:] != -100).sum(1).float()
    batch = {"rows": rows, "labels": labels, "counts": counts, "name": "text", "other": [1, 2, 3, 4]}

    def weights(loss_of) -> list[float]:
        parts = MicroBatches(2).split(batch, loss_of)
        assert [len(part["rows"]) for part, _ in parts] == [2, 2] and parts[0][0]["name"] == "text"
        assert [part["other"] for part, _ in parts] == [[1, 2], [3, 4]]
        return [weight for _, weight in parts]

    assert weights(lambda b: float(b["rows"].sum()) / 7) == [1.0, 1.0]
    assert weights(lambda b: float(b["rows"].mean())) == [0.5, 0.5]
    mean_of_labels = lambda b: float((b["rows"] * b["counts"]).sum() / b["counts"].sum())  # noqa: E731
    assert weights(mean_of_labels) == pytest.approx([3 / 5, 2 / 5])
    with pytest.raises(ValueError, match="neither the sum nor a mean"):
        weights(lambda b: float(b["rows"].max()))
    with pytest.raises(ValueError, match="not a dictionary of tensors with equally many rows"):
        MicroBatches(2).split({"a": torch.zeros(3), "b": torch.zeros(4)}, lambda b: 0.0)
    with pytest.raises(ValueError, match=r"packed into one.*cu_seq_lens_q.*packing_strategy='wrapped'"):
        packed = {"input_ids": torch.ones(1, 9), "cu_seq_lens_q": torch.tensor([0, 4, 9])}
        MicroBatches(2).split(packed, lambda b: 0.0)
    # Rows of one length do not tell a mean over rows from one over labels. When lengths differ it is asked again.
    even = {**batch, "labels": torch.ones(4, 3, dtype=torch.int), "counts": torch.full((4,), 2.0)}
    asked: list[int] = []

    def mean_of_rows(part) -> float:
        asked.append(len(part["rows"]))
        return float(part["rows"].mean())

    splitter = MicroBatches(2)
    assert [weight for _, weight in splitter.split(even, mean_of_rows)] == [0.5, 0.5]
    first = len(asked)
    assert [weight for _, weight in splitter.split(even, mean_of_rows)] == [0.5, 0.5] and len(asked) == first
    assert [weight for _, weight in splitter.split(batch, mean_of_rows)] == [0.5, 0.5] and len(asked) == 2 * first
    one = {"rows": torch.ones(1)}
    assert MicroBatches(4).split(one, lambda b: 1 / 0) == [(one, 1.0)]


@pytest.mark.parametrize(("prompt", "of_labels"), [(5, True), (0, False)])
def test_a_rule_that_fits_a_batch_by_rounding_does_not_stay(prompt: int, of_labels: bool) -> None:
    """Losses of batches of another size differ by 3e-4 of them, as they may in half precision."""
    for seed in range(100):
        generator = torch.Generator().manual_seed(seed)
        splitter = MicroBatches(2)
        for _ in range(6):
            lengths = torch.randint(10, 60, (8,), generator=generator)
            losses = 2.3 + 0.3 * torch.randn(8, generator=generator)
            labels = torch.full((8, 60), -100)
            for row, length in enumerate(lengths.tolist()):
                labels[row, prompt:length] = 1
            counts = (labels[:, 1:] != -100).sum(1).float() if of_labels else torch.ones(8)

            def loss_of(part: Any) -> float:
                mean = (part["losses"] * part["counts"]).sum() / part["counts"].sum()
                return float(mean * (1 + 3e-4 * torch.randn((), generator=generator)))  # noqa: B023

            batch = {"losses": losses, "counts": counts, "labels": labels}
            weights = [weight for _, weight in splitter.split(batch, loss_of)]
        assert weights == pytest.approx(
            [float(counts[:4].sum() / counts.sum()), float(counts[4:].sum() / counts.sum())]
        )


def test_processes_split_alike_whatever_is_in_their_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss may wait for the other processes, as SFT's does for its metrics: all have to compute it equally often."""
    monkeypatch.setattr("diffora_trainer.search.micro_batches.world_size", lambda: 2)
    whole = torch.ones(4, 5, dtype=torch.int)
    short, empty = whole.clone(), whole.clone()
    short[0, 2:] = empty[:2] = -100
    batches = {0: (whole, whole, empty, whole, whole), 1: (whole, short, whole, whole[:1], whole)}

    def process(rank: int, reduce: Any) -> list[list[float]]:
        def loss_of(part: Any) -> float:
            counts = (part["labels"][:, 1:] != -100).sum(1).float()
            return float(reduce(part["rows"].mean() * 0) + (part["rows"] * counts).sum() / counts.sum())

        splitter = MicroBatches(2, runtime=Runtime(reduce=reduce))
        values = torch.tensor([1.0, 2.0, 4.0, 8.0])
        own = [{"rows": values[: len(labels)], "labels": labels} for labels in batches[rank]]
        return [[weight for _, weight in splitter.split(batch, loss_of)] for batch in own]

    found = in_two_processes(process)
    # A part without a label would be left out by one process alone, and one row makes fewer parts: no batch is split.
    assert found[0] == [[0.5, 0.5], [0.5, 0.5], [1.0], [1.0], [0.5, 0.5]]
    assert found[1] == [[0.5, 0.5], pytest.approx([5 / 13, 8 / 13]), [1.0], [1.0], [0.5, 0.5]]


class DiffoRADPOTrainer(DiffoRAMixin, DPOTrainer):
    pass


def test_preference_trainers_are_not_split(tmp_path: Path, caplog) -> None:
    """Their batches hold a pair as two rows far apart; at the start each loss is log 2, whatever is paired."""
    settings = {
        "cls": DiffoRADPOTrainer,
        "model": causal_model(),
        "args": arguments(tmp_path, DPOConfig),
        "train_dataset": preference_dataset(24),
    }
    with pytest.raises(ValueError, match="search_micro_batches=2.*DiffoRADPOTrainer.*compares rows"):
        dpo(**settings, options={"search_micro_batches": 2})
    # What was refused had its LoRA put into the model, which another trainer does not take.
    trainer = dpo(**{**settings, "model": causal_model()}, options={"max_step_memory": 0.99})
    assert "`max_step_memory=0.99` is kept after the pruning alone: the loss of DiffoRADPOTrainer" in caplog.text
    trainer.train()
    assert trainer.selection.memory["predicted"] <= 0.99 * trainer.selection.memory["all_modules"]


def dpo(cls: Any, options: dict[str, Any], **settings: Any) -> Any:
    return cls(
        **settings, processing_class=tiny_tokenizer(), peft_config=lora(), diffora_config=search_config(**options)
    )
