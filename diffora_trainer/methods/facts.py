"""What a model card and a picture say of the method of a selection, which may come from anywhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..config import DiffoRAConfig
from ..core.selection import Selection
from .base import SelectionMethod
from .build import method_of
from .custom import Custom
from .registry import get_method


@dataclass(frozen=True)
class MethodFacts:
    """
    A method in words.

    Args:
        name (`str`): its name.
        searches (`bool`): whether it learned from architecture steps, and did not score.
        informed (`bool`): whether it looked at the modules at all.
        described (`str`): what it is, in Markdown.
        citation (`str`): BibTeX of its paper, or nothing.
        options (`dict`): the options of the run and of the method, by their names.
        gives_ranks (`bool`): whether it chooses components itself, and with them the rank of each module.
    """

    name: str
    searches: bool
    informed: bool
    described: str
    citation: str
    options: dict[str, Any]
    gives_ranks: bool = False


def method_facts(options: dict[str, Any]) -> MethodFacts:
    """
    What there is to say of the method of a run, by the options that its selection holds. A method that is not known
    here is called the run's own.
    """
    method: type[SelectionMethod] = Custom
    shown = dict(options)
    try:
        config = DiffoRAConfig.from_dict({"method": "diffora", **options})
        shown, method = config.to_dict(), get_method(config.method)
        method_of(config)
    except (TypeError, ValueError):  # of another version, or of a method that is not installed
        pass
    shown.pop("base_model_id", None)
    of_method = shown.pop("method_options", None)
    shown |= of_method if isinstance(of_method, dict) else {}
    paper = method.paper
    described = method.described or f"`{method.name}`" + (f" ({paper.link})" if paper is not None else "")
    citation = paper.bibtex if paper is not None and method.informed else ""
    return MethodFacts(method.name, method.searches, method.informed, described, citation, shown, method.tells_ranks)


def option_texts(method: MethodFacts, selection: Selection) -> dict[str, str]:
    """The options of a run as a reader of its results is told them: those that had an effect."""
    return {
        name: _text(value)
        for name, value in method.options.items()
        if value not in (None, {}) and (name != "arch_warmup" or method.searches or selection.history)
    }


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{name} = {_text(entry)}" for name, entry in value.items() if entry not in (None, {}))
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
