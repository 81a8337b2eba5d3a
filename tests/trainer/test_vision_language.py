"""Vision-language models: images beside the text, in TRL's trainers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from torch import nn
from transformers import (
    AutoProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Trainer,
)
from trl import DPOConfig, DPOTrainer, SFTConfig

from diffora_trainer import DiffoRAMixin, DiffoRASFTTrainer
from diffora_trainer.cli import main
from helpers.adapted import base_weights
from helpers.checks import adapter, assert_same, assert_was_searched
from helpers.data import tiny_tokenizer
from helpers.marks import mostly_slow
from helpers.models import llama_config
from helpers.trainers import CUT, arguments, lora, search_config


Image = pytest.importorskip("PIL.Image")
IMAGE = "<image>"
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + ' ' -}}
{%- if message['content'] is string -%}{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}{{- '<image> ' if part['type'] == 'image' else part['text'] -}}{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant ' -}}{%- endif -%}"""
COLOURS = {"black": (10, 10, 10), "red": (200, 10, 10), "green": (10, 200, 10), "white": (250, 250, 250)}


def processor() -> LlavaProcessor:
    """Images of 32 x 32 in patches of 8, and the tiny tokenizer with a token that stands for an image."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([IMAGE], special_tokens=True)
    size = {"height": 32, "width": 32}
    return LlavaProcessor(
        image_processor=CLIPImageProcessor(size=size, crop_size=size),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def model() -> LlavaForConditionalGeneration:
    """Two layers that see and two that read, with a projector between them."""
    torch.manual_seed(0)
    tokenizer = processor().tokenizer
    layers = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**layers, image_size=32, patch_size=8),
        text_config=llama_config(len(tokenizer)),
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        vision_feature_layer=-1,
    )
    return LlavaForConditionalGeneration(config)


def rows(count: int = 32, preferences: bool = False) -> Dataset:
    """What colour a picture has."""
    rng = numpy.random.default_rng(0)
    names = list(COLOURS)
    found = []
    for index in range(count):
        name, other = names[index % 4], names[(index + 1) % 4]
        pixels = numpy.clip(numpy.array(COLOURS[name]) + rng.integers(-9, 9, (32, 32, 3)), 0, 255)
        picture = Image.fromarray(pixels.astype(numpy.uint8))
        question = [{"role": "user", "content": "what colour is the cat ?"}]
        answer, wrong = ([{"role": "assistant", "content": f"the cat is {colour}"}] for colour in (name, other))
        text = (
            {"prompt": question, "chosen": answer, "rejected": wrong}
            if preferences
            else {"messages": question + answer}
        )
        found.append({"images": [picture], **text})
    return Dataset.from_list(found)


class DiffoRADPOTrainer(DiffoRAMixin, DPOTrainer):
    pass


def sft(folder: Path, search: dict[str, Any] | None = None, **overrides: Any) -> Trainer:
    given = {"train_dataset": rows(), "peft_config": lora()}
    given |= {name: overrides.pop(name) for name in ("arch_dataset", "peft_config") if name in overrides}
    return DiffoRASFTTrainer(
        model(),
        arguments(folder, SFTConfig, max_length=None, **overrides),
        processing_class=processor(),
        diffora_config=search_config(**search or {}),
        **given,
    )


def assert_saved_is_trained(trainer: Trainer, folder: Path) -> None:
    """The adapter alone, on a fresh base model, gives the outputs of the trained model, and of no other."""
    trainer.save_model(str(folder))
    batch = processor()(
        images=[rows()[0]["images"][0]], text=["<image> what colour is the cat ?"], return_tensors="pt"
    )

    def logits(model: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return model.eval()(**batch).logits

    fresh = logits(model())
    trained = logits(trainer.model)
    assert torch.equal(logits(PeftModel.from_pretrained(model(), folder)), trained)
    assert not torch.allclose(fresh, trained, atol=1e-3)


def assert_base_is_untouched(trainer: Trainer) -> None:
    after = base_weights(trainer.model)
    assert all(torch.equal(tensor, after[name]) for name, tensor in base_weights(model()).items())


def test_modules_of_both_towers_compete(tmp_path: Path) -> None:
    trainer = sft(tmp_path)
    trainer.train()
    assert_was_searched(trainer)
    layers = {name.rpartition(".layers.")[0] for name in trainer.selection.selected if ".layers." in name}
    assert {layer.rpartition(".")[2] for layer in layers} == {"encoder", "language_model"}
    assert_base_is_untouched(trainer)
    assert_saved_is_trained(trainer, tmp_path / "saved")


@pytest.mark.parametrize(
    "search",
    mostly_slow(
        [
            {"max_trainable_parameters": 3000},
            {"unselected": "freeze"},
            {"search_micro_batches": 2},
            {"max_step_time": 0.8, "selection_ratio": None},
        ],
        *({"max_trainable_parameters": 3000}, {"search_micro_batches": 2}),
    ),
    ids=["ranks", "frozen", "micro-batches", "time"],
)
def test_options_work_with_images(tmp_path: Path, search: dict[str, Any]) -> None:
    trainer = sft(tmp_path, search)
    trainer.train()
    assert 0 < trainer.selection.trainable_parameters < sum(trainer.selection.grid.parameters)
    assert_base_is_untouched(trainer)
    assert_saved_is_trained(trainer, tmp_path / "saved")


def test_what_the_vision_tower_computes_is_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """From one epoch to the next, where nothing in it is trained; what is trained is the same."""
    runs = []
    for where in ("none", "memory"):
        last_layer = lora(target_modules=r".*language_model\.layers\.1\..*_proj")
        trainer = sft(tmp_path / where, {"prefix_cache": where}, peft_config=last_layer, max_steps=40)
        with caplog.at_level("INFO", "diffora_trainer"):
            trainer.train()
        runs.append((trainer.selection.selected, adapter(trainer.model)))
    assert "compute is kept" in caplog.text and "% of the rows were found" in caplog.text
    assert runs[0][0] == runs[1][0]
    torch.testing.assert_close(runs[0][1], runs[1][1])


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    whole = sft(tmp_path / "whole", save_strategy="steps", save_steps=5)
    whole.train()
    resumed = sft(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))  # within the search
    assert resumed.selection.selected == whole.selection.selected
    assert_same(adapter(resumed.model), adapter(whole.model))


def test_held_out_images_of_ones_own(tmp_path: Path) -> None:
    trainer = sft(tmp_path, arch_dataset=rows(8))
    trainer.train()
    assert_was_searched(trainer)


def test_preferences_between_answers_to_an_image(tmp_path: Path) -> None:
    trainer = DiffoRADPOTrainer(
        model=model(),
        args=arguments(tmp_path, DPOConfig, max_length=None),
        train_dataset=rows(24, preferences=True),
        processing_class=processor(),
        peft_config=lora(),
        diffora_config=search_config(),
    )
    trainer.train()
    assert_was_searched(trainer, CUT)
    assert_base_is_untouched(trainer)
    assert_saved_is_trained(trainer, tmp_path / "saved")


@pytest.mark.parametrize("task", mostly_slow(["CAUSAL_LM", None], None))
def test_its_card_and_its_exports_load_the_class_of_the_model(task: str | None, tmp_path: Path) -> None:
    """The class that PEFT's task type stands for loads no vision-language model."""
    base, out = tmp_path / "base", tmp_path / "out"
    model().save_pretrained(base)
    processor().save_pretrained(base)
    trainer = sft(out, peft_config=lora(task_type=task))
    trainer.train()
    trainer.save_model(str(out))
    batch = processor()(images=[rows(1)[0]["images"][0]], text=["<image> what colour ?"], return_tensors="pt")
    with torch.no_grad():
        trained = trainer.model.eval()(**batch).logits
        (snippet,) = re.findall(r"```python\n(from peft.*?)```", (out / "README.md").read_text(), re.DOTALL)
        scope: dict[str, Any] = {}
        exec(snippet.replace("<the base model>", str(base)).replace('"out"', repr(str(out))), scope)
        assert scope["model"].eval()(**batch).logits.equal(trained)
        for path in out.glob("*processor*.json"):  # as a folder that holds a tokenizer alone
            path.unlink()
        for server in ("lorax", "merged"):
            words = [
                "export",
                str(out),
                "--for",
                server,
                "--output",
                str(tmp_path / server),
                "--base_model",
                str(base),
            ]
            assert main(words) == 0
        merged = LlavaForConditionalGeneration.from_pretrained(tmp_path / "merged").eval()(**batch).logits
        torch.testing.assert_close(merged, trained, rtol=1e-4, atol=1e-4)
    again = AutoProcessor.from_pretrained(tmp_path / "merged")
    found = again(images=[rows(1)[0]["images"][0]], text=["<image> what colour ?"], return_tensors="pt")
    assert all(torch.equal(found[name], batch[name]) for name in batch)
    assert main(["plan", str(base), "--steps", "12"]) == 0
