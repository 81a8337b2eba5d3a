"""The parser of the commands and of the recipes: TRL's, which says what is wrong with the file behind `--config`."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from transformers import HfArgumentParser
from trl import TrlParser  # type: ignore[attr-defined]

from ..compat import number_arguments


class ConfigParser(TrlParser):
    """
    A [`~trl.TrlParser`]. What that says of a YAML file depends on its version, and may be an error of its own code or
    of PyYAML's.
    """

    def parse_args_and_config(self, args: Iterable[str] | None = None, *others: Any, **options: Any) -> Any:
        """
        The parent's.

        Args:
            args (`Iterable[str]`, *optional*): the words of the command line; by default those of the process.

        Raises:
            ValueError: if a value is wrong, or the file behind `--config` holds no arguments.
            OSError: if it cannot be read.
        """
        words = list(sys.argv[1:] if args is None else args)
        if "--config" in words:
            after = words[words.index("--config") + 1 :]
            if not after:
                raise ValueError("`--config` names no file. Please pass a YAML file after it.")
            self._check_numbers(after[0], _read(after[0]))
        return super().parse_args_and_config(words, *others, **options)

    def _check_numbers(self, path: str, found: dict[str, Any]) -> None:
        """The parent converts what a file holds as text, and takes anything else for a number as it is."""
        for name, kind in number_arguments(self).items():
            value = found.get(name)
            if value is not None and not isinstance(value, (str, int, kind)):
                raise ValueError(
                    f"`--config {path}` gives `{name}` as {value!r}, of type {type(value).__name__}, but it must be "
                    f"{'an int' if kind is int else 'a number'}."
                )


class _Reader(HfArgumentParser):
    """Gives what a YAML file holds as it is: PyYAML is a dependency of transformers, not of this package."""

    def parse_dict(self, args: Any, allow_extra_keys: bool = False) -> Any:
        return [args]


def _read(path: str) -> dict[str, Any]:
    """What a file of arguments holds."""
    try:
        (found,) = _Reader(()).parse_yaml_file(path)
    except Exception as error:
        if not isinstance(error, UnicodeDecodeError) and not type(error).__module__.startswith("yaml."):
            raise
        where = " ".join(str(error).split())  # the file and the line, over several lines
        raise ValueError(f"`--config {path}` names no valid YAML: {where}. Please mend it.") from error
    names = list(found) if isinstance(found, dict) else []
    wrong = [name for name in names if not isinstance(name, str)]
    if names and not wrong:
        return dict(found)
    if wrong:  # such as `on:`, which is `true` in YAML
        what = f"an argument that is called {wrong[0]!r}, of type {type(wrong[0]).__name__}"
    elif not found:
        what = "nothing"
    elif isinstance(found, list):
        what = f"a list, of {len(found)} entries"
    else:
        what = f"{str(found)[:40]!r}, of type {type(found).__name__}"
    raise ValueError(
        f"`--config {path}` holds {what}, but arguments by their names are expected: lines such as `max_steps: 100`. "
        "Please write them, or leave `--config` out."
    )
