"""The library's logger. Its lines are shown by default, above the progress bar: they are what a user waits for."""

from __future__ import annotations

import logging

from tqdm.auto import tqdm


_ROOT = __name__.rpartition(".")[0]


class _ProgressBarHandler(logging.Handler):
    """Writes through tqdm, so that a line does not tear the progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record))
        except Exception:
            self.handleError(record)


def get_logger(name: str) -> logging.Logger:
    """
    A logger of this library. Set `logging.getLogger("diffora_trainer").setLevel(logging.WARNING)` for less, or
    configure a handler of your own on the root logger before the import.
    """
    root = logging.getLogger(_ROOT)
    if not root.handlers and not logging.getLogger().handlers:
        handler = _ProgressBarHandler()
        handler.setFormatter(logging.Formatter("[diffora] %(message)s"))
        root.addHandler(handler)
    if root.level == logging.NOTSET:
        root.setLevel(logging.INFO)
    return logging.getLogger(name)
