"""What a release and the workflows on GitHub rest on: one version everywhere, targets and files that exist."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import diffora_trainer
from diffora_trainer.cli import COMMANDS
from diffora_trainer.methods.papers import DIFFORA, HETEROLORA
from helpers import ROOT


GITHUB = ROOT / ".github"
NOTES = "tests/project/release_notes.py"
if not GITHUB.is_dir():
    pytest.skip("the sdist has no workflows", allow_module_level=True)


def cited_version() -> str:
    """The last release, or the one that is being made."""
    return yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"]  # a text, not a number


def test_one_version(tmp_path: Path) -> None:
    """The tag of a release must be that of the package, of the citation file and of a section of the changelog."""
    version, present = cited_version(), diffora_trainer.__version__
    for name in (NOTES, "diffora_trainer/__init__.py", "CITATION.cff", "CHANGELOG.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text((ROOT / name).read_text())
    package = tmp_path / "diffora_trainer" / "__init__.py"

    def notes(tag: str) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, tmp_path / NOTES, tag], capture_output=True, text=True)

    if present != version:  # between releases
        assert present.endswith(".dev0") and present > version and notes(f"v{version}").returncode == 1
        package.write_text(package.read_text().replace(f'"{present}"', f'"{version}"'))
    found = notes(f"v{version}")
    assert found.returncode == 0, found.stderr
    assert "### Added" in found.stdout and not re.search(r"^(## |\[)", found.stdout, re.MULTILINE)
    assert f"\n[{version}]: https://" in (ROOT / "CHANGELOG.md").read_text()
    for tag in (version, f"v{version}rc1", "v9.9.9"):
        refused = notes(tag)
        assert refused.returncode == 1 and f"The tag is {tag}" in refused.stderr, tag


def test_citation() -> None:
    """The papers are those that the methods name, by their numbers, titles and authors."""
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["cff-version"] == "1.2.0" and cited["title"] == "diffora-trainer" and cited["type"] == "software"
    assert cited["version"] == cited_version()
    assert cited["license"] == "Apache-2.0" and cited["message"] and cited["authors"]
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert f"## [{cited['version']}] - {cited['date-released']}\n" in changelog
    for paper, reference in zip((DIFFORA, HETEROLORA), cited["references"], strict=True):
        assert reference["url"].rpartition("/")[2] == paper.url.rpartition("/")[2]
        authors = [f"{author['family-names']}, {author['given-names']}" for author in reference["authors"]]
        assert reference["title"] in paper.bibtex and f"{{{' and '.join(authors)}}}" in " ".join(paper.bibtex.split())


def steps() -> Iterator[dict[str, Any]]:
    for path in sorted((GITHUB / "workflows").glob("*.yml")):
        for job in yaml.safe_load(path.read_text())["jobs"].values():
            yield from job["steps"]


def test_workflows_run_targets_and_files_that_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([\w-]+):(?!=)", makefile, re.MULTILINE))
    words = "\n".join(step["run"] for step in steps() if "run" in step)
    run = set(re.findall(r"\bmake ([\w-]+)", words))
    assert run <= targets and "check-wheel" in run
    assert set(re.findall(r"\bmake ([\w-]+)", (ROOT / ".ci" / "run").read_text())) <= run
    files = re.findall(r"\btests/[\w/]+\.py", words + makefile)
    assert len(files) > 1 and all((ROOT / file).is_file() for file in files)
    phony = re.search(r"^\.PHONY: (.+)$", makefile, re.MULTILINE)
    assert phony is not None and {name for name in targets if f"make {name} " in makefile} <= set(phony[1].split())
    uses = {step["uses"] for step in steps() if "uses" in step}
    assert uses and all(re.fullmatch(r"[\w-]+/[\w-]+@(release/)?v\d+", name) for name in uses), uses


def test_the_release_publishes_what_was_checked() -> None:
    """The tag is checked before anything is built, and only the job that publishes may ask PyPI for a token."""
    workflow = yaml.safe_load((GITHUB / "workflows" / "release.yml").read_text())
    assert workflow[True] == {"push": {"tags": ["v*"]}}  # YAML reads the key `on` as true
    build, publish, release = workflow["jobs"].values()
    commands = [step["run"] for step in build["steps"] if "run" in step]
    assert commands[0].startswith(f"python {NOTES} ") and commands[1:] == ["make check-wheel"]
    assert publish["environment"] == "pypi" and publish["permissions"] == {"id-token": "write"}
    assert workflow["permissions"] == {"contents": "read"} and "permissions" not in build
    assert (publish["needs"], release["needs"]) == ("build", "publish")


@pytest.mark.parametrize("name", ["bug_report", "feature_request"])
def test_issue_forms(name: str) -> None:
    """GitHub shows no form that has a wrong or a repeated id, or a field without a label; and says so to nobody."""
    form = yaml.safe_load((GITHUB / "ISSUE_TEMPLATE" / f"{name}.yml").read_text())
    assert form["name"] and form["description"]
    ids = [field["id"] for field in form["body"]]
    assert len(set(ids)) == len(ids) and all(re.fullmatch(r"[\w-]+", each) for each in ids)
    assert all(field["type"] in ("textarea", "checkboxes") and field["attributes"]["label"] for field in form["body"])
    told = set(re.findall(r"`diffora (\w+)`", yaml.safe_dump(form)))
    assert told <= set(COMMANDS) and (name != "bug_report" or "env" in told)


def test_the_changelog_has_the_form_that_it_names() -> None:
    text = (Path(ROOT) / "CHANGELOG.md").read_text()
    heads = re.findall(r"^## (.+)$", text, re.MULTILINE)
    released = [head for head in heads if head != "[Unreleased]"]
    assert heads[0] in ("[Unreleased]", released[0])
    assert all(re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", head) for head in released)
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert set(re.findall(r"^### (.+)$", text, re.MULTILINE)) <= kinds
