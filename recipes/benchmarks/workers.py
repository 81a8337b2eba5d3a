"""Jobs in processes of their own, for the recipes: one that dies ends the work with an error instead of a wait."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any


Work = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]
"""Like `map`, but for the order: results come as they are there."""


@contextmanager
def processes(count: int, start: Callable[..., None] | None = None, arguments: tuple[Any, ...] = ()) -> Iterator[Work]:
    """
    New processes that jobs are handed out to.

    Args:
        count (`int`): how many.
        start (`Callable`, *optional*): called once in each of them, before its first job.
        arguments (`tuple`, *optional*): for `start`.

    Returns:
        `Callable`: as `map` is, with the results in the order in which they come.

    Raises:
        RuntimeError: if a process dies.
    """
    # `multiprocessing.Pool` puts a new process in the place of one that died, and waits for its result for ever.
    pool = ProcessPoolExecutor(
        count, mp_context=multiprocessing.get_context("spawn"), initializer=start, initargs=arguments
    )

    def work(function: Callable[[Any], Any], jobs: Iterable[Any]) -> Iterator[Any]:
        try:
            for future in as_completed([pool.submit(function, job) for job in jobs]):
                yield future.result()
        except BrokenProcessPool as error:
            raise RuntimeError(
                "A worker process died before its job was done: it was killed, as the system does where memory runs "
                "out, or it could not start, and what it said stands above. Results that were written are kept. "
                "Please start again, with fewer workers or a smaller model if memory is short."
            ) from error

    try:
        yield work
    finally:
        pool.shutdown(cancel_futures=True)
