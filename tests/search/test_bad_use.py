"""Bad use of the search, the cut and files, each with its message."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn

from diffora_trainer import ArchitectureSearch, Selection
from diffora_trainer.adapters.grid import AdapterGrid
from diffora_trainer.adapters.pruning import apply_selection
from diffora_trainer.core.selection import SELECTION_NAME
from diffora_trainer.core.state import RunState
from diffora_trainer.hub.card import write_card
from diffora_trainer.trainer.checkpoint import STATE_NAME, load_state, save_state
from helpers.adapted import make_selection
from helpers.checks import assert_helpful
from helpers.trainers import lora
from helpers.unfit_models import ready_model


def searching(loss_fn: Any) -> None:
    search = ArchitectureSearch(small(), loss_fn=loss_fn)
    search.begin()
    search.step({"input_ids": torch.arange(5, 13).reshape(2, 4), "labels": torch.tensor([0, 1])})


def small() -> PeftModel:
    return ready_model(target_modules=["query"])


def twice() -> None:
    model = small()
    grid = AdapterGrid.from_model(model).grid
    numbers = (0.0,) * len(grid)
    selection = Selection(grid, (grid.ranks[0],) + (0,) * (len(grid) - 1), numbers, numbers)
    for _ in range(2):
        apply_selection(model, selection)


def written(folder: Path, content: bytes | None) -> Path:
    """A folder with a selection of this content; without one it is a folder itself."""
    path = folder / SELECTION_NAME
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    return folder


def damaged(folder: Path, **changes: Any) -> Path:
    save_state(folder, RunState(3, {}, {}, selection=make_selection()), {})
    path = folder / STATE_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


DAMAGED = f"{STATE_NAME}.*cannot be read.*another checkpoint"


OTHER: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    # The search and the cut
    "search without a loss": (lambda _: searching(None), TypeError, "loss_fn.*NoneType.*Please pass one"),
    "loss in a tuple": (lambda _: searching(lambda m, b: (m(**b).loss, 1)), TypeError, "returned tuple.*one number"),
    "loss of a row each": (lambda _: searching(lambda m, b: m(**b).logits), TypeError, r"shape \(2, 2\).*one number"),
    "loss that is a number": (lambda _: searching(lambda m, b: 1.0), TypeError, "returned float.*one element"),
    "loss without a gradient": (
        lambda _: searching(torch.no_grad()(lambda m, b: m(**b).loss)),
        ValueError,
        "does not depend on any gate.*no_grad",
    ),
    "search of a plain model": (
        lambda _: ArchitectureSearch(nn.Linear(2, 2), loss_fn=print),
        TypeError,
        "PeftModel.*got Linear.*get_peft_model",
    ),
    "search with a dictionary": (
        lambda _: ArchitectureSearch(small(), {"a": 1}, loss_fn=print),  # type: ignore[arg-type]
        TypeError,
        "`config` must be a `DiffoRAConfig`, got dict",
    ),
    "search of no adapter": (
        lambda _: ArchitectureSearch(small(), loss_fn=print, adapter_name="nobody"),
        ValueError,
        r"adapter_name='nobody'.*\['default'\]",
    ),
    "cut of a plain model": (
        lambda _: apply_selection(nn.Linear(2, 2), make_selection()),
        TypeError,
        "got Linear and Selection.*model that was searched",
    ),
    "cut by a file name": (
        lambda _: apply_selection(small(), SELECTION_NAME),  # type: ignore[arg-type]
        TypeError,
        "and str.*Selection.load",
    ),
    "cut of no adapter": (
        lambda _: apply_selection(small(), make_selection(), adapter_name="nobody"),
        ValueError,
        "adapter_name='nobody'.*Please pass",
    ),
    "cut of another model": (
        lambda _: apply_selection(small(), make_selection()),
        ValueError,
        "made for other modules",
    ),
    "a second cut": (lambda _: twice(), ValueError, "made for other modules.*with all its LoRA modules"),
    # Files
    "no file": (lambda f: Selection.load(f), FileNotFoundError, f"no .*{SELECTION_NAME}.*output folder"),
    "a folder as a file": (lambda f: Selection.load(written(f, None)), OSError, SELECTION_NAME),
    "empty file": (lambda f: Selection.load(written(f, b"")), ValueError, f"{SELECTION_NAME}.*Please pass"),
    "a list": (lambda f: Selection.load(written(f, b"[]")), ValueError, "`format` is not 2.*Please pass"),
    "another format": (
        lambda f: Selection.load(written(f, b'{"format": 5}')),
        ValueError,
        "`format` is not 2, 3 or 4",
    ),
    "no modules": (lambda f: Selection.load(written(f, b'{"format": 1}')), ValueError, "has no 'modules'"),
    "binary": (lambda f: Selection.load(written(f, b"\x80\x04\xff\x00")), ValueError, "it is not text.*Please pass"),
    "no state": (lambda f: load_state(f), ValueError, f"holds no {STATE_NAME}.*start a new run"),
    "state of other options": (lambda f: load_state(damaged(f, config=3)), ValueError, DAMAGED),
    "state without a selection": (lambda f: load_state(damaged(f, selection=None)), ValueError, DAMAGED),
    "state of no search": (lambda f: load_state(damaged(f, phase="search")), ValueError, DAMAGED),
    "card into a file": (
        lambda f: write_card(written(f, b"") / SELECTION_NAME, make_selection(), lora()),
        OSError,
        SELECTION_NAME,
    ),
}


@pytest.mark.parametrize("name", OTHER)
def test_search_cut_and_files(name: str, tmp_path: Path) -> None:
    call, error, message = OTHER[name]
    with pytest.raises(error) as found:
        call(tmp_path)
    if isinstance(found.value, OSError) and found.value.errno:  # the system's own words, with the path
        assert message in str(found.value)
    else:
        assert_helpful(str(found.value), message)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    (written(tmp_path, b"{}") / SELECTION_NAME).chmod(0)
    with pytest.raises(PermissionError, match=SELECTION_NAME):
        Selection.load(tmp_path)


def test_there_are_enough_of_them() -> None:
    assert len(OTHER) >= 20
