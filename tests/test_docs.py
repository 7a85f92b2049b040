"""Numbers in the pages equal those of the result files, and everything that the pages name exists."""

import re
import sys
from pathlib import Path

import pytest

import branchynet

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_generated_blocks_are_up_to_date(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks" / "pages"), *sys.path])
    import tables

    for page in tables.PAGES:
        text = (ROOT / page).read_text()
        assert "<!-- generated: " in text
        assert tables.filled(text) == text, f"{page} is stale; run python benchmarks/pages/tables.py"


def test_blocks_that_tell_times_name_the_processor_and_mix_none(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks" / "pages"), *sys.path])
    import blocks
    import tables

    stored = "\n".join(path.read_text() for path in (ROOT / "benchmarks" / "results").rglob("*.json"))
    known = set(re.findall(r'"processor": "([^"]+)"', stored))
    assert len(known) > 1
    timed = re.compile(r"\d (us|ms|s|seconds|minutes|hours)\b|\d\.\d+x")
    for name, make in tables.TABLES.items():
        text = "\n".join(make())
        assert not timed.search(text) or any(processor in text for processor in known), name
    one, other = sorted(known)[:2]
    assert blocks.processor({"processor": one}, {"environment": {"processor": one}}) == one
    with pytest.raises(ValueError, match="mix processors"):
        blocks.processor({"processor": one}, {"environment": {"processor": other}})


def test_every_public_name_exists_and_every_imported_one_is_public():
    assert [name for name in branchynet.__all__ if not hasattr(branchynet, name)] == []
    for page in PAGES:
        for names in re.findall(r"from branchynet import ([\w, ]+)", page.read_text()):
            assert {n.strip() for n in names.split(",")} <= set(branchynet.__all__), page


def test_python_blocks_are_python_and_links_lead_somewhere():
    for page in PAGES:
        text = page.read_text()
        for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
            compile(block, str(page), "exec")
        for link in re.findall(r"\]\(((?!https?:)[^)#]+)", text):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"


def test_files_that_the_design_page_names_exist():
    named = re.findall(r"`([\w/]+\.py)`", (ROOT / "docs" / "design.md").read_text())
    assert len(named) > 40
    folders = ROOT / "src" / "branchynet", ROOT
    assert [name for name in named if not any((folder / name).exists() for folder in folders)] == []
