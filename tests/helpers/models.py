"""Tiny random models of many architectures, made from configs in code: nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from helpers.tiny_model import (
    BOS,
    EOS,
    HIDDEN,
    INIT,
    NUM_LABELS,
    PAD,
    SEED,
    VOCAB,
    TinyModel,
    causal_batch,
    classification_batch,
    image_batch,
    seq2seq_batch,
)


MOE_PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
"""What to pass to `LoraConfig(target_parameters=...)` to adapt the fused experts of `moe` by name."""


def llama_config(vocab_size: int = VOCAB, **overrides: object) -> LlamaConfig:
    """The tiny Llama configuration; pass `vocab_size=len(tokenizer)` to use it with a tokenizer."""
    settings: dict[str, object] = {
        "vocab_size": vocab_size,
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "initializer_range": INIT,
    }
    return LlamaConfig(**{**settings, **overrides})


def llama(vocab_size: int = VOCAB) -> TinyModel:
    """A causal language model with grouped-query attention: key and value projections are narrower."""
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(llama_config(vocab_size))
    return TinyModel(model, causal_batch(), "all-linear", "CAUSAL_LM", rows=2, kinds=7)


def llama_classifier(vocab_size: int = VOCAB, num_labels: int = NUM_LABELS) -> TinyModel:
    """A Llama with a `score` head; `num_labels=1` makes a reward model (its batch labels are then floats)."""
    torch.manual_seed(SEED)
    model = LlamaForSequenceClassification(llama_config(vocab_size, num_labels=num_labels))
    batch = classification_batch()
    if num_labels == 1:
        batch["labels"] = batch["labels"].float()
    return TinyModel(model, batch, "all-linear", "SEQ_CLS", rows=2, kinds=7)


def qwen() -> TinyModel:
    """A Qwen3 causal language model: norms on queries and keys, a head dimension set apart from the hidden size."""
    torch.manual_seed(SEED)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        initializer_range=INIT,
    )
    return TinyModel(Qwen3ForCausalLM(config), causal_batch(), "all-linear", "CAUSAL_LM", rows=2, kinds=7)


def gemma() -> TinyModel:
    """A Gemma 3 text model: one sliding-window layer and one full-attention layer, tied embeddings."""
    torch.manual_seed(SEED)
    config = Gemma3TextConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
        max_position_embeddings=128,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        initializer_range=INIT,
    )
    return TinyModel(Gemma3ForCausalLM(config), causal_batch(), "all-linear", "CAUSAL_LM", rows=2, kinds=7)


def gpt2() -> TinyModel:
    """A GPT-2: its linear layers are `Conv1D`, with the weight stored transposed (PEFT's `fan_in_fan_out`)."""
    torch.manual_seed(SEED)
    config = GPT2Config(
        vocab_size=VOCAB,
        n_embd=HIDDEN,
        n_layer=2,
        n_head=4,
        n_positions=128,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        initializer_range=INIT,
    )
    return TinyModel(GPT2LMHeadModel(config), causal_batch(), "all-linear", "CAUSAL_LM", rows=2, kinds=4)


def opt() -> TinyModel:
    """An OPT whose word embeddings are narrower than its hidden size: `project_in` and `project_out` are linear
    modules outside the numbered layers, and "all-linear" adapts them too."""
    torch.manual_seed(SEED)
    config = OPTConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        word_embed_proj_dim=HIDDEN // 2,
        ffn_dim=2 * HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        init_std=INIT,
    )
    outside = ("model.decoder.project_in", "model.decoder.project_out")
    return TinyModel(OPTForCausalLM(config), causal_batch(), "all-linear", "CAUSAL_LM", 2, 6, outside=outside)


