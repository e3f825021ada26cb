"""The pages: links lead somewhere, files that are named exist, the README is short."""

import re

import pytest

from tests.conftest import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_files(page):
    text = page.read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert not [link for link in links if not (page.parent / link).exists()]
    named = re.findall(r"`((?:gpu_etl|model|common|bench|tests|docs|scripts)/[\w/.]+\.\w+)`", text)
    assert not [name for name in named if not (ROOT / name).exists()]


def test_every_file_of_the_walks_exists():
    """docs/architecture.md names files within gpu_etl and model."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    here = {path.as_posix() for package in ("gpu_etl", "model", ".") for path in (ROOT / package).rglob("*.py")}
    names = set(re.findall(r"`([\w/]+\.py)`", text))
    assert len(names) > 20
    assert not [name for name in names if not any(path.endswith(f"/{name}") for path in here)]


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().split()) <= 900
