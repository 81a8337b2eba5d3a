"""What is in a file of a repository."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from io import BytesIO


def contents(name: str, data: bytes) -> Iterator[tuple[str, bytes]]:
    """A file, and if it is an archive, what is in it."""
    yield name, data
    if data[:2] == b"PK":
        archive = zipfile.ZipFile(BytesIO(data))
        yield from ((f"{name}:{part}", archive.read(part)) for part in archive.namelist())
