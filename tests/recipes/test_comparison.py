"""What `compare` makes of its records: budgets, percentiles, intervals, confidence, and the tables of them."""

from __future__ import annotations

import importlib
import json
import math
import random
from pathlib import Path

import pytest
from datasets import Dataset
from matplotlib.axes import Axes

from helpers import ROOT
from helpers.recipes import on_path


FOLDER = ROOT / "recipes" / "benchmarks" / "compare"
importable = on_path(FOLDER)
recipe = importlib.import_module


def test_a_set_of_modules_is_fitted_to_the_budget_to_within_one_module() -> None:
    grid_class = recipe("module_sets").Grid
    rng = random.Random(0)
    for _ in range(200):
        count = rng.randint(1, 40)
        names = tuple(f"layers.{i}.x" for i in range(count))
        widths = tuple(rng.choice([20, 50, 90]) for _ in names)
        grid = grid_class(names, widths, rng.randint(1, 16), ())
        cap = grid.cap(rng.uniform(0.02, 1.0))
        ranks = grid.fill(names, cap)
        assert cap - max(widths) < grid.parameters(ranks) <= cap
        assert max(ranks.values(), default=0) - min(ranks.get(n, 0) for n in names) <= 1
        if cap >= min(widths) * grid.rank:
            taken = grid.take(rng.sample(names, count), cap)
            assert 0 < grid.parameters(taken) <= cap and set(taken.values()) == {grid.rank}


def record(method: str, seed: int, loss: float, reading: str = "run", draw: int = 0, modules: str = "ab") -> dict:
    ranks = dict.fromkeys(modules, 8)
    return {
        **{"method": method, "seed": seed, "loss": loss, "reading": reading, "draw": draw, "ranks": ranks},
        **{"task": "t", "fingerprint": "f", "budget": 0.5, "parameters": 16, "metric": 0.5},
    }


def test_percentiles_differences_and_overlaps() -> None:
    draws = [record("random", seed, seed + draw / 10, draw=draw) for seed in (0, 1) for draw in range(10)]
    ours = [record("diffora", 0, 0.25, "choice"), record("diffora", 1, 1.0, "choice", modules="bc")]
    runs = [record("diffora", 0, 0.2), record("diffora", 1, 1.3), record("full", 0, 0.1)]
    rival = [record("grad_norm", 0, 0.5), record("grad_norm", 1, 1.4)]
    results = recipe("comparison").Results([*draws, *ours, *runs, *rival])
    percentile, low, high = results.percentile(results.choices["diffora"])
    assert percentile == pytest.approx((70 + 95) / 2)  # seven draws above 0.25; nine above 1.0 and one equal
    assert low < percentile < high <= 100
    # 17 of all 20 draws are above 0.25; nine above 1.0, and one equal
    assert results.percentile_of_all(results.choices["diffora"]) == pytest.approx((85 + 47.5) / 2)
    assert results.percentile(results.choices["grad_norm"])[0] == pytest.approx((45 + 55) / 2)
    mean, half, count = results.difference("diffora", "grad_norm")
    assert (mean, count) == (pytest.approx(-0.2), 2)
    assert half == pytest.approx(12.71 * 0.1)  # Student's t with one degree of freedom
    assert results.difference("diffora", "random")[0] == pytest.approx(((0.2 - 0.45) + (1.3 - 1.45)) / 2)
    assert results.overlap(results.choices["diffora"]) == 0.5
    assert results.chance_overlap() == 1.0
    assert results.time("diffora") is None
    timed = [
        {**record(method, seed, 0.5), "cpu_seconds": seconds}
        for method, seed, seconds in (("all_linear", 0, 10.0), ("diffora", 0, 12.0), ("diffora", 1, 99.0))
    ]
    assert recipe("comparison").Results(timed).time("diffora") == pytest.approx(1.2)  # over the seeds of both


def test_a_rate_at_which_a_run_diverged_is_not_the_best_one() -> None:
    comparison = recipe("comparison")
    records = [
        {**record("all_linear", seed, loss), "learning_rate": rate}
        for rate, losses in ((3e-2, (math.nan, 0.1)), (1e-3, (0.4, 0.5)), (1e-1, (math.inf, math.inf)))
        for seed, loss in enumerate(losses)
    ]
    assert comparison.best_rates(records) == {"all_linear": 1e-3}
    draws = [record("random", 0, loss, draw=draw) for draw, loss in enumerate((math.nan, 0.2, 0.6, math.inf))]
    results = comparison.Results([*draws, record("q_and_v", 0, 0.5), record("last_layers", 0, math.nan)])
    assert results.percentile(results.choices["q_and_v"])[0] == 75
    assert results.percentile_of_all(results.choices["last_layers"]) == 25  # as bad as two of four
    assert math.isnan(comparison.half_interval([0.1, math.inf]))
    assert math.isnan(results.difference("last_layers", "q_and_v")[0])
    table = recipe("report").make_table("t", 0.5, results, "q_and_v")
    assert table.index("| `q_and_v` |") < table.index("| `last_layers` |")


def test_the_row_of_random_sets_counts_the_seeds_that_have_some() -> None:
    draws = [record("random", 0, 0.5, draw=draw) for draw in (0, 1)]
    results = recipe("comparison").Results([*draws, *(record("all_linear", seed, 0.4) for seed in range(5))])
    table = recipe("report").make_table("t", 0.5, results, "all_linear")
    assert "| `random`, 2 draws | 1 |" in table and "| `all_linear` | 5 |" in table


