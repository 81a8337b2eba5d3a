"""The setting of HeteroLoRA: rows of equal parameters, choices by epochs, and a small model that is made once."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import Dataset

from helpers import ROOT
from helpers import data as tiny
from helpers.recipes import on_path


FOLDER = ROOT / "recipes" / "benchmarks" / "heterolora"
YAMLS = sorted(path.name for path in FOLDER.glob("*.yaml"))
SMALL = {"pretraining_steps": 4, "pretraining_length": 32, "vocab_size": 300, "num_layers": 2, "hidden_size": 32}
SMALL |= {"num_heads": 2, "max_train_samples": 48}
importable = on_path(FOLDER)
recipe = importlib.import_module


def run(config: str, **overrides: Any) -> tuple[str, list[dict[str, Any]]]:
    """Run a YAML in this process, as its command line would; the table and the records."""
    heterolora = recipe("heterolora")
    words = ["--config", str(FOLDER / config)]
    for name, value in overrides.items():
        words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    task, options, small = heterolora.make_parser().parse_args_and_config(words)
    task.training = {**task.training, "num_train_epochs": 2, "use_cpu": True, "per_device_train_batch_size": 4}
    table = heterolora.main(task, options, small)
    return table, recipe("result_files").read_results(Path(options.output_dir) / "results.jsonl")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Pairs of opinions in a file, and a cache of the tests' own."""
    folder = tmp_path_factory.mktemp("heterolora")
    tokenizer = tiny.tiny_tokenizer()
    opinions = [
        tokenizer.decode(row["input_ids"], skip_special_tokens=True) for row in tiny.classification_dataset(128)
    ]
    rows = [
        {"sentence1": a, "sentence2": b, "label": i % 2}
        for i, (a, b) in enumerate(zip(opinions, opinions[::-1], strict=True))
    ]
    Dataset.from_list(rows).to_json(folder / "pairs.jsonl")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIFFORA_CACHE", str(folder / "cache"))
        yield {
            **{"dataset_name": folder / "pairs.jsonl", "dataset_test_split": "validation", "eval_fraction": 0.25},
            **{"pretraining_data": f"{folder / 'pairs.jsonl'}:sentence1,sentence2", **SMALL},
        }


@pytest.mark.parametrize("config", YAMLS)
def test_every_argument_of_a_yaml_is_known(config: str) -> None:
    values = yaml.safe_load((FOLDER / config).read_text())
    assert not values.keys() - {action.dest for action in recipe("heterolora").make_parser()._actions}
    assert recipe("heterolora").HeteroLoRAConfig(methods=values["methods"]).methods[0] == "lora"


@pytest.mark.slow
def test_all_rows_have_equal_parameters_and_none_is_made_twice(data: dict[str, Any], tmp_path: Path) -> None:
    methods = yaml.safe_load((FOLDER / "small_mrpc.yaml").read_text())["methods"]
    options = {**data, "seeds": [0], "output_dir": tmp_path}
    table, records = run("small_mrpc.yaml", **options)
    assert [record["method"] for record in records] == methods

    by_method = {record["method"]: record for record in records}
    ceiling = by_method.pop("lora:rank=32")["parameters"]
    assert {record["parameters"] for record in by_method.values()} == {4 * 2 * 32 * 8}  # q and v of two layers
    assert ceiling == 4 * 4 * 2 * 32 * 8
    for method, record in by_method.items():
        assert 0 <= record["f1"] <= 1 and record["loss"] > 0 and record["majority"] >= 0.5
        if method != "lora":
            assert record["modules"] == 4 and len(record["chosen"]) == 1
            assert record["chosen"][0].endswith(("q_proj", "v_proj"))
    # 12 steps an epoch: a choice at the end of the warm-up, and each 0.2 of an epoch, two steps, until step 24.
    dynamic = by_method["snip:reallocate_epochs=0.2"]
    assert dynamic["allocations"] == list(range(1, 24, 2))
    assert len(dynamic["changes"]) == 11 and sum(dynamic["frequency"].values()) == pytest.approx(1.0, abs=1e-3)
    assert "allocations" not in by_method["snip"]
    assert all(f"| `{method}` | 1 |" in table for method in methods)

    # A run that was killed while it wrote a line goes on; nothing that is there is made again.
    results = tmp_path / "results.jsonl"
    lines = results.read_text().splitlines()
    results.write_text("\n".join(lines[:-2]) + "\n" + lines[-2][:40])
    again = run("small_mrpc.yaml", **options)[1]
    assert again[:-2] == records[:-2]  # the seconds too: they were not made anew
    assert [record["loss"] for record in again] == [record["loss"] for record in records]
    assert run("small_mrpc.yaml", **{**options, "methods": ["lora"]})[1] == again
    more = run("small_mrpc.yaml", **{**options, "methods": ["lora"], "seeds": [0, 1]})[1]
    assert more[:-1] == again and more[-1]["seed"] == 1
    # Another model gives results of its own.
    other = run("small_mrpc.yaml", **{**options, "methods": ["lora"], "pretraining_steps": 3})[1]
    assert len(other) == len(more) + 1 and other[-1]["fingerprint"] != other[0]["fingerprint"]


