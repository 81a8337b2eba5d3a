"""Time to a loss: it runs, goes on where it stopped, and its figures are read off the curves right."""

from __future__ import annotations

import importlib
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset

from helpers import ROOT, models
from helpers import data as tiny


FOLDER = ROOT / "recipes" / "benchmarks" / "time_to_loss"
YAMLS = sorted(path.name for path in FOLDER.glob("*.yaml"))


@pytest.fixture(scope="module", autouse=True)
def importable():
    before = list(sys.path)
    sys.path.insert(0, str(FOLDER))
    yield
    sys.path[:] = before


def recipe(name: str) -> Any:
    return importlib.import_module(name)


@pytest.mark.parametrize("config", YAMLS)
def test_every_yaml_is_a_comparison(config: str) -> None:
    task, options = recipe("time_to_loss").make_parser().parse_args_and_config(["--config", str(FOLDER / config)])
    for name, value in yaml.safe_load((FOLDER / config).read_text()).items():
        assert getattr(task if hasattr(task, name) else options, name) == value, name
    from diffora_trainer import DiffoRAConfig
    from diffora_trainer.methods.build import make_schedule

    steps = task.training["max_steps"]
    for method in options.methods:
        name, given = recipe("contestants").parse(method)
        if name == "diffora":  # in a longer run the search ends when it does in one of `max_steps`
            found = DiffoRAConfig(**recipe("contestants").moments(given, steps))
            assert make_schedule(found, 2 * steps).prune == make_schedule(DiffoRAConfig(**given), steps).prune


@pytest.mark.slow
def test_all_methods_take_turns_and_a_killed_comparison_goes_on(tmp_path: Path) -> None:
    tokenizer = tiny.tiny_tokenizer()
    torch.manual_seed(0)
    models.encoder_for(tokenizer, layers=3).save_pretrained(tmp_path / "encoder")
    tokenizer.save_pretrained(tmp_path / "encoder")
    rows = [
        {"review": tokenizer.decode(row["input_ids"], skip_special_tokens=True), "stars": ["no", "yes"][row["label"]]}
        for row in tiny.classification_dataset(64)
    ]
    Dataset.from_list(rows).to_json(tmp_path / "reviews.jsonl")
    words = ["--config", str(FOLDER / "sst2_minilm.yaml"), "--model", str(tmp_path / "encoder"), "--rank", "4"]
    words += ["--dataset_name", str(tmp_path / "reviews.jsonl"), "--text_columns", "review", "--label_column", "stars"]
    words += ["--seeds", "0", "--learning_rates", "1e-3", "1e-2", "--eval_every", "4", "--max_eval_samples", "8"]
    words += ["--output_dir", str(tmp_path / "out"), "--memory", "false"]
    words += ["--dropout", "0.0", "--dtype", "float32"]
    methods = ["all_linear", "q_and_v", "last_layers:k=1", "adalora", "diffora", "diffora:max_step_time=1.0"]
    methods += ["drawn_depth:whole=0.3"]

    def run(names: list[str]) -> tuple[str, list[dict[str, Any]]]:
        module = recipe("time_to_loss")
        task, options = module.make_parser().parse_args_and_config([*words, "--methods", *names])
        task.training = {**task.training, "max_steps": 12, "use_cpu": True, "per_device_train_batch_size": 4}
        dropouts = [m.p for m in recipe("tasks").Task(task).make_model(0).modules() if isinstance(m, torch.nn.Dropout)]
        assert dropouts and not any(dropouts)
        table = module.main(task, options)
        return table, recipe("result_files").read_results(tmp_path / "out" / "results.jsonl")

    run(methods[:2])
    table, records = run(methods)
    assert [r["method"] for r in records] == [*methods[:2] * 2, *["all_linear", *methods[2:]] * 2]
    assert run(methods)[1] == records  # nothing is made twice
    for record in records:
        steps = len(record["seconds"])
        assert steps == 12 if record["method"] == "all_linear" else 12 <= steps <= 24
        assert all(value > 0 for value in record["seconds"])
        assert [step for step, _ in record["losses"]][:4] == [0, 4, 8, 12] and record["losses"][-1][0] == steps
        base = next(r for r in records if r["group"] == record["group"] and r["method"] == "all_linear")
        assert steps == 24 or sum(record["seconds"]) >= sum(base["seconds"])  # as much time as all linear layers
        assert record["losses"][0][1] == pytest.approx(base["losses"][0][1], rel=1e-5)  # one start
    of = {r["method"]: r for r in records}
    assert of["q_and_v"]["parameters"] < of["all_linear"]["parameters"] < of["adalora"]["parameters"]
    assert 0 < len(of["diffora"]["selected"]) < 19 and of["diffora:max_step_time=1.0"]["times"]
    assert all(f"`{name}`" in table for name in methods)
    assert (tmp_path / "out" / "curves.png").stat().st_size > 1000
    assert (tmp_path / "out" / "table.md").read_text().strip() == table