@pytest.mark.parametrize(("degrees", "quantile"), [(1, 12.706), (10, 2.228), (14, 2.145), (30, 2.042), (60, 2.000)])
def test_intervals_are_those_of_students_t(degrees: int, quantile: float) -> None:
    values = [float(n % 3) for n in range(degrees + 1)]
    deviation = math.sqrt(sum((value - sum(values) / len(values)) ** 2 for value in values) / degrees)
    half = recipe("comparison").half_interval(values)
    assert half == pytest.approx(quantile * deviation / math.sqrt(len(values)), abs=0.006 * deviation)


def test_confidence_is_compared_with_the_percentile_of_the_choice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draws = [record("random", seed, seed + draw / 10, draw=draw) for seed in (0, 1, 2) for draw in range(10)]
    found = [(0, 0.45, 0.2), (1, 1.05, 0.9), (2, 2.25, 0.6)]  # percentiles 50, 90 and 70
    ours = [{**record("diffora", seed, 1.0), "confidence": sure} for seed, _, sure in found]
    ours += [record("diffora", seed, loss, "choice") for seed, loss, _ in found]
    path = tmp_path / "results.jsonl"
    path.write_text("\n".join(map(json.dumps, [*draws, *ours])))
    table = recipe("report").write_report([path], tmp_path)
    assert "Rank correlation of confidence and percentile over 3 runs is 1.00" in table
    assert "With a confidence above 0.05 the mean percentile is 70 (3 runs), otherwise not known." in table
    assert (tmp_path / "confidence.png").stat().st_size > 1000
    confidence = recipe("confidence")
    drawn: list[float] = []
    plain = Axes.scatter
    monkeypatch.setattr(
        Axes, "scatter", lambda self, xs, ys, **style: drawn.extend(ys) or plain(self, xs, ys, **style)
    )
    confidence.plot([("t", 0.5, percentile) for percentile in [0.0] * 9 + [100.0] * 9], tmp_path / "edges.png")
    assert len(set(drawn)) > 6 and min(drawn) >= 0 and max(drawn) <= 100
    # One of the six orders of three values is theirs; in a quarter of those of four the largest one is first.
    assert confidence.by_chance(lambda ys: -sum(y * 10**i for i, y in enumerate(ys)), [3, 2, 1]) == pytest.approx(
        1 / 6, abs=0.03
    )
    assert confidence.by_chance(lambda ys: ys[0], [4, 1, 2, 3]) == pytest.approx(1 / 4, abs=0.04)
    assert confidence.rank_correlation([(0.1, 3.0), (0.5, 2.0), (0.5, 2.0), (0.9, 1.0)]) == pytest.approx(-1)
    assert confidence.rank_correlation([(0.1, 3.0), (0.1, 2.0), (0.1, 1.0)]) is None


def test_what_a_perfect_trial_of_two_candidates_gains() -> None:
    ours = [record("diffora", 0, 0.5), record("diffora", 1, 0.9), record("diffora", 2, 0.3, modules="abc")]
    even = [record("all_linear", seed, 0.4) for seed in (0, 1, 2, 3)]
    others = [record("diffora", 2, 9.0, "choice"), {**record("all_linear", 0, 0.1), "learning_rate": 1.0}]
    trial_bound = recipe("trial_bound")
    found = trial_bound.differences([*ours, *even, *others])
    assert found == {("t", False): pytest.approx([0.1, 0.5]), ("t", True): pytest.approx([-0.1])}
    row = trial_bound.make_table([*ours, *even, *others]).splitlines()[-1]
    assert row == "| t | 1 | -0.1000 | 0.0000 | 2 | +0.3000 | 0.3000 |"


def test_records_of_another_training_are_not_mixed(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    other = {**record("random", 0, 9.0), "fingerprint": "g"}
    path.write_text("\n".join(json.dumps(r) for r in (record("random", 0, 1.0), other)) + '\n{"task": "cut o')
    table = recipe("report").write_report([path], tmp_path)
    assert table.count("### t, 0.5") == 2
    with pytest.raises(ValueError, match="no results"):
        recipe("report").write_report([tmp_path / "none.jsonl"], tmp_path)


def test_pairs_of_questions_and_sentences(tmp_path: Path) -> None:
    """Half of the sentences hold the answer, the others come from the same paragraph and do not."""
    paragraph = (
        "The river Aare flows through the old town of Bern. It is crossed by nineteen bridges in all. A bear? Yes."
    )
    asked = [("Which town is it?", "Bern"), ("How many bridges are there?", "nineteen"), ("What lives there?", "bear")]
    rows = [
        {"context": paragraph, "question": question, "answers": {"text": [a], "answer_start": [paragraph.index(a)]}}
        for question, a in asked * 40
    ]
    alone = {"context": "Only Bern.", "question": "Where?", "answers": {"text": ["Bern"], "answer_start": [5]}}
    for split in ("train", "validation"):
        Dataset.from_list([*rows, alone]).to_json(tmp_path / f"{split}.jsonl")
    recipe("qnli_from_squad").main(tmp_path, tmp_path / "pairs")
    pairs = [json.loads(line) for line in (tmp_path / "pairs" / "train.jsonl").read_text().splitlines()]
    assert len(pairs) == len(rows)  # no other sentence is there for the last one
    answer_of = dict(asked)
    for pair in pairs:
        assert (answer_of[pair["question"]] in pair["sentence"]) == (pair["label"] == "entailment")
        assert pair["sentence"] in paragraph and pair["sentence"] != paragraph
    assert 0.3 < sum(pair["label"] == "entailment" for pair in pairs) / len(pairs) < 0.7
    with pytest.raises(FileNotFoundError, match="no train.jsonl or train.jsonl.gz in"):
        recipe("qnli_from_squad").main(tmp_path / "pairs" / "nothing", tmp_path / "out")
