"""What tells on a user or a machine, in texts, files and arguments: tokens, and paths of folders."""

from __future__ import annotations

import copy
import html
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]


# Vocabularies are left alone, since they may hold any string.
_VOCABULARY_SUFFIXES = (".model", ".bpe", ".tiktoken", ".spm")
_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json")
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")
_HIDDEN_TOKEN = "<HUB_TOKEN>"


class Masked(str):
    """A string that is pickled as another one."""

    shown: str

    @classmethod
    def of(cls, value: str, shown: str) -> Masked:
        masked = cls(value)
        masked.shown = shown
        return masked

    def __reduce_ex__(self, protocol: Any) -> Any:
        return str, (self.shown,)


class Private:
    """
    What must not leave this machine: the user's tokens, and folders that a run was told of or works in.

    Args:
        folders (`Iterable[Path]`): the folders.
        tokens (`Iterable[str]`): the tokens.
    """

    def __init__(self, folders: Iterable[Path], tokens: Iterable[str]) -> None:
        given = set(folders)
        words = {str(folder) for folder in given | {f.resolve() for f in given} if folder != Path(folder.anchor)}
        words |= {written for word in words for written in (json.dumps(word)[1:-1], _in_html(word))}
        longest_first = "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True)) or "(?!)"
        self._inside = re.compile(rf"(?:{longest_first})(?:[\\/]+|(?![\w.-]))")
        self._folders = re.compile(rf"(?<![\w.~-]){self._inside.pattern}")  # not in the middle of an address
        self._tokens = list(tokens)

    def without(self, text: str, in_html: bool = False) -> str:
        """
        A text without tokens, and with paths from the last folder on that says nothing about this machine.

        Args:
            text (`str`): the text.
            in_html (`bool`, *optional*, defaults to `False`): whether it is that of a page.
        """
        hidden = _in_html(_HIDDEN_TOKEN) if in_html else _HIDDEN_TOKEN
        for token in self._tokens:
            text = text.replace(token, hidden)
        text = _TOKEN.sub(hidden, text)
        return self._folders.sub(lambda found: "" if found[0].endswith(("/", "\\")) else ".", text)

    def arguments(self, args: Any) -> Any:
        """A copy of training arguments that reads the same, and is pickled without what is private."""
        args = copy.copy(args)
        vars(args).update({name: self._masked(value) for name, value in vars(args).items()})
        return args

    def _masked(self, value: Any) -> Any:
        if type(value) is str and (shown := self.without(value)) != value:
            return Masked.of(value, shown)
        if type(value) is dict:
            return {key: self._masked(entry) for key, entry in value.items()}
        if type(value) in (list, tuple):
            return type(value)(self._masked(entry) for entry in value)
        return value

    def clean(self, path: Path) -> bytes | None:
        """The content of a file without what is private; `None` if it can stay as it is."""
        if ".tfevents." in path.name:
            return b"".join(record for record in _records(path.read_bytes()) if not self._tells(record))
        if path.name in _VOCABULARIES or path.suffix in _VOCABULARY_SUFFIXES or not _is_text(path):
            return None
        text = path.read_bytes().decode(errors="surrogateescape")  # with the ends of lines that it has
        clean = text
        if path.name == "adapter_config.json":
            config = json.loads(text)
            if config.get("base_model_name_or_path") and not public_model_id(config["base_model_name_or_path"]):
                # Not its last part: that would name whatever model has this name on the Hub.
                config["base_model_name_or_path"] = None
                clean = json.dumps(config, indent=2, sort_keys=True)
        clean = self.without(clean, in_html=path.suffix == ".html")
        return None if clean == text else clean.encode(errors="surrogateescape")

    def _tells(self, record: bytes) -> bool:
        text = record.decode(errors="surrogateescape")
        return self._inside.search(text) is not None or self.without(text) != text


def public_model_id(name: str | None) -> str | None:
    """A model's name if it is one on the Hub; a folder on someone's disk means nothing to others, and tells on it."""
    if not name or name.startswith(".") or os.path.exists(name):
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def _is_text(path: Path) -> bool:
    """Whatever its name: a user may have put a log, a script or an `.env` beside the adapter."""
    with path.open("rb") as file:
        return b"\0" not in file.read(8192)


def _in_html(text: str) -> str:
    """A text as a report holds it: Jinja's escapes of quotes are not those of `html.escape`."""
    return html.escape(text).replace("&#x27;", "&#39;").replace("&quot;", "&#34;")


def _records(content: bytes) -> Iterator[bytes]:
    """The records of a TensorBoard file, whole: 8 bytes of length and 4 of checksum, the data, 4 of checksum."""
    start = 0
    while start + 12 <= len(content):
        end = start + 16 + int.from_bytes(content[start : start + 8], "little")
        if end > len(content):  # still being written
            return
        yield content[start:end]
        start = end