def test_results_on_changed_data_are_not_mixed_with_the_old_ones(data: dict[str, Any], tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(Path(data["dataset_name"]).read_text())
    options = {**data, "dataset_name": pairs, "seeds": [0], "output_dir": tmp_path, "methods": ["lora"]}
    (record,) = run("small_mrpc.yaml", **options)[1]
    assert record["trained_on"]["data"]
    pairs.write_text("".join(pairs.read_text().splitlines(keepends=True)[::-1]))
    with pytest.raises(ValueError, match="data .* then, .* now.*another `output_dir`"):
        run("small_mrpc.yaml", **options)


def test_a_row_that_fails_does_not_end_the_others(data: dict[str, Any], tmp_path: Path, capsys) -> None:
    options = {**data, "seeds": [0], "output_dir": tmp_path}
    late = "snip:discretize_at=1000"  # the run has 24 steps
    with pytest.raises(ValueError, match="only 24 optimizer steps"):
        run("small_mrpc.yaml", **options, methods=[late])
    records = run("small_mrpc.yaml", **options, methods=[late, "lora"])[1]
    assert [record["method"] for record in records] == ["lora"]
    assert f"FAILED: {late}, seed 0" in capsys.readouterr().out


def test_a_model_from_elsewhere_and_scores_on_held_out_rows(data: dict[str, Any], tmp_path: Path) -> None:
    small_opt = recipe("small_opt")
    options = {**SMALL, "pretraining_data": [data["pretraining_data"]]}
    options.pop("max_train_samples")
    folder = small_opt.small_opt_folder(small_opt.SmallModelConfig(**options))
    base = {name: value for name, value in data.items() if not name.startswith("pretraining")}
    base |= {"model": folder, "seeds": [0], "methods": ["constant:score_batches=2"], "dataset_config": "unused"}
    held_out = run("hub.yaml", **base, output_dir=tmp_path / "a", score_rows="held_out")[1]
    trained_on = run("hub.yaml", **base, output_dir=tmp_path / "b")[1]
    assert held_out[0]["chosen"] == trained_on[0]["chosen"]  # drawn from the seed
    assert held_out[0]["loss"] != trained_on[0]["loss"]  # other rows were trained on before the choice


def test_the_small_model_is_made_once_and_marks_the_ends_of_texts(data: dict[str, Any], capsys) -> None:
    from transformers import AutoTokenizer, OPTForCausalLM

    small_opt = recipe("small_opt")
    options = {name: value for name, value in SMALL.items() if name != "max_train_samples"}
    config = small_opt.SmallModelConfig(
        **{**options, "pretraining_steps": 120}, pretraining_data=[data["pretraining_data"]]
    )
    folder = small_opt.small_opt_folder(config)
    losses = [float(line.split("loss ")[1].split(",")[0]) for line in capsys.readouterr().out.splitlines()[1:]]
    assert losses[-1] < 4.0  # a uniform guess is at 5.7
    assert small_opt.small_opt_folder(config) == folder
    assert not capsys.readouterr().out
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.convert_ids_to_tokens(tokenizer("The fox", "the")["input_ids"])
    assert [text[0], text[-1], text.count("</s>")] == ["</s>", "</s>", 3]
    assert tokenizer("The fox")["input_ids"] == tokenizer("the FOX")["input_ids"]
    model = OPTForCausalLM.from_pretrained(folder)
    assert model.config.num_hidden_layers == 2 and model.config.vocab_size == len(tokenizer)


def test_options_of_a_method() -> None:
    parse = recipe("heterolora").parse_method
    assert parse("lora:rank=32") == ("lora", {"rank": 32})
    assert parse("snip:reallocate_epochs=0.2:normalize_scores=true") == (
        "snip",
        {"reallocate_epochs": 0.2, "normalize_scores": True},
    )
    assert parse("diffora:discretize_at=0.5") == ("diffora", {"discretize_at": 0.5})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"methods": ["best"]}, "no method 'best'.*grad_norm"),
        ({"methods": ["snip:size=3"]}, "'size=3'.*known are.*reallocate_epochs"),
        ({"methods": ["lora:selection_ratio=0.5"]}, r"known are \['rank'\]"),
        ({"keep": 0.3}, "must be a whole number"),
        ({"keep": 0}, r"in \(0, 1\]"),
        ({"score_rows": "test"}, "`score_rows` must be"),
        ({"pretraining_data": "texts"}, "without a column"),
    ],
)
def test_bad_options_are_named(data: dict[str, Any], tmp_path: Path, overrides: dict[str, Any], message: str) -> None:
    base = {**data, "seeds": [0], "methods": ["lora"], "output_dir": tmp_path}
    with pytest.raises(ValueError, match=message):
        run("small_mrpc.yaml", **{**base, **overrides})


