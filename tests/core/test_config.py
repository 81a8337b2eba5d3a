"""The configuration: parsing, names of before, errors, and the moments of a run."""

from __future__ import annotations

import dataclasses
import re
import warnings
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from transformers import HfArgumentParser
from trl import SFTConfig, TrlParser

from diffora_trainer import DiffoRAConfig
from diffora_trainer.methods.build import make_schedule, method_of
from diffora_trainer.renamed import OLD_NAMES
from helpers.options import make_config


OPTIONS: dict[str, Any] = {
    "selection_ratio": 0.25,
    "selection_scope": "model",
    "max_trainable_parameters": 1000,
    "selection_granularity": "module",
    "discretize_at": 40.0,
    "arch_warmup": 0.1,
    "fade_out": 0.1,
    "max_step_time": 0.6,
    "max_step_memory": 0.7,
    "selection_unit": "group",
    "selection_groups": {"attention": ["q_proj", "v_proj"]},
    "search_micro_batches": 2,
    "decide_early": True,
    "search_only": False,  # it does not combine with `prefix_cache`
    "prefix_cache": "disk",
    "prefix_cache_gib": 0.5,
    "method": "snip",
    "method_options": {"score_batches": 8, "normalize_scores": True},
    "arch_split": 0.2,
    "arch_batch_size": 4,
    "arch_seed": 7,
    "unselected": "prune",  # "freeze" does not combine with `extra_sites`
    "weight_sharing": "none",
    "extra_sites": {"shortcuts": {"kinds": ["residual1"]}},
    "base_model_id": "org/name",
    "log_gates_by_kind": True,
}
# What was written before, on the command line, and what it is now
BEFORE: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"relaxation": "budget"}, {"method": "diffora"}),
    ({"relaxation": "sigmoid"}, {"method": "sigmoid"}),
    ({"relaxation": "softmax", "method": "snip"}, {"method": "snip"}),  # it was not read
    ({"method": "constant"}, {"method": "random"}),
    ({"arch_closing": 0.1}, {"fade_out": 0.1}),
    (
        {"cost": "time", "selection_scope": "model"},
        {"max_step_time": 0.7, "selection_scope": "model", "selection_ratio": 0.5},
    ),
    (
        {"cost": "time", "max_step_time": 0.5, "selection_scope": "model"},
        {"max_step_time": 0.5, "selection_scope": "model", "selection_ratio": 0.5},
    ),
    ({"cost": "parameters", "max_step_time": 0.7}, {}),
    ({"arch_every": 3}, {"method_options": {"arch_every": 3}}),
    ({"arch_learning_rate": 0.2}, {"method_options": {"arch_learning_rate": 0.2}}),
    ({"arch_order": 2, "relaxation": "sigmoid"}, {"method": "sigmoid", "method_options": {"arch_order": 2}}),
    ({"fold_gates": False}, {"method_options": {"fold_gates": False}}),
    ({"method": "snip", "score_batches": 8}, {"method": "snip", "method_options": {"score_batches": 8}}),
    ({"method": "snip", "normalize_scores": True}, {"method": "snip", "method_options": {"normalize_scores": True}}),
    ({"method": "snip", "reallocate_every": 0.1}, {"method": "snip", "method_options": {"reallocate_every": 0.1}}),
    ({"method": "snip", "arch_every": 2}, {"method": "snip"}),
    ({"shortcuts": ["residual1", "shortcut2"]}, {"extra_sites": {"shortcuts": {"kinds": ["residual1", "shortcut2"]}}}),
    (
        {"shortcuts": ["residual1"], "shortcut_ranking": "separated"},
        {"extra_sites": {"shortcuts": {"kinds": ["residual1"], "ranking": "separated"}}},
    ),
]


def words(options: dict[str, Any]) -> list[str]:
    """Options as they stand on a command line."""
    line = []
    for name, value in options.items():
        line += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return [word.replace("'", '"').replace("True", "true") if word.startswith("{") else word for word in line]


def present() -> list[Any]:
    """The fields that are not names of before."""
    return [field for field in dataclasses.fields(DiffoRAConfig) if field.name not in OLD_NAMES]


