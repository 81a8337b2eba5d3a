"""What is pushed or printed holds no secret, and no name of this machine."""

from __future__ import annotations

import json
import pickle
import struct
import subprocess
import sys
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from diffora_trainer.core.selection import SELECTION_NAME
from diffora_trainer.hub.push import private_of
from diffora_trainer.hub.redact import Private
from diffora_trainer.hub.report import REPORT_NAME
from diffora_trainer.trainer.checkpoint import STATE_NAME
from helpers import IMPORT_PATH
from helpers.checks import adapter, assert_same
from helpers.data import tiny_tokenizer
from helpers.hub import HubServer
from helpers.hub.contents import contents
from helpers.trainers import causal_model, make_trainer


PUSH = """
import json, sys, torch
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, TrainingArguments
from peft import LoraConfig
from helpers.data import classification_dataset, lm_dataset, tiny_tokenizer
from trl import SFTConfig
from diffora_trainer import DiffoRAConfig, DiffoRASFTTrainer, DiffoRATrainer

kind, home, token = sys.argv[1:]
common = dict(
    output_dir=home + "/out", max_steps=4, learning_rate=0.01, use_cpu=True, logging_steps=1, save_strategy="steps",
    save_steps=2, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True, push_to_hub=True,
    hub_always_push=True, hub_token=token, hub_model_id="user/adapter", disable_tqdm=True,
)
search = dict(
    diffora_config=DiffoRAConfig(discretize_at=2, arch_warmup=1),
    peft_config=LoraConfig(r=2, target_modules="all-linear"),
)
if kind == "sft":
    trainer = DiffoRASFTTrainer(
        model=home + "/base", train_dataset=lm_dataset(40), eval_dataset=lm_dataset(8),
        args=SFTConfig(bf16=False, report_to="tensorboard", hub_strategy="checkpoint", run_name=home + "/out",
                       model_init_kwargs={"cache_dir": home + "/cache", "token": token}, **common), **search,
    )
else:
    tokenizer = tiny_tokenizer()
    trainer = DiffoRATrainer(
        model=AutoModelForSequenceClassification.from_pretrained(home + "/base", num_labels=2, pad_token_id=0),
        train_dataset=classification_dataset(40), eval_dataset=classification_dataset(8),
        data_collator=DataCollatorWithPadding(tokenizer),
        args=TrainingArguments(report_to="none", hub_strategy="all_checkpoints", **common), **search,
    )
args = trainer.args
trainer.train()
with open(home + "/out/train.log", "w") as log:  # whatever a user keeps there
    log.write(f"export HF_TOKEN={token}; python {home}/train.py")
trainer.push_to_hub(commit_message="the end")
trainer.push_to_hub(commit_message="again", blocking=False).result()
assert trainer.args is args and args.output_dir == home + "/out" and args.hub_token == token
assert type(args.hub_token) is type(args.output_dir) is str
"""


