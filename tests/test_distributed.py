"""Two processes decide as one, and train on after the cut."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


RUN = """
import json, os, sys
import torch
torch.set_num_threads(1)
from models import llama_classifier
from tokenizer import classification_dataset, tiny_tokenizer
from transformers import TrainingArguments
from diffora_trainer import DiffoRAConfig, DiffoRATrainer

world = int(os.environ.get("WORLD_SIZE", 1))
trainer = DiffoRATrainer(
    model=llama_classifier(231, 2).model,
    args=TrainingArguments(
        sys.argv[1], max_steps=16, per_device_train_batch_size=8 // world, gradient_accumulation_steps=2,
        activation_checkpointing=True, activation_checkpointing_kwargs={"use_reentrant": False},
        learning_rate=1e-2, max_grad_norm=0.0, logging_steps=4, report_to="none", use_cpu=True, save_strategy="no",
        disable_tqdm=True,
    ),
    train_dataset=classification_dataset(96),
    processing_class=tiny_tokenizer(),
    diffora_config=DiffoRAConfig(arch_batch_size=8 // world, discretize_at=8, arch_warmup=2, arch_every=1),
)
at_cut = {}
after_cut = trainer._after_cut
trainer._callback._after_cut = lambda: (
    after_cut(), at_cut.update({n: p.detach().clone() for n, p in trainer.model.named_parameters() if "lora_" in n})
)
trainer.train()
moved = [not torch.equal(p, at_cut[n]) for n, p in trainer.model.named_parameters() if n in at_cut]
weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad])
report = {
    "selected": trainer.selection.selected, "scores": trainer.selection.scores, "moved": all(moved) and len(moved) > 0,
    "weights": weights.double().sum().item(),
}
with open(f"{sys.argv[1]}.{os.environ.get('RANK', 0)}.json", "w") as file:
    json.dump(report, file)
"""


@pytest.mark.slow
def test_two_processes_decide_as_one(tmp_path: Path) -> None:
    """DDP on CPU: equal scores and selection on both ranks and on one process with the same global batches."""
    script = tmp_path / "run.py"
    script.write_text(RUN)
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(__file__).parent)}
    alone, launcher = (
        [sys.executable],
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    )
    subprocess.run([*alone, script, tmp_path / "one"], check=True, env=env, timeout=240)
    subprocess.run([*launcher, script, tmp_path / "two"], check=True, env=env, timeout=240)
    one, left, right = (
        json.loads((tmp_path / name).read_text()) for name in ("one.0.json", "two.0.json", "two.1.json")
    )
    assert left == right  # the same decision, and the same weights, on both ranks
    assert left["moved"]  # what was kept still learns: the reducer was built anew
    assert left["selected"] == one["selected"]
    assert left["scores"] == pytest.approx(one["scores"], abs=1e-5)


RESUMED = """
import json, os, sys
import torch
torch.set_num_threads(1)
from conftest import classifier, search_config, step_logs
from test_resume import SaveAt
from tokenizer import classification_dataset, tiny_tokenizer
from transformers import TrainingArguments
from diffora_trainer import DiffoRATrainer

class Save(SaveAt):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = state.global_step in (5, 10)

trainer = DiffoRATrainer(
    model=classifier().model,
    args=TrainingArguments(
        sys.argv[1], max_steps=12, per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=1,
        report_to="none", use_cpu=True, save_strategy="steps", save_steps=100, disable_tqdm=True,
    ),
    train_dataset=classification_dataset(32),
    processing_class=tiny_tokenizer(),
    callbacks=[Save()],
    diffora_config=search_config(),
)
trainer.train(resume_from_checkpoint=sys.argv[2] if len(sys.argv) > 2 else None)
weights = {name: p.flatten().tolist() for name, p in trainer.model.named_parameters() if p.requires_grad}
report = {"selection": trainer.selection.to_json(), "weights": weights, "logs": step_logs(trainer)}
with open(f"{sys.argv[1]}.{os.environ['RANK']}.json", "w") as file:
    json.dump(report, file, sort_keys=True)
"""


@pytest.mark.slow
def test_two_processes_resume(tmp_path: Path) -> None:
    """In the second epoch and in the third, in the search and after the cut, bit for bit; also on the second rank."""
    script = tmp_path / "run.py"
    script.write_text(RESUMED)
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script]
    subprocess.run([*launcher, tmp_path / "whole"], check=True, env=env, timeout=240)
    for step in (5, 10):  # of 4 in an epoch
        checkpoint = tmp_path / f"whole/checkpoint-{step}"
        subprocess.run([*launcher, tmp_path / str(step), checkpoint], check=True, env=env, timeout=240)
        for rank in (0, 1):
            whole, resumed = ((tmp_path / f"{name}.{rank}.json").read_text() for name in ("whole", step))
            assert json.loads(resumed) == json.loads(whole), f"rank {rank} from {step}"