def test_a_pretrained_llama_is_what_the_comparison_of_text_begins_with(tmp_path: Path) -> None:
    rows = [{"text": f"the cat sat on the mat and saw {n} birds"} for n in range(40)]
    Dataset.from_list(rows).to_json(tmp_path / "text.jsonl")
    module, folder = recipe("pretrain_llama"), str(tmp_path / "llama")
    arguments = module.PretrainingArguments(
        dataset_name=str(tmp_path / "text.jsonl"),
        num_layers=2,
        hidden_size=32,
        vocab_size=300,
        steps=4,
        max_eval_samples=4,
        output_dir=folder,
    )
    loss = module.main(arguments)["eval_loss"]
    recipe("time_to_loss")  # for the paths
    config = recipe("tasks").TaskConfig(
        model=folder,
        dataset_name=str(tmp_path / "text.jsonl"),
        max_eval_samples=8,
        dtype="float32",
        training={"use_cpu": True, "max_steps": 1, "per_device_train_batch_size": 4},
    )
    task = recipe("tasks").Task(config)
    trainer = recipe("contestants").make_trainer(task, "last_layers:k=1", 0, 1, 1)
    assert task.measure(trainer)["loss"] == pytest.approx(loss, rel=0.2)  # what was learned is what is loaded
    assert loss < math.log(300) - 0.2
    assert {name.split(".")[4] for name, p in trainer.model.named_parameters() if p.requires_grad} == {"1"}


@pytest.mark.slow
def test_peak_memory_is_that_of_a_process_of_its_own(tmp_path: Path) -> None:
    tokenizer = tiny.tiny_tokenizer()
    models.encoder_for(tokenizer, layers=3).save_pretrained(tmp_path / "encoder")
    tokenizer.save_pretrained(tmp_path / "encoder")
    rows = [{"review": "a b c", "stars": n % 2} for n in range(16)]
    Dataset.from_list(rows).to_json(tmp_path / "reviews.jsonl")
    recipe("time_to_loss")  # for the paths
    config = recipe("tasks").TaskConfig(
        model=str(tmp_path / "encoder"),
        dataset_name=str(tmp_path / "reviews.jsonl"),
        text_columns=["review"],
        label_column="stars",
        training={"use_cpu": True, "per_device_train_batch_size": 2},
    )
    found = recipe("peaks").measure_peak(config, "diffora", steps=12, threads=1)
    assert 2**20 < found["before_bytes"] <= found["peak_bytes"]


def record(method: str, group: str, seconds: list[float], losses: list[tuple[int, float]], **more: Any) -> dict:
    key = {"kind": "run", "fingerprint": "a", "task": "t", "method": method, "group": group, "seed": 0}
    return {**key, "learning_rate": 1e-3, "seconds": seconds, "losses": losses, **more}


def test_figures_are_read_off_the_curves() -> None:
    curves = recipe("curves")
    base = record("all_linear", "g", [2.0] * 10, [(0, 3.0), (5, 2.0), (10, 1.0)])
    # Twice as fast: 20 steps in the same 20 seconds. It reaches 1.0 half-way between steps 10 and 15.
    fast = record("diffora", "g", [1.0] * 20, [(0, 3.0), (10, 1.5), (15, 0.5), (20, 0.75)])
    worse = {**fast, "learning_rate": 1e-2, "group": "h", "losses": [(0, 3.0), (20, 2.9)]}
    never = record("q_and_v", "g", [2.5] * 10, [(0, 3.0), (10, 2.0)])
    records = [
        base,
        fast,
        {**base, "group": "h", "learning_rate": 1e-2, "losses": [(0, 3.0), (10, 2.0)]},
        worse,
        never,
    ]
    runs = curves.runs_of(records)
    (best,) = curves.at_best_rate(runs["diffora"])
    assert best.rate == 1e-3 and best.step_ratio == 0.5
    assert best.time_to(1.0) == pytest.approx(12.5 / 20)
    assert best.loss_at(1.0) == 0.75 and best.loss_at(0.25) == pytest.approx(2.25)
    assert best.loss_after(10) == 1.5
    assert runs["q_and_v"][0].time_to(1.0) is None
    assert runs["q_and_v"][0].loss_at(1.0) == pytest.approx(2.2)  # it has made 8 of 10 steps by then
    memory = [{"kind": "memory", "method": m, "peak_bytes": p} for m, p in (("all_linear", 200), ("diffora", 120))]
    lines = {line.split("`")[1]: line for line in curves.make_table([*records, *memory]).splitlines()[2:]}
    assert "| 0.62 | 0.7500 | 1.5000 | 0.50 | 0.60 | 0.5000 |" in lines["diffora"]
    assert "| not reached |" in lines["q_and_v"] and "| 1.00 | 1.0000 |" in lines["all_linear"]
    assert list(lines) == ["diffora", "all_linear", "q_and_v"]


