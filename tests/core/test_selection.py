"""The budget rules, and the frozen result of a search."""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from diffora_trainer.core.budget import Budget
from diffora_trainer.core.costs import Ceiling
from diffora_trainer.core.grid import SiteInfo
from diffora_trainer.core.selection import SELECTION_NAME, Selection
from diffora_trainer.core.text import short_names
from helpers.adapted import make_grid, make_selection


def random_rows(rng: random.Random) -> tuple[list[int], list[int]]:
    """Rows of different lengths, out of order, with gaps in their numbers; and a size for each module."""
    rows = [row for row in rng.sample(range(20), rng.randint(1, 5)) for _ in range(rng.randint(1, 7))]
    rng.shuffle(rows)
    return rows, [rng.choice([8, 16, 24, 100]) for _ in rows]


def half_up(value: float) -> int:
    return int(value + 0.5)


def test_exact_counts() -> None:
    rng = random.Random(0)
    for _ in range(150):
        rows, sizes = random_rows(rng)
        ratio = rng.choice([0.01, 0.25, 1 / 3, 0.5, 0.9, 1.0, rng.uniform(0.01, 1)])
        scores = torch.randn(len(rows), generator=torch.Generator().manual_seed(rng.randrange(999)))

        kept = Budget(rows, sizes, ratio=ratio, scope="layer").discretize(scores)
        for row in set(rows):
            members = [i for i, r in enumerate(rows) if r == row]
            count = max(1, half_up(ratio * len(members)))
            best = sorted(members, key=lambda i: -float(scores[i]))[:count]
            assert [i for i in members if kept[i]] == sorted(best)

        kept = Budget(rows, sizes, ratio=ratio, scope="model").discretize(scores)
        count = max(1, half_up(ratio * len(rows)))
        assert set(kept.nonzero().flatten().tolist()) == set(scores.topk(count).indices.tolist())


def test_cap_holds_and_nothing_else_fits() -> None:
    rng = random.Random(1)
    for _ in range(150):
        rows, sizes = random_rows(rng)
        cap = rng.randint(min(sizes), sum(sizes) + 10)
        scores = torch.randn(len(rows), generator=torch.Generator().manual_seed(rng.randrange(999)))
        kept = Budget(rows, sizes, scope=rng.choice(["layer", "model"]), cap=cap).discretize(scores)
        spent = sum(size for size, keep in zip(sizes, kept, strict=True) if keep)
        assert 0 < spent <= cap
        assert all(spent + size > cap for size, keep in zip(sizes, kept, strict=True) if not keep)
        # The best module that fits at all is always there.
        affordable = [i for i, size in enumerate(sizes) if size <= cap]
        assert kept[max(affordable, key=lambda i: float(scores[i]))]


def test_ties_are_decided_the_same_way_always() -> None:
    rows, sizes = [0, 0, 0, 1, 1, 1], [10] * 6
    budget = Budget(rows, sizes, ratio=1 / 3)
    equal = torch.zeros(6)
    assert budget.discretize(equal).tolist() == [True, False, False, True, False, False]
    breaker = torch.tensor([0.0, 1.0, 1.0, 0.0, 0.0, 2.0])
    assert budget.discretize(equal, breaker).tolist() == [False, True, False, False, False, True]
    scores = torch.tensor([0.0, 0.0, 0.1, 0.0, 0.1, 0.0])  # a tie-breaker never overrules a score
    assert budget.discretize(scores, breaker).tolist() == [False, False, True, False, True, False]
    assert Budget(rows, sizes, cap=25).discretize(equal, breaker).nonzero().flatten().tolist() == [1, 5]


