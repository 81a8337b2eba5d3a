"""The documentation as its tests read it: pages, fenced blocks, headings and links."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from helpers import ROOT


README = "README.md"
PAGES = (README, *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))
"""Every page, by its path in the repository."""

_FENCE = re.compile(
    r"(?:^<!-- needs: ([\w-]+) -->\n+)?^(?P<ticks>`{3,})\{?(\w*)\}?[^\n]*\n(.*?)^(?P=ticks)\s*$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Fence:
    """
    A fenced block.

    Args:
        page (`str`): where it stands.
        line (`int`): the number of its first line.
        language (`str`): what is written behind the ticks.
        text (`str`): what is in it.
        needs (`str`, *optional*): the package that it needs beside those of the tests.
    """

    page: str
    line: int
    language: str
    text: str
    needs: str | None = None


def read(page: str) -> str:
    """The text of a page."""
    return (ROOT / page).read_text(encoding="utf-8")


def fences(page: str, *languages: str) -> Iterator[Fence]:
    """The fenced blocks of a page in these languages, in order."""
    text = read(page)
    for found in _FENCE.finditer(text):
        if found[3] in languages:
            yield Fence(page, text.count("\n", 0, found.start(4)) + 1, found[3], found[4], found[1])


def prose(page: str) -> str:
    """A page without its fenced blocks."""
    return _FENCE.sub("", read(page))


def anchors(page: str) -> set[str]:
    """The anchors of a page's headings, as GitHub and MyST make them."""
    found: set[str] = set()
    for heading in re.findall(r"^#{1,6} (.+)$", prose(page), re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", heading.strip().lower().replace("`", "")).replace(" ", "-")
        number = 0
        while (name := slug if not number else f"{slug}-{number}") in found:
            number += 1
        found.add(name)
    return found


def links(page: str) -> list[str]:
    """Where a page links to, images included."""
    return ["".join(found) for found in re.findall(r"\]\(([^)\s]+)\)|src=\"(.+?)\"", prose(page))]


def rows(page: str) -> list[list[str]]:
    """The cells of every row of a page's tables."""
    lines = [line for line in prose(page).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def path_of(page: str, link: str) -> Path:
    """The file that a relative link of a page leads to."""
    return (ROOT / page).parent / link.partition("#")[0]
