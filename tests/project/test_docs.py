"""The documentation: it builds without a warning, leaves nothing out, and what it names is there."""

from __future__ import annotations

import html
import re
from dataclasses import fields
from fractions import Fraction
from pathlib import Path

import pytest

import diffora_trainer
from diffora_trainer import DiffoRAConfig
from diffora_trainer.cli import COMMANDS
from diffora_trainer.methods.options import GradientOptions, ScoreOptions
from diffora_trainer.methods.registry import get_method, method_names
from diffora_trainer.renamed import OLD_NAMES
from diffora_trainer.serving import SERVERS
from helpers import ROOT, TESTS
from helpers.documentation import PAGES, README, anchors, links, path_of, prose, read, rows


HOME = re.search(r'Repository = "https://github.com/(.+)"', read("pyproject.toml"))


OWN_METHODS = [n for n in method_names() if get_method(n).__module__.startswith("diffora_trainer.methods.")]


def test_the_readme_is_short() -> None:
    assert len(read(README).splitlines()) <= 130


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pages as `make docs` builds them."""
    for package in ("sphinx", "myst_parser", "furo", "sphinx_copybutton"):
        pytest.importorskip(package)
    from sphinx.cmd.build import main

    folder = tmp_path_factory.mktemp("docs")
    log = folder / "warnings.txt"
    words = ["-W", "--keep-going", "-q", "-b", "html", "-w", str(log), "-d", str(folder / "doctrees")]
    failed = main([*words, str(ROOT / "docs"), str(folder / "html")])
    assert not failed, log.read_text()
    return folder / "html"


def test_it_builds_without_a_warning(site: Path) -> None:
    api = (site / "api.html").read_text()
    for name in diffora_trainer.__all__:
        assert f'id="diffora_trainer.{name}"' in api, name
    # No docstring has kept the form of Hugging Face's: its links, its sections, its fences.
    words = html.unescape(re.sub(r"<[^>]+>", "", api))
    assert not re.findall(r"\[`|`\]|^\s*Args:|```|\*optional\*", words, re.MULTILINE)
    assert "Share of the LoRA modules to keep" in words and "relaxation=" not in words
    # A link out of the folder leads to the repository.
    assert HOME is not None
    folder = f"https://github.com/{HOME[1]}/tree/main/recipes/benchmarks/compare"
    assert folder in (site / "benchmarks.html").read_text()


def test_every_page_is_in_the_contents() -> None:
    listed = re.findall(r"^(\w+)$", read("docs/index.md"), re.MULTILINE)
    pages = {Path(page).stem for page in PAGES if page.startswith("docs/")} - {"index"}
    assert len(listed) == len(set(listed)) and set(listed) == pages


def test_every_option_and_every_public_name_is_documented() -> None:
    first_cells = {cell for row in rows("docs/choosing_options.md") for cell in re.findall(r"`(\w+)`", row[0])}
    options = {field.name: field.default for field in fields(DiffoRAConfig) if field.name not in OLD_NAMES}
    options |= {field.name: field.default for kind in (GradientOptions, ScoreOptions) for field in fields(kind)}
    assert first_cells == set(options)
    shown_defaults = {row[0].strip("`"): row[1].strip('`"') for row in rows("docs/choosing_options.md")}
    for name, default in options.items():
        if default is not None:
            assert shown_defaults[name] == (str(default) if isinstance(default, (str, bool)) else f"{default:g}"), name
    tables = [*rows("docs/methods.md"), *rows("docs/ranks_and_methods.md")]
    methods = {cell for row in tables for cell in re.findall(r'`"(\w+)"`', row[0])}
    assert methods == set(OWN_METHODS)
    assert {cell for row in rows("docs/serving.md") for cell in re.findall(r"`([\w.]+)`", row[1])} == set(SERVERS)
    shown = re.findall(r"^## diffora (.+)$", read("docs/cli.md"), re.MULTILINE)
    assert {name for heading in shown for name in re.split(r", | and ", heading)} == set(COMMANDS)
    documented = re.findall(r"^\.\. auto\w+:: (\w+)$", read("docs/api.md"), re.MULTILINE)
    assert len(documented) == len(set(documented)) and set(documented) == set(diffora_trainer.__all__)


def test_what_a_loop_calls_is_among_the_members_of_its_classes() -> None:
    found = re.findall(r"^\.\. autoclass:: (\w+)\n   :members: (.+)$", read("docs/api.md"), re.MULTILINE)
    members = {name: set(listed.split(", ")) for name, listed in found}
    for name, listed in members.items():
        assert not {member for member in listed if not hasattr(getattr(diffora_trainer, name), member)}, name
    page, attributes = read("docs/custom_loop.md"), {"selection", "step", "schedule", "search"}
    assert set(re.findall(r"\brun\.(\w+)", page)) <= members["SelectionRun"] | attributes
    shown = {call for row in rows("docs/custom_loop.md") for cell in row for call in re.findall(r"`(\w+)\(", cell)}
    assert {"select", "discretize", "finish"} <= shown <= members["ArchitectureSearch"]


def test_every_option_of_a_single_method_is_documented() -> None:
    """What a method adds to the options of all that search or score, or has another default of."""
    shared = {field.name: field.default for kind in (GradientOptions, ScoreOptions) for field in fields(kind)}
    options = {
        (name, field.name): field.default
        for name in OWN_METHODS
        for field in fields(get_method(name).Options)
        if field.name not in shared or shared[field.name] != field.default
    }
    table = [row for row in rows("docs/ranks_and_methods.md") if re.fullmatch(r"`\w+`", row[1])]
    shown = {(row[0].strip('`"'), row[1].strip("`")): row[2] for row in table}
    assert len(shown) == len(table) and all(row[3] for row in table)
    assert set(shown) == set(options)
    for key, default in options.items():
        cell = shown[key]
        if default is None:
            assert cell == "", key
        elif isinstance(default, str):
            assert cell == f'`"{default}"`', key
        else:
            assert float(Fraction(cell)) == default, key


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    """PyPI shows the README alone, so its links are absolute; those of the pages are relative."""
    assert HOME is not None
    repository = rf"https://(?:raw\.githubusercontent|github)\.com/{HOME[1]}/(?:(?:blob|tree)/)?main/(.+)"
    for link in links(page):
        inside = re.fullmatch(repository, link)
        if page == README:
            assert link.startswith("https://"), link
        else:
            assert inside is None, f"{link} should be a relative link"
        if inside is None and link.startswith("https://"):
            continue
        target = ROOT / inside[1].partition("#")[0] if inside else path_of(page, link)
        anchor = link.partition("#")[2]
        if link.startswith("#"):
            target = ROOT / page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(str(target.resolve().relative_to(ROOT))), link


def test_tests_that_are_named_are_there() -> None:
    tests = {path.name: path.read_text() for path in TESTS.rglob("test_*.py")}
    texts = {page: prose(page) for page in PAGES}
    for text in texts.values():
        for path in set(re.findall(r"`((?:tests/)?(?:\w+/)*test_\w+\.py)", text)):
            assert (ROOT / path).is_file() if path.startswith("tests/") else path in tests, path
        for path, name in re.findall(r"`(test_\w+\.py)::(test_\w+)", text):
            assert f"def {name}(" in tests[path], name
    every = "".join(tests.values())
    named = {name for text in texts.values() for name in re.findall(r"\b(test_\w+)\b(?!\.py)", text)}
    files = {name.removesuffix(".py") for name in tests}
    assert len(named) > 20 and not [name for name in named - files if f"def {name}(" not in every]
    cases = re.findall(r"`test_trainer\[([\w-]+)\]`|`\[([\w-]+)\]`", texts["docs/trainers.md"])
    table = tests["test_trainers_table.py"]
    assert len(cases) > 15 and not [case for pair in cases if f'"{(case := "".join(pair))}"' not in table]