@pytest.mark.parametrize("options", [{"scope": "layer"}, {"scope": "model"}, {"cap": 120}])
@pytest.mark.parametrize("spread", [0.0, 1.0, 300.0])
def test_calibration_hits_its_target(options: dict[str, Any], spread: float) -> None:
    rows, sizes = [0, 0, 0, 0, 1, 1, 1, 2], [10, 20, 30, 40, 10, 20, 30, 40]
    budget = Budget(rows, sizes, ratio=0.5, **options)
    logits = spread * torch.randn(8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = budget.calibrate(logits)
    assert values.min() >= 0 and values.max() <= 1
    if "cap" in options:
        found, expected = [float((values * torch.tensor(sizes)).sum())], [120.0]
    elif options["scope"] == "model":
        found, expected = [float(values.sum())], [4.0]
    else:
        found = [float(sum(v for v, r in zip(values, rows, strict=True) if r == row)) for row in range(3)]
        expected = [2.0, 2.0, 1.0]  # a row of three keeps 1.5, rounded up
    assert found == pytest.approx(expected, rel=1e-6)
    order = logits.argsort()  # within a group a higher logit means a higher gate
    for group in set(budget.group.tolist()):
        assert values[[i for i in order.tolist() if budget.group[i] == group]].diff().ge(0).all()
    assert torch.allclose(Budget(rows, sizes, ratio=1.0).calibrate(logits), torch.ones(8, dtype=torch.float64))


def test_share_is_what_equal_scores_would_get() -> None:
    rows, sizes = [0, 0, 0, 0, 1, 1, 1, 2], [10, 20, 30, 40, 10, 20, 30, 40]
    assert Budget(rows, sizes, 0.5).share.tolist() == pytest.approx([0.5] * 4 + [2 / 3] * 3 + [1.0])
    assert Budget(rows, sizes, 0.5, "model").share.tolist() == pytest.approx([0.5] * 8)
    assert Budget(rows, sizes, cap=50).share.tolist() == pytest.approx([0.25] * 8)
    assert Budget(rows, sizes, cap=5000).share.tolist() == pytest.approx([1.0] * 8)


def test_share_is_within_what_ceilings_allow() -> None:
    """The mean of two modules in two rows and of one in the first row."""
    for ratio in (1.0, 0.75):  # of four, or of three
        budget = Budget([0, 0, 1, 1], [10] * 4, ratio, "model")
        budget.limit([Ceiling(frozenset([0, 1]), 2), Ceiling(frozenset([0]), 1)])
        assert budget.share.tolist() == pytest.approx([0.5, 0.5, 0.25, 0.25])
        assert budget.discretize(torch.arange(4.0)).tolist() == [False, False, True, True]


def test_a_kind_without_a_part_of_the_cap_takes_no_part() -> None:
    budget = Budget([0, 0, 0], [50, 50, 1], cap=60, kinds=[0, 0, 1])
    assert budget.targets.tolist() == [59, 0] and budget.allowed.tolist() == [True, True, False]
    assert budget.share.tolist() == pytest.approx([0.59, 0.59, 0.0])
    assert budget.calibrate(torch.zeros(3)).tolist() == pytest.approx([0.59, 0.59, 0.0])
    assert budget.discretize(torch.tensor([0.0, 1.0, 2.0])).tolist() == [False, True, False]
    budget = Budget([0, 1, 0], [50, 50, 1], cap=60, kinds=[0, 0, 1])
    budget.limit([Ceiling(frozenset([0]), 3)])
    assert budget.share.tolist() == [1.0, 0.0, 0.0] and budget.discretize(torch.zeros(3)).tolist() == [
        True,
        False,
        False,
    ]


def test_of_the_required_modules_those_under_a_ceiling_are_tried() -> None:
    """Where the best of them is not under it, the next one is kept."""
    scores = torch.tensor([3.0, 1.0, 5.0, 4.0])
    deep, shallow = Ceiling(frozenset([0]), 1), Ceiling(frozenset([1]), 2)
    for ceilings, expected in (([], [0, 2]), ([shallow], [1, 2]), ([deep, shallow], [1, 2])):
        budget = Budget([0, 1, 1, 1], [10] * 4, 0.5, "model", required=[True, True, False, False])
        if ceilings:
            budget.limit(ceilings)
        assert budget.discretize(scores).nonzero().flatten().tolist() == expected


def test_vertex_is_the_best_affordable_set() -> None:
    rng = random.Random(2)
    for trial in range(60):
        rows = [rng.randrange(3) for _ in range(rng.randint(1, 7))]
        size, ratio = rng.choice([1, 12]), rng.uniform(0.1, 1)
        options: dict[str, Any] = [
            {"ratio": ratio, "scope": "layer"},
            {"ratio": ratio, "scope": "model"},
            {"cap": size * rng.randint(1, 5)},
        ][trial % 3]
        budget = Budget(rows, [size] * len(rows), **options)
        gains = torch.randn(len(rows), generator=torch.Generator().manual_seed(trial))
        # The polytope's corners are 0/1 vectors, because all weights of a group are equal.
        best = 0.0
        for corner in itertools.product([0.0, 1.0], repeat=len(rows)):
            weights = torch.zeros_like(budget.targets).index_add_(
                0, budget.group, torch.tensor(corner, dtype=torch.float64) * budget.weights
            )
            if (weights <= budget.targets).all():
                best = max(best, float(torch.dot(torch.tensor(corner), gains)))
        vertex = budget.linear_oracle(gains)
        assert set(vertex.tolist()) <= {0.0, 1.0}
        assert float(torch.dot(vertex, gains)) == pytest.approx(best)
    assert not Budget([0, 0], [1, 1]).linear_oracle(torch.tensor([-1.0, 0.0])).any()  # nothing gains: nothing is taken


def test_vertex_counts_gains_per_parameter_under_a_cap() -> None:
    budget = Budget([0, 0, 0], [100, 10, 10], cap=110)
    assert budget.linear_oracle(torch.tensor([5.0, 1.0, 0.9])).tolist() == [0.0, 1.0, 1.0]
    assert budget.linear_oracle(torch.tensor([50.0, 1.0, 0.9])).tolist() == [1.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Budget([], []), "no module to choose"),
        (lambda: Budget([0, 1], [5]), "2 rows for 1 parameter counts"),
        (lambda: Budget([0], [5], scope="row"), "scope='row'"),
        (lambda: Budget([0, 0], [1500, 2000], cap=1000), "max_trainable_parameters=1,000.*1,500.*raise the cap"),
        (lambda: Budget([0, 0], [5, 5]).discretize(torch.zeros(3)), r"Expected 2 scores.*\(3,\)"),
        (lambda: Budget([0, 0], [5, 5]).discretize(torch.tensor([0.0, float("nan")])), "finite"),
        (lambda: Budget([0, 0], [5, 5]).discretize(torch.tensor([0.0, float("inf")])), "finite"),
    ],
)
def test_budget_errors(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_json_round_trip(tmp_path: Path) -> None:
    for selection in (make_selection(), make_selection(shared=(), step=None, config={}, versions={})):
        assert Selection.from_json(selection.to_json()) == selection
        path = selection.save(tmp_path)
        assert path == tmp_path / SELECTION_NAME
        assert Selection.load(tmp_path) == Selection.load(path) == selection
        assert json.loads(path.read_text())["selected"] == ["layers.0.attn.q", "pooler"]


def test_options_that_hold_tuples_are_the_same_after_a_way_through_json() -> None:
    given = {"method_options": {"taps": (1, 2), "grid": {"pairs": [("a", 0.5)]}}, "extra_sites": None}
    selection = make_selection(config=given)
    assert Selection.from_json(selection.to_json()) == selection
    assert given["method_options"]["taps"] == (1, 2)  # what was passed stays as it is


def test_costs_by_their_names_of_before_are_read() -> None:
    """Version 0.1 wrote what a step costs around the pruning under other names."""
    seconds = {"all_modules": 0.8, "predicted": 0.5, "before_pruning": 0.8, "after_pruning": 0.52}
    selection = make_selection(times=seconds, memory={"all_modules": 8.0, "predicted": 5.0, "after_pruning": 5.2})
    text = selection.to_json().replace("before_pruning", "before_cut").replace("after_pruning", "after_cut")
    assert text.count("_cut") == 3 and Selection.from_json(text) == selection


def changed(**changes: Any) -> str:
    return json.dumps({**json.loads(make_selection().to_json()), **changes})


def changed_record(**changes: Any) -> str:
    data = json.loads(make_selection().to_json())
    data["modules"][0].update(changes)
    return json.dumps(data)


HOSTILE = {
    "empty": "",
    "text": "not json",
    "list": "[]",
    "null": "null",
    "no keys": "{}",
    "cut short": make_selection().to_json()[:-20],
    "too deep": "[" * 100_000,
    "newer format": changed(format=3),
    "a rank above the module's": changed_record(kept_rank=6),
    "a rank that is no number": changed_record(kept_rank="5"),
    "kept without a rank": changed_record(kept_rank=0),
    "no modules": changed(modules=[]),
    "modules are null": changed(modules=None),
    "modules are names": changed(modules=["layers.0.attn.q"]),
    "no grid": changed(rows=[]),
    "rows are null": changed(rows=None),
    "step is a word": changed(step="soon"),
    "step is infinite": changed(step=float("inf")),
    "config is a number": changed(config=3),
    "versions are null": changed(versions=None),
    "shared is null": changed(shared=None),
    "empty group": changed(shared=[[]]),
    "unknown sharer": changed(shared=[["nobody", "layers.1.attn.q"]]),
    "selected sharer": changed(shared=[["pooler", "layers.1.attn.q"]]),
    "sharer twice": changed(shared=[["layers.0.attn.v", "layers.1.attn.q"], ["layers.0.attn.v", "layers.1.attn.v"]]),
    "named twice": changed_record(name="pooler"),
    "row outside": changed_record(row=9),
    "column outside": changed_record(column=-1),
    "row is infinite": changed_record(row=float("inf")),
    "parameters are a word": changed_record(parameters="many"),
    "parameters are infinite": changed_record(parameters=float("inf")),
    "score is nan": changed_record(score=float("nan")),
    "gate is infinite": changed_record(gate=float("inf")),
    "gate is null": changed_record(gate=None),
    "kept is a word": changed_record(kept="false"),
    "rows are a word": changed(rows="layers"),
    "a row is a number": changed(rows=[0, 1, 2]),
    "a name is null": changed_record(name=None),
    "a name without end": changed_record(name="x" * 1001),
    "row is a fraction": changed_record(row=0.5),
    "row is a word": changed_record(row="0"),
    "no parameters": changed_record(parameters=0),
    "two in a cell": changed_record(column=1),
    "a grid that no memory holds": changed(rows=["x"] * 5000, columns=["y"] * 5000),
    "an option is nan": changed(config={"selection_ratio": float("nan")}),
    "a time is infinite": changed(times={"predicted": float("inf")}),
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_json_is_a_value_error(text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        Selection.from_json(text)
    (tmp_path / SELECTION_NAME).write_text(text)
    with pytest.raises(ValueError, match=SELECTION_NAME):
        Selection.load(tmp_path)


def test_bytes_that_are_no_text_are_a_value_error(tmp_path: Path) -> None:
    (tmp_path / SELECTION_NAME).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=SELECTION_NAME):
        Selection.load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ranks": (5,)}, "6 modules has 1 entries in `ranks`"),
        ({"scores": (float("nan"),) * 6}, "not finite"),
        ({"ranks": (0,) * 6}, "keeps no module"),
        ({"ranks": (6, 0, 0, 0, 0, 5)}, "the rank 6 of 5"),
        ({"ranks": (True, 0, 0, 0, 0, 5)}, "the rank True of 5"),
    ],
)
def test_impossible_selections_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_selection(**changes)