@pytest.fixture(scope="module")
def pushed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run of a kind that pushed everything it could: its home, what it printed, its repository and its token."""
    made: dict[str, Any] = {}

    def run(kind: str) -> Any:
        if kind not in made:
            folder = tmp_path_factory.mktemp("alice")
            home = folder / "home" / "alice"
            causal_model().save_pretrained(home / "base")
            tiny_tokenizer().save_pretrained(home / "base")
            with HubServer() as hub:
                done = subprocess.run(
                    [sys.executable, "-c", PUSH, kind, str(home), hub.token],
                    env=hub.env(folder / "hf_home", PYTHONPATH=IMPORT_PATH, HOME=str(home)),
                    cwd=folder,
                    capture_output=True,
                    text=True,
                    timeout=200,
                )
                assert done.returncode == 0, done.stderr
                made[kind] = (home, done.stdout + done.stderr, hub.repos["user/adapter"], hub.token)
        return made[kind]

    return run


@pytest.mark.parametrize("kind", ["sft", pytest.param("classifier", marks=pytest.mark.slow)])
def test_no_token_and_no_home_in_what_is_pushed_or_printed(kind: str, pushed: Any) -> None:
    home, printed, repo, token = pushed(kind)
    step = "last-checkpoint" if kind == "sft" else "checkpoint-4"
    expected = {"adapter_config.json", "training_args.bin", "trainer_state.json", STATE_NAME, "README.md"}
    assert {f"{step}/{name}" for name in expected} <= set(repo.files)
    assert {"adapter_config.json", "adapter_model.safetensors", "training_args.bin", SELECTION_NAME} <= set(repo.files)
    assert {REPORT_NAME, f"{step}/{REPORT_NAME}"} <= set(repo.files)
    assert "the end" in repo.commits and not [name for name in repo.files if "_hub" in name]
    assert repo.files["train.log"] == b"export HF_TOKEN=<HUB_TOKEN>; python train.py"
    secrets = [token.encode(), b"alice", str(home.parent.parent).encode()]
    for name, data in repo.files.items():
        for part, content in contents(name, data):
            assert not [secret for secret in secrets if secret in content], part
    lines = [line for line in printed.splitlines() if "[diffora]" in line]
    assert len(lines) > 3 and token not in printed and "alice" not in "".join(lines)

    # What others read of it is whole.
    config = json.loads(repo.files["adapter_config.json"])
    assert config["base_model_name_or_path"] is None and config["target_modules"]
    state = json.loads(repo.files[f"{step}/trainer_state.json"])
    assert state["best_model_checkpoint"].startswith("out/checkpoint-")
    args = torch.load(BytesIO(repo.files["training_args.bin"]), weights_only=False)
    assert (args.max_steps, args.output_dir, args.hub_model_id) == (4, "out", "user/adapter")
    if kind == "sft":
        assert args.model_init_kwargs == {"cache_dir": "cache", "token": "<HUB_TOKEN>"}
        (events,) = [data for name, data in repo.files.items() if "tfevents" in name]
        assert b"train/loss" in events and b"diffora/entropy" in events
        (length,) = struct.unpack("<Q", events[:8])
        assert len(events) > length + 16


def test_the_output_folder_stays_as_it_is_on_this_machine(pushed: Any) -> None:
    """Only the copies are changed: here the adapter still finds its local base model, and the run its best one."""
    home, _, repo, token = pushed("sft")
    out = home / "out"
    assert not [path for path in out.iterdir() if path.name.startswith("_")]
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == str(home / "base")
    state = json.loads((out / "checkpoint-4" / "trainer_state.json").read_text())
    assert Path(state["best_model_checkpoint"]).is_dir()
    assert token.encode() not in (out / "training_args.bin").read_bytes()  # there it has no use
    from peft import AutoPeftModelForCausalLM

    here = AutoPeftModelForCausalLM.from_pretrained(out)
    there = out.parent / "downloaded"
    for name, data in repo.files.items():
        if "/" not in name:
            there.mkdir(exist_ok=True)
            (there / name).write_bytes(data)
    base = AutoModelForCausalLM.from_pretrained(home / "base")
    assert_same(adapter(PeftModel.from_pretrained(base, there)), adapter(here))


def test_what_is_private_is_told_from_what_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home" / "alice"
    monkeypatch.setattr(Path, "home", lambda: home)
    trainer = make_trainer(home / "out", args={"hub_token": "hf_secret", "run_name": "hf_" + "A1b2" * 8})
    private = private_of(trainer)
    for text, expected in {
        f"{home}/out/checkpoint-3": "out/checkpoint-3",
        f'"{home}"': '"."',
        f"file://{home}/x": "file://x",
        "token hf_secret.": "token <HUB_TOKEN>.",
        "hf_" + "A1b2" * 8: "<HUB_TOKEN>",
        f"{home}-2/x": f"{home}-2/x",  # another folder
        f"https://huggingface.co{home}/x": f"https://huggingface.co{home}/x",
        "hf_hub and home": "hf_hub and home",
    }.items():
        assert private.without(text) == expected
    page = tmp_path / REPORT_NAME
    page.write_text("<td>/srv/o&#39;neil&#34;s/models/x</td><td>s3cr3t-token</td>")
    cleaned = Private([Path("/srv/o'neil\"s/models")], ["s3cr3t-token"]).clean(page)
    assert cleaned == b"<td>x</td><td>&lt;HUB_TOKEN&gt;</td>"
    copied = private.arguments(trainer.args)
    assert copied.output_dir == trainer.args.output_dir and trainer.args.hub_token == copied.hub_token == "hf_secret"
    stored = pickle.loads(pickle.dumps(copied))
    assert (stored.output_dir, stored.hub_token, stored.run_name) == ("out", "<HUB_TOKEN>", "<HUB_TOKEN>")
    assert stored.to_dict() | {"output_dir": 0, "run_name": 0} == trainer.args.to_dict() | {
        "output_dir": 0,
        "run_name": 0,
    }
