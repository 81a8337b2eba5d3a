"""What goes to the Hub: copies of the files without tokens, and without the folders of this machine."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import get_token
from transformers.trainer_utils import HubStrategy

from ..adapters.grid import peft_model
from ..core.files import write_file
from ..experimental.shortcuts.model import copy_inner_adapter
from .card import public_model_id


if TYPE_CHECKING:
    from transformers import Trainer

    class _Base(Trainer):
        args: Any
        push_in_progress: Any

        def _save_findings(self, folder: Path) -> None: ...

else:
    _Base = object


# Texts that may name folders: the adapter's configuration, the Trainer's state, the card, what a user adds.
# Vocabularies are left alone, since they may hold any string.
_TEXTS = (".json", ".jsonl", ".md", ".txt", ".yaml", ".yml")
_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json")
# What a checkpoint holds to resume from, and its card, of which the output has its own.
_NOT_OF_THE_ADAPTER = ("README", "optimizer", "scheduler", "scaler", "rng_state", "trainer_state", "diffora_state")
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")
_HIDDEN_TOKEN = "<HUB_TOKEN>"


class _Masked(str):
    """A string that is pickled as another one."""

    shown: str

    @classmethod
    def of(cls, value: str, shown: str) -> _Masked:
        masked = cls(value)
        masked.shown = shown
        return masked

    def __reduce_ex__(self, protocol: Any) -> Any:
        return str, (self.shown,)


class Private:
    """
    What must not leave this machine: the user's tokens, and the folders that the run was told of or works in.

    Args:
        trainer (`Trainer`): the run.
    """

    def __init__(self, trainer: Any) -> None:
        named = [value for value in _strings(vars(trainer.args)) if os.path.isabs(value)]
        named += [
            c.base_model_name_or_path or "" for c in getattr(peft_model(trainer.model), "peft_config", {}).values()
        ]
        named.append(getattr(trainer.processing_class, "name_or_path", None) or "")
        folders = {Path.home(), *(Path(name).parent for name in named if os.path.isabs(name))}
        folders |= {folder.resolve() for folder in folders}
        words = {str(folder) for folder in folders if folder != Path(folder.anchor)}
        words |= {json.dumps(word)[1:-1] for word in words}  # as JSON writes it
        longest_first = "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True)) or "(?!)"
        self._inside = re.compile(rf"(?:{longest_first})(?:[\\/]+|(?![\w.-]))")
        self._folders = re.compile(rf"(?<![\w.~-]){self._inside.pattern}")  # not in the middle of an address
        self._tokens = [token for token in (trainer.args.hub_token, get_token()) if token and len(token) > 5]

    def without(self, text: str) -> str:
        """A text without tokens, and with paths from the last folder on that says nothing about this machine."""
        for token in self._tokens:
            text = text.replace(token, _HIDDEN_TOKEN)
        text = _TOKEN.sub(_HIDDEN_TOKEN, text)
        return self._folders.sub(lambda found: "" if found[0].endswith(("/", "\\")) else ".", text)

    def arguments(self, args: Any) -> Any:
        """A copy of training arguments that reads the same, and is pickled without what is private."""
        args = copy.copy(args)
        vars(args).update({name: self._masked(value) for name, value in vars(args).items()})
        return args

    def _masked(self, value: Any) -> Any:
        if type(value) is str and (shown := self.without(value)) != value:
            return _Masked.of(value, shown)
        if type(value) is dict:
            return {key: self._masked(entry) for key, entry in value.items()}
        if type(value) in (list, tuple):
            return type(value)(self._masked(entry) for entry in value)
        return value

    def copy(self, source: Path, target: Path) -> None:
        """Copy what the Trainer would push of a folder. Files in which nothing is private are linked."""
        target.mkdir()
        for path in list(source.rglob("*")):
            name = path.relative_to(source)
            if not path.is_file() or name.parts[0].startswith(("_", "checkpoint-")) or name.parts[0] == ".git":
                continue
            copied = target / name
            content = self._clean(path)
            if content is not None:
                write_file(copied, content)
                continue
            copied.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(path.resolve(), copied)
            except OSError:  # a file system without links
                shutil.copyfile(path, copied)

    def _clean(self, path: Path) -> bytes | None:
        """The content of a file without what is private; `None` if it can stay as it is."""
        if ".tfevents." in path.name:
            return b"".join(record for record in _records(path.read_bytes()) if not self._tells(record))
        if path.suffix not in _TEXTS or path.name in _VOCABULARIES:
            return None
        text = path.read_text(encoding="utf-8", errors="surrogateescape")
        clean = text
        if path.name == "adapter_config.json":
            config = json.loads(text)
            if config.get("base_model_name_or_path") and not public_model_id(config["base_model_name_or_path"]):
                # Not its last part: that would name whatever model has this name on the Hub.
                config["base_model_name_or_path"] = None
                clean = json.dumps(config, indent=2, sort_keys=True)
        clean = self.without(clean)
        return None if clean == text else clean.encode(errors="surrogateescape")

    def _tells(self, record: bytes) -> bool:
        text = record.decode(errors="surrogateescape")
        return self._inside.search(text) is not None or self.without(text) != text


class PublicPushMixin(_Base):
    """
    A trainer that pushes nothing private. The parent pushes its folders as they are, with the user's token in
    `training_args.bin` and the paths of this machine in several files; so it is given copies without them, of each
    checkpoint and at the end of the output. They lie in the output folder, where the parent pushes nothing that starts
    with "_", until the push is done.
    """

    _pushing = False
    _public_folders: tuple[Path, ...] = ()

    def _save(self, *args: Any, **kwargs: Any) -> None:
        own = self.args
        self.args = Private(self).arguments(own)  # the parent pickles them
        try:
            super()._save(*args, **kwargs)
        finally:
            self.args = own

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return  # and here the parent pushes nothing either
        if busy and not self.args.hub_always_push:
            return
        if not busy:
            self._remove_public_copies()
        own = self.args
        for path in Path(checkpoint_folder).iterdir():  # as the parent does it: the output holds the latest adapter
            if path.is_file() and not path.name.startswith(_NOT_OF_THE_ADAPTER):
                shutil.copy(path, own.output_dir)
        copy_inner_adapter(checkpoint_folder, own.output_dir)
        self._save_findings(Path(own.output_dir))  # with a card of what was copied
        try:
            super()._push_from_checkpoint(self._use_public_copies(checkpoint_folder))
        finally:
            self.args = own

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """See [`~transformers.Trainer.push_to_hub`]. The tokens and folders of this machine are left out."""
        own, self._pushing = self.args, True
        pushed: Any = None
        try:
            pushed = super().push_to_hub(*args, **kwargs)
        finally:
            self.args, self._pushing = own, False
            if isinstance(pushed, Future):  # `blocking=False`
                pushed.add_done_callback(lambda _: self._remove_public_copies())
            else:
                self._remove_public_copies()
        return pushed

    def _finish_current_push(self) -> None:
        super()._finish_current_push()
        self._remove_public_copies()
        if self._pushing:  # the last that `push_to_hub` calls before it uploads
            self._use_public_copies()

    def _use_public_copies(self, checkpoint: str | None = None) -> str:
        """
        Let the parent push a copy of the output folder, by naming it in `args`; whoever calls this puts them back.
        Gives the copy of the checkpoint.
        """
        private, output = Private(self), Path(self.args.output_dir)
        folder = Path(tempfile.mkdtemp(prefix="_hub-", dir=output))
        self._public_folders += (folder,)
        public = folder / "output"
        private.copy(output, public)
        self.args = private.arguments(self.args)
        self.args.output_dir = _Masked.of(str(public), private.without(self.args.output_dir))
        if checkpoint is None:
            return ""
        copied = folder / Path(checkpoint).name
        private.copy(Path(checkpoint), copied)
        return str(copied)

    def _remove_public_copies(self) -> None:
        for folder in self._public_folders:
            shutil.rmtree(folder, ignore_errors=True)
        self._public_folders = ()


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for entry in value.values():
            yield from _strings(entry)
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from _strings(entry)


def _records(content: bytes) -> Iterator[bytes]:
    """The records of a TensorBoard file, whole: 8 bytes of length and 4 of checksum, the data, 4 of checksum."""
    start = 0
    while start + 12 <= len(content):
        end = start + 16 + int.from_bytes(content[start : start + 8], "little")
        if end > len(content):  # still being written
            return
        yield content[start:end]
        start = end
