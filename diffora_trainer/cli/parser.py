"""The parser of the commands and of the recipes: TRL's, which says what is wrong with the file behind `--config`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable
from enum import Enum
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from transformers import HfArgumentParser
from trl import TrlParser  # type: ignore[attr-defined]


_KINDS = {int: "an int", float: "a number", str: "a string", bool: "true or false", list: "a list", dict: "a mapping"}


class ConfigParser(TrlParser):
    """
    A [`~trl.TrlParser`] that reads the file behind `--config` itself: what TRL says of one depends on its version, and
    may be an error of its own code or of PyYAML's, and of what stands in the file TRL checks nothing but texts.

    Attributes:
        refuses_others (`bool`): whether what the file holds that is no argument is refused, and not passed over.
    """

    refuses_others = True

    def parse_args_and_config(self, args: Iterable[str] | None = None, *others: Any, **options: Any) -> Any:
        """
        The parent's. What the file holds that is no argument is refused here, or passed over.

        Args:
            args (`Iterable[str]`, *optional*): the words of the command line; by default those of the process.

        Raises:
            ValueError: if a value is wrong, or the file behind `--config` holds no arguments.
            OSError: if it cannot be read.
        """
        first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        first.add_argument("--config", nargs="?", action="append")
        found, words = first.parse_known_args(sys.argv[1:] if args is None else list(args))
        if found.config:
            self._take_file(found.config)
        return super().parse_args_and_config(words, *others, **options)

    def _take_file(self, paths: list[str | None]) -> None:
        """Make what a file holds the defaults."""
        path = paths[0]
        if path is None or len(paths) > 1:
            what = "no file" if path is None else f"{len(paths)} files"
            raise ValueError(f"`--config` names {what}. Please pass one YAML file after it.")
        values = _read(path)
        variables = values.pop("env", None)  # of the environment, as TRL sets them
        if not _fits(variables, dict[str, Any] | None):
            raise ValueError(
                f"`--config {path}` gives `env` as {variables!r}, but it must be a mapping by their names."
            )
        hints = {name: hint for kind in self.dataclass_types for name, hint in get_type_hints(kind).items()}
        for name, value in values.items():
            self._check(path, name, value, hints.get(name, Any))
        unknown = self.set_defaults_with_config(**values)[::2]  # names and values in turn
        if unknown and self.refuses_others:
            names = ", ".join(f"`{name.removeprefix('--')}`" for name in unknown)
            raise ValueError(f"`--config {path}` gives {names}: there is no such argument. Please remove the line.")
        os.environ.update({str(name): str(value) for name, value in (variables or {}).items()})

    def _check(self, path: str, name: str, value: Any, hint: Any) -> None:
        """Refuse a value of a wrong type. A text is converted as a word of the command line is, or refused there."""
        of_default = value is None and self.get_default(name) is None
        # Texts by their types, but documented as switches too: the last folder is resumed from, and FSDP is on.
        a_switch = isinstance(value, bool) and name in ("resume_from_checkpoint", "fsdp")
        if isinstance(value, str) or of_default or a_switch or _fits(value, hint):
            return
        hints = get_args(hint) if _is_union(hint) else [hint]
        kinds = [get_origin(kind) or kind for kind in hints]
        expected = " or ".join(_named(one) for one, kind in zip(hints, kinds, strict=True) if kind in _KINDS)
        remedy = ""
        if value is None:
            remedy = " Please write one, or leave the line out."
        elif str in kinds and isinstance(value, bool):
            remedy = " Please write it in quotes: YAML reads `no`, `off`, `on` and `yes` without them so."
        elif str in kinds and not isinstance(value, (list, dict)):
            remedy = f" Please write it in quotes: '{value}'."
        raise ValueError(
            f"`--config {path}` gives `{name}` as {'null' if value is None else repr(value)}, of type "
            f"{type(value).__name__}, but it must be {expected}.{remedy}"
        )


def _is_union(hint: Any) -> bool:
    return get_origin(hint) in (Union, UnionType)


def _named(hint: Any) -> str:
    """A type that `_KINDS` has, as a message names it: of a list, with what its entries are."""
    kind, inner = get_origin(hint) or hint, get_args(hint)
    if kind is not list or not inner:
        return _KINDS[kind]
    if isinstance(inner[0], type) and issubclass(inner[0], Enum):
        return f"a list with entries of {', '.join(repr(one.value) for one in inner[0])}"
    return f"a list with entries that are each {_KINDS[inner[0]]}" if inner[0] in _KINDS else "a list"


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value of a YAML file is of a type; of one that is not looked into here, such as `Literal`, any is."""
    kind, inner = get_origin(hint) or hint, get_args(hint)
    if _is_union(hint):
        return any(_fits(value, one) for one in inner)
    if kind is list:
        return isinstance(value, list) and all(_fits(one, inner[0]) for one in value if inner)
    if kind in (int, float):
        return isinstance(value, (int, kind)) and not isinstance(value, bool)
    if kind is bool:
        return isinstance(value, int)  # 0 and 1 too, as on the command line
    if isinstance(kind, type) and issubclass(kind, Enum):
        # A text in a list is not converted; those of transformers are equal to their texts.
        return isinstance(value, kind) or value in [one.value for one in kind]
    return isinstance(value, kind) if kind in (str, dict, NoneType) else True


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
        raise ValueError(f"`--config {path}` is not valid YAML: {where}. Please fix it.") from error
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
