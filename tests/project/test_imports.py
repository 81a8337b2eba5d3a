"""Which room may import which, how long a file may be, and how many parameters a function may have."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import diffora_trainer
from diffora_trainer.adapters import base as sites
from helpers import ROOT


PACKAGE = ROOT / "diffora_trainer"
LEAVES = {"config", "renamed", "logging", "compat", "core"}
# `config_checks` reads numbers by `core.values`, checks moments by `core.schedule`, and knows nothing else.
MAY_IMPORT = {
    "core": set(),
    "logging": set(),
    "renamed": {"core"},
    "config_checks": {"core"},
    "config": {"core", "renamed", "config_checks"},
    "compat": {"core", "logging"},
    "methods": {"core", "config", "logging", "compat"},
    "adapters": {"core", "config", "logging", "compat"},
    "prefix": {"core", "logging", "compat"},
    "search": {"methods", "adapters", *LEAVES},
    "hub": {"methods", "adapters", *LEAVES},
    "schedules": {"adapters", *LEAVES},
    "serving": {"adapters", "core", "logging", "compat"},
    "cli": {"serving", "trainer", "search", "hub", "methods", "adapters", *LEAVES},
    "__main__": {"cli"},
    "trainer": {"search", "prefix", "hub", "methods", "adapters", *LEAVES},
    "integrations": {"trainer", "methods", "adapters", *LEAVES},
    "experimental": {"adapters", *LEAVES},
}
# The public names, which are loaded when they are asked for.
LAZY = PACKAGE / "__init__.py"
MAX_LINES, MAX_PARAMETERS = 360, 6
# Whose arguments are the user's options: classes that users build, and the budget, which is made of options.
OF_USERS = {
    *("DiffoRATrainer", "DiffoRASFTTrainer", "DiffoRAMixin", "DiffoRACallback"),
    *("SelectionRun", "ArchitectureSearch", "Budget"),
}

FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != LAZY)


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def statements(path: Path, for_types: bool) -> Iterator[ast.AST]:
    """What stands in a file; on request without what a type checker alone reads, the bodies of `if TYPE_CHECKING`."""
    waiting: list[ast.AST] = [ast.parse(path.read_text())]
    while waiting:
        node = waiting.pop()
        yield node
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" and not for_types:
            waiting += node.orelse
        else:
            waiting += ast.iter_child_nodes(node)


def imported(path: Path, for_types: bool = True) -> set[Path]:
    """The files of the package that one imports, also inside of functions; with those for annotations, or without."""
    found = set()
    for node in statements(path, for_types):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        folder = path.parent
        for _ in range(node.level - 1):
            folder = folder.parent
        base = folder.joinpath(*(node.module or "").split(".")) if node.module else folder
        for alias in node.names:
            for candidate in (base / f"{alias.name}.py", base / alias.name / "__init__.py", base.with_suffix(".py")):
                if candidate.is_file():
                    found.add(candidate)
                    break
            else:
                assert (base / "__init__.py").is_file(), (path, node.module, alias.name)
                found.add(base / "__init__.py")
    return found


def test_imports_run_one_way() -> None:
    assert {room(path) for path in FILES} == set(MAY_IMPORT)
    wrong = [
        f"{path.relative_to(PACKAGE)} -> {other.relative_to(PACKAGE)}"
        for path in FILES
        for other in imported(path) - {LAZY}
        if room(other) not in {room(path), *MAY_IMPORT[room(path)]}
    ]
    assert not wrong


def test_nobody_imports_what_is_experimental() -> None:
    """It registers itself; whoever asks for it by a public name or in a file of its own gets it."""
    assert not [path for path in FILES if room(path) != "experimental" and "experimental" in map(room, imported(path))]


def test_one_table_names_what_is_experimental() -> None:
    """By a text that no import shows: of the kinds of site, which are imported when one is asked for."""
    name = re.compile(r"(diffora_trainer)?\.*experimental[\w.]*")
    naming = {
        path
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and name.fullmatch(node.value)
    }
    assert naming == {PACKAGE / "adapters" / "base.py"}
    for kind, home in sites._OWN.items():
        importlib.import_module(home)
        assert kind in sites._KINDS


def test_core_and_methods_need_torch_alone() -> None:
    for path in FILES:
        if room(path) not in ("core", "methods"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            for name in names:
                assert name.split(".")[0] not in ("transformers", "peft", "trl", "accelerate", "datasets"), path


def test_imports_for_annotations_are_told_apart(tmp_path: Path) -> None:
    names = ("at_once", "for_types", "in_their_place", "in_function")
    at_once, for_types, in_their_place, in_function = (tmp_path / f"{name}.py" for name in names)
    for path in (at_once, for_types, in_their_place, in_function):
        path.touch()
    importing = tmp_path / "importing.py"
    importing.write_text(
        "from .at_once import a\n"
        "if TYPE_CHECKING:\n    from .for_types import b\nelse:\n    from .in_their_place import c\n"
        "def f():\n    if True:\n        from .in_function import d\n"
    )
    assert imported(importing, for_types=False) == {at_once, in_their_place, in_function}
    assert imported(importing) == {at_once, for_types, in_their_place, in_function}


def test_no_circle() -> None:
    edges = {path: imported(path, for_types=False) for path in FILES}
    done: set[Path] = set()

    def visit(path: Path, above: tuple[Path, ...]) -> None:
        assert path not in above, [p.relative_to(PACKAGE).as_posix() for p in (*above[above.index(path) :], path)]
        if path in done:
            return
        for other in edges.get(path, ()):
            visit(other, (*above, path))
        done.add(path)

    for path in FILES:
        visit(path, ())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_files_and_functions_are_short(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= MAX_LINES
    for owner in ast.walk(ast.parse(text)):
        body = getattr(owner, "body", ())
        for node in body if isinstance(body, list) else ():
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or getattr(owner, "name", "") in OF_USERS:
                continue
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            given = [a.arg for a in arguments if a.arg not in ("self", "cls")]
            assert len(given) <= MAX_PARAMETERS, (node.name, given)


def test_the_package_lists_its_public_names_alone() -> None:
    listed = {name for name in dir(diffora_trainer) if not name.startswith("__")}
    assert listed == set(diffora_trainer.__all__)
