"""Which rows the recipe makes, and how a row is named."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import yaml


@dataclass
class HeteroLoRAConfig:
    """
    Which rows are made, and what they have in common.

    Args:
        methods (`list[str]`, *optional*):
            `lora` is LoRA on all target modules, and `lora:rank=32` the same at another rank. Any other name is a
            `method` of [`~diffora_trainer.DiffoRAConfig`], whose options follow colons (lists with commas). By default
            a score is taken once, after the warm-up (the static form); `snip:reallocate_epochs=0.2` chooses anew after
            each 0.2 of an epoch until the last step (the dynamic form).
        seeds (`list[int]`, *optional*):
            Seeds of head, LoRA, order of the rows and choice.
        target_modules (`list[str]`, *optional*):
            Ends of the names of the modules to choose from.
        keep (`float`, *optional*, defaults to `0.25`):
            Part of the modules of the whole model that is kept. Their rank is `rank / keep`, so that the parameters
            are those of `lora`.
        warmup (`float`, *optional*, defaults to `0.05`):
            Part of the run in which all modules train before the first choice, since `lora_B` is 0 at the start, and
            SNIP and SYNFLOW with it.
        score_rows (`str`, *optional*, defaults to `"train"`):
            Which rows scores read. `"train"`: random ones of the training set, as in the paper, so that all rows of
            the table train on the same data. `"held_out"`: a part of the training set that is not trained on until the
            cut, as is the default of this package. `diffora` always has the second.
        output_dir (`str`, *optional*, defaults to `"heterolora"`):
            Where `results.jsonl` and `table.md` go.
    """

    methods: list[str] = field(default_factory=lambda: ["lora", "constant", "snip"])
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    target_modules: list[str] = field(default_factory=lambda: ["q_proj", "v_proj"])
    keep: float = 0.25
    warmup: float = 0.05
    score_rows: str = "train"
    output_dir: str = "heterolora"

    def __post_init__(self) -> None:
        for method in self.methods:
            parse_method(method)
        if not self.methods or not self.seeds:
            raise ValueError("`methods` and `seeds` must not be empty.")
        if not 0 < self.keep <= 1:
            raise ValueError(f"`keep` is the part of the modules that is kept, in (0, 1]; got {self.keep}.")
        if self.score_rows not in ("train", "held_out"):
            raise ValueError(f"`score_rows` must be 'train' or 'held_out', got {self.score_rows!r}.")


def parse_method(text: str) -> tuple[str, dict[str, Any]]:
    """
    `"snip:reallocate_epochs=0.2"` as a name and options.

    Raises:
        ValueError: if there is no such method or option, or an option has no value.
    """
    from diffora_trainer import DiffoRAConfig
    from diffora_trainer.methods.registry import method_names

    METHODS = [*method_names(), "constant"]  # the last is the random order by its name of before

    name, *words = text.split(":")
    known = {entry.name: str(entry.type) for entry in dataclasses.fields(DiffoRAConfig) if entry.name != "method"}
    known["reallocate_epochs"] = "float"
    if name == "lora":
        known = {"rank": "int"}
    elif name not in METHODS or name == "custom":
        raise ValueError(
            f"There is no method {name!r}; known are {['lora', *(known for known in METHODS if known != 'custom')]}."
        )
    options: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or key not in known:
            raise ValueError(f"{word!r} in {text!r} is not an `option=value` of {name!r}; known are {sorted(known)}.")
        is_list = any(kind in known[key] for kind in ("list", "tuple", "Sequence"))
        options[key] = value.split(",") if is_list else yaml.safe_load(value)
    return name, options
