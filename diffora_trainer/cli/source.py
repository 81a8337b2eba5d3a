"""A selection by what a command was given: a folder, a file, or an adapter on the Hub."""

from __future__ import annotations

from huggingface_hub.errors import LocalEntryNotFoundError

from ..core.selection import Selection
from ..hub import pull


def load_selection(source: str) -> Selection:
    """
    What was chosen.

    Args:
        source (`str`): a folder, a file, or the id of an adapter on the Hub.

    Raises:
        ValueError: if there is none, or the Hub could not be asked.
        FileNotFoundError: if it is not in the folder.
    """
    try:
        return pull.load_selection(source)
    except ValueError as error:
        if not isinstance(error.__cause__, LocalEntryNotFoundError):
            raise
        raise ValueError(
            f"{source!r} is not a folder here, and the Hub could not be reached to look for an adapter of this name. "
            "Please check the path, the connection, and that HF_HUB_OFFLINE is not set."
        ) from error
