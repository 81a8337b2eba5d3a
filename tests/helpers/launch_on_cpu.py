"""Runs a script as `accelerate launch` would on GPUs, on the CPU: `launch_on_cpu.py SCRIPT ARGUMENTS`."""

from __future__ import annotations

import os
import runpy
import sys

from accelerate.state import PartialState
from accelerate.utils import DistributedType


def allow_fsdp_on_cpu() -> None:
    """accelerate turns FSDP on for GPUs alone, though PyTorch's works on CPUs too: say that these are such."""
    stock = PartialState.__init__

    def init(self, *args: object, **kwargs: object) -> None:
        stock(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            PartialState._shared_state["distributed_type"] = self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = init


if __name__ == "__main__":
    if "ACCELERATE_USE_FSDP" in os.environ:
        allow_fsdp_on_cpu()
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
