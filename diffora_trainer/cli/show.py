"""Show what a run has chosen: the matrix, the ranking, how sure it is; of a folder or of an adapter on the Hub."""

from __future__ import annotations

import argparse

from ..adapters.handover import write_lora_config
from ..core.selection import Selection
from ..core.text import CONFIDENCE
from ..hub.pull import selected_lora_config
from .source import load_selection


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `diffora show`."""
    parser.add_argument("source", help="folder of an adapter, its diffora_selection.json, or its Hub id")
    parser.add_argument("--diff", metavar="OTHER", help="another one of the same model, to compare with")
    parser.add_argument("--ranking", action="store_true", help="all modules, the best first")
    parser.add_argument("--picture", metavar="FILE.png", help="write the matrix as a picture (needs matplotlib)")
    parser.add_argument("--lora_config", metavar="FILE.json", help="write the LoraConfig of a second run")


def run(words: argparse.Namespace) -> None:
    """Print it."""
    selection = load_selection(words.source)
    print(describe(selection))
    if words.ranking:
        print("\nAll modules, the best first:")
        fates = dict.fromkeys(selection.dropped, "removed") | dict.fromkeys(selection.frozen, "frozen")
        fates |= {name: f"rank {rank}" for name, rank in zip(selection.modules, selection.ranks, strict=True) if rank}
        for position, name in enumerate(selection.ranking(), start=1):
            print(f"{position:4d}  {fates.get(name, 'shares'):8s}  {name}")
    if words.diff:
        print("\n" + difference(selection, load_selection(words.diff), (words.source, words.diff)))
    if words.picture:
        from ..hub.plots import plot_selection

        print(f"\nWritten: {plot_selection(selection, words.picture)}")
    if words.lora_config:
        print(f"\nWritten: {write_lora_config(selected_lora_config(words.source), words.lora_config)}")


def describe(selection: Selection) -> str:
    """What was chosen, as a text."""
    lines = [f"{selection.summary()}, by {selection.config.get('method')}, after step {selection.step}."]
    lines.append(selection.table())
    if selection.confidence is not None:
        lines.append(f"Confidence: {selection.confidence:.2f} ({CONFIDENCE}).")
    for name, costs, unit in (("time", selection.times, "s"), ("memory", selection.memory, "bytes")):
        if costs:
            after = costs.get("after_pruning", costs["predicted"])
            part = after / costs["all_modules"]
            lines.append(f"A step has {part:.2f} of the {name} with all modules ({after:.4g} {unit}).")
    lines += [f"Note: {note}" for note in selection.notes]
    return "\n".join(lines)


def difference(first: Selection, second: Selection, names: tuple[str, str]) -> str:
    """Where two selections differ, as a text."""
    if set(first.modules) != set(second.modules):
        raise ValueError(f"{names[0]} and {names[1]} are of different models: they do not have the same modules.")
    of_second = dict(zip(second.modules, second.ranks, strict=True))
    changes = [
        f"{name}: rank {rank} and {of_second[name]}"
        for name, rank in zip(first.modules, first.ranks, strict=True)
        if rank != of_second[name]
    ]
    shared = sum(min(rank, of_second[name]) for name, rank in zip(first.modules, first.ranks, strict=True))
    smaller = min(sum(first.ranks), sum(second.ranks))
    head = f"{names[0]} and {names[1]} share {shared / smaller:.0%} of their ranks."
    return "\n".join([head, *changes])
