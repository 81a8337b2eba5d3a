"""Exported adapters: the same model through plain PEFT, in the form that each server takes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import (
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PolyConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from diffora_trainer import ShortcutConfig, ShortcutModel
from diffora_trainer.serving import SERVERS, export
from helpers.models import llama_config, vit


ODD = {
    "model.layers.0.self_attn.q_proj": 2,
    "model.layers.1.self_attn.v_proj": 4,
    "model.layers.1.mlp.gate_proj": 3,
    "model.layers.2.mlp.down_proj": 4,
}


def saved(folder: Path, base: Any, ranks: dict[str, int], **options: Any) -> tuple[Path, Path]:
    """A base model and an adapter of these modules and ranks with random weights, as PEFT saves them."""
    base.save_pretrained(folder / "base")
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=list(ranks),
        rank_pattern=dict(ranks),
        **{"alpha_pattern": {name: 3 * rank for name, rank in list(ranks.items())[1:2]}, **options},
    )
    torch.manual_seed(1)
    model = get_peft_model(type(base).from_pretrained(folder / "base"), config)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(folder / "adapter")
    return folder / "base", folder / "adapter"


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(llama_config(64, num_hidden_layers=3))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(3, 15).view(2, 6)).logits


def loaded(base: Path, adapter: Path, cls: Any = AutoModelForCausalLM) -> torch.Tensor:
    return logits(PeftModel.from_pretrained(cls.from_pretrained(base), adapter))


def modules(folder: Path) -> set[str]:
    names = load_file(folder / "adapter_model.safetensors")
    return {name.removeprefix("base_model.model.").split(".lora_")[0] for name in names if "lora_" in name}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"alpha_pattern": {"v_proj": 12}},
        {"alpha_pattern": {r"layers\.1\..*_proj": 3}},
    ],
    ids=["LoRA", "rsLoRA", "alpha by a short name", "alpha by a pattern"],
)
def test_the_same_model_for_every_server(options: dict[str, Any], tmp_path: Path) -> None:
    base, adapter = saved(tmp_path, llama(), ODD, **options)
    wanted = loaded(base, adapter)
    assert not torch.allclose(wanted, logits(AutoModelForCausalLM.from_pretrained(base)), atol=1e-2)
    for server in SERVERS:
        folder = export(adapter, server, tmp_path / server)
        if server == "merged":
            found = logits(AutoModelForCausalLM.from_pretrained(folder))
        else:
            found = loaded(base, folder)
            config = json.loads((folder / "adapter_config.json").read_text())
            assert config["r"] == config["lora_alpha"] == 4 and not config["use_rslora"]
            assert not config["rank_pattern"] and not config["alpha_pattern"]
            ranks = {t.shape[0] for n, t in load_file(folder / "adapter_model.safetensors").items() if "lora_A" in n}
            assert ranks == {4}
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert modules(tmp_path / "vllm") == modules(tmp_path / "llama.cpp") == set(ODD)
    layers = [f"model.layers.{index}" for index in range(3)]
    # Query, key and value together; gate and up together; each only where one of them was.
    attention = {f"{layer}.self_attn.{kind}" for layer in layers[:2] for kind in ("q_proj", "k_proj", "v_proj")}
    assert modules(tmp_path / "sglang") == attention | set(ODD) | {f"{layers[1]}.mlp.up_proj"}
    # Each kind in all layers
    kinds = {name.split(".", 3)[3] for name in ODD}
    assert modules(tmp_path / "lorax") == {f"{layer}.{kind}" for layer in layers for kind in kinds}
    config = json.loads((tmp_path / "lorax" / "adapter_config.json").read_text())
    assert set(config["target_modules"]) == {kind.split(".")[-1] for kind in kinds}


def test_weights_the_other_way_round_and_a_head_that_was_trained_along(tmp_path: Path) -> None:
    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=64))
    ranks = {"transformer.h.0.attn.c_attn": 2, "transformer.h.2.mlp.c_fc": 4}
    base, adapter = saved(tmp_path / "gpt2", gpt2, ranks, fan_in_fan_out=True)
    folder = export(adapter, "lorax", tmp_path / "gpt2" / "out")
    torch.testing.assert_close(loaded(base, folder), loaded(base, adapter), rtol=1e-4, atol=1e-4)
    assert len(modules(folder)) == 6

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
    bert = BertForSequenceClassification(BertConfig(vocab_size=64, num_labels=3, **sizes))
    ranks = {"bert.encoder.layer.1.attention.self.query": 2}
    base, adapter = saved(tmp_path / "bert", bert, ranks, task_type="SEQ_CLS")
    wanted = loaded(base, adapter, BertForSequenceClassification)
    folder = export(adapter, "merged", tmp_path / "bert" / "merged")
    found = logits(BertForSequenceClassification.from_pretrained(folder))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    for server in ("vllm", "sglang", "lorax", "llama.cpp"):  # which refuse a head or leave it out
        with pytest.raises(ValueError, match=r"holds '.*classifier\..*' beside its LoRA.*--for merged"):
            export(adapter, server, tmp_path / "bert" / server)


def test_heads_by_any_name_and_the_classes_they_predict(tmp_path: Path) -> None:
    """A head is what changes its shape with the number of classes; PEFT says the class where it knows no task."""
    torch.manual_seed(0)
    sizes = {"dim": 32, "hidden_dim": 64, "n_heads": 4, "n_layers": 2, "vocab_size": 64, "num_labels": 3}
    distilbert = DistilBertForSequenceClassification(DistilBertConfig(**sizes))  # its last layer is not its head
    query = {"distilbert.transformer.layer.1.attention.q_lin": 2}
    heads = ["pre_classifier", "classifier"]
    base, adapter = saved(tmp_path / "distilbert", distilbert, query, task_type="SEQ_CLS", modules_to_save=heads)
    wanted = loaded(base, adapter, DistilBertForSequenceClassification)
    distilbert.distilbert.save_pretrained(base)  # without the head, as a pre-trained model comes
    (adapter / "id2label.json").write_text('{"0": "bad", "1": "so-so", "2": "gut ü"}', encoding="utf-8")
    merged = AutoModelForSequenceClassification.from_pretrained(export(adapter, "merged", tmp_path / "merged"))
    torch.testing.assert_close(logits(merged), wanted, rtol=1e-4, atol=1e-4)
    assert merged.config.id2label == {0: "bad", 1: "so-so", 2: "gut ü"} and merged.config.label2id["gut ü"] == 2

    tiny = vit()
    query = {name: 2 for name, _ in tiny.model.named_modules() if name.endswith(("query", "q_proj"))}
    base, adapter = saved(tmp_path / "vit", tiny.model, query, modules_to_save=["classifier"])
    with torch.no_grad():
        known = PeftModel.from_pretrained(type(tiny.model).from_pretrained(base), adapter).eval()(**tiny.batch).logits
        tiny.model.base_model.save_pretrained(base)
        found = AutoModelForImageClassification.from_pretrained(export(adapter, "merged", tmp_path / "vit" / "out"))
        torch.testing.assert_close(found.eval()(**tiny.batch).logits, known, rtol=1e-4, atol=1e-4)


NOT_MERGED = ("LILY", "POLY", "PROMPT_TUNING")
TIED = {
    "input embeddings": {"ranks": {"model.embed_tokens": 2, "model.layers.0.self_attn.q_proj": 2}},
    "output embeddings": {"ranks": {"lm_head": 2}},
    "input embeddings, trained whole": {"ranks": {"lm_head": 2}, "modules_to_save": ["embed_tokens"]},
    "trained tokens": {"ranks": {"model.layers.0.self_attn.q_proj": 2}, "trainable_token_indices": [5, 6]},
    "both, trained whole": {
        "ranks": {"model.layers.0.self_attn.q_proj": 2},
        "modules_to_save": ["embed_tokens"],
        "ensure_weight_tying": True,
    },
}


@pytest.mark.parametrize("options", TIED.values(), ids=TIED)
def test_an_adapter_on_embeddings_that_share_their_weight(options: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(llama_config(64, num_hidden_layers=2, tie_word_embeddings=True))
    base, adapter = saved(tmp_path, model, **options)
    folder = export(adapter, "merged", tmp_path / "merged")
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(folder)), loaded(base, adapter))
    torch.manual_seed(0)
    shared = T5ForConditionalGeneration(
        T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, vocab_size=64)
    )
    adapter = saved(tmp_path / "t5", shared, {"shared": 2})[1]
    with pytest.raises(ValueError, match="shares their weight with other layers"):
        export(adapter, "merged", tmp_path / "t5" / "out")


@pytest.mark.parametrize(
    "config",
    [
        LoHaConfig(r=2, target_modules=["q_proj"]),
        LoKrConfig(r=2, target_modules=["q_proj"]),
        VeraConfig(r=2, target_modules=["q_proj"]),
        IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
        PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
        PolyConfig(r=2, n_tasks=1, target_modules=["q_proj"]),
        *([peft.LilyConfig(r=2, target_modules=["q_proj"])] if hasattr(peft, "LilyConfig") else []),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_other_types_are_merged_or_refused_by_name(config: PeftConfig, tmp_path: Path) -> None:
    kind, base, adapter, out = config.peft_type.value, tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    llama().save_pretrained(base)
    torch.manual_seed(1)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    for weight in model.parameters():
        if weight.requires_grad:
            torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(adapter)
    merges = kind not in NOT_MERGED
    for server in set(SERVERS) - {"merged"}:
        with pytest.raises(ValueError, match=f"of type {kind}, and what {server} takes.*LoRA alone") as refused:
            export(adapter, server, out)
        assert ("--for merged" in str(refused.value)) == merges != ("load it with PEFT" in str(refused.value))
    if not merges:
        with pytest.raises(ValueError, match=f"of type {kind}, which PEFT cannot merge"):
            export(adapter, "merged", out)
        return
    export(adapter, "merged", out)
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(out)), logits(model), atol=1e-5)


def test_a_lora_that_no_weights_hold_is_not_sent_to_a_merge(tmp_path: Path) -> None:
    adapter = saved(tmp_path, llama(), ODD, use_dora=True)[1]
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "alora_invocation_tokens": [5]}))
    with pytest.raises(ValueError, match="a DoRA.*load it with PEFT"):
        export(adapter, "vllm", tmp_path / "out")


def test_biases_of_a_lora_are_merged_into_layers_that_have_one(tmp_path: Path) -> None:
    """`lora_bias`: no pair of matrices holds it, nor does a layer without a bias."""
    adapter = saved(tmp_path / "llama", llama(), ODD, lora_bias=True)[1]
    for server in ("vllm", "lorax"):
        with pytest.raises(ValueError, match="lora_bias=True.*no pair of matrices.*load it with PEFT.*have a bias"):
            export(adapter, server, tmp_path / "out")
    with pytest.raises(
        ValueError, match=r"such as 'model\.layers\.0\.self_attn\.q_proj' have none.*load it with PEFT"
    ):
        export(adapter, "merged", tmp_path / "out")
    with_biases = LlamaForCausalLM(llama_config(64, num_hidden_layers=3, attention_bias=True, mlp_bias=True))
    base, adapter = saved(tmp_path / "biases", with_biases, ODD, lora_bias=True)
    folder = export(adapter, "merged", tmp_path / "merged")
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(folder)), loaded(base, adapter), rtol=1e-4, atol=1e-4
    )


def test_an_adapter_that_lies_beside_shortcuts_is_not_exported_without_them(tmp_path: Path) -> None:
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    ShortcutModel(model, ShortcutConfig(r=2, kinds=["residual1"])).save_pretrained(tmp_path / "out")
    for server in SERVERS:
        with pytest.raises(ValueError, match=r"beside the shortcuts in .*ShortcutModel\.from_pretrained"):
            export(tmp_path / "out" / "adapter", server, tmp_path / server)
        with pytest.raises(ValueError, match="LoRA with shortcuts, which PEFT alone cannot load"):
            export(tmp_path / "out", server, tmp_path / server)
    shutil.copytree(tmp_path / "out" / "adapter", tmp_path / "apart")  # a LoRA like any other
    assert export(tmp_path / "apart", "vllm", tmp_path / "vllm").is_dir()


def test_what_cannot_be_exported_says_why_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = saved(tmp_path, llama(), ODD)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    for arguments, message in (
        ((adapter, "ollama", tmp_path / "out"), "no export for 'ollama'"),
        ((tmp_path / "base", "vllm", tmp_path / "out"), "no adapter in"),
        ((adapter, "vllm", tmp_path / "full"), "is there already and not empty"),
        ((adapter, "lorax", tmp_path / "out", str(tmp_path / "nowhere")), "name its folder or Hub id"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            export(*arguments)
    dora, torn = saved(tmp_path / "dora", llama(), ODD, use_dora=True)[1], tmp_path / "torn"
    with pytest.raises(ValueError, match="a DoRA, whose magnitudes.*--for merged"):
        export(dora, "vllm", tmp_path / "out")
    started = saved(tmp_path / "pissa", llama(), ODD, init_lora_weights="pissa")[1]
    with pytest.raises(ValueError, match="starts as a part of the base weights.*--for merged"):
        export(started, "vllm", tmp_path / "out")
    for start in ("pissa_niter_4", "corda"):  # another part of the weights each time, so that nothing can be exact
        drawn = saved(tmp_path / start, llama(), ODD)[1]
        config = json.loads((drawn / "adapter_config.json").read_text())
        (drawn / "adapter_config.json").write_text(json.dumps({**config, "init_lora_weights": start}))
        for server in SERVERS:
            with pytest.raises(ValueError, match=f"{start}.*not the same when it is computed again"):
                export(drawn, server, tmp_path / "out")
    nameless = saved(tmp_path / "nameless", llama(), ODD)[1]
    config = json.loads((nameless / "adapter_config.json").read_text())
    (nameless / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    with pytest.raises(ValueError, match="does not say what its base model is.*--base_model"):
        export(nameless, "merged", tmp_path / "out")
    with monkeypatch.context() as here:
        (tmp_path / "empty").mkdir()
        here.chdir(tmp_path / "empty")
        with pytest.raises(ValueError, match="is the current folder"):
            export(adapter, "vllm", ".")
    other = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=64))
    other.save_pretrained(torn)
    with pytest.raises(ValueError, match="no linear layer of this name.*--base_model"):
        export(adapter, "lorax", tmp_path / "out", str(torn))
    assert not (tmp_path / "out").exists() and not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert (tmp_path / "full" / "mine").read_text() == "x"
