# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "diffora-trainer",
#     "trl",
#     "peft",
# ]
# ///

"""
The search in a training loop of your own, without any `Trainer`.

`train` is the whole loop in plain PyTorch. The rest of the script gives it something to train that needs neither the
Hub nor a GPU: a small random Llama that learns to count in steps. The arguments of `diffora_trainer.DiffoRAConfig` are
accepted, on the command line or in a YAML file; the command line wins.

```bash
python recipes/custom_loop/custom_loop.py --config recipes/custom_loop/custom_loop.yaml
```
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, get_scheduler, set_seed

from diffora_trainer import DiffoRAConfig, Selection, SelectionRun
from diffora_trainer.cli.parser import ConfigParser


Batch = dict[str, torch.Tensor]
NUMBERS = 97  # vocabulary of the toy task


@dataclass
class RecipeArguments:
    """
    Arguments of the recipe itself.

    Args:
        max_steps (`int`, *optional*, defaults to `200`):
            Optimizer steps of the run.
        learning_rate (`float`, *optional*, defaults to `0.005`):
            Learning rate at the start; it falls linearly to zero.
        batch_size (`int`, *optional*, defaults to `16`):
            Rows of a batch.
        lora_r (`int`, *optional*, defaults to `8`):
            LoRA rank.
        lora_alpha (`int`, *optional*, defaults to `16`):
            LoRA alpha.
        num_layers (`int`, *optional*, defaults to `4`):
            Layers of the random model.
        hidden_size (`int`, *optional*, defaults to `64`):
            Width of the random model.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the model and of the data.
        output_dir (`str`, *optional*, defaults to `"custom-loop-diffora"`):
            Where the adapter is saved.
    """

    max_steps: int = field(default=200, metadata={"help": "Optimizer steps of the run."})
    learning_rate: float = field(default=0.005, metadata={"help": "Learning rate at the start; it falls to zero."})
    batch_size: int = field(default=16, metadata={"help": "Rows of a batch."})
    lora_r: int = field(default=8, metadata={"help": "LoRA rank."})
    lora_alpha: int = field(default=16, metadata={"help": "LoRA alpha."})
    num_layers: int = field(default=4, metadata={"help": "Layers of the random model."})
    hidden_size: int = field(default=64, metadata={"help": "Width of the random model."})
    seed: int = field(default=0, metadata={"help": "Seed of the model and of the data."})
    output_dir: str = field(default="custom-loop-diffora", metadata={"help": "Where the adapter is saved."})


def train(
    model: PeftModel,
    train_batches: Iterator[Batch],
    held_out_batches: Iterator[Batch],
    config: DiffoRAConfig,
    max_steps: int,
    learning_rate: float,
) -> Selection:
    """Train a LoRA model, choose its modules on the way, and go on with the chosen ones alone."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    scheduler = get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=max_steps)
    run = SelectionRun(model, optimizer, config, loss_of, held_out_batches, max_steps, scheduler=scheduler)
    model.train()
    for _ in range(max_steps):
        batch = next(train_batches)
        run.before_step(batch)
        loss_of(model, batch).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        run.after_step()
    assert run.selection is not None
    return run.selection


def loss_of(model: PeftModel, batch: Batch) -> torch.Tensor:
    """What the weights and the gates are trained on."""
    return model(**batch).loss


def make_base(args: RecipeArguments) -> PreTrainedModel:
    """A small Llama with random weights, the same ones at each call."""
    set_seed(args.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=NUMBERS,
            hidden_size=args.hidden_size,
            intermediate_size=2 * args.hidden_size,
            num_hidden_layers=args.num_layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.1,
        )
    )


def batches(batch_size: int, seed: int, length: int = 16) -> Iterator[Batch]:
    """Endless batches of rows that count up by 5 from a random number and start again at the end of the vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        start = torch.randint(NUMBERS, (batch_size, 1), generator=generator)
        rows = (start + 5 * torch.arange(length)) % NUMBERS
        yield {"input_ids": rows, "labels": rows}


def main(script_args: RecipeArguments, diffora_args: DiffoRAConfig) -> dict[str, Any]:
    """Run the recipe. Returns what is printed at the end."""
    lora = LoraConfig(
        r=script_args.lora_r, lora_alpha=script_args.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = get_peft_model(make_base(script_args), lora)
    # Three streams of their own: the rows that the matrix learns from are not those that the weights learn from.
    training, held_out, test = (batches(script_args.batch_size, script_args.seed + offset) for offset in (1, 2, 3))
    probe = next(test)

    def test_loss(model: PeftModel) -> float:
        model.eval()
        with torch.no_grad():
            return float(loss_of(model, probe))

    loss_before = test_loss(model)
    selection = train(model, training, held_out, diffora_args, script_args.max_steps, script_args.learning_rate)

    # What is saved is an ordinary PEFT adapter: it is loaded again without this package.
    output_dir = Path(script_args.output_dir)
    model.save_pretrained(output_dir)
    selection.save(output_dir)
    loss_after = test_loss(model)
    reloaded = PeftModel.from_pretrained(make_base(script_args), output_dir)
    loss_reloaded = test_loss(reloaded)

    print("Chosen modules")
    print(selection.table())
    print(f"\nDiffoRA {selection.summary()}.")
    print(f"Loss: {loss_before:.4f} before, {loss_after:.4f} after, {loss_reloaded:.4f} reloaded by PEFT")
    print(f"Adapter: {output_dir}")
    return {
        "loss_before": loss_before,
        "loss_after": loss_after,
        "loss_reloaded": loss_reloaded,
        "selected": list(selection.selected),
    }


def make_parser(subparsers: argparse._SubParsersAction | None = None, prog: str | None = None) -> Any:
    """The parser of the recipe's arguments, alone or as a subcommand."""
    dataclass_types = (RecipeArguments, DiffoRAConfig)
    if subparsers is not None:
        return subparsers.add_parser(
            "custom_loop", help="Run the DiffoRA recipe with a loop of its own", dataclass_types=dataclass_types
        )
    return ConfigParser(dataclass_types, prog=prog)


if __name__ == "__main__":
    parser = make_parser()
    main(*parser.parse_args_and_config())
