"""Model cards, read as far as the Hub looks at them."""

from __future__ import annotations

import re
from typing import Any


CARD_KEY = re.compile(r"""["']?(?P<key>[A-Za-z_][\w.-]*)["']?:(?:\s+(?P<value>.*))?""")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[\w.-]+)?")


def _card_scalar(value: str) -> str | None:
    value = value.strip()
    if len(value) >= 2 and value[0] == value[-1] and value[0] in "\"'":
        return value[1:-1]
    return None if value in ("", "null", "~") else value


def check_card(text: str) -> tuple[dict[str, Any], list[str], list[str]]:
    """Return the metadata, the errors and the warnings of a model card.

    The standard library reads no YAML, so this looks at the top level only: it keeps plain values and flat lists,
    skips what is nested, and reports lines that cannot be YAML.
    """
    text = text.lstrip("\ufeff").replace("\r\n", "\n")
    if not text.lstrip().startswith("---\n"):
        return {}, [], ["empty or missing yaml metadata in repo card"]
    end = re.search(r"\n---[ \t]*(?:\n|\Z)", text.lstrip())
    if end is None:
        return {}, ["the yaml metadata is not closed by a line with ---"], []
    block = text.lstrip()[4 : end.start() + 1]
    if block.strip() in ("", "{}"):
        return {}, [], ["empty or missing yaml metadata in repo card"]

    card: dict[str, Any] = {}
    seen: set[str] = set()
    errors: list[str] = []
    key: str | None = None
    for number, line in enumerate(block.splitlines(), start=2):
        item = re.fullmatch(r" *- +([^\s].*)", line)
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        if line.startswith("\t"):
            errors.append(f"line {number}: tabs cannot indent yaml")
        elif key is not None and item is not None:
            is_nested = CARD_KEY.fullmatch(item[1]) is not None
            if is_nested or not isinstance(card.setdefault(key, []), list):
                card.pop(key, None)
                key = "" if is_nested else key
            elif key:
                card[key].append(_card_scalar(item[1]))
        elif line.startswith(" ") and key is not None:
            card.pop(key, None)
            key = ""
        elif line == "-" and key is not None:
            key = ""
        elif (match := CARD_KEY.fullmatch(line)) is not None:
            key, value = match["key"], (match["value"] or "").strip()
            if key in seen:
                errors.append(f"line {number}: duplicated mapping key {key!r}")
            seen.add(key)
            if value.startswith("[") and value.endswith("]"):
                card[key] = [_card_scalar(part) for part in value[1:-1].split(",") if part.strip()]
            elif value and value[0] not in "{|>&*":
                card[key] = _card_scalar(value)
        else:
            errors.append(f"line {number}: cannot be read as yaml: {line.strip()[:60]!r}")
    card.pop("", None)

    # A path on the author's disk is what a trainer writes here by mistake, and the Hub refuses it.
    for key, kind in (("base_model", "model"), ("datasets", "dataset")):
        values = card.get(key)
        for value in values if isinstance(values, list) else [values]:
            if value is not None and HUB_ID.fullmatch(value) is None:
                errors.append(
                    f'"{key}" with value "{value}" is not valid. Use a {kind} id from https://hf.co/{kind}s.'
                )
    return card, errors, []
