# /// script
# requires-python = ">=3.10"
# dependencies = ["diffora-trainer", "trl", "peft"]
# ///

"""
What does a search cost, and what does it save? Time per step and peak memory in every phase of a run, against stock
PEFT on the stock trainer.

Four trainers run side by side in one process and take turns step by step, in an order that changes, so that whatever
disturbs the machine disturbs all of them: LoRA on all linear layers, `DiffoRATrainer`, LoRA on exactly the modules
that it keeps (from the moment it has chosen), and AdaLoRA. Memory is measured in a process of its own for each.

# A Llama-like model of 16 thin layers, on a CPU
```bash
python recipes/benchmarks/profile/measure.py --config recipes/benchmarks/profile/llama_cpu.yaml
```

# The packaged SmolLM2-135M
```bash
python recipes/benchmarks/profile/measure.py --config recipes/benchmarks/profile/smollm2.yaml
```

# Llama shapes of 1B and 8B in bf16 with checkpointing and sequences of 2,048 tokens, on a GPU
```bash
python recipes/benchmarks/profile/measure.py --config recipes/benchmarks/profile/llama_1b.yaml
python recipes/benchmarks/profile/measure.py --config recipes/benchmarks/profile/llama_8b.yaml
```

# In two processes
```bash
accelerate launch --config_file recipes/accelerate_configs/ddp.yaml recipes/benchmarks/profile/measure.py \
    --config recipes/benchmarks/profile/llama_cpu.yaml --memory false --variants all_linear diffora kept
```

# How long it takes to score, choose and cut 10,000 modules
```bash
python recipes/benchmarks/profile/measure.py --modules 10000
```
"""

# This file is not called `profile.py`, because that would hide the module of this name in the standard library.

from __future__ import annotations

import json
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any


sys.path += [str(Path(__file__).resolve().parents[i]) for i in (1, 2)]  # for `adalora` and `embedded`


if TYPE_CHECKING:
    from torch import nn
    from transformers import Trainer

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
            max_steps=config.steps - (schedule_of(config)[1] if variant == "kept" else 0),
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


def phase_of(schedule: tuple[int, int], step: int) -> str:
    """The phase that a step (1 is the first) belongs to: the step of the cut is the last of the search."""
    warmup, cut = schedule
    return PHASES[0] if step <= warmup else PHASES[1] if step <= cut else PHASES[2]


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


def measure_times(config: ProfileConfig) -> dict[str, list[float]]:
    """Seconds of each step of each variant. `kept` begins after the cut, so its list is shorter."""
    import torch
    from transformers import TrainerCallback

    torch.set_num_threads(config.threads)
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    turns, seconds = Turns(), defaultdict(list)
    selected: list[str] = []

    class Turn(TrainerCallback):
        """A turn goes from the beginning of one step to that of the next, so nothing is left out."""

        def __init__(self, name: str) -> None:
            self.name, self.started = name, 0.0

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step > 0:
                self._stop()
            turns.give()
            turns.take(self.name)
            synchronize()
            self.started = time.perf_counter()

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self._stop()

        def _stop(self) -> None:
            synchronize()
            seconds[self.name].append(time.perf_counter() - self.started)

    def work(name: str) -> None:
        if name == "kept":
            while not selected:
                turns.give()
                turns.take(name)
        trainer = make_trainer(config, name, kept=selected or None, callbacks=[Turn(name)])
        if name == "diffora":

            class Report(TrainerCallback):
                def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                    if trainer.selection is not None and not selected:
                        selected.extend(trainer.selection.selected)

            trainer.add_callback(Report())
        trainer.train()

    turns.run({name: lambda name=name: work(name) for name in config.variants})
    return dict(seconds)


