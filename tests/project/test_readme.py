"""What the README shows is run as it is written, on models and data that stand where it looks for its own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from helpers import ROOT, TESTS
from helpers.data import chat_dataset, tiny_tokenizer
from helpers.trainers import causal_model


def snippet(heading: str) -> str:
    """The first Python snippet under a heading."""
    section = (ROOT / "README.md").read_text().split(f"\n## {heading}\n")[1]
    found = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert found is not None
    return found[1]


def test_links_and_names_are_there() -> None:
    """PyPI shows the README alone, so its links are absolute; and a promise names a test that exists."""
    texts = {name: (ROOT / name).read_text() for name in ("README.md", "docs/trainers.md")}
    readme = texts["README.md"]
    links = re.findall(r"\]\((.+?)\)|src=\"(.+?)\"", readme)
    assert len(links) > 20 and all("".join(link).startswith("https://") for link in links)
    repository = re.search(r'Repository = "https://github.com/(.+)"', (ROOT / "pyproject.toml").read_text())
    assert repository is not None
    home = repository[1]
    inside = re.findall(
        rf"https://(?:raw\.githubusercontent|github)\.com/{home}/(?:(?:blob|tree)/)?main/([^)\"]+)", readme
    )
    assert len(inside) > 15 and all((ROOT / path.partition("#")[0]).exists() for path in inside)
    tests = {path.name: path.read_text() for path in TESTS.rglob("test_*.py")}
    for text in texts.values():
        for path in set(re.findall(r"`((?:tests/)?(?:\w+/)*test_\w+\.py)", text)):
            assert (ROOT / path).is_file() if path.startswith("tests/") else path in tests, path
    every = "".join(tests.values())
    named = {name for text in texts.values() for name in re.findall(r"\b(test_\w+)\b(?!\.py)", text)}
    files = {name.removesuffix(".py") for name in tests}
    assert len(named) > 20 and not [name for name in named - files if f"def {name}(" not in every]
    cases = re.findall(r"`test_trainer\[([\w-]+)\]`|`\[([\w-]+)\]`", texts["docs/trainers.md"])
    table = tests["test_trainers_table.py"]
    assert len(cases) > 15 and not [case for pair in cases if f'"{(case := "".join(pair))}"' not in table]


def run(program: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_train_then_load(tmp_path: Path) -> None:
    """On a CPU and without the Hub; folders of the same names stand in for its model and data."""
    train, load = snippet("Train"), snippet("Load")
    model, data = (re.search(pattern, train) for pattern in (r'model="(.+?)"', r'load_dataset\("(.+?)"'))
    assert model is not None and data is not None
    causal_model().save_pretrained(tmp_path / model[1])
    tiny_tokenizer().save_pretrained(tmp_path / model[1])
    (tmp_path / data[1]).mkdir(parents=True)
    rows = "".join(json.dumps(row) + "\n" for row in chat_dataset(64))
    (tmp_path / data[1] / "train.jsonl").write_text(rows)

    said = run(train, tmp_path)
    assert "[diffora] Step 75: kept" in said and "x kept   . removed" in said
    alone = "import sys\nsys.modules.update(diffora_trainer=None, trl=None)\n"
    assert "0" in run(f"{alone}{load}\nprint(sum('lora' in name for name, _ in model.named_modules()))", tmp_path)
