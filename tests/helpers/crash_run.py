"""
The run that the tests of crashes kill: a server that imports once, and forks a process for each life of the run.

Each line on standard input is a JSON object: `output_dir`, `log`, `report` (where the final findings go), `events` (a
file to which the life appends a line when it begins, and before and after it writes a checkpoint), and perhaps
`save_total_limit`, `shortcuts`, the kinds to choose among too, and `file_limit`, the largest file that it may write
once it is at step 9. The answer is the process id of the life, and at its end its exit status.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import traceback

import torch
from transformers import TrainerCallback, set_seed

from diffora_trainer import DiffoRATrainer
from diffora_trainer.experimental.shortcuts.shortcuts import shortcut_tensors
from diffora_trainer.trainer.checkpoint import newest_checkpoint
from helpers.checks import adapter, step_logs
from helpers.trainers import classifier, make_trainer


STEPS, EVERY, CUT = 100, 2, 24


class Life(DiffoRATrainer):
    """Tells when it writes a checkpoint. The writing itself is the package's and the Trainer's."""

    events: int

    def tell(self, event: str) -> None:
        os.write(self.events, f"{event}\n".encode())

    def _save_checkpoint(self, model, trial) -> None:
        self.tell(f"writes {self.state.global_step}")
        super()._save_checkpoint(model, trial)
        self.tell(f"wrote {self.state.global_step}")


class Circumstances(TrainerCallback):
    def __init__(self, trainer: Life, file_limit: int | None) -> None:
        self.trainer, self.file_limit = trainer, file_limit

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.trainer.tell(f"begins {state.global_step}")

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == 9 and self.file_limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.file_limit, self.file_limit))


def live(order: dict) -> None:
    set_seed(0)
    trainer = make_trainer(
        order["output_dir"],
        cls=Life,
        model=classifier().model,
        args={
            "max_steps": STEPS,
            "save_strategy": "steps",
            "save_steps": EVERY,
            "save_total_limit": order.get("save_total_limit"),
        },
        search={
            "arch_warmup": 6,
            "discretize_at": CUT,
            "fade_out": 8,
            "arch_every": 2,
            **({"shortcuts": order["shortcuts"]} if order.get("shortcuts") else {}),
        },
    )
    trainer.events = os.open(order["events"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    trainer.add_callback(Circumstances(trainer, order.get("file_limit")))
    there_is_one = newest_checkpoint(order["output_dir"])[0] is not None
    trainer.train(resume_from_checkpoint=True if there_is_one else None)
    torch.save(
        {
            "adapter": adapter(trainer.model),
            "shortcuts": {name: tensor.detach() for name, tensor in shortcut_tensors(trainer.model).items()},
            "selection": trainer.selection.to_json(),
            "logs": {step: dict(sorted(log.items())) for step, log in step_logs(trainer).items()},
        },
        order["report"],
    )


def main() -> None:
    for line in sys.stdin:
        order = json.loads(line)
        sys.stdout.flush()
        life = os.fork()
        if life == 0:
            log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            status = 1
            try:
                live(order)
                status = 0
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        print(life, flush=True)
        print(os.waitpid(life, 0)[1], flush=True)


if __name__ == "__main__":
    main()
