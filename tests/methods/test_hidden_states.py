"""Methods that read hidden states (GeLoRA, CKA) against a direct computation."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from diffora_trainer.methods.gelora import intrinsic_dimension
from helpers.checks import assert_each_close
from helpers.models import bert, gpt2
from helpers.searches import components, make_search, pairs, warm


@pytest.mark.parametrize(("size", "dimension"), [(20, 2), (30, 5)])
def test_two_nn_finds_the_dimension_of_a_plane(size: int, dimension: int) -> None:
    generator = np.random.default_rng(0)
    points = generator.uniform(size=(700, dimension)) @ generator.normal(size=(dimension, size))
    found = intrinsic_dimension(torch.tensor(np.concatenate([points, points[:50]])))  # some of them twice
    distances = np.linalg.norm(points[:, None] - points[None], axis=-1)
    first, second = np.sort(distances, axis=1)[:, 1:3].T
    ratios = np.sort(np.log(second / first))[:630]
    line = -np.log(1 - np.arange(1, 631) / 700)
    assert found == pytest.approx(np.linalg.lstsq(ratios[:, None], line, rcond=None)[0][0], rel=1e-6)
    assert abs(found - dimension) < 0.15 * dimension
    with pytest.raises(ValueError, match="2 different states.*score_batches"):
        intrinsic_dimension(torch.tensor([[1.0], [2.0], [2.0]]).double())


def hidden(model: nn.Module, batches: list[dict[str, Tensor]], position: str) -> list[np.ndarray]:
    """The states of the embeddings and after each layer, by the model's own output."""
    plain = copy.deepcopy(model).eval()
    found: list[list[np.ndarray]] = []
    for batch in batches:
        with torch.no_grad():
            states = plain(**batch, output_hidden_states=True).hidden_states
        mask = batch.get("attention_mask", torch.ones(states[0].shape[:2]))
        for index, layer in enumerate(states):
            if index == len(found):
                found.append([])
            for row, seen in zip(layer.double(), mask.bool(), strict=True):
                own = row[seen]
                found[index].append({"first": own[0], "last": own[-1], "mean": own.mean(dim=0)}[position].numpy())
    return [np.stack(parts) for parts in found]


@pytest.mark.parametrize(("kind", "position"), [(bert, "first"), (gpt2, "last")])
def test_cka_is_the_change_of_the_representation(kind: Any, position: str) -> None:
    model, batches = warm(kind())
    for batch in batches:
        batch["input_ids"][:, 0] = 5  # as texts begin
    search = make_search(model, "cka")
    found = search.score(batches)
    states = hidden(model, batches, position)
    by_row = {}
    numbered = [row for row, name in enumerate(search.grid.rows) if name != "other"]
    # Behind the last layer of a causal model a norm follows before its states are given out.
    for row, (x, y) in zip(numbered, pairwise(states), strict=True):
        count = len(x)
        centering = np.eye(count) - 1 / count
        k, l = (centering @ s @ s.T @ centering for s in (x, y))  # noqa: E741
        by_row[row] = 1 - np.trace(k @ l) / np.sqrt(np.trace(k @ k) * np.trace(l @ l))
    if position == "first":
        assert np.ptp(states[0], axis=0).max() < 1e-6  # the first token is the same everywhere
        by_row[numbered[0]] = 0.0
    compared = numbered if position == "first" else numbered[:-1]
    for row, score in zip(search.grid.row_of, found.tolist(), strict=True):
        if row in compared:
            assert score == pytest.approx(by_row[row], abs=1e-6)
        elif row not in numbered:
            assert score == 0.0
    assert max(by_row.values()) > 1e-3
    kept = search.select().kept
    rows = {row: {keep for keep, own in zip(kept, search.grid.row_of, strict=True) if own == row} for row in numbered}
    assert all(len(fates) == 1 for fates in rows.values()), "whole layers are kept or pruned"


