"""Print what a bug report should say of an environment: versions and devices, nothing else."""

from __future__ import annotations

import argparse
import platform
from importlib import metadata


PACKAGES = (
    "torch",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "datasets",
    "huggingface_hub",
    "safetensors",
    "numpy",
    "bitsandbytes",
    "sentence-transformers",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`diffora env` has no arguments."""


def run(words: argparse.Namespace) -> None:
    """Print it, as a list in Markdown."""
    print("\n".join(f"- {head}: {text}" for head, text in describe()))


def describe() -> list[tuple[str, str]]:
    """What is installed here: names and versions."""
    from .. import __version__

    lines = [
        ("diffora-trainer", __version__),
        ("Python", platform.python_version()),
        ("Platform", platform.platform()),
    ]
    return [*lines, *((name, _version(name)) for name in PACKAGES), ("Devices", _devices())]


def _version(package: str) -> str:
    # Read, not imported: a library that fails to load is what a report may be about.
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> str:
    try:
        import torch
    except (ImportError, OSError) as error:
        return f"unknown, torch cannot be imported ({type(error).__name__})"
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        kind = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
        counts = [f"{names.count(name)} x {name}" for name in dict.fromkeys(names)]
        return f"{', '.join(counts)} ({kind})"
    if torch.accelerator.is_available():
        return f"{torch.accelerator.device_count()} x {torch.accelerator.current_accelerator()}"
    return "CPU"
