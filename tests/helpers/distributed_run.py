"""Runs of one process of several, one after the other. Each writes what it found into its folder."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import TrainerCallback

from diffora_trainer import AlternateFactors
from diffora_trainer.experimental.shortcuts.structure import ATTRIBUTE
from helpers.checks import raw_optimizer, step_logs
from helpers.data import lm_dataset
from helpers.trainers import adapter_config, causal_model, make_trainer, running


class At(TrainerCallback):
    """Calls a function at the end of a step."""

    def __init__(self, step: int, function: object) -> None:
        self.step, self.function = step, function

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.step:
            self.function()


class SaveAt(TrainerCallback):
    """Saves a checkpoint at some steps."""

    def __init__(self, steps: list[int]) -> None:
        self.steps = steps

    def on_step_end(self, args, state, control, **kwargs) -> None:
        control.should_save = state.global_step in self.steps


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def trained_weights(model) -> dict[str, Tensor]:
    """The weights of the LoRA modules and shortcuts, gathered from all processes."""
    prefix = model.base_model.prefix
    added = {name: p for name, p in model.named_parameters() if prefix in name or f".{ATTRIBUTE}." in name}
    return {name: full(p.detach()).clone() for name, p in added.items()}


def gathered_parameters(model) -> int:
    """How many parameters FSDP2 gathers; all of them, if it does not shard."""
    groups = [g for m in model.modules() if isinstance(m, FSDPModule) for g in m._get_fsdp_state()._fsdp_param_groups]
    held = {id(parameter): parameter for group in groups for parameter in group.fsdp_params}
    return (
        sum(p.sharded_param.numel() for p in held.values()) if groups else sum(p.numel() for p in model.parameters())
    )


def run(folder: Path, options: dict) -> Accelerator:
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    search = options.get("search", {})
    if rank in options.get("other_search", {}).get("ranks", []):
        search = {**search, **options["other_search"]["search"]}
    trainer = make_trainer(
        folder,
        "sft",
        model=causal_model(attention_dropout=options.get("dropout", 0.0)),
        train_dataset=lm_dataset(options.get("rows", 96)),
        args={
            "per_device_train_batch_size": 4 // world,
            "gradient_accumulation_steps": 2,
            "max_length": 8,  # all rows are longer: equally many tokens on each process
            "save_strategy": "steps",
            "save_steps": 1000,
            **options.get("args", {}),
        },
        peft_config=adapter_config(**options.get("adapter", {})),
        search={"arch_batch_size": 4 // world, "fade_out": 2, **search},
        callbacks=[SaveAt(options.get("save_at", [])), *map(AlternateFactors, options.get("alternate", []))],
    )
    if "die_at" in options and rank == 1:
        trainer.add_callback(At(options["die_at"], lambda: os._exit(1)))
    if "choose_otherwise_at" in options and rank == 1:

        def flip() -> None:
            matrix = running(trainer).search.method
            matrix.discretize = lambda: ~type(matrix).discretize(matrix)

        trainer.add_callback(At(options["choose_otherwise_at"], flip))
    at_cut: dict[str, Tensor] = {}
    after_cut = trainer._after_prune

    def keep_weights() -> None:
        after_cut()
        at_cut.update(trained_weights(trainer.model))

    trainer._after_prune = keep_weights
    trainer.train(resume_from_checkpoint=options.get("resume"))
    weights = trained_weights(trainer.model)
    trainer.save_model(str(folder))
    groups = raw_optimizer(trainer.optimizer).param_groups
    report = {
        "wrapper": type(trainer.model_wrapped).__name__,
        "scores": trainer.selection.scores,
        "selected": trainer.selection.selected,
        "selected_shortcuts": trainer.selection.of_kind("shortcuts"),
        "losses": {step: log["loss"] for step, log in step_logs(trainer).items()},
        "moved": [not torch.equal(weights[name], start) for name, start in at_cut.items()],
        "weights": {name: weight.flatten().tolist() for name, weight in weights.items()},
        "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
        "gathered": gathered_parameters(trainer.model),
        "optimized": sum(p.numel() for group in groups for p in group["params"]),
        "trainable": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
    }
    (folder / f"report.{rank}.json").write_text(json.dumps(report))
    return trainer.accelerator


if __name__ == "__main__":
    torch.set_num_threads(1)
    for folder, options in json.loads(sys.argv[1]).items():
        accelerator = run(Path(folder), options)
    accelerator.end_training()