def test_every_option_is_parsed_from_the_command_line() -> None:
    assert set(OPTIONS) == {field.name for field in present()} and len(OPTIONS) <= 26
    (config,) = HfArgumentParser(DiffoRAConfig).parse_args_into_dataclasses(words(OPTIONS))
    assert config.to_dict() == OPTIONS
    assert {name: type(value) for name, value in config.to_dict().items()} == {
        name: type(value) for name, value in OPTIONS.items()
    }
    (plain,) = HfArgumentParser(DiffoRAConfig).parse_args_into_dataclasses([])
    assert plain == DiffoRAConfig()
    with pytest.raises(SystemExit):  # choices are checked by the parser already
        HfArgumentParser(DiffoRAConfig).parse_args_into_dataclasses(["--weight_sharing", "hard"])


def test_beside_sft_config_from_yaml_and_command_line(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"output_dir: {tmp_path}\nmax_steps: 300\nlearning_rate: 3.0e-4\nuse_cpu: true\nbf16: false\nreport_to: none\n"
        "selection_ratio: 0.25\nselection_scope: model\ndiscretize_at: 100\narch_seed: 5\n"
        "method_options:\n  arch_learning_rate: 0.01\n  fold_gates: false\n"
    )
    parser = TrlParser((SFTConfig, DiffoRAConfig))
    args, config = parser.parse_args_and_config(["--config", str(recipe), "--arch_seed", "9", "--max_length", "64"])
    assert (args.max_steps, args.learning_rate, args.max_length) == (300, 3e-4, 64)
    assert config == make_config(
        selection_ratio=0.25,
        selection_scope="model",
        discretize_at=100,
        arch_learning_rate=0.01,
        fold_gates=False,
        arch_seed=9,
    )
    assert make_schedule(config, args.max_steps).prune == 100
    # One more reader of the same words would be a clash: argparse refuses it, but a subclass of SFTConfig would not.
    shared = {f.name for f in dataclasses.fields(SFTConfig)} & {f.name for f in dataclasses.fields(DiffoRAConfig)}
    assert not shared


