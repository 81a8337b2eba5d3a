"""The runs of a profile: what is measured, the trainers that are compared, their phases, and how they take turns."""

from __future__ import annotations

import random
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any


sys.path += [str(Path(__file__).resolve().parents[i]) for i in (1, 2)]  # for `adalora` and `embedded`


if TYPE_CHECKING:
    from torch import nn
    from transformers import Trainer

    from diffora_trainer.core.schedule import Schedule

VARIANTS = ("all_linear", "diffora", "kept", "adalora")
PHASES = ("warm-up", "search", "selected")


@dataclass
class ProfileConfig:
    """
    What is measured.

    Args:
        model (`str`, *optional*, defaults to `"llama"`):
            `"llama"` for a model with random weights of the shape in `shape`; `"smollm2"` for the packaged one; or a
            Hub id or local folder of a causal language model.
        shape (`dict`, *optional*):
            Arguments of [`~transformers.LlamaConfig`].
        rank (`int`, *optional*, defaults to `8`):
            LoRA rank.
        sequence_length (`int`, *optional*, defaults to `128`):
            Tokens of each row; rows are full, as packed ones are.
        batch_size (`int`, *optional*, defaults to `4`):
            Rows of a step.
        steps (`int`, *optional*, defaults to `80`):
            Optimizer steps of the run.
        diffora (`dict`, *optional*):
            Options of [`~diffora_trainer.DiffoRAConfig`]; by default its defaults.
        variants (`list[str]`, *optional*):
            Which of `all_linear`, `diffora`, `kept` and `adalora` take part. The ratios are to `all_linear`.
        gradient_checkpointing (`bool`, *optional*, defaults to `False`):
            Whether activations are computed again in the backward pass.
        threads (`int`, *optional*, defaults to `1`):
            Threads on a CPU. One keeps the trainers, each in a thread of its own, out of each other's way.
        memory (`bool`, *optional*, defaults to `True`):
            Whether to measure the peak of memory too.
        modules (`int`, *optional*):
            Instead of all this: time the choice among so many modules.
        output_file (`str`, *optional*):
            Where all single measurements go, as JSON.
    """

    model: str = "llama"
    shape: dict[str, Any] = field(default_factory=dict)
    rank: int = 8
    sequence_length: int = 128
    batch_size: int = 4
    steps: int = 80
    diffora: dict[str, Any] = field(default_factory=dict)
    variants: list[str] = field(default_factory=lambda: list(VARIANTS))
    gradient_checkpointing: bool = False
    threads: int = 1
    memory: bool = True
    modules: int | None = None
    output_file: str | None = None

    def __post_init__(self) -> None:
        if unknown := set(self.variants) - set(VARIANTS):
            raise ValueError(f"`variants` has {sorted(unknown)}; choose from {list(VARIANTS)}.")
        if "all_linear" not in self.variants:
            raise ValueError("`variants` needs 'all_linear', which all ratios are to.")
        if "kept" in self.variants and "diffora" not in self.variants:
            raise ValueError("The variant 'kept' trains what 'diffora' keeps; add that one.")


def make_model(config: ProfileConfig) -> nn.Module:
    """The base model."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, set_seed

    set_seed(0)
    dtype = torch.bfloat16 if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else torch.float32
    if config.model == "llama":
        shape = LlamaConfig(**config.shape)
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            return LlamaForCausalLM._from_config(shape, dtype=dtype)
    name = config.model
    if name == "smollm2":
        from embedded import smollm2_folder

        name = smollm2_folder()
    return AutoModelForCausalLM.from_pretrained(name, dtype=dtype)


def make_trainer(
    config: ProfileConfig, variant: str, kept: list[str] | None = None, callbacks: list[Any] | None = None
) -> Trainer:
    """The trainer of a variant. `kept` are the modules of the variant of this name."""
    import torch
    from adalora import AdaLoraUpdate, adalora_config
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer, TrainingArguments, default_data_collator

    from diffora_trainer import DiffoRAConfig, DiffoRATrainer

    model = make_model(config)
    generator = torch.Generator().manual_seed(0)
    size = (10 * config.batch_size, config.sequence_length)
    rows = torch.randint(model.config.vocab_size, size, generator=generator)
    arguments: dict[str, Any] = {
        "train_dataset": [{"input_ids": row, "labels": row} for row in rows],
        "data_collator": default_data_collator,
        "callbacks": callbacks,
        "args": TrainingArguments(
            tempfile.gettempdir(),
            max_steps=config.steps - (schedule_of(config).prune if variant == "kept" else 0),
            per_device_train_batch_size=config.batch_size,
            learning_rate=1e-4,
            use_cpu=not torch.cuda.is_available(),
            bf16=model.dtype == torch.bfloat16,
            gradient_checkpointing=config.gradient_checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False} if config.gradient_checkpointing else None,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
    }
    common = {"lora_alpha": 2 * config.rank, "task_type": "CAUSAL_LM"}
    if variant == "adalora":
        start = -(-3 * config.rank // 2)
        peft_config = adalora_config(config.steps, start, target_r=config.rank, target_modules="all-linear", **common)
        trainer = Trainer(model=get_peft_model(model, peft_config), **arguments)
        trainer.add_callback(AdaLoraUpdate())
        return trainer
    peft_config = LoraConfig(r=config.rank, target_modules=kept or "all-linear", **common)
    if variant == "diffora":
        return DiffoRATrainer(
            model=model, peft_config=peft_config, diffora_config=DiffoRAConfig(**config.diffora), **arguments
        )
    return Trainer(model=get_peft_model(model, peft_config), **arguments)


def schedule_of(config: ProfileConfig) -> Schedule:
    """When our trainer does what."""
    from diffora_trainer import DiffoRAConfig
    from diffora_trainer.methods.build import make_schedule

    return make_schedule(DiffoRAConfig(**config.diffora), config.steps)


def phase_of(schedule: Schedule, step: int) -> str:
    """The phase that a step (1 is the first) belongs to: the step of the cut is the last of the search."""
    return PHASES[0] if step <= schedule.warmup else PHASES[1] if step <= schedule.prune else PHASES[2]


class Turns:
    """Lets several threads work one at a time, one piece after the other."""

    def __init__(self) -> None:
        self.lock = threading.Condition()
        self.turn: str | None = None
        self.active: set[str] = set()
        self.errors: list[BaseException] = []

    def take(self, name: str) -> None:
        """Wait until it is this one's turn."""
        with self.lock:
            self.lock.wait_for(lambda: self.turn == name or bool(self.errors))
        if self.errors:
            raise RuntimeError("Another trainer failed.")

    def give(self) -> None:
        """End a turn."""
        with self.lock:
            self.turn = None
            self.lock.notify_all()

    def run(self, works: dict[str, Callable[[], None]]) -> None:
        """Give turns, in an order that changes, until all are done."""

        def body(name: str, work: Callable[[], None]) -> None:
            try:
                self.take(name)
                work()
            except BaseException as error:
                self.errors.append(error)
            self.active.discard(name)
            self.give()

        self.active = set(works)
        threads = [threading.Thread(target=body, args=item, daemon=True) for item in works.items()]
        for thread in threads:
            thread.start()
        order = random.Random(0)
        while self.active and not self.errors:
            for name in order.sample(sorted(self.active), len(self.active)):
                if name in self.active and not self.errors:
                    with self.lock:
                        self.turn = name
                        self.lock.notify_all()
                        self.lock.wait_for(lambda: self.turn is None)
        with self.lock:
            self.lock.notify_all()  # those that wait for a turn look at the errors
        for thread in threads:
            thread.join()
        if self.errors:
            raise self.errors[0]
