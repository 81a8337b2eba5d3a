"""The library's logger. Its lines are shown by default, above the progress bar: they are what a user waits for."""

from __future__ import annotations

import logging

from tqdm.auto import tqdm
from transformers.utils import logging as transformers_logging


_PACKAGE = __name__.rpartition(".")[0]
_level = logging.INFO
"""What is shown when neither the logger of this package nor a root logger with handlers says otherwise."""


class _Threshold(logging.Filter):
    """
    Which records of this package are passed on. Asked for each record, so that it does not matter whether logging is
    configured before or after the import.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        package, root = logging.getLogger(_PACKAGE), logging.getLogger()
        return record.levelno >= (package.level or (root.level if root.handlers else _level))


class _ProgressBarHandler(logging.Handler):
    """Writes through tqdm, so that a line does not tear the progress bar, unless the user has their own handlers."""

    def emit(self, record: logging.LogRecord) -> None:
        if logging.getLogger().handlers:  # the record reaches these
            return
        try:
            tqdm.write(self.format(record))
        except Exception:
            self.handleError(record)


def get_logger(name: str) -> logging.Logger:
    """
    A logger of this library. What is shown is decided, in this order, by
    `logging.getLogger("diffora_trainer").setLevel(...)`, by the level of a root logger that has handlers
    (`logging.basicConfig`), and by `log_level` of the training arguments; the default is `INFO`.
    """
    package = logging.getLogger(_PACKAGE)
    if not package.handlers:
        handler = _ProgressBarHandler()
        handler.setFormatter(logging.Formatter("[diffora] %(message)s"))
        package.addHandler(handler)
    logger = logging.getLogger(name)
    logger.setLevel(logging.DEBUG)  # what is passed on is decided by the filter
    if not any(isinstance(known, _Threshold) for known in logger.filters):
        logger.addFilter(_Threshold())
    return logger


def follow_log_level(log_level: str) -> None:
    """
    Show what a trainer is asked to show.

    Args:
        log_level (`str`): that of the training arguments. With `"passive"`, their default, all from `INFO` on is
            shown, unless transformers itself is asked for errors alone (`transformers.logging.set_verbosity_error`).
    """
    global _level
    named = logging.getLevelName(log_level.upper())  # a number, or a text if there is no level of this name
    verbosity = transformers_logging.get_verbosity()
    _level = named if isinstance(named, int) else verbosity if verbosity > logging.WARNING else logging.INFO
