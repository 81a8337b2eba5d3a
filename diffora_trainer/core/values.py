"""What a user passed, checked."""

from __future__ import annotations

import json
import math
from typing import Any


def check_number(name: str, value: Any) -> float:
    """A finite float, or a `TypeError` or `ValueError` that names the option."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        quotes = " Please write it without quotes." if isinstance(value, str) else ""
        raise TypeError(f"`{name}` must be a number, got {value!r} of type {type(value).__name__}.{quotes}")
    try:
        number = float(value)
    except OverflowError:  # an int beyond all floats
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"You passed `{name}={number}`; it must be finite.")
    return number


def check_integer(name: str, value: Any, minimum: int | None = None) -> int:
    """An int of at least `minimum`, or a `TypeError` or `ValueError` that names the option."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"`{name}` must be an int, got {value!r} of type {type(value).__name__}.")
    if minimum is not None and value < minimum:
        raise ValueError(f"You passed `{name}={value}`; it must be {minimum} or more.")
    return int(value)


def parse_mapping(name: str, value: Any) -> dict[str, Any]:
    """A dictionary of options by their names, or the JSON of one as a command line has it; empty for `None`."""
    if value is None:
        return {}
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ValueError(f"You passed `{name}={value!r}`, which is not valid JSON: {error}.") from error
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise TypeError(
            f"`{name}` must be a dictionary of options by their names, got {value!r}. Please pass one, or its JSON."
        )
    return dict(value)