def measure_memory(config: ProfileConfig, variant: str, kept: list[str] | None) -> dict[str, int]:
    """Peak bytes in each phase of a variant, alone in this process."""
    import torch
    from transformers import TrainerCallback

    torch.set_num_threads(config.threads)
    peaks: dict[str, int] = {}
    schedule = schedule_of(config)

    class Peak(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step in (0, *schedule):
                _reset_peak()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            phase = PHASES[2] if variant == "kept" else phase_of(schedule, state.global_step)
            peaks[phase] = max(peaks.get(phase, 0), _peak())

    # The last callback of the list, so that what the search does at the end of a step is measured too.
    trainer = make_trainer(config, variant, kept=kept)
    trainer.add_callback(Peak())
    trainer.train()
    return peaks | {"modules": list(trainer.selection.selected)} if variant == "diffora" else peaks


def _peak() -> int:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if not status.is_file():
        raise OSError("Peak memory of a process is read from /proc, which this system lacks; pass `--memory false`.")
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def _reset_peak() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the highest size becomes the present one


def _memory_worker(job: tuple[ProfileConfig, str, list[str] | None]) -> dict[str, Any]:
    return measure_memory(*job)


def schedule_of(config: ProfileConfig) -> tuple[int, int]:
    """The last step of the warm-up and the step of the cut."""
    from diffora_trainer import DiffoRAConfig

    return DiffoRAConfig(**config.diffora).schedule(config.steps)


def make_table(config: ProfileConfig, seconds: dict[str, list[float]], memory: dict[str, dict[str, int]]) -> str:
    """
    Medians and ratios of steps of the same number, with the quartiles of those ratios, as Markdown; in the search the
    ratio of the whole phase, with the quartiles of blocks of as many steps as one architecture step stands for.
    """
    from diffora_trainer import DiffoRAConfig

    warmup, cut = schedule_of(config)
    spans = {PHASES[0]: (2, warmup), PHASES[1]: (warmup, cut - 1), PHASES[2]: (cut + 2, config.steps)}
    lines = [
        "| phase | variant | seconds a step | ratio to all-linear (quartiles; range if fewer than 8) | peak memory, "
        "MB | ratio |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    base = seconds["all_linear"]

    def part(name: str, start: int, stop: int) -> list[float]:
        missing = config.steps - len(seconds[name])  # of a variant that joined later
        return seconds[name][max(0, start - missing) : max(0, stop - missing)]

    for phase, (start, stop) in spans.items():
        for name in seconds:
            mine = part(name, start, stop)
            if not mine or (name == "kept" and phase != PHASES[2]):
                continue
            pairs = list(zip(mine, base[stop - len(mine) : stop], strict=True))
            if phase == PHASES[1]:  # few steps are followed by an architecture step: the mean counts, not the median
                size = DiffoRAConfig(**config.diffora).arch_every
                blocks = [pairs[i : i + size] for i in range(0, len(pairs) - size + 1, size)]
                ratios = [sum(a for a, _ in block) / sum(b for _, b in block) for block in blocks]
                middle, typical = sum(mine) / sum(b for _, b in pairs), statistics.fmean(mine)
            else:
                ratios, typical = [a / b for a, b in pairs], statistics.median(mine)
                middle = statistics.median(ratios)
            peak, standard = memory.get(name, {}).get(phase), memory.get("all_linear", {}).get(phase)
            cells = [phase, f"`{name}`", f"{typical:.3f}", _quartiles(middle, ratios)]
            cells += [f"{peak / 2**20:,.0f}", f"{peak / standard:.3f}"] if peak and standard else ["", ""]
            lines.append("| " + " | ".join(cells) + " |")
    for name, values in seconds.items():
        if len(values) == config.steps:
            cells = ["whole run", f"`{name}`", f"{sum(values):.1f} in all", f"{sum(values[1:]) / sum(base[1:]):.3f}"]
            lines.append("| " + " | ".join([*cells, "", ""]) + " |")
    return "\n".join(lines)


def _quartiles(middle: float, ratios: list[float]) -> str:
    if len(ratios) < 8:  # too few for quartiles: the range
        return f"{middle:.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
    low, _, high = statistics.quantiles(ratios, n=4)
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def measure_many(count: int) -> dict[str, float]:
    """Seconds, without the model's own passes, that a search, a choice and a cut of many modules take."""
    import torch
    from peft import LoraConfig, get_peft_model
    from torch import nn

    from diffora_trainer import ArchitectureSearch, DiffoRAConfig, apply_selection

    kinds = 4

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for kind in range(kinds):
                self.add_module(f"proj_{kind}", nn.Linear(8, 8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + sum(module(x) for module in self.children()) / 1000

    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Layer() for _ in range(count // kinds))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    torch.manual_seed(0)
    names = [f"proj_{kind}" for kind in range(kinds)]
    model = get_peft_model(Many(), LoraConfig(r=2, target_modules=names))
    parameters = [p for p in model.parameters() if p.requires_grad]
    for parameter in parameters:
        nn.init.normal_(parameter, std=0.1)
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    batch = torch.randn(4, 8)

    def loss_fn(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return model(batch).square().mean()

    def clock(function: Callable[[], Any]) -> float:
        started = time.perf_counter()
        function()
        return time.perf_counter() - started

    loss_fn(model, batch).backward()
    optimizer.step()
    optimizer.zero_grad()
    search = ArchitectureSearch(model, DiffoRAConfig(), loss_fn=loss_fn)
    passes, steps = [], []
    search.begin()
    for _ in range(6):
        passes.append(clock(lambda: torch.autograd.grad(loss_fn(model, batch), parameters)))
        steps.append(clock(lambda: search.step(batch)))
    chosen: list[Any] = []
    found = {
        "a pass of the model": statistics.median(passes),
        "an architecture step besides it": statistics.median(steps) - statistics.median(passes),
        "choosing": clock(lambda: chosen.append(search.finish())),
        "cutting": clock(lambda: apply_selection(model, chosen[0], optimizer)),
    }
    return found


def main(config: ProfileConfig) -> str:
    """Measure, and show the table. Returns it."""
    if config.modules is not None:
        return "\n".join(f"{what}: {seconds:.2f} s" for what, seconds in measure_many(config.modules).items())
    seconds = measure_times(config)
    memory: dict[str, dict[str, int]] = {}
    kept: list[str] | None = None
    if config.memory:
        context = multiprocessing.get_context("spawn")
        for variant in config.variants:  # `diffora` before `kept`
            with context.Pool(1) as pool:
                memory[variant] = pool.map(_memory_worker, [(config, variant, kept)])[0]
            kept = memory[variant].pop("modules", kept)  # type: ignore[arg-type]
    if config.output_file and os.environ.get("RANK", "0") == "0":
        Path(config.output_file).parent.mkdir(parents=True, exist_ok=True)
        Path(config.output_file).write_text(json.dumps({"seconds": seconds, "peak_bytes": memory}, indent=1) + "\n")
    return make_table(config, seconds, memory)


def make_parser(prog: str | None = None) -> Any:
    """The parser of the command line and the YAML file."""
    from trl import TrlParser

    return TrlParser((ProfileConfig,), prog=prog)


if __name__ == "__main__":
    table = main(*make_parser().parse_args_and_config())
    if os.environ.get("RANK", "0") == "0":  # the order of the turns is the same in all processes
        print(table)
