"""The command `diffora`, also as `python -m diffora_trainer`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from . import export, plan, show


COMMANDS = {"plan": plan, "show": show, "export": export}


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    from .. import __version__

    parser = argparse.ArgumentParser(prog="diffora", description=__doc__)
    parser.add_argument("--version", action="version", version=f"diffora-trainer {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, command in COMMANDS.items():
        summary = (command.__doc__ or "").strip()
        command.add_arguments(commands.add_parser(name, help=summary.splitlines()[0], description=summary))
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Run a command.

    Args:
        arguments (`Sequence[str]`, *optional*): the words after `diffora`; by default those of the process.

    Returns:
        `int`: 0, or 1 after an error that the user can do something about, which is printed.
    """
    parser = make_parser()
    words, rest = parser.parse_known_args(arguments)
    if rest and words.command != "plan":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    words.options = rest
    try:
        COMMANDS[words.command].run(words)
    except (ValueError, OSError) as error:
        print(f"diffora {words.command}: {error}", file=sys.stderr)
        return 1
    return 0