def test_gelora_gives_ranks_by_the_rise_of_the_dimension() -> None:
    tiny = bert()
    model, _ = warm(tiny)
    torch.manual_seed(0)
    rows = torch.randint(5, 7, (120, 7))  # of two tokens: the mean of their embeddings is near a line
    batches = [{"input_ids": part, "attention_mask": torch.ones_like(part), "labels": part[:, 0] % 2}
               for part in rows.split(30)]  # fmt: skip
    search = make_search(model, "gelora")
    search.score(batches)
    dimensions = [intrinsic_dimension(torch.tensor(part)) for part in hidden(model, batches, "mean")]
    rises = [max(after - before, 0.0) + 1 for before, after in pairwise(dimensions)]
    assert max(rises) > 1.0
    numbered = [row for row, name in enumerate(search.grid.rows) if name != "other"]
    weights = {**dict(zip(numbered, rises, strict=True)), len(numbered): float(np.mean(rises))}
    expected = []
    for site, (a, b) in zip(search.grid.sites, pairs(model), strict=True):
        sizes = [float(torch.linalg.matrix_norm((b[:, [k]] @ a[[k]]).detach())) for k in range(site.rank)]
        place = np.argsort(np.argsort(-np.array(sizes)))
        expected.append(weights[site.row] / (place + 1) + max(rises) * (place == 0))
    assert_each_close(components(search), expected, rtol=1e-4)


def padded(rows: list[Tensor], length: int) -> dict[str, Tensor]:
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, : len(row)], mask[index, : len(row)] = row, 1
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def texts(count: int, last: tuple[int, ...] = ()) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 64, (5 + index % 7,), generator=generator) for index in range(count)]
    for index, row in enumerate(rows if last else []):
        row[-1] = last[index % len(last)]
    return rows


def test_gelora_counts_a_text_once_in_batches_of_any_length() -> None:
    """What a text's states are differs by rounding there."""
    rows = texts(120)
    batches = [padded(rows[start : start + 20], 11) for start in range(0, 120, 20)]
    again = [padded(rows[start : start + 7], 16) for start in range(0, 49, 7)]
    found = []
    for own in (batches, [*batches, *again]):
        search = make_search(warm()[0], "gelora")
        search.score(own)
        found.append(components(search))
    assert_each_close(found[1], found[0], rtol=1e-3)


@pytest.mark.parametrize("position", ["last", "auto"])
@pytest.mark.parametrize("last", [(7, 9), (7, 9, 11, 12, 13)])
def test_a_layer_that_reads_few_values_has_no_dimension_to_read(
    position: str, last: tuple[int, ...], caplog: pytest.LogCaptureFixture
) -> None:
    """As the first one, where texts end with one of a few tokens."""
    model, _ = warm()
    batch = padded(texts(80, last), 11)
    search = make_search(model, "gelora", method_options={"position": position})
    search.score([batch])
    assert "different states" not in caplog.text
    first, second = (torch.tensor(part) for part in hidden(model, [batch], "last")[:2])
    assert len(torch.unique(first, dim=0)) == len(last)
    # Of the falling shares of a weight the second one, which is its half, says what it is.
    shares = components(search)[search.grid.row_of.index(0)].sort(descending=True).values
    assert float(2 * shares[1]) == pytest.approx(intrinsic_dimension(second) + 1, rel=1e-4)


def test_gelora_says_where_it_rests_on_few_texts(caplog: pytest.LogCaptureFixture) -> None:
    model, _ = warm()
    rows = texts(12)
    make_search(model, "gelora").score([padded(rows, 11), padded(rows, 11)])
    assert "from 12 different states of 24 rows" in caplog.text and "score_batches" in caplog.text


def test_two_rows_do_not_tell_layers_apart() -> None:
    model, batches = warm()
    with pytest.raises(ValueError, match="2 rows.*score_batches"):
        make_search(model, "cka").score(batches[:1])
