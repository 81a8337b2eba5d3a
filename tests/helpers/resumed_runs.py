"""Runs that are stopped and resumed: the task, the accumulation, and the options of the trainer, by a name."""

from __future__ import annotations

from typing import Any

from helpers.trainers import lora


COMPONENTS = {"selection_granularity": "component", "selection_scope": "model", "rank_margin": 1.5}
RUNS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "classifier": ("cls", 1, {}),
    "classifier, accumulated": ("cls", 2, {}),
    "sft": ("sft", 1, {}),
    "sft, accumulated": ("sft", 2, {}),
    "closing": ("cls", 1, {"search": {"fade_out": 4}}),  # chosen at step 4, so step 5 lies among the closing ones
    "ranks": ("cls", 1, {"search": {"fade_out": 4, "selection_granularity": "rank"}}),
    "components": ("cls", 1, {"search": {"fade_out": 4, **COMPONENTS}}),
    "frozen": ("sft", 1, {"search": {"unselected": "freeze"}, "peft_config": lora(lora_dropout=0.1)}),
    "sampled": ("cls", 1, {"search": {"method": "sampled", "selection_scope": "model"}}),
    "sigmoid, second order": ("sft", 1, {"search": {"method": "sigmoid", "arch_order": 2, "arch_every": 2}}),
    # All of equal shapes, so that moments that land on another pair are a wrong result and not a crash.
    "shared pairs": (
        "llama",
        1,
        {
            "peft_config": lora(target_modules=["q_proj", "o_proj"]),
            "search": {"weight_sharing": "model", "selection_scope": "model", "selection_ratio": 0.25},
        },
    ),
    # One module is kept, one of its layer is removed, and those of the other layer share.
    "shared pairs, one removed": (
        "llama",
        1,
        {
            "peft_config": lora(target_modules=["q_proj", "o_proj"]),
            "search": {"weight_sharing": "layer", "selection_scope": "model", "selection_ratio": 0.25},
        },
    ),
}
