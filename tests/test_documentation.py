"""The pages of docs/: tutorials run as they stand, links lead somewhere, the site shows every page and public name."""

from __future__ import annotations

import contextlib
import doctest
import importlib
import io
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
TUTORIALS = sorted((DOCS / "tutorials").glob("*.md"))
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def fences(text: str) -> Iterator[tuple[str, str]]:
    """Language and text of every fenced block."""
    return ((match[1], match[2]) for match in FENCE.finditer(text))


@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_a_tutorial_runs_and_prints_what_it_says(page, request):
    """Its ``python`` blocks one after another in one module; a ``text`` block is what the one above it prints."""
    text = page.read_text()
    if needs := re.match(r"<!-- needs: (.*) -->", text):
        request.getfixturevalue("torchvision_stub")
        for name in needs[1].split(", "):
            pytest.importorskip(name)
    names: dict[str, object] = {"__name__": "tutorial"}
    checker, printed, checked = doctest.OutputChecker(), "", 0
    torch.manual_seed(0)
    for language, block in fences(text):
        if language == "python":
            assert printed == "", f"{page.name} does not show what is printed: {printed}"
            with contextlib.redirect_stdout(io.StringIO()) as stream:
                exec(compile(block, str(page), "exec"), names)
            printed = stream.getvalue()
        elif language == "text":
            assert checker.check_output(block, printed, doctest.ELLIPSIS), f"{page.name}: got {printed}wanted {block}"
            printed, checked = "", checked + 1
    assert printed == ""
    assert checked


# --- the site, without the tools that build it ------------------------------------------------------------------------

AT_THE_TOP = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")
PAGES = [*sorted(DOCS.rglob("*.md")), *(ROOT / name for name in AT_THE_TOP)]
LINK = re.compile(r"\]\(([^)\s]+)\)")
MODULES = {"models", "nn", "ops", "reparam"}  # names of repavit_ops with a page of their own
PUBLIC = ("", *(f".{name}" for name in sorted(MODULES)), ".idling", ".profiling")


def without_code(text: str) -> str:
    return FENCE.sub("", text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page):
    for target in LINK.findall(without_code(page.read_text())):
        if "://" not in target and not target.startswith(("#", "mailto:")):
            path, _, anchor = target.partition("#")
            # pages of the site that are made when it is built (docs/site/hooks.py) are not there before
            assert (page.parent / path).exists() or path == "command-line.md", f"{page.name} links to {target}"
            if anchor and path.endswith(".md"):
                titles = re.findall(r"^#+ (.*)$", (page.parent / path).read_text(), re.MULTILINE)
                assert anchor in {re.sub(r"[^\w -]", "", t).strip().lower().replace(" ", "-") for t in titles}


def site() -> dict[str, str]:
    """Pages that stand elsewhere in the repository, by their place on the site."""
    text = (DOCS / "site/hooks.py").read_text()
    return dict(re.findall(r'^    "([^"]+\.md)": "([^"]+)",$', text, re.MULTILINE))


def test_every_page_is_in_the_navigation_once():
    navigation = re.findall(r"^ +- (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert len(navigation) == len(set(navigation))
    here = {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}
    assert set(navigation) == here | site().keys() | {"reference/command-line.md"}
    assert all((ROOT / source).exists() for source in site().values())


def test_every_public_name_is_in_the_reference():
    pages = "\n".join(page.read_text() for page in (DOCS / "reference").glob("*.md"))
    shown = re.findall(r"^::: ([\w.]+)$", pages, re.MULTILINE)
    assert len(shown) == len(set(shown))
    names = {name.rsplit(".", 1)[1] for name in shown}
    for module in PUBLIC:
        wanted = set(importlib.import_module(f"repavit_ops{module}").__all__)
        assert not wanted - names - MODULES - {"__version__"}, module
    for name in shown:  # each leads to something that has words of its own
        module, attribute = name.rsplit(".", 1)
        assert getattr(importlib.import_module(module), attribute).__doc__, name


@pytest.mark.parametrize("name", ["channel-idle-merge.svg", "joined-branches.svg", "join-schedule.svg"])
def test_figures_are_what_the_code_draws(name, monkeypatch):
    """idle-ratio-work.svg counts 27 whole models, which takes too long here."""
    monkeypatch.syspath_prepend(DOCS / "site")
    figures = importlib.import_module("figures")
    assert (DOCS / "concepts" / name).read_text() == figures.FIGURES[name]()
    assert set(figures.FIGURES) == {path.name for path in (DOCS / "concepts").glob("*.svg")}
