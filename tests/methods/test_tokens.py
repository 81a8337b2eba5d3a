"""Which tokens methods look at that read the states of a model: the last one of causal stacks, and no padding."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import transformers
from peft import get_peft_model
from torch import Tensor, nn

from helpers.models import bert, deberta_v2, llama, opt, t5
from helpers.searches import make_search, warm
from helpers.speech_models import wav2vec2
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
    """Other tokens in its place change nothing, nor does a mask of the decoder that says what the labels say."""
    model, _ = warm(t5())
    batch = t5().batch
    # As long as what the encoder reads, so that lengths do not tell them apart.
    labels = torch.cat([batch["labels"].flip(1), batch["labels"]], dim=1)
    labels[1:, -3:] = -100
    start = torch.zeros_like(labels[:, :1])
    batch["labels"] = labels
    batch["decoder_input_ids"] = torch.cat([start, labels[:, :-1].clamp(min=0)], 1)
    padding = torch.cat([start.bool(), labels[:, :-1] == -100], 1)  # a token reads the label before its own
    changed = {key: value.clone() for key, value in batch.items()}
    changed["input_ids"][batch["attention_mask"] == 0] = 9
    changed["decoder_input_ids"][padding] = 11
    told = {**batch, "decoder_attention_mask": (~padding).long()}
    options = {"method_options": {"position": "mean"}} if method in ("cka", "gelora") else {}
    assert_alike(model, method, [batch, changed, told], **options)


FORMS: dict[str, tuple[Any, Any]] = {
    "dictionary": (lambda batch: batch, lambda model, batch: model(**batch).loss),
    "tuple": (
        lambda batch: (batch["input_ids"], batch["attention_mask"], batch["labels"]),
        lambda model, batch: model(batch[0], batch[1], labels=batch[2]).loss,
    ),
    "other names": (  # as those of GRPO
        lambda batch: {"ids": batch["input_ids"], "mask": batch["attention_mask"], "labels": batch["labels"]},
        lambda model, batch: model(batch["ids"], attention_mask=batch["mask"], labels=batch["labels"]).loss,
    ),
    "base model": (
        lambda batch: (batch["input_ids"], batch["attention_mask"]),
        lambda model, batch: model.get_base_model()(batch[0], batch[1]).logits.square().mean(),
    ),
    "backbone": (  # as fused losses call it
        lambda batch: (batch["input_ids"], batch["attention_mask"]),
        lambda model, batch: model.get_base_model().model(batch[0], batch[1])[0].square().mean(),
    ),
}


def numbers_of(method: Any) -> Tensor:
    """All that a method has found: a number for each component, or for each module."""
    found: Tensor = method.component_scores() if method.tells_ranks else method.scores()
    return found


def assert_alike(model: Any, method: str, batches: list[Any], loss_fn: Any = None, **options: Any) -> None:
    """Batches that differ in their padding alone have the same scores."""
    scores = []
    for batch in batches:
        search = make_search(model, method, loss_fn or FORMS["dictionary"][1], **options)
        search.score([batch])
        scores.append(numbers_of(search.method))
    for other in scores[1:]:
        torch.testing.assert_close(scores[0], other, atol=1e-6, rtol=1e-5)


def padded(token: int) -> dict[str, Tensor]:
    """Rows of other lengths, the first one whole, with some token as padding behind them."""
    ids = torch.randint(3, VOCAB, (8, 10), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(10) < torch.arange(10, 2, -1)[:, None]).long()
    labels = ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids.masked_fill(mask == 0, token), "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method", ["eva", "prilora", "cka", "gelora"])
def test_padding_is_what_the_model_is_told(method: str, form: str, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever batches look like."""
    model, _ = warm(llama())
    pack, loss_fn = FORMS[form]
    assert_alike(model, method, [pack(padded(5)), pack(padded(9))], loss_fn)
    assert "does not fit" not in caplog.text


