"""
Docstrings in the form of Hugging Face's libraries, as autodoc wants them; and links that leave `docs/`.

A docstring of this package is Markdown with sections (`Args:`, `Attributes:`, `Returns:`, `Raises:`), links such as
[`Name`] and [`~package.Name`], and groups of options under `> Parameters that control X`. Sphinx reads
reStructuredText with field lists, so each is turned into what says the same there.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

import diffora_trainer
from diffora_trainer.renamed import OLD_NAMES


REPOSITORY = "https://github.com/diffora-trainer/diffora-trainer"

_SECTION = re.compile(r"^(Args|Attributes|Returns|Raises):$")
# `name (`type`, *optional*, defaults to `x`):` with the text behind it or below; of an error and of what is returned
# there may be the type alone.
_ITEM = re.compile(r"^(\*{0,2}\w+)(?: \((.*?)\))?:(?: (.*))?$")
_TYPED = re.compile(r"^(`[^`]+`(?: or `[^`]+`)*(?: of .*?)?):(?: (.*))?$")
_FENCE = re.compile(r"^(\s*)```(\w*)\s*$")


def to_rst(text: str) -> str:
    """A docstring as reStructuredText."""
    return "\n".join(_blocks(inspect.cleandoc(text).splitlines()))


def _blocks(lines: list[str]) -> Iterator[str]:
    section = None
    index = 0
    while index < len(lines):
        line = lines[index]
        if fence := _FENCE.match(line):
            end = next(i for i in range(index + 1, len(lines)) if _FENCE.match(lines[i]))
            yield from ["", f"{fence[1]}.. code-block:: {fence[2] or 'none'}", ""]
            yield from ("   " + code for code in lines[index + 1 : end])
            yield ""
            index = end + 1
            continue
        if found := _SECTION.match(line):
            section = found[1]
            yield ""
            index += 1
            continue
        if line and not line.startswith(" "):
            section = None
        if section:
            body = [inner for inner in _taken(lines, index)]
            index += len(body)
            yield from _fields(section, inspect.cleandoc("\n" + "\n".join(body)).splitlines())
            yield ""
            continue
        if line.startswith("> "):
            yield from ["", f".. rubric:: {_inline(line[2:])}", ""]
            index += 1
            continue
        item = _ITEM.match(line)
        if item and item[2] and index + 1 < len(lines) and lines[index + 1].startswith("    "):
            yield from ["", f"**{item[1]}** ({_inline(item[2])})"]  # a definition, whose text is indented below
            index += 1
            continue
        yield _inline(line)
        index += 1


def _taken(lines: list[str], start: int) -> Iterator[str]:
    for line in lines[start:]:
        if line and not line.startswith(" "):
            return
        yield line


def _fields(section: str, lines: list[str]) -> Iterator[str]:
    """The items of a section as a field list."""
    if section == "Returns":
        found = _TYPED.match(lines[0])
        text = [found[2] or "", *lines[1:]] if found else lines
        yield f":returns: {_inline(' '.join(part.strip() for part in text).strip())}"
        if found:
            yield f":rtype: {_inline(found[1])}"
        return
    for head, body in _items(lines):
        found = _ITEM.match(head)
        assert found is not None, f"No item of a docstring: {head!r}"
        name, kind, first = found[1].replace("*", r"\*"), found[2], found[3]
        text = " ".join(part.strip() for part in [first or "", *body]).strip()
        if section == "Raises":
            yield f":raises {name}: {_inline(text)}"
        else:
            yield f":{'param' if section == 'Args' else 'ivar'} {name}: {_inline(text)}"
            if kind:
                yield f":{'type' if section == 'Args' else 'vartype'} {name}: {_inline(kind)}"


def _items(lines: list[str]) -> Iterator[tuple[str, list[str]]]:
    head, body = "", []
    for line in lines:
        if line and not line.startswith(" "):
            if head:
                yield head, body
            head, body = line, []
        elif line:
            body.append(line)
    if head:
        yield head, body


def _inline(text: str) -> str:
    """Code, links and names of a line of Markdown."""
    found: list[str] = []

    def keep(rst: str) -> str:
        found.append(rst)
        return f"\0{len(found) - 1}\0"

    text = re.sub(r"\[`(~?)([\w.]+)`\](?!\()", lambda m: keep(_reference(m[2], bool(m[1]))), text)
    text = re.sub(r"\[([^\]]+)\]\((https?://[^)]+)\)", lambda m: keep(f"`{m[1]} <{m[2]}>`__"), text)
    text = re.sub(r"(?<!`)`([^`]+)`(?!`)", lambda m: keep(f"``{m[1]}``"), text)
    text = re.sub(r"(\w)_(?=\W|$)", r"\1\\_", text)  # a name with an underscore at its end is no link
    # Markup has to stand apart from letters in reStructuredText.
    text = re.sub(r"(\w)(\0\d+\0)", r"\1\\ \2", text)
    text = re.sub(r"(\0\d+\0)(\w)", r"\1\\ \2", text)
    return re.sub(r"\0(\d+)\0", lambda m: found[int(m[1])], text)


def _reference(name: str, short: bool) -> str:
    last = name.rpartition(".")[2]
    if last in diffora_trainer.__all__:
        return f":py:obj:`{last} <diffora_trainer.{last}>`"
    if name.startswith("diffora_trainer.") or "." not in name:
        return f":py:obj:`{last if short else name} <{name}>`"
    return f"``{last if short else name}``"


def process_docstring(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Called by autodoc with the lines of a docstring, which are replaced."""
    lines[:] = [*to_rst("\n".join(lines)).splitlines(), ""]


def process_signature(
    app: Any, what: str, name: str, obj: Any, options: Any, signature: str | None, annotation: str | None
) -> tuple[str | None, str | None]:
    """Called by autodoc with a signature: names of before are not shown."""
    if signature:
        for old in OLD_NAMES:
            signature = re.sub(rf", {old}=[^,)]+(?:\([^)]*\))?", "", signature)
    return signature, annotation


def link_to_repository(app: Any, name: str, source: list[str]) -> None:
    """Called by Sphinx with the text of a page: a link to a file beside `docs/` is one to the repository."""
    root = app.srcdir.parent

    def link(found: re.Match[str]) -> str:
        text, path, anchor = found.groups()
        kind = "tree" if (root / path).is_dir() else "blob"
        return f"[{text}]({REPOSITORY}/{kind}/main/{path}{anchor or ''})"

    source[0] = re.sub(r"(?<!!)\[([^\[\]]*)\]\(\.\./([^)#\s]+)(#[^)\s]*)?\)", link, source[0])


def setup(app: Any) -> dict[str, Any]:
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", process_docstring)
    app.connect("autodoc-process-signature", process_signature)
    app.connect("source-read", link_to_repository)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
