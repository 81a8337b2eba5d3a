"""Tiny models that read sound."""

from __future__ import annotations

import torch
from transformers import (
    Speech2TextConfig,
    Speech2TextForConditionalGeneration,
    Wav2Vec2Config,
    Wav2Vec2ForSequenceClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from helpers.tiny_model import (
    BATCH,
    BOS,
    EOS,
    HIDDEN,
    PAD,
    SEED,
    VOCAB,
    TinyModel,
    speech_batch,
)


_SPEECH: dict[str, object] = {
    "vocab_size": VOCAB,
    "d_model": HIDDEN,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 2 * HIDDEN,
    "decoder_ffn_dim": 2 * HIDDEN,
    "max_target_positions": 20,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "decoder_start_token_id": BOS,
}


def whisper() -> TinyModel:
    """A Whisper: it reads `input_features`, and knows no `input_ids`."""
    torch.manual_seed(SEED)
    config = WhisperConfig(**_SPEECH, num_mel_bins=8, max_source_positions=20)
    return TinyModel(WhisperForConditionalGeneration(config), speech_batch((8, 40)), "all-linear", None, 4, 10, 32)


def speech_to_text() -> TinyModel:
    """A Speech2Text model: features in time, and a mask of them that PEFT would take for that of tokens."""
    torch.manual_seed(SEED)
    sizes = {"input_feat_per_channel": 8, "input_channels": 1, "conv_channels": 16, "num_conv_layers": 2}
    config = Speech2TextConfig(**_SPEECH, **sizes, max_source_positions=40)
    batch = {**speech_batch((40, 8)), "attention_mask": torch.ones(BATCH, 40, dtype=torch.long)}
    return TinyModel(Speech2TextForConditionalGeneration(config), batch, "all-linear", None, 4, 10, 32)


def wav2vec2() -> TinyModel:
    """A classifier of sound that masks samples, of which its layers see one state for eight. Rows of 240 samples."""
    torch.manual_seed(SEED)
    convolutions = {"conv_dim": (16, 16), "conv_stride": (4, 2), "conv_kernel": (8, 4), "num_feat_extract_layers": 2}
    config = Wav2Vec2Config(
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=2 * HIDDEN,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
        classifier_proj_size=16,
        num_labels=2,
        feat_extract_norm="layer",
        do_stable_layer_norm=True,
        **convolutions,
    )
    mask = (torch.arange(400) < 240).long().expand(8, -1)
    batch = {"input_values": torch.randn(8, 400) * mask, "attention_mask": mask, "labels": torch.arange(8) % 2}
    model = Wav2Vec2ForSequenceClassification(config)
    return TinyModel(model, batch, ["q_proj", "k_proj", "v_proj", "output_dense"], None, 2, 0)