@pytest.mark.parametrize(("before", "now"), BEFORE, ids=[str(before) for before, _ in BEFORE])
def test_names_of_before_are_read_with_one_warning(
    before: dict[str, Any], now: dict[str, Any], tmp_path: Path
) -> None:
    """From Python, the command line and YAML, they make the configuration that today's names make."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        expected = DiffoRAConfig(**now)
        method_of(expected)
        assert dataclasses.replace(expected) == expected
    with pytest.warns(FutureWarning, match=r"deprecated and will be removed in version 0\.3") as caught:
        config = DiffoRAConfig(**before)
    assert [one.filename for one in caught if one.category is FutureWarning] == [__file__]
    assert config == expected and config.to_dict() == expected.to_dict()
    assert DiffoRAConfig.from_dict({**config.to_dict(), **before}).method == expected.method
    with pytest.warns(FutureWarning):
        (parsed,) = HfArgumentParser(DiffoRAConfig).parse_args_into_dataclasses(words(before))
    assert parsed == expected
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("".join(f"{name}: {str(value).lower()}\n" for name, value in before.items()))
    with pytest.warns(FutureWarning):
        (parsed,) = TrlParser(DiffoRAConfig).parse_args_and_config(["--config", str(recipe)])
    assert parsed == expected


def test_numbers_can_be_read_by_their_names_of_before() -> None:
    """As training loops have read them; a copy of the configuration does not take them for passed."""
    config = make_config(arch_every=3, fade_out=0.2)
    assert (config.arch_every, config.arch_order, config.arch_closing) == (3, 1, 0.2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        copied = dataclasses.replace(config, method_options={"arch_every": 8})
        assert copied.arch_every == 8 and dataclasses.replace(copied, method_options=None).arch_every == 4
    with pytest.warns(FutureWarning, match="make_schedule"):
        assert DiffoRAConfig().schedule(300) == (15, 75)
    with pytest.warns(FutureWarning, match="SelectionRun"):
        assert DiffoRAConfig().decision(300) == 60


def test_a_copy_with_another_seed() -> None:
    config = DiffoRAConfig(arch_seed=3)
    assert dataclasses.replace(config, arch_seed=5).arch_seed == 5
    assert dataclasses.replace(config, arch_seed=0) == DiffoRAConfig()
    assert dataclasses.replace(config, selection_ratio=0.25) == DiffoRAConfig(0.25, arch_seed=3)
    with pytest.raises(TypeError, match="seed"):  # a second name for the same was more trouble than help
        DiffoRAConfig(seed=3)  # type: ignore[call-arg]


def test_the_dictionary_that_was_passed_is_not_written_into() -> None:
    options, sites = {"arch_every": 2}, {"shortcuts": {"kinds": ["residual1"]}}
    with pytest.warns(FutureWarning):
        config = DiffoRAConfig(method_options=options, extra_sites=sites, arch_order=2, shortcut_ranking="separated")
    assert options == {"arch_every": 2} and sites == {"shortcuts": {"kinds": ["residual1"]}}
    assert config.method_options == {"arch_every": 2, "arch_order": 2}


def test_limits_are_allowed() -> None:
    for config in (
        make_config(selection_ratio=1, arch_warmup=0, arch_learning_rate=1.0, arch_seed=0),
        make_config(method="sigmoid", arch_learning_rate=5.0),
        DiffoRAConfig(arch_warmup=0.9, discretize_at=1000),  # one is a fraction, the other a step: the run can tell
    ):
        method_of(config)


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
    schedule = make_schedule(DiffoRAConfig(**options), steps)
    assert (schedule.warmup, schedule.prune) == expected


@pytest.mark.parametrize(
    ("options", "steps", "expected"),
    [
        ({}, 300, 60),
        ({}, 3, 2),  # no time for it
        ({}, 14, 3),
        ({"fade_out": 0}, 300, 75),
        ({"fade_out": 10}, 300, 65),
        ({"fade_out": 59}, 300, 16),
        ({"fade_out": 0.9}, 300, 16),  # one step of the search at least
        ({"method": "softmax"}, 300, 60),
        ({"method": "sampled"}, 300, 75),  # its weights train under drawn gates
        ({"weight_sharing": "layer"}, 300, 75),  # what fades out would come back as a shared pair
    ],
)
def test_decision(options: dict[str, Any], steps: int, expected: int) -> None:
    assert make_schedule(DiffoRAConfig(**options), steps).discretize == expected


def test_the_example_of_the_docstring() -> None:
    text = re.sub(r"\s+", " ", str(DiffoRAConfig.__doc__))
    example = re.search(
        r"Example: of (\d+) steps with the defaults, 1 to (\d+) are .* to (\d+) the search.*, and (\d+) to \1 train",
        text,
    )
    assert example is not None
    steps, warmup, decision, alone = map(int, example.groups())
    schedule = make_schedule(DiffoRAConfig(), steps)
    assert (schedule.warmup, schedule.discretize, schedule.prune) == (warmup, decision, alone - 1)


@pytest.mark.parametrize(
    ("options", "steps", "message"),
    [
        ({}, 1, "1 optimizer step.*at least 2"),
        ({"discretize_at": 301}, 300, "discretize_at=301.*only 300 optimizer steps"),
        ({"discretize_at": 1}, 300, "pruned at step 1"),
        ({"discretize_at": 15}, 300, "pruned at step 15.*until step 15"),
        ({"arch_warmup": 75}, 300, "pruned at step 75.*until step 75"),
    ],
)
def test_impossible_schedules_are_refused(options: dict[str, Any], steps: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_schedule(DiffoRAConfig(**options), steps)


def test_every_option_is_documented() -> None:
    text = str(DiffoRAConfig.__doc__)
    types = get_type_hints(DiffoRAConfig)
    for option in present():
        assert len(option.metadata["help"]) > 20, option.name
        entry = re.search(rf"^ *{option.name} \(`([\w\[\]]+)`, \*optional\*(?:, defaults to `(.+)`)?\):$", text, re.M)
        assert entry is not None, option.name
        kind, default = entry.groups()
        plain = [t for t in get_args(types[option.name]) if t is not type(None)] or [types[option.name]]
        assert getattr(plain[0], "__name__", str(plain[0])) == kind  # of a dictionary JSON may stand in its place
        assert (None if default is None else default.strip('"')) == (
            None if option.default is None else str(option.default)
        )
