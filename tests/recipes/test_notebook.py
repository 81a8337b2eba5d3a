"""The notebook runs from its first cell to its last, and shows what it shows on any machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from helpers import ROOT


NOTEBOOK = json.loads((ROOT / "recipes" / "notebooks" / "quickstart.ipynb").read_text(encoding="utf-8"))
CODE = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def test_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(CODE, start=1):
        exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
    assert names["after"] < names["before"] / 4
    assert set(names["model"].peft_config["default"].target_modules) == set(names["selection"].selected)
    said = [line.split(" ? ") for line in capsys.readouterr().out.splitlines() if " ? " in line]
    right = {
        question.format(animal): answer
        for animal, *answers in names["facts"]
        for question, answer in zip(names["questions"], answers, strict=True)
    }
    assert len(said) == 6 and all(right[f"{question} ?"] == answer for question, answer in said)


def test_its_outputs_are_of_no_machine() -> None:
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    shown = json.dumps([cell["outputs"] for cell in CODE])
    assert "Evaluation loss" in shown and "image/png" in shown
    assert not [sign for sign in ("/home", "/root", "/tmp", "/work", "site-packages", "Warning") if sign in shown]