@pytest.mark.parametrize("position", ["first", "last", "mean"])
@pytest.mark.parametrize("method", ["cka", "gelora"])
def test_padding_in_front_moves_no_position(method: str, position: str) -> None:
    model, _ = warm(llama())
    batch = padded(5)
    ids = batch["input_ids"][:, :6]
    plain = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    parts = {"input_ids": 7, "attention_mask": 0, "labels": -100}
    front = {key: torch.cat([torch.full((8, 4), parts[key]), value], dim=1) for key, value in plain.items()}
    assert_alike(model, method, [plain, front], method_options={"position": position})


def test_padding_is_left_out_of_flattened_states(caplog: pytest.LogCaptureFixture) -> None:
    """As OPT has them around its feed-forward."""
    model, _ = warm(opt())
    assert_alike(model, "eva", [padded(5), padded(9)])
    assert "does not fit" not in caplog.text


@pytest.mark.parametrize("method", ["eva", "gelora"])
def test_a_mask_of_samples_is_one_of_states(method: str, caplog: pytest.LogCaptureFixture) -> None:
    """More padding, which does not change what the model computes, changes no score either."""
    tiny = wav2vec2()
    batch = {key: value.clone() for key, value in tiny.batch.items()}
    shorter = {key: value[:, :320] if value.ndim == 2 else value for key, value in batch.items()}
    model, _ = warm(tiny)
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, model(**shorter).logits)
    assert_alike(model, method, [batch, shorter])
    assert "does not fit" not in caplog.text


READ_STATES = ["eva", "prilora", "cka", "gelora"]


@pytest.mark.parametrize("reference", ["base model", "ref"])
@pytest.mark.parametrize("method", READ_STATES)
def test_a_reference_in_the_loss_adds_no_states(method: str, reference: str) -> None:
    """As of DPO: a pass without the adapter, or with a frozen one, beside that of the model."""
    model, _ = warm(bert())
    model.add_adapter("ref", lora(target_modules=["query", "value"], task_type="SEQ_CLS"))
    batch = {**padded(5), "labels": torch.arange(8) % 2}
    before, scores = FORMS["dictionary"][1], []

    def beside(model: Any, batch: Any) -> Tensor:
        with torch.no_grad():
            if reference == "ref":
                model.set_adapter("ref")
                expected = before(model, batch)
                model.set_adapter("default")
            else:
                with model.disable_adapter():
                    expected = before(model, batch)
        return before(model, batch) - expected

    for loss_fn in (before, beside):
        search = make_search(model, method, loss_fn)
        search.score([batch])
        scores.append(numbers_of(search.method))
    assert torch.equal(*scores)


def packed(batch: dict[str, Tensor], told: str) -> dict[str, Tensor]:
    """All rows in one, as without padding, and how the batch tells where one ends."""
    mask = batch["attention_mask"].bool()
    ids, rows = batch["input_ids"][mask], mask.nonzero()[:, 0]
    found = {"input_ids": ids[None], "labels": batch["labels"][mask][None]}
    if told == "position_ids":
        positions = (mask.cumsum(dim=1) - 1)[mask]
        ends = torch.zeros(1, 4, dtype=torch.long)  # padded to a multiple, as TRL does it
        found = {name: torch.cat([value, ends + 9], dim=1) for name, value in found.items()}
        return {**found, "position_ids": torch.cat([positions[None], ends], dim=1)}
    # The model is told by a mask; its positions are relative.
    own = torch.where(rows[:, None] == rows, 0.0, -1e9) + torch.full((len(ids), len(ids)), -1e9).triu(1)
    borders = torch.cat([torch.zeros(1), mask.sum(dim=1).cumsum(0)]).int()
    return {**found, "attention_mask": own[None, None], "cu_seq_lens_q": borders}