def test_groups_of_two_sittings_that_share_a_name_are_told_apart(tmp_path: Path) -> None:
    """Each run stands beside the all linear layers that it took turns with, also where files are read together."""
    curves = recipe("curves")
    losses = [(0, 3.0), (10, 1.0)]
    sittings = [
        [record("all_linear", "0-0.001-0", [1.0] * 10, losses), record("diffora", "0-0.001-0", [0.8] * 10, losses)],
        [record("all_linear", "0-0.001-0", [2.0] * 10, losses), record("q_and_v", "0-0.001-0", [1.0] * 10, losses)],
    ]
    ratios = {method: [run.step_ratio for run in runs] for method, runs in curves.runs_of(sum(sittings, [])).items()}
    assert ratios == {"all_linear": [1.0], "diffora": [pytest.approx(0.8)], "q_and_v": [0.5]}
    epochs = recipe("result_files").read_results(FOLDER / "results" / "stsb_epochs.jsonl")
    lines = {line.split("`")[1]: line for line in curves.make_table(epochs).splitlines()[2:]}
    assert "| 1.00 (1.00 to 1.00) | 0.6399" in lines["all_linear"] and "| 0.69 (" in lines["last_layers:k=3"]
    # Of another training: a table and a picture of its own.
    other = [{**run, "fingerprint": "b"} for run in sittings[1]]
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for path, records in zip(paths, (sittings[0], other), strict=True):
        path.write_text("\n".join(map(json.dumps, records)))
    table = curves.write_report(paths, tmp_path)
    assert table.count("### t, ") == 2 and "| `diffora` |" in table and "| `q_and_v` |" in table
    assert "###" not in curves.write_report(paths[:1], tmp_path)


def test_a_rate_at_which_a_run_diverged_is_not_the_best_one(tmp_path: Path) -> None:
    curves = recipe("curves")
    high = {"learning_rate": 1e-1}
    records = [
        record("all_linear", "g", [1.0] * 10, [(0, 3.0), (10, 1.0)]),
        record("diffora", "g", [1.0] * 10, [(0, 3.0), (10, 1.1)]),
        record("all_linear", "h", [1.0] * 10, [(0, 3.0), (10, math.nan)], **high),
        record("diffora", "h", [1.0] * 10, [(0, 3.0), (10, math.nan)], **high),
        record("q_and_v", "h", [1.0] * 10, [(0, 3.0), (10, math.inf)], **high),
    ]
    for found in (records, records[2:4] + records[:2] + records[4:]):
        path = tmp_path / "results.jsonl"
        path.write_text("\n".join(map(json.dumps, found)))
        lines = curves.write_report([path], tmp_path).splitlines()[2:]
        assert [line.split("|")[1:3] for line in lines] == [
            *[[" `all_linear` ", " 0.001 "], [" `diffora` ", " 0.001 "], [" `q_and_v` ", " 0.1 "]]
        ]


@pytest.mark.parametrize(
    "training", [{"lr_scheduler_type": "linear"}, {"lr_scheduler_type": "constant_with_warmup", "warmup_ratio": 0.1}]
)
def test_a_rate_that_depends_on_the_length_of_a_run_needs_runs_of_one_length(
    tmp_path: Path, training: dict[str, Any]
) -> None:
    module = recipe("time_to_loss")
    task = recipe("tasks").TaskConfig(dataset_name="none.jsonl", training={"max_steps": 4, **training})
    options = {"methods": ["all_linear"], "output_dir": str(tmp_path)}
    with pytest.raises(ValueError, match="`longest=1.5`.*Please pass `longest=1`"):
        module.compare(task, module.TimeToLossConfig(longest=1.5, **options))
    with pytest.raises(FileNotFoundError, match=r"there is no none\.jsonl"):  # what comes next
        module.compare(task, module.TimeToLossConfig(longest=1.0, **options))
    recipe("contestants").check_schedule({"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 20}, 2.0)


def test_what_is_refused() -> None:
    config, parse = recipe("time_to_loss").TimeToLossConfig, recipe("contestants").parse
    with pytest.raises(ValueError, match="needs 'all_linear'"):
        config(methods=["diffora"])
    for text in ("last_layers", "last_layers:k=x", "q_and_v:k=2", "eva"):
        with pytest.raises(ValueError, match=text.partition(":")[0]):
            parse(text)
    assert parse("diffora:max_step_time=0.6:method=snip") == ("diffora", {"max_step_time": 0.6, "method": "snip"})