def record(method: str, seed: int, loss: float, accuracy: float = 0.5) -> dict[str, Any]:
    numbers = {"loss": loss, "accuracy": accuracy, "parameters": 16, "seconds": 1.0, "majority": 0.5}
    return {"fingerprint": "f", "task": "t", "method": method, "seed": seed, **numbers}


def test_differences_are_paired_with_plain_lora_and_with_the_random_control(tmp_path: Path) -> None:
    dynamic = ":reallocate_epochs=0.2"
    rows = [record("lora", seed, 0.5 + seed) for seed in (0, 1)]
    rows += [record("constant", seed, 0.7 + seed) for seed in (0, 1)]
    rows += [record("constant" + dynamic, seed, 0.8 + seed) for seed in (0, 1)]
    rows += [
        {**record("snip" + dynamic, 0, 0.4), "chosen": ["a", "b"], "changes": [0, 1]},
        {**record("snip" + dynamic, 1, 1.6), "chosen": ["b", "c"], "changes": [2, 0]},
        record("diffora", 0, 0.3),
    ]
    path = tmp_path / "results.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in [*rows, {**rows[0], "fingerprint": "g", "loss": 9.0}]))
    table = recipe("table").write_table([path], tmp_path)
    assert (tmp_path / "table.md").read_text().strip() == table.strip()
    assert table.count("### t") == 2  # results of another training are not mixed
    cells = {line.split(" | ")[0]: line.split(" | ")[1:] for line in table.splitlines() if line.startswith("| `")}
    # Sample standard deviation; Student's t with one degree of freedom on the differences ∓0.1, and so on.
    assert cells[f"| `snip{dynamic}`"][3:7] == [
        "1.0000 ± 0.8485",
        "+0.0000 ± 1.2710",
        "-0.2000 ± 1.2710",
        "-0.3000 ± 1.2710",
    ]
    assert cells[f"| `snip{dynamic}`"][9:] == ["0.50", "0.62 |"]
    assert cells["| `diffora`"][4:7] == ["-0.2000", "-0.4000", ""]
    assert cells["| `constant`"][4:7] == ["+0.2000 ± 0.0000", "", ""]
    with pytest.raises(ValueError, match="no results"):
        recipe("table").write_table([tmp_path / "none.jsonl"], tmp_path)