@pytest.mark.parametrize("position", ["auto", "first", "last", "mean"])
@pytest.mark.parametrize("told", ["position_ids", "cu_seq_lens_q"])
@pytest.mark.parametrize("method", ["cka", "gelora"])
def test_documents_of_a_packed_row_are_taken_apart(
    method: str, told: str, position: str, caplog: pytest.LogCaptureFixture
) -> None:
    model, _ = warm(llama())
    batch = padded(5)

    def loss_fn(model: Any, batch: Any) -> Tensor:
        # With a cache, transformers does not keep documents apart.
        return model(**{key: value for key, value in batch.items() if key != "cu_seq_lens_q"}, use_cache=False).loss

    assert_alike(model, method, [batch, packed(batch, told)], loss_fn, method_options={"position": position})
    assert "not fit" not in caplog.text


def test_documents_that_do_not_fit_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    model, batches = warm(llama())
    batches = [{**batch, "cu_seq_lens_q": torch.tensor([0, 2, 5])} for batch in batches]
    make_search(model, "cka").score(batches)
    assert caplog.text.count("(`cu_seq_lens_q`, of 5 tokens) do not fit the states (2, ") == 1


class Tagger(nn.Module):
    """A model of one's own: tokens that one of transformers has read, two of which it may take together."""

    def __init__(self, together: bool = False) -> None:
        super().__init__()
        self.encoder = bert().model.bert
        self.together = together
        self.layers = nn.ModuleList([nn.Linear(HIDDEN, HIDDEN)])
        self.head = nn.Linear(HIDDEN, 2)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        states = self.encoder(input_ids=ids, attention_mask=mask)[0]
        if self.together:
            states = states[:, ::2] + states[:, 1::2]
            mask = mask[:, ::2]
        states = self.head(torch.tanh(self.layers[0](states)))
        return (states.sum(-1) * mask).square().mean()


def loss_of_pair(model: Any, batch: Any) -> Tensor:
    return model(*batch)


def test_a_head_of_ones_own_has_the_mask_of_the_model_below() -> None:
    batches = [(one["input_ids"], one["attention_mask"]) for one in map(padded, (5, 9))]
    torch.manual_seed(0)
    model = get_peft_model(Tagger(), lora(target_modules=["query", "layers.0", "head"]))  # type: ignore[arg-type]
    assert_alike(model, "eva", batches, loss_of_pair)


def test_a_mask_that_does_not_fit_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    """States of other tokens than those of the mask, where some are padding; a state for each row has none."""
    caplog.set_level(logging.WARNING)
    torch.manual_seed(0)

    class Pairs(Tagger):
        def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(ids, attention_mask)

    for whole in (True, False):
        model = get_peft_model(Pairs(together=True), lora(target_modules=["query", "layers.0", "head"]))  # type: ignore
        one = padded(5)
        batch = one["input_ids"], torch.ones_like(one["attention_mask"]) if whole else one["attention_mask"]
        for _ in range(2):
            make_search(model, "eva", loss_of_pair).score([batch])
        told = [r.getMessage() for r in caplog.records if "does not fit" in r.getMessage()]
        assert len(told) == (0 if whole else 1)
    assert "(8, 10), does not fit the states (8, 5, 32) at 'layers.0.lora_A.default'" in told[0]


@pytest.mark.parametrize("method", ["eva", "prilora"])
def test_a_table_that_all_rows_share_has_no_padding(method: str, caplog: pytest.LogCaptureFixture) -> None:
    """In DeBERTa, a query projection reads the relative positions too, here 16: also in a batch of 16 tokens."""
    tiny = deberta_v2()
    model = get_peft_model(tiny.model, lora(target_modules=tiny.target_modules, task_type=tiny.task_type))
    for rows, tokens in ((4, 8), (2, 8), (1, 8)):
        mask = torch.ones(rows, tokens, dtype=torch.long)
        mask[0, -3:] = 0
        ids = torch.randint(3, VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(0))
        batch = {"attention_mask": mask, "labels": torch.arange(rows) % 2}
        assert_alike(model, method, [{**batch, "input_ids": ids.masked_fill(mask == 0, token)} for token in (5, 9)])
    assert "does not fit" not in caplog.text
