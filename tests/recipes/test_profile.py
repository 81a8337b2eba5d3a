"""The profile runs and adds up. What it measures is never asserted: that is the machine's affair."""

from __future__ import annotations

import importlib
import json
import statistics
import sys
from pathlib import Path

import pytest
import yaml

from helpers import ROOT


FOLDER = ROOT / "recipes" / "benchmarks" / "profile"
SHAPE = {
    **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3},
    **{"num_attention_heads": 4, "num_key_value_heads": 2},
}


@pytest.fixture(scope="module")
def measure():
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module("measure")
    sys.path.remove(str(FOLDER))


@pytest.mark.parametrize("config", sorted(path.name for path in FOLDER.glob("*.yaml")))
def test_every_yaml_is_a_profile(measure, config: str) -> None:
    (profile,) = measure.make_parser().parse_args_and_config(["--config", str(FOLDER / config)])
    values = yaml.safe_load((FOLDER / config).read_text())
    assert all(getattr(profile, name) == value for name, value in values.items())
    schedule = measure.schedule_of(profile)
    assert 2 < schedule.warmup < schedule.prune < profile.steps - 4  # each phase has steps to take a median of


def test_trainers_take_turns_and_every_step_is_counted(measure, tmp_path: Path) -> None:
    steps, cut = 64, 16
    out = tmp_path / "figures" / "times.json"
    config = measure.ProfileConfig(
        shape=SHAPE, sequence_length=8, batch_size=2, steps=steps, rank=2, memory=False, output_file=str(out)
    )
    table = measure.main(config)
    seconds = json.loads(out.read_text())["seconds"]
    assert {name: len(values) for name, values in seconds.items() if name != "kept"} == dict.fromkeys(
        ("all_linear", "diffora", "adalora"), steps
    )
    assert steps - cut - 2 <= len(seconds["kept"]) <= steps - cut + 2
    assert all(value > 0 for values in seconds.values() for value in values)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    found = {(row[0], row[1].strip("`")): row for row in rows}
    assert set(found) == {
        *(
            (phase, name)
            for phase in ("warm-up", "search", "selected")
            for name in ("all_linear", "diffora", "adalora")
        ),
        *(("whole run", name) for name in ("all_linear", "diffora", "adalora")),
        ("selected", "kept"),
    }
    for phase in ("warm-up", "search", "selected"):
        assert found[phase, "all_linear"][3].startswith("1.000 (1.000")
    middle = statistics.median(
        a / b for a, b in zip(seconds["diffora"][cut + 2 :], seconds["all_linear"][cut + 2 :], strict=True)
    )
    assert found["selected", "diffora"][3].startswith(f"{middle:.3f}")


def test_a_trainer_that_fails_stops_the_others(measure, monkeypatch) -> None:
    original = measure.make_trainer

    def broken(config, variant, **kwargs):
        if variant == "adalora":
            raise OSError("no such thing")
        return original(config, variant, **kwargs)

    monkeypatch.setattr(measure, "make_trainer", broken)
    config = measure.ProfileConfig(shape=SHAPE, sequence_length=8, batch_size=2, steps=40, rank=2, memory=False)
    with pytest.raises(OSError, match="no such thing"):
        measure.main(config)


def test_many_modules(measure) -> None:
    lines = measure.main(measure.ProfileConfig(modules=200)).splitlines()
    assert [line.split(":")[0] for line in lines] == [
        *("a pass of the model", "an architecture step besides it", "choosing", "cutting")
    ]


def test_bad_variants_are_named(measure) -> None:
    with pytest.raises(ValueError, match=r"\['vera'\]; choose from"):
        measure.ProfileConfig(variants=["all_linear", "vera"])
    with pytest.raises(ValueError, match="needs 'all_linear'"):
        measure.ProfileConfig(variants=["diffora"])
    with pytest.raises(ValueError, match="add that one"):
        measure.ProfileConfig(variants=["all_linear", "kept"])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_memory_of_each_phase(measure) -> None:
    config = measure.ProfileConfig(shape=SHAPE, sequence_length=8, batch_size=2, steps=40, rank=2)
    table = measure.main(config)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    peaks = {(row[0], row[1]): row[4] for row in rows if row[0] != "whole run"}
    assert all(int(peak.replace(",", "")) > 100 for peak in peaks.values())
