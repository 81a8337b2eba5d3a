"""Write an adapter as a server takes it: vLLM, SGLang, LoRAX, TGI, llama.cpp, or merged into the model."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from safetensors import SafetensorError

from ..serving import SERVERS
from ..serving import export as export_adapter


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `diffora export`."""
    parser.add_argument("adapter", help="folder of a LoRA that PEFT has saved")
    parser.add_argument(
        "--for",
        dest="server",
        required=True,
        choices=list(SERVERS),
        help="; ".join(f"{name}: {what}" for name, what in SERVERS.items()),
    )
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument("--base_model", help="folder or Hub id of the base model; by default what the adapter says")


def run(words: argparse.Namespace) -> None:
    """
    Export the adapter, and say where it is.

    Raises:
        ValueError: if it cannot be exported, or a file of it is damaged.
        FileNotFoundError: if there is no adapter.
    """
    output = Path(words.output)
    # `export` puts its folder in the place of an empty one, which can be neither a link nor the one of the shell.
    inside = output.is_dir() and not any(output.iterdir())
    target = output / "export" if inside else output
    try:
        export_adapter(words.adapter, words.server, target, words.base_model)
    except (SafetensorError, json.JSONDecodeError) as error:
        what = "weights" if isinstance(error, SafetensorError) else "configuration"
        raise ValueError(
            f"The {what} of the adapter {words.adapter!r}, or of its base model, cannot be read: {error}. A file is "
            "damaged, or was not copied to its end. Please copy or save it again."
        ) from error
    if inside:
        for path in sorted(target.iterdir(), key=lambda path: path.suffix == ".json"):  # the configurations last
            path.rename(output / path.name)
        target.rmdir()
    print(f"Written: {output}")
