"""What the tests share. Whoever imports a part of it is offline, computes with one thread, and shows no bars."""

from __future__ import annotations

import os
from pathlib import Path


# Before the imports: the libraries read these once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import datasets  # noqa: E402
import torch  # noqa: E402


torch.set_num_threads(1)
datasets.disable_progress_bars()

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
IMPORT_PATH = os.pathsep.join([str(ROOT), str(TESTS)])
"""The `PYTHONPATH` of a program that imports this package and these helpers."""
