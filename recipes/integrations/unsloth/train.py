"""
unsloth's example of supervised fine-tuning, on the LoRA modules that a search without unsloth has chosen:

    diffora sft --search_only true --model_name_or_path unsloth/Qwen3-0.6B --dataset_name trl-lib/Capybara \
        --learning_rate 2e-4 --max_steps 300 --output_dir outputs/qwen3-search
    python recipes/integrations/unsloth/train.py outputs/qwen3-search

See docs/integrations.md for why unsloth cannot search itself.
"""

from __future__ import annotations

import sys
from typing import Any


from unsloth import FastLanguageModel  # isort: skip # first: it changes what is imported after it

from datasets import load_dataset
from trl import SFTConfig, SFTTrainer

from diffora_trainer import selected_lora_config


def main(search: str, name: str = "unsloth/Qwen3-0.6B", data: str = "trl-lib/Capybara", **options: Any) -> SFTTrainer:
    """Train the modules that a search has chosen; `options` are those of `SFTConfig`."""
    chosen = selected_lora_config(search)
    model, tokenizer = FastLanguageModel.from_pretrained(name, max_seq_length=2048, load_in_4bit=False)
    model = FastLanguageModel.get_peft_model(
        model,
        r=chosen.r,
        lora_alpha=chosen.lora_alpha,
        target_modules=sorted(chosen.target_modules or ()),
        rank_pattern=chosen.rank_pattern,
        alpha_pattern=chosen.alpha_pattern,
        use_rslora=chosen.use_rslora,
    )
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=load_dataset(data, split="train"),
        args=SFTConfig(
            **{
                "output_dir": "outputs/qwen3-lora",
                "learning_rate": 2e-4,
                "max_steps": 300,
                "logging_steps": 10,
                **options,
            }
        ),
    )
    trainer.train()
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main(sys.argv[1])
