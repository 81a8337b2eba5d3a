"""Parameters of tests of which a few are run each time, and all of them with the slow proofs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def mostly_slow(values: Iterable[Any], *quick: Any) -> list[Any]:
    """
    Values for `pytest.mark.parametrize`, of which all but some are marked as slow: the same proof of other kinds.

    Args:
        values (`Iterable`): the values; a tuple for several names.
        quick: those that are run each time, which must be among them.
    """
    values = list(values)
    missing = [value for value in quick if value not in values]
    assert not missing, f"{missing} are not among {values}"
    return [
        value
        if value in quick
        else pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.slow)
        for value in values
    ]
