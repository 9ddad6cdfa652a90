"""The site builds strictly, its links lead somewhere, and what it says of the package is so."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from pages import PAGES, ROOT, blocks

from rolora_passes.graphs.facts import FACTS

sys.path.insert(0, str(ROOT / "scripts"))

import house

OTHERS = [ROOT / name for name in ("CONTRIBUTING.md", "SECURITY.md")]


class Page(HTMLParser):
    """The links of a page, the files that it shows, and the places that can be linked to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.places: set[str] = set()
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("href", "src") and value:
                self.links.append(value)
            elif name in ("id", "name") and value:
                self.places.add(value)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.xdist_group("site")
def test_every_link_leads_somewhere(site: Path) -> None:
    pages = {path: Page(path) for path in site.rglob("*.html") if path.name != "404.html"}
    assert len(pages) > 20
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            assert target.exists(), f"{path.relative_to(site)} links to {link}"
            if parts.fragment and target in pages:
                assert unquote(parts.fragment) in pages[target].places, f"{path.name}: {link}"


@pytest.mark.xdist_group("site")
def test_pages_are_read_without_a_network(site: Path) -> None:
    for path in site.rglob("*.html"):
        text = path.read_text("utf-8")
        fetched = re.findall(r'<(?:script|img|link)[^>]*(?:src|href)="(https?:[^"]+)"', text)
        assert not fetched, path.name


@pytest.mark.xdist_group("site")
def test_the_reference_is_generated(site: Path) -> None:
    import rolora_passes
    from rolora_passes import export, graphs

    text = "".join(path.read_text("utf-8") for path in (site / "reference").glob("*.html"))
    for name in [*rolora_passes.__all__, *graphs.__all__, *export.__all__]:
        assert name.startswith("__") or name in text, name
    assert "usage: rolora compile" in text
    assert "generated:" not in text


def relative_links(path: Path) -> Iterator[Path]:
    for link in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", path.read_text("utf-8")):
        if "://" not in link:
            yield path.parent / link


@pytest.mark.parametrize("path", [*PAGES, *OTHERS], ids=lambda path: path.stem)
def test_links_between_files(path: Path) -> None:
    """As they are followed where the repository is read, without the site."""
    missing = [str(target) for target in relative_links(path) if not target.exists()]
    assert not missing


def test_the_glossary_is_short_and_used() -> None:
    glossary = (ROOT / "docs" / "glossary.md").read_text("utf-8")
    entries = re.findall(r"^\| \*\*(.+?)\*\* \|", glossary, flags=re.MULTILINE)
    assert 20 < len(entries) <= 30
    assert entries == sorted(entries, key=str.lower)
    others = " ".join(p.read_text("utf-8") for p in PAGES if p.stem != "glossary").lower()
    for word in (word for entry in entries for word in entry.split(", ")):
        assert word.lower() in others, f"no page has the word {word!r}"


def surface() -> dict[str, set[str]]:
    """The names that the page of stability says extensions may import, by module."""
    page = (ROOT / "docs" / "stability.md").read_text("utf-8")
    rows = re.findall(r"^\| `(rolora_passes[\w.]*)` \| (.*) \|$", page, flags=re.MULTILINE)
    return {module: set(re.findall(r"`(\w+)`", names)) for module, names in rows}


def test_the_extension_surface_is_there() -> None:
    assert len(surface()) > 15
    for module, names in surface().items():
        assert not [name for name in names if not hasattr(import_module(module), name)], module


def test_pages_import_what_is_stable() -> None:
    stable = surface()
    for module in ("rolora_passes", "rolora_passes.graphs", "rolora_passes.export"):
        stable[module] = {*import_module(module).__all__}
    stable["rolora_passes.errors"] = {*dir(import_module("rolora_passes.errors"))}
    imports = r"^from (rolora_passes[\w.]*) import (.+)$"
    for path in PAGES:
        text = "\n".join(block.text for block in blocks(path) if block.language == "python")
        for module, names in re.findall(imports, text, flags=re.MULTILINE):
            assert {*names.split(", ")} <= stable.get(module, set()), f"{path.name}: {module}: {names}"


def test_every_fact_is_explained() -> None:
    page = (ROOT / "docs" / "first-pass.md").read_text("utf-8")
    _, table = page.split("| fact | it holds |")
    named = re.findall(r"^\| `([a-z ]+)` \|", table, flags=re.MULTILINE)
    assert named == [*FACTS]


def test_the_rooms_have_no_circles() -> None:
    _, edges = house.rooms(house.PACKAGE)
    assert len(edges) > 10 and not house.circles(edges)
    assert house.circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == {"b", "c"}


NUMBER = re.compile(r"(?<![\w.-])(?<!\.\.)(\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?)")


def test_every_figure_was_measured() -> None:
    """Every figure of three digits or more on the page of benchmarks is one of the results, rounded."""
    page = (ROOT / "docs" / "benchmarks.md").read_text("utf-8")
    results = " ".join(p.read_text("utf-8") for p in (ROOT / "benchmarks" / "results").glob("*.md"))
    known = [float(n.replace(",", "")) for n in NUMBER.findall(results.replace("..", " "))]
    figures = NUMBER.findall(re.sub(r"2026-\d\d-\d\d", "", page))
    assert len(figures) > 200
    for figure in (f.replace(",", "") for f in figures):
        mantissa, _, power = figure.partition("e")
        step = 10.0 ** (int(power or 0) - len(mantissa.partition(".")[2]))
        if len(mantissa.replace(".", "")) > 2 and float(figure) not in known:
            close = [n for n in known for scale in (1, 100) if abs(n * scale - float(figure)) <= step * 0.501]
            assert close, f"{figure} is in no file of benchmarks/results"
