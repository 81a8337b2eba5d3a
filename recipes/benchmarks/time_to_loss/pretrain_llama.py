# /// script
# requires-python = ">=3.10"
# dependencies = ["diffora-trainer", "trl", "datasets"]
# ///

"""
Train a small Llama of 16 layers on text, as the pre-trained model of `shakespeare_llama.yaml`: deep enough that the
depth of a step matters, and small enough for a CPU.

```bash
python recipes/benchmarks/time_to_loss/pretrain_llama.py --dataset_name ../shared/data/wikitext2_small \\
    --output_dir llama-16-layers
```

The tokenizer (byte-level BPE) is learned from the same text. Model and tokenizer are saved into `output_dir`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed
from trl import SFTConfig, SFTTrainer

from diffora_trainer.cli.parser import ConfigParser


sys.path.append(str(Path(__file__).resolve().parents[2]))

from splits import DataArguments, load_splits  # noqa: E402


END, PAD = "<|end|>", "<|pad|>"


@dataclass
class PretrainingArguments(DataArguments):
    """
    The model and what it reads. The data set needs a column `text`.

    Args:
        num_layers (`int`, *optional*, defaults to `16`):
            Layers of the model.
        hidden_size (`int`, *optional*, defaults to `128`):
            Its width; heads are 32 wide, and the MLP is 2.75 times as wide.
        vocab_size (`int`, *optional*, defaults to `4096`):
            Tokens of the vocabulary.
        steps (`int`, *optional*, defaults to `1200`):
            Optimizer steps of 8 packed sequences of 128 tokens.
        learning_rate (`float`, *optional*, defaults to `2e-3`):
            Highest learning rate; it rises over a twentieth of the steps and falls as a cosine.
        seed (`int`, *optional*, defaults to `0`):
            Seed of weights and data.
        output_dir (`str`, *optional*, defaults to `"llama-16-layers"`):
            Where the model goes.
    """

    dataset_test_split: str = "validation"
    num_layers: int = 16
    hidden_size: int = 128
    vocab_size: int = 4096
    steps: int = 1200
    learning_rate: float = 2e-3
    seed: int = 0
    output_dir: str = "llama-16-layers"


def learn_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of these texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END, PAD], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=PAD)


def main(arguments: PretrainingArguments) -> dict[str, Any]:
    """Train and save. Returns the metrics of the evaluation split."""
    train, test = load_splits(arguments, seed=arguments.seed)
    tokenizer = learn_tokenizer(train["text"], arguments.vocab_size)
    set_seed(arguments.seed)
    width = arguments.hidden_size
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=round(2.75 * width),
            num_hidden_layers=arguments.num_layers,
            num_attention_heads=width // 32,
            num_key_value_heads=max(1, width // 64),
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=arguments.output_dir,
            max_steps=arguments.steps,
            learning_rate=arguments.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=arguments.steps // 20,
            weight_decay=0.1,
            per_device_train_batch_size=8,
            per_device_eval_batch_size=8,
            max_length=128,
            packing=True,
            packing_strategy="wrapped",
            eval_packing=True,
            gradient_checkpointing=False,
            save_strategy="no",
            report_to="none",
            logging_steps=50,
            disable_tqdm=True,
            bf16=False,
            seed=arguments.seed,
        ),
        train_dataset=train,
        eval_dataset=test,
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model()
    return trainer.evaluate()


if __name__ == "__main__":
    print(main(*ConfigParser((PretrainingArguments,)).parse_args_and_config()))
