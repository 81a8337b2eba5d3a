"""The model card: what PEFT and TRL wrote, and what the search found."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..adapters.base import SiteKind, extra_kinds
from ..adapters.wrapping import read_base_config
from ..compat.transformers import loading_class
from ..core.base_model import class_of, is_own_class, label_names, predicts_classes, problem_type
from ..core.files import ADAPTER_CONFIG_NAME, ADAPTER_NAME, adapters_inside, tensor_shapes, write_file
from ..core.selection import Selection
from ..core.text import CONFIDENCE, sanitize
from ..methods.facts import method_facts, option_texts
from .plots import PICTURE_NAME
from .redact import public_model_id
from .report import REPORT_NAME


_BEGIN, _END = "<!-- diffora-trainer: begin -->", "<!-- diffora-trainer: end -->"
_TEMPLATES = Path(__file__).parent / "templates"
# More names than this are no help in a snippet.
_MOST_LABELS = 30


def write_card(
    folder: str | os.PathLike,
    selection: Selection | None,
    peft_config: Any,
    adapter: str | None = None,
    model: Any = None,
    went_on: bool = True,
) -> Path:
    """
    Complete the `README.md` of an adapter folder: its metadata, and a section on the selection that replaces the one
    of an earlier call. What is there already is kept.

    Args:
        folder (`str` or `os.PathLike`): the adapter folder.
        selection ([`Selection`], *optional*): what was chosen; without one only the metadata is completed.
        peft_config (`LoraConfig`): the adapter's configuration.
        adapter (`str`, *optional*): Hub id of the adapter, for the snippet that loads it; defaults to the folder's
            name.
        model (`nn.Module`, *optional*): the base model as it was trained, for its class, and the classes that a
            classifier predicts.
        went_on (`bool`, *optional*, defaults to `True`): whether anything was trained after the choice.
    """
    folder = Path(folder)
    path = folder / "README.md"
    card = ModelCard.load(path) if path.is_file() else ModelCard.from_template(ModelCardData())
    base_model = public_model_id(peft_config.base_model_name_or_path)
    kind = next((kind for kind in extra_kinds() if kind.holds(folder)), None)
    # By the library's name the Hub shows how to load it, and finds the base model of a PEFT adapter.
    _complete_metadata(card, base_model, SiteKind.library if kind is None else kind.library)
    name = adapter or folder.resolve().name
    card.text = _named(_without_placeholders(card.text, name), base_model, name)
    if kind is not None:  # TRL's example loads it with PEFT, which refuses it
        card.text = re.sub(r"## Quick start\n.*?(?=\n## )", "", card.text, flags=re.DOTALL)
    text = re.sub(rf"\n*{_BEGIN}.*?{_END}\n*", "\n", card.text, flags=re.DOTALL)
    if selection is not None:
        method = method_facts(selection.config)
        subfolder = "" if kind is not None else _subfolder(folder, peft_config)
        model_config = getattr(model, "config", None)
        base = _base_class(folder / subfolder, peft_config, model)
        shares = {
            keep: [share for share, kept in zip(selection.frequency, selection.kept, strict=True) if kept == keep]
            for keep in (True, False)
            if selection.history
        }
        environment = Environment(loader=FileSystemLoader(_TEMPLATES), undefined=StrictUndefined, autoescape=False)
        section = environment.get_template("diffora_card.md").render(
            selection=selection,
            options={
                sanitize(name, markdown=True): sanitize(text, markdown=True)
                for name, text in option_texts(method, selection).items()
            },
            mixed=len(set(selection.grid.kinds)) > 1,
            load_note=None if kind is None else kind.card_note(len(selection.of_kind(kind.name))),
            loader=SiteKind.loader if kind is None else kind.loader,
            notes=[sanitize(note, markdown=True, limit=None) for note in selection.notes],
            method=method,
            confidence=CONFIDENCE,
            picture=PICTURE_NAME if (folder / PICTURE_NAME).is_file() else None,
            report=REPORT_NAME if (folder / REPORT_NAME).is_file() else None,
            on_share={keep: f"{sum(found) / max(1, len(found)):.0%}" for keep, found in shares.items()},
            went_on=went_on,
            base=base,
            labels=_labels(model, peft_config.revision),
            revision=base_model and peft_config.revision and json.dumps(peft_config.revision),
            rows=_grown_rows(folder / subfolder, model_config),
            subfolder=subfolder and json.dumps(subfolder, ensure_ascii=False),
            base_model=base_model,
            adapter=json.dumps(name, ensure_ascii=False),  # a string of the snippet
        )
        text = f"{text.rstrip()}\n\n{_BEGIN}\n{section.strip()}\n{_END}\n"
    card.text = text
    write_file(path, str(card).encode())
    return path


def _subfolder(folder: Path, peft_config: Any) -> str:
    """Where in a folder PEFT has saved an adapter of this configuration: one not called "default" inside of it."""

    def is_it(path: Path) -> bool:
        try:
            targets = json.loads((path / ADAPTER_CONFIG_NAME).read_text(encoding="utf-8"))["target_modules"]
        except (OSError, ValueError, KeyError):
            return False
        mine = peft_config.target_modules
        return targets == mine or (isinstance(targets, list) and mine is not None and set(targets) == set(mine))

    inside = [] if is_it(folder) else [name for name in adapters_inside(folder) if is_it(folder / name)]
    return next((name for name in inside if not name.startswith("checkpoint-")), "")


@dataclass(frozen=True)
class _BaseClass:
    """Module and name of the class that loads the base model; whether the reader has to bring it, and how it loads."""

    module: str
    name: str
    own: bool = False
    loads: bool = True


def _base_class(folder: Path, peft_config: Any, model: Any) -> _BaseClass:
    """The class in the snippet: that of the model, if it is the user's own, or else by what PEFT says."""
    cls = None if model is None else class_of(model)
    if cls is not None and is_own_class(cls):
        module, name = cls.__module__, cls.__name__
        if not all(part.isidentifier() for part in module.split(".")) or module == "__mp_main__":
            module = "__main__"
        return _BaseClass(module, name, not _is_installed(module), hasattr(cls, "from_pretrained"))
    mapping = getattr(peft_config, "auto_mapping", None)
    with contextlib.suppress(OSError, ValueError):  # PEFT completes only what it writes
        mapping = json.loads((folder / ADAPTER_CONFIG_NAME).read_text(encoding="utf-8")).get("auto_mapping")
    module, name = loading_class(peft_config.task_type, mapping, getattr(model, "config", None))
    return _BaseClass(module, name, module == "__main__")