def test_impossible_grids_are_refused() -> None:
    site = SiteInfo("a", 0, 0, 5, 2)
    for sites, message in (
        ((site, site), "twice"),
        ((replace(site, column=4),), "outside its grid"),
        ((site, replace(site, name="b")), "one cell"),
        ((replace(site, rank=0),), "without parameters"),
    ):
        with pytest.raises(ValueError, match=message):
            make_grid(sites=sites)


def test_what_becomes_of_each_module() -> None:
    selection = make_selection()
    assert selection.selected == ("layers.0.attn.q", "pooler")
    assert selection.adapted == ("layers.0.attn.q", "layers.0.attn.v", "layers.1.attn.q", "pooler")
    assert selection.dropped == ("layers.1.attn.v", "layers.1.mlp.down")
    assert selection.trainable_parameters == 10 + 5 + 10  # the shared pair counts once
    assert make_selection(shared=()).trainable_parameters == 15
    assert selection.unadapted() == ((), ("mlp.down",))
    assert make_selection(shared=()).unadapted() == (("layers.1",), ("attn.v", "mlp.down"))
    assert selection.summary() == ("kept 2 of 6 LoRA modules, 2 share 1 pair(s): 25 of 75 LoRA parameters (33.3%)")
    assert selection.matrix()[0] == [1.0, 0.0, None, None]
    assert selection.matrix(selection.gates)[2] == [None, None, None, 0.7]


