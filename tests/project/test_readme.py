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


def snippet(heading: str, file: str = "README.md") -> str:
    """The first Python snippet under a heading."""
    section = (ROOT / file).read_text().split(f"\n## {heading}\n")[1]
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


def stand_ins(train: str, folder: Path) -> None:
    """Folders of the same names for the model and the data of a snippet."""
    model, data = (re.search(pattern, train) for pattern in (r'model="(.+?)"', r'load_dataset\("(.+?)"'))
    assert model is not None and data is not None
    causal_model().save_pretrained(folder / model[1])
    tiny_tokenizer().save_pretrained(folder / model[1])
    (folder / data[1]).mkdir(parents=True)
    rows = "".join(json.dumps(row) + "\n" for row in chat_dataset(64))
    (folder / data[1] / "train.jsonl").write_text(rows)


def test_train_then_load(tmp_path: Path) -> None:
    """On a CPU and without the Hub."""
    train, load = snippet("Train"), snippet("Load")
    stand_ins(train, tmp_path)
    said = run(train, tmp_path)
    assert "[diffora] Step 75: kept" in said and "x kept   . removed" in said
    alone = "import sys\nsys.modules.update(diffora_trainer=None, trl=None)\n"
    assert "0" in run(f"{alone}{load}\nprint(sum('lora' in name for name, _ in model.named_modules()))", tmp_path)


def test_two_runs(tmp_path: Path) -> None:
    program = snippet("Two runs", "docs/launchers.md")
    stand_ins(program, tmp_path)
    program = program.replace("max_steps=300", "max_steps=300, bf16=False, report_to='none'")
    look = "names = {n.split('.lora_A')[0] for n, _ in trainer.model.named_parameters() if '.lora_A.' in n}\n"
    look += "assert search.state.global_step == 75 and trainer.state.global_step == 300\n"
    look += "assert {n.removeprefix('base_model.model.') for n in names} == set(search.selection.selected)\n"
    assert "The run ends here" in run(f"{program}\n{look}", tmp_path)