def _is_installed(module: str) -> bool:
    """Whether a module lies where packages are installed, so that others can have it too."""
    file = getattr(sys.modules.get(module.partition(".")[0]), "__file__", None)
    homes = {sysconfig.get_path(name) for name in ("purelib", "platlib", "stdlib")}
    return file is not None and module != "__main__" and any(Path(home) in Path(file).parents for home in homes)


def _labels(model: Any, revision: str | None) -> str:
    """What the snippet passes so that the base model, of this revision, gets the head that was trained."""
    model_config = getattr(model, "config", None)
    number = getattr(model_config, "num_labels", None)
    if number is None or not predicts_classes(class_of(model), model_config):
        return ""
    problem = problem_type(model_config)
    more = f', problem_type="{problem}"' if problem else ""
    if _replaced_head(model_config, revision, number):
        more += ", ignore_mismatched_sizes=True"
    names = label_names(model_config)
    if names is None or len(names) > _MOST_LABELS:
        return f", num_labels={number}{more}"
    text = ", ".join(f"{index}: {json.dumps(name, ensure_ascii=False)}" for index, name in names.items())
    return f", id2label={{{text}}}{more}"


def _replaced_head(model_config: Any, revision: str | None, number: int) -> bool:
    """
    Whether the base model has a head with another number of outputs, by the configuration that is here: in the folder
    that the model was loaded from, or in the cache of the Hub.
    """
    if not (source := getattr(model_config, "name_or_path", "")):
        return False
    found: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):
        found = read_base_config(source, {"local_files_only": True, "revision": revision})
    has_head = any("Classification" in name for name in found.get("architectures") or ())
    return has_head and len(found.get("id2label") or (0, 1)) != number  # two, if it names none


def _grown_rows(folder: Path, model_config: Any) -> int | None:
    """Rows of the embeddings that an adapter holds, which the base model gets first: its vocabulary may have grown."""
    if not hasattr(model_config, "get_text_config"):  # none of transformers
        return None
    size = getattr(model_config.get_text_config(), "vocab_size", None)
    with contextlib.suppress(OSError, ValueError):
        shapes = tensor_shapes(folder / ADAPTER_NAME)
        embeddings = [shape for name, shape in shapes.items() if "lora_" not in name and name.endswith(".weight")]
        return size if any(len(shape) == 2 and shape[0] == size for shape in embeddings) else None
    return None


def _without_placeholders(text: str, title: str) -> str:
    """
    PEFT fills a new card with the Hub's template, dozens of "[More Information Needed]". What it knows stands in the
    metadata and under "Framework versions", so that is what stays of it.
    """
    if "[More Information Needed]" not in text:
        return text
    heading = "### Framework versions"
    _, found, versions = text.partition(heading)
    return f"# {title}\n\n{found}{versions}"


def _named(text: str, base_model: str | None, adapter: str) -> str:
    """TRL's card with names where it wrote "None": for a base model from a folder, and an adapter not yet pushed."""
    link = f"[{base_model}](https://huggingface.co/{base_model})" if base_model else "a model that is not on the Hub"
    return text.replace("[None](https://huggingface.co/None)", link).replace('model="None"', f'model="{adapter}"')


def _complete_metadata(card: ModelCard, base_model: str | None, library: str) -> None:
    data: Any = card.data
    data.library_name = library  # TRL's card says transformers
    named = [data.base_model] if isinstance(data.base_model, str) else list(data.base_model or ())
    named = [name for name in named if public_model_id(name)]
    if base_model is not None and base_model not in named:
        named.append(base_model)
    data.base_model = (named[0] if len(named) == 1 else named) or None
    tags = [tag for tag in (data.tags or []) if tag is not None and not _is_local_base_tag(tag)]
    if base_model is not None:
        tags.append(f"base_model:adapter:{base_model}")
    data.tags = sorted({*tags, "lora", "diffora", "diffora-trainer"})


def _is_local_base_tag(tag: str) -> bool:
    prefix, _, name = tag.rpartition(":")
    return prefix.startswith("base_model") and public_model_id(name) is None