def test_table() -> None:
    assert make_selection().table().splitlines() == [
        "layer     q  v  down  pooler",
        "layers.0  x  s",
        "layers.1  s  .   .",
        "other                   x",
        "x kept   . removed   s shares a pair",
    ]
    assert make_selection(shared=()).table(markdown=True).splitlines() == [
        "| layer | q | v | down | pooler |",
        "| --- | :-: | :-: | :-: | :-: |",
        "| layers.0 | ✅ | · |  |  |",
        "| layers.1 | · | · | · |  |",
        "| other |  |  |  | ✅ |",
    ]


def test_short_names_stay_different() -> None:
    assert short_names(["attn.q", "mlp.up", "cross.attn.k", "self.k"]) == ["q", "up", "attn.k", "self.k"]
    assert short_names(["dense", "output.dense"]) == ["dense", "output.dense"]
    assert short_names(["layer.0.SelfAttention.q", "layer.1.EncDecAttention.q"]) == [
        "SelfAttention.q",
        "EncDecAttention.q",
    ]


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = make_selection(step=1)
    old.save(tmp_path)
    writing = Path.write_bytes

    def full_disk(self: Path, data: bytes) -> int:
        writing(self, data[:50])
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(OSError):
        make_selection(step=2).save(tmp_path)
    assert Selection.load(tmp_path) == old
    assert [path.name for path in tmp_path.iterdir()] == [SELECTION_NAME]
