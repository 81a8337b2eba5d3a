"""Runs on models that nothing here was written for: what is saved is what was trained, and the base is untouched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, TrainingArguments

from diffora_trainer import DiffoRATrainer
from helpers.adapted import base_weights
from helpers.trainers import lora, search_config


pytestmark = pytest.mark.slow

Row = dict[str, Any]

LABELS = 3
DECODER = {
    **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64},
}
ENCODER = {name: value for name, value in DECODER.items() if name not in ("num_key_value_heads", "head_dim")}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
ROUTED = {**EXPERTS, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
STATES = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8}

DECODERS: dict[str, Row] = {
    "bloom": {"n_layer": 2, "n_head": 4},
    "cohere2": {},
    "ernie4_5": {},
    "gpt_neox": {},
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 64},
    "nemotron": {},
    "olmo2": {},
    "phi3": {"pad_token_id": 0},
    "starcoder2": {},
    # mixtures of experts
    "glm4_moe": ROUTED,
    "gpt_oss": {"num_local_experts": 4, **EXPERTS},
    "hunyuan_v1_moe": {"num_experts": 2, "moe_topk": 1},
    # recurrent, convolutional and linear attention, alone or between layers of attention
    "bamba": {**STATES, "attn_layer_indices": [1]},
    "granitemoehybrid": {
        **{**STATES, "num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 32},
        "layer_types": ["mamba", "attention"],
    },
    "jamba": {
        **{"num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
        **{"expert_layer_period": 2, "expert_layer_offset": 1},
    },
    "lfm2": {"full_attn_idxs": [1]},
    "minimax": {"num_local_experts": 2},
    "qwen3_next": {
        **{**EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 16, "num_hidden_layers": 4},
        **{"linear_num_key_heads": 2, "linear_num_value_heads": 4},
        **{"linear_key_head_dim": 8, "linear_value_head_dim": 8},
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "rwkv": {"attention_hidden_size": 32},
}


def images() -> list[Row]:
    generator = torch.Generator().manual_seed(0)
    return [{"pixel_values": torch.randn(3, 32, 32, generator=generator), "labels": i % LABELS} for i in range(32)]


def texts(label: Callable[[int, list[int]], Any]) -> list[Row]:
    rows = [[(7 * i + j) % 60 + 2 for j in range(10)] for i in range(32)]
    return [{"input_ids": row, "attention_mask": [1] * 10, "labels": label(i, row)} for i, row in enumerate(rows)]


def whole(index: int, row: list[int]) -> list[int]:
    return row


def of_the_row(index: int, row: list[int]) -> int:
    return index % LABELS


def of_each_token(index: int, row: list[int]) -> list[int]:
    return [token % LABELS for token in row]


OTHERS: dict[str, tuple[str, Row, Callable[[], list[Row]]]] = {
    "albert": ("AlbertForSequenceClassification", {**ENCODER, "embedding_size": 16}, lambda: texts(of_the_row)),
    "funnel": (
        "FunnelForSequenceClassification",
        {
            **{"vocab_size": 64, "block_sizes": [1, 1], "d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 64},
            "num_decoder_layers": 1,
        },
        lambda: texts(of_the_row),
    ),
    "longformer": (
        "LongformerForSequenceClassification",
        {**ENCODER, "attention_window": 4},
        lambda: texts(of_the_row),
    ),
    "modernbert": ("ModernBertForTokenClassification", {**ENCODER, "pad_token_id": 0}, lambda: texts(of_each_token)),
    "xlnet": (
        "XLNetForSequenceClassification",
        {"vocab_size": 64, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64},
        lambda: texts(of_the_row),
    ),
    "bart": (
        "BartForConditionalGeneration",
        {
            **{"vocab_size": 64, "d_model": 32, "max_position_embeddings": 64},
            **{"encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 64},
            **{"decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 64},
        },
        lambda: texts(whole),
    ),
    "t5gemma": (
        "T5GemmaForConditionalGeneration",
        {"encoder": DECODER, "decoder": {**DECODER, "cross_attention_hidden_size": 32}},
        lambda: texts(whole),
    ),
    "convnext": (
        "ConvNextForImageClassification",
        {"image_size": 32, "hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2},
        images,
    ),
    "dinov2": (
        "Dinov2ForImageClassification",
        {
            **{"image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2},
            "num_attention_heads": 4,
        },
        images,
    ),
    "segformer": (
        "SegformerForImageClassification",
        {
            **{"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [8, 16]},
            **{"patch_sizes": [7, 3], "strides": [4, 2], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2]},
        },
        images,
    ),
    "swin": (
        "SwinForImageClassification",
        {
            **{"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2]},
            "window_size": 4,
        },
        images,
    ),
}
WITH_PARAMETERS = ("glm4_moe", "hunyuan_v1_moe", "minimax", "qwen3_next")
"""Where `target_modules="all-linear"` reaches parameters of experts or routers, which are kept or pruned whole."""
SEARCHES: dict[str, Row] = {
    "modules": {},
    "ranks": {"selection_granularity": "auto"},
    "components": {"selection_granularity": "component"},
    "frozen": {"unselected": "freeze"},
}
"""Each at half of the parameters, the second and the third under a cap."""


def make(name: str) -> tuple[nn.Module, list[Row]]:
    torch.manual_seed(0)
    if name in DECODERS:
        config = CONFIG_MAPPING[name](**{**DECODER, **DECODERS[name]})
        return AutoModelForCausalLM.from_config(config), texts(whole)
    class_name, options, rows = OTHERS[name]
    model_class = getattr(transformers, class_name)
    labels = {} if "Generation" in class_name else {"num_labels": LABELS}
    return model_class(model_class.config_class(**options, **labels)), rows()


def make_trainer(name: str, search: str, folder: Path) -> DiffoRATrainer:
    model, rows = make(name)
    heads = [head for head in ("classifier", "score", "logits_proj") if hasattr(model, head)]
    adapted = get_peft_model(model, lora(modules_to_save=heads or None))
    half = sum(tensor.numel() for key, tensor in adapted.named_parameters() if "lora_" in key) // 2
    budget = {"max_trainable_parameters": half} if search in ("ranks", "components") else {"selection_ratio": 0.5}
    steps = {"max_steps": 12, "per_device_train_batch_size": 4, "learning_rate": 1e-2}
    return DiffoRATrainer(
        adapted,
        TrainingArguments(str(folder), **steps, report_to="none", use_cpu=True),
        train_dataset=Dataset.from_list(rows),
        diffora_config=search_config(**budget, **SEARCHES[search]),
    )


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("name", [*DECODERS, *OTHERS])
def test_what_is_saved_is_what_was_trained(name: str, search: str, tmp_path: Path) -> None:
    if search == "components" and name in WITH_PARAMETERS:
        with pytest.raises(ValueError, match="is not one of two linear layers"):
            make_trainer(name, search, tmp_path)
        return
    trainer = make_trainer(name, search, tmp_path)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    selection = trainer.selection
    assert 0 < selection.trainable_parameters < sum(selection.grid.parameters)

    def loss(model: nn.Module) -> Tensor:
        batch = trainer.data_collator(make(name)[1][:4])
        with torch.no_grad():
            return model.eval()(**batch).loss

    reloaded, _ = make(name)
    base = base_weights(reloaded)
    untrained = loss(reloaded)
    torch.testing.assert_close(loss(PeftModel.from_pretrained(reloaded, tmp_path / "saved")), loss(trainer.model))
    assert loss(trainer.model) != untrained
    after = base_weights(trainer.model)
    kept = [key for key in base if key in after]
    assert len(kept) > len(base) / 2 and all(torch.equal(base[key], after[key]) for key in kept)
