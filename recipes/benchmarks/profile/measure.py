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
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from profile_memory import measure_all_memory
from profile_runs import PHASES, ProfileConfig, Turns, make_trainer, schedule_of


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


def make_table(config: ProfileConfig, seconds: dict[str, list[float]], memory: dict[str, dict[str, int]]) -> str:
    """
    Medians and ratios of steps of the same number, with the quartiles of those ratios, as Markdown; in the search the
    ratio of the whole phase, with the quartiles of blocks of as many steps as one architecture step stands for.
    """
    schedule = schedule_of(config)
    warmup, cut = schedule.warmup, schedule.prune
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
                size = schedule.updates.step
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
    memory = measure_all_memory(config) if config.memory else {}
    if config.output_file and os.environ.get("RANK", "0") == "0":
        Path(config.output_file).parent.mkdir(parents=True, exist_ok=True)
        Path(config.output_file).write_text(json.dumps({"seconds": seconds, "peak_bytes": memory}, indent=1) + "\n")
    return make_table(config, seconds, memory)


def make_parser(prog: str | None = None) -> Any:
    """The parser of the command line and the YAML file."""
    from diffora_trainer.cli.parser import ConfigParser

    return ConfigParser((ProfileConfig,), prog=prog)


if __name__ == "__main__":
    table = main(*make_parser().parse_args_and_config())
    if os.environ.get("RANK", "0") == "0":  # the order of the turns is the same in all processes
        print(table)
