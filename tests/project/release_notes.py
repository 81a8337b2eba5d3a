"""
Print the section of the changelog for a tag, if the tag, the package and the citation file name one version. Run by
the release workflow; needs nothing but Python.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]


def notes(tag: str, root: Path = ROOT) -> str:
    """The text under the heading of a version."""
    files = {"package": "diffora_trainer/__init__.py", "citation": "CITATION.cff", "changelog": "CHANGELOG.md"}
    texts = {name: (root / file).read_text(encoding="utf-8") for name, file in files.items()}
    version = _one(r'(?m)^__version__ = "(.+)"$', texts["package"], files["package"])
    cited = _one(r"(?m)^version: (.+)$", texts["citation"], files["citation"])
    if tag != f"v{version}" or cited != version:
        raise ValueError(f"The tag is {tag}, but the package has version {version} and CITATION.cff {cited}.")
    section = rf"(?ms)^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d\n(.*?)(?=^## \[|^\[[^]]+\]: |\Z)"
    return _one(section, texts["changelog"], files["changelog"]).strip()


def _one(pattern: str, text: str, file: str) -> str:
    found = re.findall(pattern, text)
    if len(found) != 1:
        raise ValueError(f"{file} has {len(found)} places that match {pattern!r}; there must be one.")
    return found[0]


if __name__ == "__main__":
    try:
        print(notes(sys.argv[1]))
    except ValueError as error:
        sys.exit(str(error))
