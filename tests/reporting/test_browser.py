"""The report in a real browser: every section draws, selectors change what is drawn, nothing is fetched."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from browser import Page, browsing, find_browser
from helpers import captured, tokens_for

from rolora_passes.passes.base import Pass
from rolora_passes.recipes import load_recipe
from rolora_passes.reporting import gather, write_page

SECTIONS = ("outliers", "errors", "grids", "bases", "pipeline", "sizes", "about")
LOADED = "document.querySelector('.plot .main-svg') || document.querySelector('.error')"
# Texts of one figure that lie over one another.
OVERLAPS = """[...document.querySelectorAll('.plot')].flatMap((plot) => {
  const texts = [...plot.querySelectorAll('text')].filter((t) => t.textContent.trim())
    .map((t) => [t.textContent, t.getBoundingClientRect()]).filter(([, box]) => box.width);
  return texts.flatMap(([a, p], i) => texts.slice(i + 1)
    .filter(([, q]) => p.left + 1 < q.right && q.left + 1 < p.right)
    .filter(([, q]) => p.top + 2 < q.bottom && q.top + 2 < p.bottom)
    .map(([b]) => `${a} | ${b}`));
})"""


def made(folder: Path, recipe: list[Pass]) -> Path:
    """The report of a recipe on a tiny model."""
    graph = captured("llama", torch.float32)
    data, arrays = gather(graph, recipe, tokens_for(graph, 1, 40))
    data["about"] = {
        "model": "tiny <b>llama</b>", "recipe": "a recipe", "yaml": "passes: []", "seed": None,
        "text": "t.txt", "beginning": "<script>", "tokens": 40, "versions": {"torch": "2.13"},
        "seconds": 1.5,
    }  # fmt: skip
    write_page(data, arrays, folder / "report.html")
    return folder / "report.html"


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    program = find_browser()
    if program is None:
        missing = "no Chromium is on this machine: install one (Debian: apt-get install chromium)"
        if os.environ.get("ROLORA_BROWSER") == "required":
            pytest.fail(missing)
        pytest.skip(missing)
    with browsing(program) as opened:
        yield opened


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("report"), load_recipe("quarot-rtn:W4A4KV4"))


def show(page: Page, path: Path, width: int = 1280, height: int = 12000) -> None:
    """Open a report in a window so high that all of it is in view."""
    page.size(width, height)
    page.open(path)
    page.wait(LOADED)
    page.wait("waiting.size === 0")


def drawn(page: Page, section: str) -> list[Any]:
    """What the plots of a section show, as text that changes with the picture."""
    return list(
        page.run(
            f"[...document.querySelectorAll('#{section} .plot .main-svg')].map((s) => s.outerHTML)"
            ".filter((s) => /<(path|image)/.test(s))"
        )
    )


@pytest.mark.parametrize("width", [1280, 400])
def test_every_section_draws(page: Page, report: Path, width: int) -> None:
    page.errors.clear()
    page.requests.clear()
    show(page, report, width)
    for section in SECTIONS:
        assert page.run(f"document.querySelector('#{section}').children.length") > 2
    plots = {"outliers": 3, "errors": 1, "grids": 1, "pipeline": 1, "sizes": 1}
    for section, count in plots.items():
        assert page.run(f"document.querySelectorAll('#{section} .js-plotly-plot').length") == count
        assert len(drawn(page, section)) >= count
    assert page.run("document.querySelectorAll('#outliers .plot image').length") == 2
    assert page.run("document.querySelectorAll('#bases td.cell').length") > 8
    assert page.run("document.querySelector('h1').textContent") == "tiny <b>llama</b>"
    assert page.run("document.documentElement.scrollWidth") <= width, "it scrolls sideways"
    assert page.run(OVERLAPS) == []
    assert not page.errors
    assert all(url.startswith(("file:", "data:", "blob:")) for url in page.requests)


def test_selectors_change_the_picture(page: Page, report: Path) -> None:
    page.errors.clear()
    show(page, report)
    for section, first in (("outliers", "#outliers"), ("grids", "#grids")):
        before = drawn(page, section)
        page.run(f"document.querySelector('{first} input[type=range]').value = 0")
        page.run(f"document.querySelector('{first} input[type=range]').focus()")
        page.press("ArrowRight")
        page.press("ArrowLeft")
        said = page.run(f"document.querySelector('{first} output').textContent")
        home = drawn(page, section)
        page.press("ArrowRight")
        assert (said, page.run(f"document.querySelector('{first} output').textContent")) == ("0", "1")
        assert home != drawn(page, section) and len(before) == len(home)
    for section in ("outliers", "errors", "grids"):
        before = drawn(page, section)
        page.run(f"document.querySelector('#{section} select').focus()")
        page.press("ArrowUp" if section == "errors" else "ArrowDown")
        assert drawn(page, section) != before
    assert not page.errors


def test_surfaces_tables_and_the_dark(page: Page, report: Path) -> None:
    page.errors.clear()
    show(page, report)
    page.run(
        "(() => { const view = document.querySelectorAll('#outliers select')[1];"
        " view.value = 1; view.dispatchEvent(new Event('change')); })()"
    )
    page.wait("document.querySelectorAll('#outliers .gl-container canvas').length")
    page.run("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    page.wait("document.querySelectorAll('#outliers details tr').length > 10")
    light = drawn(page, "errors")
    page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    page.wait("getComputedStyle(document.body).backgroundColor === 'rgb(20, 23, 28)'")
    page.wait("document.querySelector('#errors .main-svg').outerHTML.includes('rgb(86, 180, 233)')")
    assert drawn(page, "errors") != light
    page.call("Emulation.setEmulatedMedia", features=[])
    assert not page.errors


@pytest.mark.parametrize("recipe", ["rtn:W8A16", "float"])
def test_less_to_show(page: Page, tmp_path: Path, recipe: str) -> None:
    """A recipe that moves nothing, and one that quantizes nothing."""
    page.errors.clear()
    show(page, made(tmp_path, load_recipe(recipe)))
    assert page.run("document.querySelectorAll('#outliers .plot image').length") == (
        1 if "W8" in recipe else 2
    )
    assert page.run("document.querySelectorAll('#errors .plot').length") == ("W8" in recipe)
    assert not page.errors and page.run(OVERLAPS) == []


def test_a_damaged_file_says_so(page: Page, report: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.html"
    damaged.write_text(report.read_text().replace('id="data">H4sI', 'id="data">AAAA'))
    page.size(1280, 800)
    page.open(damaged)
    page.wait("document.querySelector('.error')")
    assert "cannot be drawn" in page.run("document.querySelector('.error').textContent")
    page.errors.clear()
