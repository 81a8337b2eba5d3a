"""Write an adapter as a server takes it: vLLM, SGLang, LoRAX, TGI, llama.cpp, or merged into the model."""

from __future__ import annotations

import argparse

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
    """Export the adapter, and say where it is."""
    print(f"Written: {export_adapter(words.adapter, words.server, words.output, words.base_model)}")
