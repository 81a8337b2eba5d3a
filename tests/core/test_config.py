"""The configuration: parsing, errors, and the moments of a run."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from transformers import HfArgumentParser
from trl import SFTConfig, TrlParser

from diffora_trainer import DiffoRAConfig


OPTIONS: dict[str, Any] = {
    "selection_ratio": 0.25,
    "selection_scope": "model",
    "max_trainable_parameters": 1000,
    "discretize_at": 40.0,
    "arch_warmup": 0.1,
    "fade_out": 0.1,
    "cost": "time",
    "max_step_time": 0.6,
    "arch_every": 3,
    "relaxation": "softmax",
    "arch_learning_rate": 0.02,
    "arch_order": 2,
    "arch_split": 0.2,
    "arch_batch_size": 4,
    "arch_seed": 7,
    "weight_sharing": "none",
    "fold_gates": False,
    "base_model_id": "org/name",
    "method": "snip",
    "score_batches": 8,
    "normalize_scores": True,
    "reallocate_every": 10.0,
    "shortcuts": ["residual1", "shortcut2"],
    "shortcut_ranking": "separated",
    "log_gates_by_kind": True,
}


def test_every_option_is_parsed_from_the_command_line() -> None:
    assert set(OPTIONS) == {field.name for field in dataclasses.fields(DiffoRAConfig)}
    line = [
        part
        for name, value in OPTIONS.items()
        for part in (f"--{name}", *map(str, value if isinstance(value, list) else [value]))
    ]
    (config,) = HfArgumentParser(DiffoRAConfig).parse_args_into_dataclasses(line)
    assert config.to_dict() == OPTIONS
    assert {name: type(value) for name, value in config.to_dict().items()} == {
        name: type(value) for name, value in OPTIONS.items()
    }
    (plain,) = HfArgumentParser(DiffoRAConfig).parse_args_into_dataclasses([])
    assert plain == DiffoRAConfig()
    with pytest.raises(SystemExit):  # choices are checked by the parser already
        HfArgumentParser(DiffoRAConfig).parse_args_into_dataclasses(["--relaxation", "hard"])


def test_beside_sft_config_from_yaml_and_command_line(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"output_dir: {tmp_path}\nmax_steps: 300\nlearning_rate: 3.0e-4\nuse_cpu: true\nbf16: false\nreport_to: none\n"
        "selection_ratio: 0.25\nselection_scope: model\ndiscretize_at: 100\narch_learning_rate: 1e-2\n"
        "fold_gates: false\narch_seed: 5\n"
    )
    parser = TrlParser((SFTConfig, DiffoRAConfig))
    args, config = parser.parse_args_and_config(["--config", str(recipe), "--arch_seed", "9", "--max_length", "64"])
    assert (args.max_steps, args.learning_rate, args.max_length) == (300, 3e-4, 64)
    assert config == DiffoRAConfig(0.25, "model", None, 100, arch_learning_rate=0.01, fold_gates=False, arch_seed=9)
    assert config.schedule(args.max_steps) == (15, 100)
    # One more reader of the same words would be a clash: argparse refuses it, but a subclass of SFTConfig would not.
    shared = {f.name for f in dataclasses.fields(SFTConfig)} & {f.name for f in dataclasses.fields(DiffoRAConfig)}
    assert not shared


def test_a_copy_with_another_seed() -> None:
    config = DiffoRAConfig(arch_seed=3)
    assert dataclasses.replace(config, arch_seed=5).arch_seed == 5
    assert dataclasses.replace(config, arch_seed=0) == DiffoRAConfig()
    assert dataclasses.replace(config, selection_ratio=0.25) == DiffoRAConfig(0.25, arch_seed=3)
    with pytest.raises(TypeError, match="seed"):  # a second name for the same was more trouble than help
        DiffoRAConfig(seed=3)


def test_limits_are_allowed() -> None:
    DiffoRAConfig(selection_ratio=1, arch_warmup=0, arch_learning_rate=1.0, arch_seed=0)
    DiffoRAConfig(method="sigmoid", arch_learning_rate=5.0)
    DiffoRAConfig(arch_warmup=0.9, discretize_at=1000)  # one is a fraction, the other a step: only the run can tell


@pytest.mark.parametrize(
    ("options", "steps", "expected"),
    [
        ({}, 300, (15, 75)),
        ({}, 2, (1, 2)),  # fractions bend to short runs
        ({}, 3, (1, 2)),
        ({"discretize_at": 0.25}, 10, (1, 3)),  # 2.5 is rounded up
        ({"discretize_at": 0.25}, 14, (1, 4)),  # and so is 3.5
        ({"discretize_at": 100}, 300, (15, 100)),
        ({"discretize_at": 300}, 300, (15, 300)),
        ({"arch_warmup": 20}, 300, (20, 75)),
        ({"arch_warmup": 20, "discretize_at": 21}, 21, (20, 21)),
        ({"arch_warmup": 0}, 300, (1, 75)),  # at step 0 every gradient is zero
        ({"arch_warmup": 0.49, "discretize_at": 0.5}, 4, (1, 2)),
        ({"discretize_at": 0.999}, 10, (1, 10)),
    ],
)
def test_schedule(options: dict[str, Any], steps: int, expected: tuple[int, int]) -> None:
    assert DiffoRAConfig(**options).schedule(steps) == expected


@pytest.mark.parametrize(
    ("options", "steps", "expected"),
    [
        ({}, 300, 60),
        ({}, 3, 2),  # no time for it
        ({}, 14, 3),
        ({"fade_out": 0}, 300, 75),
        ({"fade_out": 10}, 300, 65),
        ({"fade_out": 1000}, 300, 16),  # one step of the search at least
        ({"relaxation": "softmax"}, 300, 60),
        ({"relaxation": "sampled"}, 300, 75),  # its weights train under drawn gates
        ({"weight_sharing": "layer"}, 300, 75),  # what is closed would come back as a shared pair
    ],
)
def test_decision(options: dict[str, Any], steps: int, expected: int) -> None:
    assert DiffoRAConfig(**options).decision(steps) == expected


def test_the_example_of_the_docstring() -> None:
    text = re.sub(r"\s+", " ", str(DiffoRAConfig.__doc__))
    example = re.search(
        r"in a run of (\d+) steps with the defaults, steps 1 to (\d+) .* to (\d+) the search.* of step (\d+), and",
        text,
    )
    assert example is not None
    steps, warmup, decision, cut = map(int, example.groups())
    assert DiffoRAConfig().schedule(steps) == (warmup, cut)
    assert DiffoRAConfig().decision(steps) == decision


@pytest.mark.parametrize(
    ("options", "steps", "message"),
    [
        ({}, 1, "1 optimizer step.*at least 2"),
        ({"discretize_at": 301}, 300, "discretize_at=301.*only 300 optimizer steps"),
        ({"discretize_at": 1}, 300, "cut at step 1"),
        ({"discretize_at": 15}, 300, "cut at step 15.*until step 15"),
        ({"arch_warmup": 75}, 300, "cut at step 75.*until step 75"),
    ],
)
def test_impossible_schedules_are_refused(options: dict[str, Any], steps: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiffoRAConfig(**options).schedule(steps)


def test_every_option_is_documented() -> None:
    text = str(DiffoRAConfig.__doc__)
    types = get_type_hints(DiffoRAConfig)
    for option in dataclasses.fields(DiffoRAConfig):
        assert len(option.metadata["help"]) > 20, option.name
        entry = re.search(
            rf"^    {option.name} \(`([\w\[\]]+)`, \*optional\*(?:, defaults to `(.+)`)?\):$", text, re.M
        )
        assert entry is not None, option.name
        kind, default = entry.groups()
        plain = [t for t in get_args(types[option.name]) if t is not type(None)] or [types[option.name]]
        assert [str(t) if get_args(t) else t.__name__ for t in plain] == [kind]
        assert (None if default is None else default.strip('"')) == (
            None if option.default is None else str(option.default)
        )
