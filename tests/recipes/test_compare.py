"""The comparison of methods: equal parameters, honest statistics, and a file of results that survives a kill."""

from __future__ import annotations

import importlib
import json
import math
import os
from pathlib import Path

import peft.helpers
import pytest
import torch
import yaml
from datasets import Dataset
from peft import get_peft_model

from diffora_trainer import DiffoRAConfig
from helpers import ROOT, models
from helpers import data as tiny
from helpers.recipes import on_path


FOLDER = ROOT / "recipes" / "benchmarks" / "compare"
YAMLS = sorted(path.name for path in FOLDER.glob("*.yaml"))
# KappaTune, and AdaLoRA whose regularisation may be 0.
needs_newer_peft = pytest.mark.skipif(
    not hasattr(peft.helpers, "KappaTuneSelector"), reason="the comparison's baselines need a newer PEFT"
)
ALL_METHODS = "random all_linear q_and_v last_layers kappa_tune eva adalora grad_norm diffora full".split()
importable = on_path(FOLDER)
recipe = importlib.import_module


def run(config: str, **overrides) -> tuple[str, list[dict]]:
    """Run a YAML in this process, as its command line would; the table and the records."""
    compare = recipe("compare")
    words = ["--config", str(FOLDER / config)]
    for name, value in overrides.items():
        words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    task, options = compare.make_parser().parse_args_and_config(words)
    task.training = {**task.training, "max_steps": 8, "use_cpu": True, "per_device_train_batch_size": 4}
    table = compare.main(task, options)
    return table, recipe("result_files").read_results(Path(options.output_dir) / "results.jsonl")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny encoder and language model, and data for both."""
    folder = tmp_path_factory.mktemp("compare")
    tokenizer = tiny.tiny_tokenizer()
    torch.manual_seed(0)
    encoder = models.encoder_for(tokenizer, layers=3)
    for name, model in (("encoder", encoder), ("language_model", models.llama(vocab_size=len(tokenizer)).model)):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    rows = [
        {
            "review": tokenizer.decode(row["input_ids"], skip_special_tokens=True),
            "stars": ["bad", "good"][row["label"]],
        }
        for row in tiny.classification_dataset(64)
    ]
    Dataset.from_list(rows).to_json(folder / "reviews.jsonl")
    tiny.prompt_completion_dataset(32).to_json(folder / "answers.jsonl")
    return folder


@pytest.mark.parametrize("config", YAMLS)
def test_every_argument_of_a_yaml_is_known(config: str) -> None:
    known = {action.dest for action in recipe("compare").make_parser()._actions}
    assert not yaml.safe_load((FOLDER / config).read_text()).keys() - known


@needs_newer_peft
def test_every_method_on_data_that_the_recipe_has_never_seen(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    reviews = {"model": folder / "encoder", "dataset_name": folder / "reviews.jsonl", "task": "reviews", "rank": 4}
    reviews |= {"text_columns": "review", "label_column": "stars", "workers": 0, "output_dir": out}
    options = {"budgets": [0.25], "seeds": [0, 1], "draws": 4, "worst": True, "methods": ALL_METHODS}
    table, records = run("sst2_minilm.yaml", **reviews, **options)

    grid_modules = {name for record in records for name in record["ranks"]}
    full = next(record for record in records if record["method"] == "full")
    assert set(full["ranks"]) == grid_modules and len(grid_modules) == 3 * 6 + 1
    cap = 0.25 * full["parameters"]
    largest = 4 * (32 + 64)
    for record in records:
        if record["method"] == "adalora":  # it prunes ranks, whatever their modules cost
            assert sum(record["ranks"].values()) == round(0.25 * 4 * len(grid_modules))
        elif record["method"] != "full":
            assert cap - largest < record["parameters"] <= cap, record["method"]
        assert math.isfinite(record["loss"]) and 0 <= record["metric"] <= 1
    found = {(r["method"], r["reading"], r["seed"], r["draw"]) for r in records}
    assert len(found) == len(records) == 4 + 2 * 9 + 2 * 3 + 2  # draws, runs, choices, worst sets
    ranks = {r["method"]: r["ranks"] for r in records if r["reading"] == "run" and r["seed"] == 0}
    assert set(ranks["q_and_v"]) == {n for n in grid_modules if n.endswith(("query", "value"))}
    assert set(ranks["all_linear"]) == grid_modules
    assert "bert.pooler.dense" in ranks["last_layers"]
    assert set(ranks["diffora"]) == grid_modules and max(ranks["diffora"].values()) <= 4
    worst = next(r for r in records if r["reading"] == "worst" and r["seed"] == 0)
    assert set(worst["ranks"].values()) == {4} and len(worst["ranks"]) < len(grid_modules)
    assert "random sets of its seed; among all 4" in table and all(f"`{name}`" in table for name in ALL_METHODS[1:])
    assert (out / "losses.png").stat().st_size > 1000 and (out / "table.md").read_text().strip() == table.strip()

    # A run that was killed while it wrote a line goes on; nothing that is there is made again.
    results = out / "results.jsonl"
    lines = results.read_text().splitlines()
    results.write_text("\n".join(lines[:-3]) + "\n" + lines[-3][:40])
    again = run("sst2_minilm.yaml", **reviews, **options)[1]
    assert again[: len(lines) - 3] == records[: len(lines) - 3]
    by_key = {(r["method"], r["reading"], r["seed"], r["draw"]): r["loss"] for r in records}
    assert {(r["method"], r["reading"], r["seed"], r["draw"]): r["loss"] for r in again} == by_key
    assert not run("sst2_minilm.yaml", **{**reviews, "rank": 8}, **{**options, "methods": ["full"]})[1] == again


@pytest.mark.parametrize("order", ["random", "group_by_length"])
def test_a_search_that_moves_no_rank_is_the_stock_run_on_the_same_batches(folder: Path, order: str) -> None:
    """From the same first weights, until long after the choice: what the two differ in otherwise is drawn."""
    tasks, methods, sets = recipe("tasks"), recipe("methods"), recipe("module_sets")
    training = {"max_steps": 12, "use_cpu": True, "per_device_train_batch_size": 4, "train_sampling_strategy": order}
    config = tasks.TaskConfig(
        model=str(folder / "encoder"),
        dataset_name=str(folder / "reviews.jsonl"),
        dataset_test_split="train",
        text_columns=["review"],
        label_column="stars",
        rank=4,
        training={**training, "learning_rate": 1e-2, "max_grad_norm": 1e9},
    )
    task = tasks.Task(config)
    grid = sets.Grid.of(task)
    cap = grid.cap(0.5)
    options = DiffoRAConfig(max_trainable_parameters=cap, arch_seed=5, discretize_at=0.5)
    search = task.make_trainer(
        task.make_model(5), 5, search=True, peft_config=sets.lora_config(task, None), diffora_config=options
    )
    first = {name: p.detach().clone() for name, p in search.model.named_parameters() if p.requires_grad}
    stock_model = get_peft_model(task.make_model(5), sets.lora_config(task, sets.all_linear(grid, cap)))
    with torch.no_grad():
        for name, parameter in stock_model.named_parameters():
            if parameter.requires_grad:
                rows, *columns = parameter.shape
                parameter.copy_(first[name][:rows, : columns[0]] if columns else first[name])
    stock = task.make_trainer(stock_model, 5, held_out_order=True)
    stock.diffora_config = options
    assert methods.split_options("all_linear:held_out_order=true") == ("all_linear", {"held_out_order": True})

    for trainer in (search, stock):
        torch.manual_seed(7)
        trainer.train()
    assert max(search.selection.ranks) - min(search.selection.ranks) <= 1  # no rank was moved
    trained = [dict(trainer.model.named_parameters()) for trainer in (search, stock)]
    for name, parameter in trained[1].items():
        if parameter.requires_grad:
            torch.testing.assert_close(trained[0][name], parameter, atol=1e-5, rtol=1e-4)
            assert not parameter.equal(first[name][tuple(map(slice, parameter.shape))])


@needs_newer_peft
def test_each_method_stands_at_its_best_learning_rate(folder: Path, tmp_path: Path) -> None:
    """A rate that is far too high for all but one method; the random sets and the choices have theirs too."""
    base = {"model": folder / "encoder", "dataset_name": folder / "reviews.jsonl", "text_columns": "review"}
    base |= {"label_column": "stars", "workers": 0, "output_dir": tmp_path, "seeds": [0, 1], "budgets": [0.3]}
    options = {"methods": ["random", "all_linear", "diffora"], "draws": 2, "learning_rates": [1e-6, 1e-2]}
    table, records = run("sst2_minilm.yaml", **base, **options)
    assert len(records) == 2 * (2 + 2 + 2 + 2) and {r["learning_rate"] for r in records} == {1e-6, 1e-2}
    rates = {(r["method"], r["learning_rate"]) for r in records if r["reading"] == "choice"}
    assert rates == {("diffora", 1e-6), ("diffora", 1e-2)}
    for method in options["methods"]:
        found = {
            rate: [
                r["loss"] for r in records if (r["method"], r["learning_rate"], r["reading"]) == (method, rate, "run")
            ]
            for rate in (1e-6, 1e-2)
        }
        assert not set(found[1e-6]) & set(found[1e-2])  # the rate did act
        best = min(found, key=lambda rate: sum(found[rate]))
        line = next(line for line in table.splitlines() if line.startswith(f"| `{method}`"))
        assert f" at {best:g} |" in line and f"{sum(found[best]) / len(found[best]):.4f}" in line
    # Another rate is added, and nothing is made again.
    more = run("sst2_minilm.yaml", **base, **{**options, "methods": ["all_linear"], "learning_rates": [1e-3]})[1]
    assert more[: len(records)] == records and len(more) == len(records) + 2
    best_rates = recipe("comparison").best_rates
    whole = best_rates(more)
    assert whole["all_linear"] in (1e-6, 1e-3, 1e-2) and set(whole) == set(options["methods"])
    few = [r for r in more if r.get("learning_rate") != whole["all_linear"] or r["seed"] == 0]
    assert best_rates(few)["all_linear"] != whole["all_linear"]  # one seed does not stand beside two
    with pytest.raises(ValueError, match="learning rate is positive"):
        run("sst2_minilm.yaml", **base, learning_rates=[0.0])


@needs_newer_peft
def test_methods_in_parts_of_the_steps(folder: Path, tmp_path: Path, monkeypatch) -> None:
    """The run and its choice: each makes so many steps, and none is copied from one that made others."""
    methods = recipe("methods")
    steps, train = [], methods.train
    monkeypatch.setattr(methods, "train", lambda trainer: (train(trainer), steps.append(trainer.state.global_step))[0])
    base = {"model": folder / "encoder", "dataset_name": folder / "reviews.jsonl", "text_columns": "review"}
    base |= {"label_column": "stars", "workers": 0, "output_dir": tmp_path, "seeds": [0], "budgets": [0.5]}
    names = ["all_linear", "all_linear:steps=0.5", "diffora:steps=1.5", "diffora:steps=0.5"]
    records = run("sst2_minilm.yaml", **base, methods=names)[1]
    assert steps[:4] == [8, 4, 12, 4] and sorted(steps[4:]) == [4, 12]  # runs, choices
    losses = {(record["method"], record["reading"]): record["loss"] for record in records}
    assert len(losses) == 6
    assert losses["diffora:steps=1.5", "choice"] != losses["diffora:steps=0.5", "choice"]


def test_a_language_model_on_questions_and_answers(folder: Path, tmp_path: Path) -> None:
    options = {"methods": ["random", "diffora:arch_every=1", "q_and_v"], "budgets": [0.3], "seeds": [0], "draws": 2}
    answers = {"model": folder / "language_model", "dataset_name": folder / "answers.jsonl", "workers": 0}
    columns = {"prompt_column": "prompt", "completion_column": "completion", "max_length": 48}
    table, records = run("gsm8k_smollm2.yaml", **answers, **columns, **options, output_dir=tmp_path)
    assert len(records) == 2 + 2 + 1
    assert len({r["loss"] for r in records}) >= 4 and all(0 <= r["metric"] <= 1 for r in records)
    assert "### answers, 0.3 of the LoRA parameters" in table


@needs_newer_peft
def test_a_method_that_fails_does_not_end_the_others(folder: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    def fail(*args):
        raise OSError("this model has no such layer")

    monkeypatch.setattr(recipe("methods"), "kappa_tune", fail)
    base = {"model": folder / "encoder", "dataset_name": folder / "reviews.jsonl", "text_columns": "review"}
    base |= {"label_column": "stars", "workers": 0, "output_dir": tmp_path, "seeds": [0], "budgets": [0.3]}
    records = run("sst2_minilm.yaml", **base, methods=["kappa_tune", "last_layers"])[1]
    assert [record["method"] for record in records] == ["last_layers"]
    assert "FAILED: kappa_tune 0.3 0 0 run: this model has no such layer" in capsys.readouterr().out
    monkeypatch.undo()
    records = run("sst2_minilm.yaml", **base, methods=["kappa_tune", "last_layers"])[1]
    assert [record["method"] for record in records] == ["last_layers", "kappa_tune"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"methods": ["best"]}, "no method 'best'.*grad_norm"),
        ({"methods": ["random:r=1"]}, "has no such options"),
        ({"methods": ["diffora:held_out_order=true"]}, "`held_out_order` is for methods that choose before"),
        ({"methods": ["all_linear:steps=0"]}, "`steps` is a part of `max_steps`.*all_linear:steps=0"),
        ({"methods": ["diffora:method={eva,cka}"]}, "not the name of a method.*unquoted"),
        ({"methods": ["diffora:discretize_at=-1"]}, "discretize_at=-1"),
        ({"budgets": [0]}, r"in \(0, 1\]"),
        ({"metric": "bleu"}, "`metric` must be one of"),
        ({"text_columns": ["title"]}, r"no column \['title'\]; it has"),
        ({"budgets": [0.001]}, "No module of rank"),
    ],
)
def test_bad_options_are_named(folder: Path, tmp_path: Path, overrides: dict, message: str) -> None:
    base = {"model": folder / "encoder", "dataset_name": folder / "reviews.jsonl", "text_columns": "review"}
    base |= {"label_column": "stars", "workers": 0, "output_dir": tmp_path, "methods": ["random"], "seeds": [0]}
    with pytest.raises(ValueError, match=message):
        run("sst2_minilm.yaml", **{**base, **overrides})


@pytest.mark.parametrize(
    ("change", "overrides", "message"),
    [
        (lambda n, row: {**row, "stars": "good"}, {}, "have the label 'good' in the column 'stars'.*nothing to learn"),
        (
            lambda n, row: {**row, "stars": None if n % 5 == 0 else row["stars"]},
            {},
            r"of the 57 rows.*no label \(null\)",
        ),
        (lambda n, row: {**row, "stars": "abc"[n % 3]}, {"metric": "f1"}, "'f1'.*classifier of 3 classes.*macro_f1"),
        (lambda n, row: row, {"metric": "pearson"}, "'pearson'.*classifier of 2 classes.*'accuracy', 'f1'"),
        (lambda n, row: row, {"metric": "token_accuracy"}, "'token_accuracy'.*classifier of 2 classes"),
        (lambda n, row: {**row, "stars": n / 8}, {"metric": "accuracy"}, "'accuracy'.*a regression.*'pearson'"),
    ],
)
def test_labels_and_metrics_that_do_not_fit_are_named_before_the_first_run(
    folder: Path, tmp_path: Path, change, overrides: dict, message: str
) -> None:
    rows = map(json.loads, (folder / "reviews.jsonl").read_text().splitlines())
    data = tmp_path / "changed.jsonl"
    data.write_text("\n".join(json.dumps(change(n, row)) for n, row in enumerate(rows)))
    config = {"text_columns": ["review"], "label_column": "stars", "dataset_name": str(data), **overrides}
    with pytest.raises(ValueError, match=message):
        recipe("tasks").Task(recipe("tasks").TaskConfig(model=str(folder / "encoder"), **config))


def test_a_metric_of_a_classifier_is_refused_for_a_language_model(folder: Path) -> None:
    columns = {"prompt_column": "prompt", "completion_column": "completion", "metric": "accuracy"}
    model, data = str(folder / "language_model"), str(folder / "answers.jsonl")
    with pytest.raises(ValueError, match="'accuracy'.*a language model.*'token_accuracy'"):
        recipe("tasks").Task(recipe("tasks").TaskConfig(model=model, dataset_name=data, **columns))


def test_data_that_cannot_be_used_end_a_comparison_with_workers_too(folder: Path, tmp_path: Path) -> None:
    base = {"model": folder / "encoder", "dataset_name": folder / "reviews.jsonl", "text_columns": "review"}
    base |= {"label_column": "nope", "workers": 2, "output_dir": tmp_path, "methods": ["all_linear"]}
    with pytest.raises(ValueError, match=r"no column \['nope'\]; it has"):
        run("sst2_minilm.yaml", **base)


def test_a_killed_worker_ends_the_work_with_an_error() -> None:
    recipe("tasks")  # for the path
    processes = recipe("workers").processes
    with processes(1) as work:
        assert sorted(work(abs, [-1, 2, -3])) == [1, 2, 3]
        with pytest.raises(RuntimeError, match="worker process died.*fewer workers"):
            list(work(os._exit, [1]))


@pytest.mark.slow
def test_workers_make_what_one_process_makes(folder: Path, tmp_path: Path) -> None:
    base = {"model": folder / "encoder", "dataset_name": folder / "reviews.jsonl", "text_columns": "review"}
    base |= {"label_column": "stars", "seeds": [0], "budgets": [0.3], "methods": ["all_linear", "last_layers"]}
    found = []
    for workers in (0, 1):
        records = run("sst2_minilm.yaml", **base, workers=workers, output_dir=tmp_path / str(workers))[1]
        found.append({record["method"]: record["loss"] for record in records})
    assert found[1] == pytest.approx(found[0], rel=1e-5) and len(found[0]) == 2


def test_results_on_changed_data_are_not_mixed_with_the_old_ones(folder: Path, tmp_path: Path) -> None:
    data, out = tmp_path / "mine.jsonl", tmp_path / "out"
    data.write_text((folder / "reviews.jsonl").read_text())
    base = {"model": folder / "encoder", "dataset_name": data, "text_columns": "review", "label_column": "stars"}
    base |= {"workers": 0, "output_dir": out, "seeds": [0], "budgets": [0.3], "methods": ["all_linear"]}
    (first,) = run("sst2_minilm.yaml", **base)[1]
    assert len(first["trained_on"]["data"]) == 12 and first["trained_on"]["device"] == "cpu"
    assert run("sst2_minilm.yaml", **base)[1] == [first]

    data.write_text(data.read_text().replace("good", "gold").replace("bad", "good").replace("gold", "bad"))
    more = {**base, "methods": ["last_layers"]}
    with pytest.raises(ValueError, match="data .* then, .* now.*another `output_dir`"):
        run("sst2_minilm.yaml", **more)
    results = out / "results.jsonl"
    old = {name: value for name, value in first.items() if name != "trained_on"}
    results.write_text(json.dumps(old) + "\n")  # a record from before this was written
    records = run("sst2_minilm.yaml", **more)[1]
    assert records[0] == old and records[1]["fingerprint"] == old["fingerprint"]
    assert records[1]["trained_on"]["data"] != first["trained_on"]["data"]

    # Files of both can be read together, and do not stand in one table.
    (tmp_path / "first.jsonl").write_text(json.dumps(first) + "\n")
    write_report = recipe("report").write_report
    assert write_report([results], tmp_path).count("### mine, 0.3") == 1
    assert write_report([results, tmp_path / "first.jsonl"], tmp_path).count("### mine, 0.3") == 3


@needs_newer_peft
def test_a_method_with_a_learning_rate_of_its_own_is_run_once(folder: Path, tmp_path: Path) -> None:
    base = {"model": folder / "encoder", "dataset_name": folder / "reviews.jsonl", "text_columns": "review"}
    base |= {"label_column": "stars", "workers": 0, "output_dir": tmp_path, "seeds": [0], "budgets": [0.3]}
    own = "adalora:learning_rate=0.01"
    table, records = run("sst2_minilm.yaml", **base, methods=[own, "all_linear"], learning_rates=[1e-6, 1e-2])
    found = [(record["method"], record["reading"], record.get("learning_rate")) for record in records]
    assert found == [
        *[(own, "run", None), ("all_linear", "run", 1e-6), ("all_linear", "run", 1e-2)],
        *[(own, "choice", 1e-6), (own, "choice", 1e-2)],
    ]
    assert f"| `{own}` | 1 |" in table
    choice = min(record["loss"] for record in records if record["reading"] == "choice")
    (result,) = recipe("comparison").group(records).popitem()[1].values()
    assert result.choices[own][0]["loss"] == choice
    # One that was run at each rate before counts as run.
    path = tmp_path / "results.jsonl"
    path.write_text("\n".join(json.dumps({**record, "learning_rate": 1e-2}) for record in records[:1]) + "\n")
    again = run("sst2_minilm.yaml", **base, methods=[own], learning_rates=[1e-6], choice=False)
    assert len(again[1]) == 1 and f"| `{own}` | 1 |" in again[0]
