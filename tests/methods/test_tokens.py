"""Which tokens methods look at that read the states of a model: the last one of causal stacks, and no padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from peft import get_peft_model
from torch import Tensor

from helpers.models import bert, t5
from helpers.searches import make_search, warm
from helpers.tiny_model import HIDDEN, VOCAB, TinyModel, causal_batch
from helpers.trainers import lora


IDS = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def other(name: str) -> TinyModel:
    """Causal models of which no module says so."""
    init = {"initializer_range": 0.2}
    configs: dict[str, tuple[dict[str, Any], Any]] = {
        "Mamba": ({"hidden_size": HIDDEN, "num_hidden_layers": 2, "state_size": 4}, ["in_proj", "x_proj"]),
        "Bloom": ({"hidden_size": HIDDEN, "n_layer": 2, "n_head": 4, **init}, "all-linear"),
        "XGLM": (
            {"d_model": HIDDEN, "num_layers": 2, "attention_heads": 4, "ffn_dim": 64, "init_std": 0.2},
            "all-linear",
        ),
        "Mpt": ({"d_model": HIDDEN, "n_layers": 2, "n_heads": 4, "max_seq_len": 64, **init}, "all-linear"),
        "CodeGen": ({"n_embd": HIDDEN, "n_layer": 2, "n_head": 4, "rotary_dim": 4, **init}, "all-linear"),
    }
    options, targets = configs[name]
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**IDS, **options))
    batch = causal_batch()
    if name == "Mamba":
        del batch["attention_mask"]
    return TinyModel(model, batch, targets, "CAUSAL_LM", 2, 0)


def layer_scores(build: Any, position: str, batch: dict[str, Tensor] | None = None) -> dict[str, float]:
    tiny = build()
    model = get_peft_model(tiny.model, lora(target_modules=tiny.target_modules, task_type=tiny.task_type))
    search = make_search(model, "cka", method_options={"position": position})
    search.score([batch or tiny.batch])
    scores = search.method.scores().tolist()
    return {search.grid.rows[row]: score for row, score in zip(search.grid.row_of, scores, strict=True)}


@pytest.mark.parametrize("name", ["Mamba", "Bloom", "XGLM", "Mpt", "CodeGen", "bert"])
def test_auto_is_the_last_token_where_none_sees_those_behind_it(name: str) -> None:
    build = bert if name == "bert" else lambda: other(name)
    tiny = build()
    batches = [tiny.batch]
    if "attention_mask" in tiny.batch and name != "Bloom":  # padding in front of the first token
        batches.append({key: value.flip(1) if value.ndim == 2 else value for key, value in tiny.batch.items()})
    for batch in batches:
        found = {position: layer_scores(build, position, batch) for position in ("auto", "first", "last")}
        assert found["auto"] == found["first" if name == "bert" else "last"]
        assert found["first"] != found["last"]


def test_each_stack_of_an_encoder_decoder_has_its_own_token() -> None:
    found = {position: layer_scores(t5, position) for position in ("auto", "first", "last")}
    for row, score in found["auto"].items():
        encodes = row.startswith("encoder")
        assert score == found["first" if encodes else "last"][row] != found["last" if encodes else "first"][row]


@pytest.mark.parametrize("method", ["eva", "prilora", "cka", "gelora"])
def test_padding_is_left_out_of_encoder_and_decoder(method: str) -> None:
    """Other tokens in its place change nothing."""
    model, _ = warm(t5())
    batch = t5().batch
    # As long as what the encoder reads, so that lengths do not tell them apart.
    labels = torch.cat([batch["labels"].flip(1), batch["labels"]], dim=1)
    labels[1:, -3:] = -100
    start = torch.zeros_like(labels[:, :1])
    batch["labels"] = labels
    batch["decoder_input_ids"] = torch.cat([start, labels[:, :-1].clamp(min=0)], 1)
    changed = {key: value.clone() for key, value in batch.items()}
    changed["input_ids"][batch["attention_mask"] == 0] = 9
    changed["decoder_input_ids"][torch.cat([start.bool(), labels[:, :-1] == -100], 1)] = 11
    scores = []
    for one in (batch, changed):
        options = {"method_options": {"position": "mean"}} if method in ("cka", "gelora") else {}
        search = make_search(model, method, **options)
        search.score([one])
        scores.append(search.method._scores.clone())  # type: ignore[attr-defined]
    torch.testing.assert_close(scores[0], scores[1], atol=1e-6, rtol=1e-5)
