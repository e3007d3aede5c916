"""The report's page in a real browser: readable at three widths, light and dark, by keyboard and without a script.

The browser is one that is installed, found by its path; `make browser` installs it with axe-core where it can.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.report_pages import comparison

from peft_lab.comparison.report.report import write_report

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: make browser")

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = os.environ.get("PEFT_LAB_CHROMIUM") or next(filter(None, map(shutil.which, _NAMES)), None)
AXE = Path(sys.prefix) / "node" / "node_modules" / "axe-core" / "axe.min.js"
WIDTHS, SCHEMES = (400, 800, 1280), ("light", "dark")

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome is installed: make browser")


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = comparison(tmp_path_factory.mktemp("comparison"))
    return write_report(folder).as_uri()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        # the sandbox of chromium needs a user that is not root
        found = started.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def open_page(browser: Any, address: str) -> Iterator[Any]:
    """Function that opens the page; a request for anything but the page itself is an error."""
    contexts, requests = [], []

    def opened(width: int = 1280, scheme: str = "light", script: bool = True) -> Any:
        size = {"width": width, "height": 900}
        contexts.append(browser.new_context(viewport=size, color_scheme=scheme, java_script_enabled=script))
        page = contexts[-1].new_page()
        page.on("request", lambda request: requests.append(request.url))
        page.goto(address)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert {url for url in requests if not url.startswith("data:")} == {address}


@pytest.mark.skipif(not AXE.is_file(), reason="axe-core is not installed: make browser")
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
def test_axe_finds_no_fault(open_page: Any, width: int, scheme: str) -> None:
    page = open_page(width, scheme)
    # everything that can be opened is looked at too
    page.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
    page.evaluate(AXE.read_text(encoding="utf-8"))
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
    assert len(found["passes"]) > 20
    faults = [(fault["id"], [node["target"] for node in fault["nodes"]][:3]) for fault in found["violations"]]
    assert faults == []


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
def test_tables_scroll_and_the_page_does_not(open_page: Any, width: int, scheme: str) -> None:
    page = open_page(width, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    overflowing = 0
    for table in page.locator(".table:has(table.sortable)").all():
        region = table.locator(".scroll")
        overflows = region.evaluate("one => one.scrollWidth > one.clientWidth + 1")
        overflowing += overflows
        # the hint stands where there is something to scroll, and nowhere else
        assert table.locator(".hint").is_visible() == overflows
        if overflows:
            first = region.locator("tbody th").first
            before = first.bounding_box()["x"]
            region.evaluate("one => one.scrollLeft = 80")
            assert region.evaluate("one => one.scrollLeft") > 0
            assert first.bounding_box()["x"] == pytest.approx(before, abs=1), "the first column stays"
    assert (overflowing > 0) == (width == 400)


def test_every_control_is_reached_and_seen_by_keyboard(open_page: Any) -> None:
    page = open_page()
    seen = []
    for _ in range(60):
        page.keyboard.press("Tab")
        focused = page.evaluate(
            """() => {
              const one = document.activeElement, style = getComputedStyle(one);
              return [one.tagName, one.type || one.className, style.outlineStyle, parseFloat(style.outlineWidth)];
            }"""
        )
        if focused[0] == "BODY":
            break
        seen.append((focused[0], focused[1]))
        assert focused[2] != "none", focused
        assert focused[3] >= 2, focused
    assert {("SUMMARY", ""), ("BUTTON", "button"), ("INPUT", "radio"), ("DIV", "scroll")} <= set(seen)
    assert {tag for tag, _ in seen} >= {"A"}


def choose_a_column(page: Any) -> None:
    """Show the column of the bootstrap in the first table that has one, by keyboard alone."""
    table = page.locator(".table", has=page.locator("th", has_text="bootstrap")).first
    head = table.locator("th", has_text="bootstrap")
    cells = table.locator("tbody tr").first.locator(":scope > :visible")
    before = cells.count()
    assert head.is_hidden()
    table.locator(".columns summary").press("Enter")
    box = table.get_by_label("bootstrap")
    box.focus()
    page.keyboard.press("Space")
    assert box.is_checked()
    assert head.is_visible()
    assert cells.count() == before + 1
    page.keyboard.press("Space")
    assert head.is_hidden()


def choose_a_figure(page: Any) -> None:
    """Show the second of the figures of costs by an arrow key."""
    chooser = page.locator(".chooser", has=page.locator("legend", has_text="Score against")).first
    figures = chooser.locator("figure")
    assert [figure.is_visible() for figure in figures.all()] == [True, False]
    chooser.locator("input").first.focus()
    page.keyboard.press("ArrowRight")
    assert [figure.is_visible() for figure in figures.all()] == [False, True]


def test_columns_figures_and_order_are_chosen_by_keyboard(open_page: Any) -> None:
    page = open_page()
    choose_a_column(page)
    choose_a_figure(page)
    table = page.locator(".table", has=page.locator("tfoot")).first
    arms = table.locator("tbody th")
    before = arms.all_inner_texts()
    table.locator("thead button").first.press("Enter")
    assert table.locator("thead th").first.get_attribute("aria-sort") == "ascending"
    assert arms.all_inner_texts() == sorted(before) != before
    assert table.locator("tfoot").inner_text().startswith("baseline: ")


def test_without_a_script_everything_but_the_order_works(open_page: Any) -> None:
    page = open_page(width=400, script=False)
    assert page.locator("button").count() == 0, "no button that does nothing"
    choose_a_column(page)
    choose_a_figure(page)
    assert page.locator(".hint").first.is_visible()


def test_paper_has_every_figure(open_page: Any) -> None:
    page = open_page()
    page.emulate_media(media="print")
    assert all(figure.is_visible() for figure in page.locator("figure").all())