def opt_post_norm() -> TinyModel:
    """The order of OPT-350m: norms after the sums. With dropout, as all OPT."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "word_embed_proj_dim": HIDDEN, "ffn_dim": 2 * HIDDEN}
    config = OPTConfig(
        **sizes,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        pad_token_id=PAD,
        do_layer_norm_before=False,
        init_std=0.2,
    )
    return TinyModel(OPTForCausalLM(config), opt().batch, "all-linear", "CAUSAL_LM", 2, 6)


def bert() -> TinyModel:
    """A BERT classifier: the pooler is a linear module outside the numbered layers."""
    torch.manual_seed(SEED)
    config = BertConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        num_labels=NUM_LABELS,
        pad_token_id=PAD,
        initializer_range=INIT,
    )
    model = BertForSequenceClassification(config)
    return TinyModel(model, classification_batch(), "all-linear", "SEQ_CLS", 2, 6, outside=("bert.pooler.dense",))


def encoder_for(tokenizer: object, layers: int) -> BertForSequenceClassification:
    """A tiny classifier for a tokenizer's vocabulary, of some layers, to be saved and named to a recipe."""
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=layers,
            num_attention_heads=4,
            max_position_embeddings=128,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def roberta() -> TinyModel:
    """A RoBERTa classifier: its head is a module with two linear layers of its own."""
    torch.manual_seed(SEED)
    config = RobertaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        num_labels=NUM_LABELS,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        initializer_range=INIT,
    )
    model = RobertaForSequenceClassification(config)
    return TinyModel(model, classification_batch(), "all-linear", "SEQ_CLS", rows=2, kinds=6)


def deberta_v2() -> TinyModel:
    """A DeBERTa-v2/v3 classifier with relative attention, as DeBERTaV3-base has it."""
    torch.manual_seed(SEED)
    config = DebertaV2Config(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        type_vocab_size=0,
        relative_attention=True,
        position_buckets=8,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        pos_att_type=["p2c", "c2p"],
        position_biased_input=False,
        pooler_hidden_size=HIDDEN,
        num_labels=NUM_LABELS,
        pad_token_id=PAD,
        initializer_range=INIT,
    )
    model = DebertaV2ForSequenceClassification(config)
    return TinyModel(model, classification_batch(), "all-linear", "SEQ_CLS", 2, 6, outside=("pooler.dense",))


def t5() -> TinyModel:
    """A T5 with a gated feed-forward: two encoder layers and two decoder layers, the latter with cross-attention."""
    torch.manual_seed(SEED)
    config = T5Config(
        vocab_size=VOCAB,
        d_model=HIDDEN,
        d_kv=8,
        d_ff=2 * HIDDEN,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        pad_token_id=PAD,
        eos_token_id=EOS,
        decoder_start_token_id=PAD,
        initializer_factor=0.5,
    )
    model = T5ForConditionalGeneration(config)
    return TinyModel(
        model, seq2seq_batch(), "all-linear", "SEQ_2_SEQ_LM", rows=4, kinds=11, linear_modules=2 * 7 + 2 * 11
    )


def vit() -> TinyModel:
    """A ViT image classifier. PEFT has no task type for images, so "all-linear" puts LoRA on its head too, unless the
    head is in `modules_to_save` or `exclude_modules`."""
    torch.manual_seed(SEED)
    config = ViTConfig(
        image_size=8,
        patch_size=4,
        num_channels=3,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_labels=NUM_LABELS,
        initializer_range=INIT,
    )
    model = ViTForImageClassification(config)
    return TinyModel(model, image_batch(), "all-linear", None, rows=2, kinds=6, outside=("classifier",))


def moe(vocab_size: int = VOCAB) -> TinyModel:
    """A Mixtral: its experts are fused 3D parameters and its router is a bare parameter. PEFT turns "all-linear" into
    the four attention projections plus `target_parameters` for the router and the experts; targets named one by one
    (`["q_proj", "v_proj"]`) leave these alone unless `MOE_PARAMETERS` are asked for."""
    torch.manual_seed(SEED)
    config = MixtralConfig(
        vocab_size=vocab_size,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=128,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        initializer_range=INIT,
    )
    return TinyModel(MixtralForCausalLM(config), causal_batch(), "all-linear", "CAUSAL_LM", 2, 4, parameters=3)


ARCHITECTURES: dict[str, Callable[[], TinyModel]] = {
    "llama": llama,
    "qwen": qwen,
    "gemma": gemma,
    "gpt2": gpt2,
    "opt": opt,
    "bert": bert,
    "roberta": roberta,
    "deberta_v2": deberta_v2,
    "t5": t5,
    "vit": vit,
    "moe": moe,
}
