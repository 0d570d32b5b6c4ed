"""The pages in a real browser: clicks, keys, contrast, phone width, light and dark, without JavaScript.

With `VOUCH_SCREENSHOTS=FOLDER` in the environment every page is kept there as a picture, to be looked at.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("playwright", reason="no playwright here")
pytest.importorskip("axe_playwright_python", reason="no axe here")

import uvicorn
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright
from small_runs import small_run
from test_pages import EVIL, write_comparison

from vouch.data.world import WorldConfig, build
from vouch.service.app import create_app
from vouch.service.config import ServiceConfig

DESKTOP = {"width": 1280, "height": 900}
PHONE = {"width": 390, "height": 844}
PLACES = {
    "shop": "/shop?with=3&with=9",
    "item": "/items/3",
    "compare": "/compare",
    "claims": "/claims",
    "claim": "/claims/remi",
    "card": "/card",
    "sign-in": "/sign-in",
    "nothing": "/items/nobody",
}
SHOTS = os.environ.get("VOUCH_SCREENSHOTS")
RULES = {"runOnly": {"type": "tag", "values": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]}}
CONTRAST = {"runOnly": {"type": "rule", "values": ["color-contrast"]}}


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where a service over a small world answers, with a comparison beside its run."""
    root = tmp_path_factory.mktemp("browser")
    world = build(WorldConfig(users=80, items=80, events=1500))
    small_run(root / "best", "itemknn", world.dataset)
    write_comparison(root / "compare")
    app = create_app(ServiceConfig(run=root / "best", requests_per_second=0))
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_config=None))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until = time.monotonic() + 30
    while not server.started:
        assert thread.is_alive() and time.monotonic() < until, "the service did not start"
        time.sleep(0.02)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(20)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """A headless Chromium of the distribution."""
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("there is no Chromium on the path: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


class Visit:
    """A visitor whose browser must not complain, run what was typed, or ask anybody else for anything."""

    def __init__(self, browser: Browser, address: str, **settings: Any) -> None:
        self.address = address
        self.context: BrowserContext = browser.new_context(base_url=address, **{"viewport": DESKTOP, **settings})
        self.context.set_default_timeout(15_000)
        self.page: Page = self.context.new_page()
        self.complaints: list[str] = []
        self.page.on("console", lambda message: message.type in ("error", "warning") and self.complain(message.text))
        self.page.on("pageerror", lambda error: self.complain(str(error)))
        self.page.on("dialog", lambda dialog: self.complain(f"a dialog: {dialog.message}"))
        self.page.on("request", lambda sent: sent.url.startswith((address, "data:")) or self.complain(sent.url))

    def complain(self, text: str) -> None:
        if "status of 4" not in text and "Error Code 4" not in text:  # the words for a page that tells of an error
            self.complaints.append(text)

    def go(self, path: str) -> Page:
        self.page.goto(path)
        if path == "/compare" and self.page.evaluate("typeof Plotly") != "undefined":
            self.page.wait_for_selector("#plots[data-drawn]")
        return self.page

    def items(self) -> list[str]:
        """The items recommended."""
        return self.page.eval_on_selector_all("#seen input", "all => all.map(each => each.value)")

    def after(self, act: Any) -> list[str]:
        """The items recommended after the window was changed by something."""
        before = self.page.locator("#window").element_handle()
        act()
        assert before is not None
        self.page.wait_for_function("old => !old.isConnected", arg=before)
        self.page.wait_for_selector("#seen", state="attached")
        return self.items()


@pytest.fixture
def visit(chromium: Browser, address: str) -> Iterator[Any]:
    """A function that lets a visitor in; at the end no browser may have complained."""
    with contextlib.ExitStack() as stack:

        def begin(**settings: Any) -> Visit:
            visitor = Visit(chromium, address, **settings)
            stack.callback(visitor.context.close)
            visitors.append(visitor)
            return visitor

        visitors: list[Visit] = []
        yield begin
        for visitor in visitors:
            assert visitor.complaints == []


# Every page ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_page_meets_wcag_aa(visit: Any, scheme: str) -> None:
    """Contrast, labels, names, order, by axe; in the dark only the contrast is another."""
    visitor = visit(color_scheme=scheme)
    for name, path in PLACES.items():
        page = visitor.go(path)
        found = Axe().run(page, options=RULES if scheme == "light" else CONTRAST)
        assert found.violations_count == 0, found.generate_report()
        assert any(rule["id"] == "color-contrast" for rule in found.response["passes"])
        if SHOTS:
            for size in (DESKTOP, PHONE):
                page.set_viewport_size(size)
                page.screenshot(path=Path(SHOTS) / f"{name}-{scheme}-{size['width']}.png", full_page=True)
            page.set_viewport_size(DESKTOP)


def test_phones_need_no_sideways_scrolling(visit: Any) -> None:
    visitor = visit(viewport=PHONE)
    for path in PLACES.values():
        page = visitor.go(path)
        for width in (390, 320):
            page.set_viewport_size({"width": width, "height": 800})
            # Plots are drawn anew a moment after the width changed.
            page.wait_for_function("width => document.documentElement.scrollWidth <= width", arg=width)


def test_dark_is_dark_and_light_is_light(visit: Any) -> None:
    seen = {}
    for scheme in ("light", "dark"):
        page = visit(color_scheme=scheme).go("/card")
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        seen[scheme] = sum(int(part) for part in colour.strip("rgb()").split(","))
    assert seen["light"] > 700 and seen["dark"] < 120


# The shop window ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scripts", [True, False])
def test_clicking_items_together(visit: Any, scripts: bool) -> None:
    """With htmx the part changes in place; without JavaScript the same links lead to whole pages."""
    visitor = visit(java_script_enabled=scripts)
    page = visitor.go("/shop")
    expect(page.get_by_role("heading", name="Popular with everybody")).to_be_visible()
    expect(page.locator(".card")).to_have_count(12)
    first = page.locator(".card h3").first.inner_text()
    page.get_by_role("link", name=f"Add {first}", exact=True).click()
    expect(page.locator(".history li")).to_have_count(1)
    expect(page.get_by_role("heading", name="Recommended for this history")).to_be_visible()
    expect(page.locator("section.goods .card h3", has_text=first)).to_have_count(0)
    expect(page.locator(".because").first).to_contain_text("because of")
    assert "seen=" not in page.url and page.url.count("with=") == 1
    if scripts:
        expect(page.get_by_role("status")).to_contain_text("of them new")
        expect(page.locator(".flag").first).to_be_visible()

    page.locator(".acts .button:not(.quiet)").first.click()
    expect(page.locator(".history li")).to_have_count(2)
    refused = page.locator(".card h3").nth(1).inner_text()
    page.get_by_role("link", name=f"Not {refused}", exact=True).click()
    expect(page.get_by_role("heading", name="Turned down")).to_be_visible()
    expect(page.locator("section.goods .card h3", has_text=refused)).to_have_count(0)

    page.go_back()
    expect(page.get_by_role("heading", name="Turned down")).to_have_count(0)
    expect(page.locator(".history li")).to_have_count(2)
    page.get_by_role("link", name=f"Remove {first}", exact=True).click()
    expect(page.locator(".history li")).to_have_count(1)


@pytest.mark.parametrize("scripts", [True, False])
def test_feedback_of_a_user(visit: Any, scripts: bool) -> None:
    visitor = visit(java_script_enabled=scripts)
    page = visitor.go("/shop")
    page.get_by_label("User id").fill(f"somebody {scripts}")
    page.get_by_role("button", name="Go").click()
    expect(page.get_by_role("heading", name=f"User somebody {scripts}", exact=True)).to_be_visible()
    assert "somebody" not in page.url
    expect(page.get_by_text("not in the log")).to_be_visible()
    liked = page.locator(".card h3").first.inner_text()
    page.get_by_role("button", name=f"Like {liked}", exact=True).click()
    expect(page.locator(".history li", has_text=liked)).to_be_visible()
    expect(page.get_by_role("heading", name=f"Recommended for user somebody {scripts}")).to_be_visible()
    refused = page.locator(".card h3").first.inner_text()
    page.get_by_role("button", name=f"Not {refused}", exact=True).click()
    expect(page.get_by_role("heading", name="Hidden", exact=True)).to_be_visible()
    expect(page.locator(".card h3", has_text=refused)).to_have_count(0)
    if scripts:
        expect(page.get_by_role("status")).to_contain_text("is hidden from now on. 12 recommendations")
    page.get_by_role("button", name="Forget what was stored").click()
    expect(page.get_by_text("not in the log")).to_be_visible()


def test_searching_and_narrowing_down(visit: Any) -> None:
    visitor = visit()
    page = visitor.go("/shop?with=3")
    page.get_by_label("Find an item").fill("lamp")
    page.get_by_label("Only category").select_option("lamp")
    page.get_by_label("Price up to").fill("70")
    visitor.after(page.get_by_role("button", name="Show").click)
    expect(page.get_by_role("heading", name="Found for “lamp”")).to_be_visible()
    assert "label=lamp" in page.url and "with=3" in page.url
    details = page.locator("section.goods > .cards >> nth=1").locator(".detail").all_inner_texts()
    assert details and all("lamp" in each for each in details)


def test_reasons_unfold_in_the_card(visit: Any) -> None:
    visitor = visit()
    page = visitor.go("/shop?with=3&with=9")
    at = page.url
    page.get_by_role("link", name="Why").first.click()
    opened = page.locator("#why-1")
    expect(opened).to_contain_text("standing falls most without")
    expect(opened.locator(".bar").first).to_be_visible()
    assert page.url == at
    opened.get_by_role("button", name="Close").press("Enter")
    expect(opened).to_be_empty()
    assert "Why" in page.evaluate("document.activeElement.getAttribute('aria-label')")


def test_reasons_have_a_page_of_their_own_without_scripts(visit: Any) -> None:
    page = visit(java_script_enabled=False).go("/shop?with=3&with=9")
    page.get_by_role("link", name="Why").first.click()
    expect(page.get_by_role("heading", level=1)).to_contain_text("Why")
    page.get_by_role("link", name="Back to the shop window").click()
    expect(page.locator(".history li")).to_have_count(2)


def test_an_error_is_told_where_one_is(visit: Any) -> None:
    visitor = visit()
    page = visitor.go("/shop?with=3")
    page.get_by_label("Price up to").fill("cheap")
    page.get_by_role("button", name="Show").click()
    expect(page.get_by_role("alert")).to_contain_text("is no number")
    expect(page.locator(".card")).to_have_count(12)  # what was there stays
    page.get_by_label("Price up to").fill("90")
    visitor.after(page.get_by_role("button", name="Show").click)
    expect(page.get_by_role("alert")).to_be_empty()


def test_a_service_that_is_gone_is_told(visit: Any) -> None:
    visitor = visit()
    page = visitor.go("/shop?with=3")
    page.route("**/shop?*", lambda route: route.abort())
    page.locator(".acts .button").first.click()
    expect(page.get_by_role("alert")).to_contain_text("cannot be reached")
    visitor.complaints.clear()  # the browser's own word for it


@pytest.mark.parametrize("evil", EVIL)
def test_nothing_typed_runs(visit: Any, evil: str) -> None:
    """`visit` fails on dialogs, on errors, and on anything that the policy had to stop."""
    visitor = visit()
    page = visitor.go("/shop")
    page.get_by_label("Find an item").fill(evil)
    visitor.after(page.get_by_role("button", name="Show").click)
    expect(page.get_by_role("heading", name="Found for")).to_contain_text(evil.strip())
    page.get_by_label("User id").fill(evil)
    visitor.after(page.get_by_role("button", name="Go").click)
    expect(page.locator("#whose")).to_have_text(f"User {evil}")
    visitor.after(page.get_by_role("button", name="Like").first.click)
    page.reload()
    expect(page.locator("#whose")).to_have_text(f"User {evil}")


# By keyboard --------------------------------------------------------------------------------------------------------


def test_the_shop_window_by_keyboard(visit: Any) -> None:
    visitor = visit()
    page = visitor.go("/shop")

    def focused() -> dict[str, Any]:
        return page.evaluate(
            """() => { const at = document.activeElement, look = getComputedStyle(at), box = at.getBoundingClientRect();
            return { name: at.getAttribute("aria-label") || at.innerText || at.id, outline: look.outlineStyle,
                     width: parseFloat(look.outlineWidth), y: box.y, tag: at.tagName } }"""
        )

    page.keyboard.press("Tab")
    assert focused()["name"] == "Skip to the content" and focused()["y"] >= 0
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    reached = []
    for _ in range(12):
        page.keyboard.press("Tab")
        at = focused()
        assert at["outline"] == "solid" and at["width"] >= 2, at
        reached.append(at["name"])
        if at["name"].startswith("Add "):
            break
    assert reached[-1].startswith("Add "), reached
    visitor.after(lambda: page.keyboard.press("Enter"))
    expect(page.locator(".history li")).to_have_count(1)
    # The focus is not lost: the next stop lies in what was recommended.
    page.wait_for_function("document.activeElement !== document.body")
    page.keyboard.press("Tab")
    assert page.evaluate("document.querySelector('section.goods').contains(document.activeElement)")


def test_what_scrolls_can_be_reached_by_keyboard(visit: Any) -> None:
    page = visit(viewport=PHONE).go("/compare")
    inside = page.eval_on_selector_all(
        ".scroll", "all => all.map(each => [each.tabIndex, each.getAttribute('aria-label')])"
    )
    assert inside and all(index == 0 and label for index, label in inside)


# Evidence -----------------------------------------------------------------------------------------------------------


def test_the_plots_are_drawn_and_answer(visit: Any) -> None:
    visitor = visit()
    page = visitor.go("/compare")
    for plot in ("quality", "against", "trade"):
        assert page.locator(f"#{plot} .main-svg").first.is_visible()
        assert page.locator(f"#{plot} .points path").count() >= 1
    expect(page.locator("#quality")).to_contain_text("NDCG@10")
    page.get_by_label("Metric", exact=True).select_option("Coverage@10")
    expect(page.locator("#quality")).to_contain_text("Coverage@10")
    page.get_by_label("Cost", exact=True).select_option("latency_p50_ms")
    expect(page.locator("#trade")).to_contain_text("median latency")
    page.locator("#trade").scroll_into_view_if_needed()
    box = page.locator("#trade .points path").first.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    expect(page.locator("#trade .hoverlayer")).to_contain_text("median latency, ms 0.2500")
    ink = page.evaluate("getComputedStyle(document.querySelector('#quality .xtitle')).fill")
    page.emulate_media(color_scheme="dark")
    page.wait_for_function("ink => getComputedStyle(document.querySelector('#quality .xtitle')).fill !== ink", arg=ink)


def test_names_in_plots_are_text(visit: Any, address: str) -> None:
    """Plotly reads a little markup in its texts; names must not be taken for it."""
    import json

    made = {
        "headline": "NDCG@10", "metrics": ["NDCG@10"], "costs": {"fit_seconds": "seconds"}, "best": "a", "groups": [],
        "methods": [
            {"slug": slug, "name": f"<b>{slug}</b>{EVIL[1]}", "metrics": {"NDCG@10": 0.2}, "intervals": {"NDCG@10": [0.1, 0.3]},
             "cost": {"fit_seconds": 1}, "seeds": [], "against": None} for slug in "ab"
        ],
    }  # fmt: skip
    visitor = visit()
    visitor.page.route(
        "**/compare/data*", lambda route: route.fulfill(body=json.dumps(made), content_type="application/json")
    )
    page = visitor.go("/compare")
    assert "<b>a</b>" in page.locator("#quality .yaxislayer-above").text_content()
    assert page.locator(".plot img, .plot image").count() == 0


def test_the_tables_have_the_plots_numbers_without_scripts(visit: Any) -> None:
    page = visit(java_script_enabled=False).go("/compare")
    expect(page.get_by_text("The plots need JavaScript")).to_be_visible()
    expect(page.get_by_role("row", name="Best of all").first).to_contain_text("0.2345")


@pytest.mark.parametrize("scripts", [True, False])
def test_the_board_is_searched(visit: Any, scripts: bool) -> None:
    page = visit(java_script_enabled=scripts).go("/claims")
    expect(page.locator(".board > li")).to_have_count(46)
    page.get_by_label("Words").fill("remi")
    if not scripts:
        page.get_by_role("button", name="Show").click()
    expect(page.locator(".board > li")).to_have_count(1)
    expect(page.get_by_role("status")).to_contain_text("1 of 46 systems.")
    page.locator(".board h2 a").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("REMI")
    page.get_by_text("The ledger entry").first.click()
    expect(page.get_by_text("vouch claims run remi --scale desk").first).to_be_visible()


def test_the_run_card_is_measured(visit: Any) -> None:
    page = visit().go("/card")
    button = page.get_by_role("button", name="Measure it now")
    if button.count():
        button.click()
    expect(page.get_by_role("region", name="Metrics on the test part")).to_be_visible()
    expect(page.get_by_role("region", name="NDCG@10 by history length")).to_be_visible()
    for width in (390, 320):  # with all its tables, on a phone
        page.set_viewport_size({"width": width, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.set_viewport_size(DESKTOP)
    assert Axe().run(page, options=RULES).violations_count == 0
