"""What goes to the Hub: copies of a trainer's folders without tokens, and without the folders of this machine."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import get_token
from transformers.trainer_utils import HubStrategy

from ..adapters.lora import peft_model
from ..core.files import write_file
from ..core.isolation import replaced
from .redact import Masked, Private


if TYPE_CHECKING:
    from transformers import Trainer


def private_of(trainer: Trainer) -> Private:
    """What must not leave this machine of a trainer's run: the user's tokens, and the folders that it was told of."""
    configs = getattr(peft_model(trainer.model), "peft_config", {}).values()
    named = [value for value in _strings(vars(trainer.args)) if os.path.isabs(value)]
    named += [config.base_model_name_or_path or "" for config in configs]
    named.append(getattr(trainer.processing_class, "name_or_path", None) or "")
    folders = {Path.home(), *(Path(name).parent for name in named if os.path.isabs(name))}
    return Private(folders, [token for token in (trainer.args.hub_token, get_token()) if token and len(token) > 5])


class PublicCopies:
    """
    The copies that a trainer pushes in the place of its folders, of each checkpoint and at the end of the output. The
    parent pushes its folders as they are, with the user's token in `training_args.bin` and the paths of this machine
    in several files; so it is given copies without them. They lie in the output folder, where the parent pushes
    nothing that starts with "_", until the push is done.

    Args:
        trainer (`Trainer`): the trainer.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._pushing = False
        self._folders: tuple[Path, ...] = ()

    def arguments(self) -> AbstractContextManager[None]:
        """For a while, give the trainer arguments that are pickled without what is private."""
        args = self._trainer.args
        return replaced(self._trainer, "args", private_of(self._trainer).arguments(args))

    def push_checkpoint(
        self, parent: Callable[[str], None], checkpoint: str, update_output: Callable[[], None]
    ) -> None:
        """
        Push copies of a checkpoint and of the output.

        Args:
            parent (`Callable[[str], None]`): pushes a checkpoint and the output, as the parent trainer does it.
            checkpoint (`str`): the checkpoint.
            update_output (`Callable[[], None]`): brings the output to the checkpoint, before it is copied.
        """
        trainer = self._trainer
        busy = trainer.push_in_progress is not None and not trainer.push_in_progress.is_done()
        if not trainer.is_world_process_zero() or trainer.args.hub_strategy == HubStrategy.END:
            return  # and here the parent pushes nothing either
        if busy and not trainer.args.hub_always_push:
            return
        if not busy:
            self._remove()
        update_output()
        own = trainer.args
        try:
            parent(self._use(checkpoint))
        finally:
            trainer.args = own

    def push(self, parent: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """
        Push a copy of the output.

        Args:
            parent (`Callable`): the parent trainer's `push_to_hub`, which takes the other arguments. It calls
                [`~PublicCopies.renew`] right before it uploads.
        """
        own, self._pushing = self._trainer.args, True
        pushed: Any = None
        try:
            pushed = parent(*args, **kwargs)
        finally:
            self._trainer.args, self._pushing = own, False
            if isinstance(pushed, Future):  # `blocking=False`
                pushed.add_done_callback(lambda _: self._remove())
            else:
                self._remove()
        return pushed

    def renew(self) -> None:
        """No push is under way any more: remove the copies, and make one of the output if it is to be pushed next."""
        self._remove()
        if self._pushing:
            self._use()

    def _use(self, checkpoint: str | None = None) -> str:
        """
        Let the parent push a copy of the output folder, by naming it in `args`; whoever calls this puts them back.
        Gives the copy of the checkpoint.
        """
        trainer = self._trainer
        private, output = private_of(trainer), Path(trainer.args.output_dir)
        folder = Path(tempfile.mkdtemp(prefix="_hub-", dir=output))
        self._folders += (folder,)
        public = folder / "output"
        copy_without(private, output, public)
        trainer.args = private.arguments(trainer.args)
        trainer.args.output_dir = Masked.of(str(public), private.without(trainer.args.output_dir))
        if checkpoint is None:
            return ""
        copied = folder / Path(checkpoint).name
        copy_without(private, Path(checkpoint), copied)
        return str(copied)

    def _remove(self) -> None:
        for folder in self._folders:
            shutil.rmtree(folder, ignore_errors=True)
        self._folders = ()


def copy_without(private: Private, source: Path, target: Path) -> None:
    """Copy what the Trainer would push of a folder. Files in which nothing is private are linked."""
    target.mkdir()
    for path in list(source.rglob("*")):
        name = path.relative_to(source)
        if not path.is_file() or name.parts[0].startswith(("_", "checkpoint-")) or name.parts[0] == ".git":
            continue
        copied = target / name
        content = private.clean(path)
        if content is not None:
            write_file(copied, content)
            continue
        copied.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path.resolve(), copied)
        except OSError:  # a file system without links
            shutil.copyfile(path, copied)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for entry in value.values():
            yield from _strings(entry)
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from _strings(entry)
