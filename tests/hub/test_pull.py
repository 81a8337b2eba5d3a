"""What a run has chosen, read from the Hub."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from diffora_trainer import selected_lora_config
from helpers import IMPORT_PATH
from helpers.hub import HubServer
from helpers.trainers import make_trainer


PULL = """
import json
from diffora_trainer import selected_lora_config
from diffora_trainer.cli import main

config = selected_lora_config("user/adapter")
assert main(["show", "user/adapter"]) == 0
try:
    selected_lora_config("user/base")
except ValueError as error:
    print(error)
print("FOUND" + json.dumps(sorted(config.target_modules)), config.r)
"""


def test_the_lora_of_an_adapter_on_the_hub(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, search={"method": "random", "search_only": True})
    trainer.train()
    trainer.save_model(str(tmp_path / "out"))
    with HubServer() as hub:
        files = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()}
        hub.add_repo("user/adapter", files)
        hub.add_repo("user/base", {"config.json": b"{}"})
        done = subprocess.run(
            [sys.executable, "-c", PULL],
            env=hub.env(tmp_path / "hf_home", PYTHONPATH=IMPORT_PATH),
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert done.returncode == 0, done.stderr
    found = done.stdout.split("FOUND")[1]
    assert json.loads(found.rpartition(" ")[0]) == sorted(trainer.selection.selected) and found.endswith(" 4\n")
    assert trainer.selection.table() in done.stdout
    assert "'user/base' is neither a folder here nor an adapter on the Hub" in done.stdout
    assert selected_lora_config(trainer).r == 4
