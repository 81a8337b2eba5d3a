"""The command `diffora`, also as `python -m diffora_trainer`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence


# A command is imported when it is asked for: what it needs takes seconds to load.
COMMANDS = {
    "sft": "fine-tune a language model: all arguments of SFTConfig, ModelConfig and DiffoRAConfig, or --config x.yaml",
    "dpo": "train a language model on preferences: those of DPOConfig, ModelConfig and DiffoRAConfig",
    "classify": "train a classifier or a regression: those of TrainingArguments, ModelConfig and DiffoRAConfig",
    "plan": "say what a run would do before anything is trained",
    "show": "show what a run has chosen, of a folder or of an adapter on the Hub",
    "report": "write what a run has chosen, and why, as one HTML page, of a folder or of an adapter on the Hub",
    "export": "write an adapter as a server takes it: vLLM, SGLang, LoRAX, TGI, llama.cpp, or merged",
    "env": "print the versions and devices that a bug report should name",
}
TRAINING = ("sft", "dpo", "classify")
"""Commands that train."""

WITH_CONFIG = (*TRAINING, "plan")
"""Commands whose arguments a parser of TRL's reads, and explains."""


def make_parser(command: str | None = None) -> argparse.ArgumentParser:
    """
    The parser of all commands.

    Args:
        command (`str`, *optional*): the one whose arguments it knows.
    """
    from .. import __version__

    parser = argparse.ArgumentParser(prog="diffora", description="Choose LoRA modules while a model trains.")
    parser.add_argument("--version", action="version", version=f"diffora-trainer {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, summary in COMMANDS.items():
        own = commands.add_parser(name, help=summary, add_help=name not in WITH_CONFIG)
        if name == command:
            module = importlib.import_module(f"{__name__}.{name}")
            own.set_defaults(run=module.run)
            if name not in WITH_CONFIG:
                own.description = module.__doc__
                module.add_arguments(own)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Run a command.

    Args:
        arguments (`Sequence[str]`, *optional*): the words after `diffora`; by default those of the process.

    Returns:
        `int`: 0, or 1 after an error that the user can do something about, which is printed.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = make_parser(words[0] if words and words[0] in COMMANDS else None)
    found, rest = parser.parse_known_args(words)
    if rest and found.command not in WITH_CONFIG:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    found.options = rest
    try:
        found.run(found)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        if not isinstance(error, (ValueError, OSError)) and not _is_of_installation(error):
            raise
        print(f"diffora {found.command}: {error}", file=sys.stderr)
        return 1
    return 0


def _is_of_installation(error: ImportError | RuntimeError) -> bool:
    """
    Whether something is not installed, and the error says what: it names a module that is not there, or was written
    for the user, and then names none. For a name that a module lacks, the traceback says more.
    """
    if isinstance(error, RuntimeError):  # of the trackers in transformers, such as wandb's
        return "to be installed" in str(error)
    if isinstance(error, ModuleNotFoundError):
        return (error.name or "").partition(".")[0] not in ("", __name__.partition(".")[0])
    return error.name is None
