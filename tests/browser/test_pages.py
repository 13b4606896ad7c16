"""The pages in a real browser: what AppTest cannot see. Slow parts share one server and one open model."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import psutil
import pytest

from tests.browser.waiting import inspect, ready

playwright = pytest.importorskip("playwright.sync_api")
expect = playwright.expect
pytestmark = [pytest.mark.browser, pytest.mark.timeout(400)]

AXE = Path(__file__).parent / "vendor" / "axe.min.js"
STREAMLITS_OWN = {"svg-img-alt", "empty-table-header", "presentation-role-conflict", "list", "listitem"}
"""axe rules that Streamlit itself breaks (measured on pages without anything of ours)."""
HOSTILE = "<img src=x onerror=window.__owned=1> ![x](http://evil.example/x.png) :red[x] $x$"


def test_first_page_and_navigation(page, server):
    page.goto(server.url)
    ready(page)
    expect(page.get_by_role("heading", name="What do you want to look at?")).to_be_visible()
    names = (
        "Home",
        "Model",
        "Formats",
        "Inspect",
        "Compress",
        "Distil",
        "Trade-offs",
        "Profile",
        "Devices",
        "Jobs",
    )
    for name in names:
        expect(page.get_by_role("link", name=name, exact=True)).to_be_visible()


def test_a_click_on_a_cell_opens_its_detail_and_is_a_link(page, server, model):
    inspect(page, server, model)
    page.locator(".st-key-logit_lens_map0_grid .cell").nth(7).click()
    page.wait_for_url("**cell=1*")
    expect(page.get_by_role("heading", name=re.compile("^Layer 1, position"))).to_be_visible()
    ready(page)
    page.reload()
    ready(page)
    expect(page.locator(".cell[aria-selected=true]")).to_have_count(1)


def test_the_keyboard_walks_the_grid(page, server, model):
    inspect(page, server, model)
    page.locator(".cell").first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    page.wait_for_url("**cell=1*1*")


def test_a_click_on_a_head_shows_its_pattern(page, server, model):
    inspect(page, server, model, probe="attention_pattern")
    canvas = page.locator(".st-key-attention_pattern_choice0_canvas canvas")
    box = canvas.bounding_box()
    canvas.click(position={"x": 5, "y": box["height"] * 0.5})  # the second of three layers
    page.wait_for_url(re.compile("attention_pattern_layer=1"))
    expect(page.get_by_role("heading", name="Layer 1, head 0", exact=True)).to_be_visible()


def test_a_token_picks_its_column(page, server, model):
    inspect(page, server, model)
    page.locator(".tok").nth(2).click()
    page.wait_for_url("**cell=*")
    expect(page.get_by_role("heading", name=re.compile("position 2"))).to_be_visible()


def test_the_choice_of_probe_survives_a_change_of_page(page, server, model):
    inspect(page, server, model, probe="residual_norms")
    page.get_by_role("link", name="Model", exact=True).click()
    expect(page.get_by_role("heading", name="Where the bytes are")).to_be_visible(timeout=60_000)
    page.get_by_role("link", name="Inspect", exact=True).click()
    expect(page.get_by_role("heading", name=re.compile("Residual norms of"))).to_be_visible(timeout=60_000)
    page.wait_for_url("**probe=residual_norms*")


def test_hostile_text_stays_text_and_asks_nobody(page, server, model):
    """The `page` fixture fails on any request to another machine."""
    inspect(page, server, model, text=HOSTILE, cell="1~1")
    page.get_by_role("button", name="Reproduce").click()
    expect(page.get_by_text("On the command line")).to_be_visible()
    for probe in ("token_surprisal", "attention_pattern"):
        inspect(page, server, model, text=HOSTILE, probe=probe)
        expect(page.locator(".tok").first).to_be_visible(timeout=120_000)
        assert "<" in "".join(page.locator(".tok").all_text_contents())
    page.goto(f"{server.url}/model?model={HOSTILE.replace(' ', '%20')}")
    ready(page)
    assert page.evaluate("window.__owned") is None
    assert page.locator("img[src='x'], img[src*='evil']").count() == 0


def test_a_killed_inspector_is_an_error_card_and_a_new_try(page, server, model):
    inspect(page, server, model)
    child = next(
        process
        for process in psutil.Process(server.pid).children(recursive=True)
        if "core.inspector.child" in process.cmdline()
    )
    child.suspend()
    box = page.get_by_role("textbox", name="Prompt")
    box.fill("a new text that is not yet answered")
    box.press("Control+Enter")
    expect(page.get_by_test_id("stProgress")).to_be_visible(timeout=10_000)
    child.kill()
    expect(page.get_by_text("The inspector stopped")).to_be_visible(timeout=20_000)
    page.get_by_role("button", name="Try again").click()
    expect(page.locator(".cell").first).to_be_visible(timeout=120_000)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_of_ours(page, server, model, tradeoffs, measured, scheme):
    page.emulate_media(color_scheme=scheme)
    found = {}
    for path in (
        "/",
        f"/model?model={model}",
        "/formats?number=0.1&format=mxfp4",
        f"/inspect?model={model}&text=one+two&cell=1~1",
        f"/compress?model={model}",
        tradeoffs.removeprefix(server.url),
        *(f"{measured}&part={part}" for part in ("results", "race", "where", "measure")),
        *(f"/devices?part={part}" for part in ("fits", "registry", "record", "own", "import")),
        "/jobs",
    ):
        page.goto(server.url + path)
        ready(page)
        # Through the driver, not as a <script> tag: the page's policy would refuse that, as it should.
        page.evaluate(AXE.read_text(encoding="utf-8"))
        report = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
        found |= {
            f"{path[:60]} {violation['id']}": [node["target"] for node in violation["nodes"]]
            for violation in report["violations"]
            if violation["id"] not in STREAMLITS_OWN
        }
    assert not found, json.dumps(found, indent=1)


def test_the_dashboard_stays_light(page, fresh_server, model):
    """After every page was drawn and a probe was used: no torch in the process, and it rests below 250 MB.

    In a dashboard of its own: Streamlit keeps the sessions of other tests, and what they drew, for minutes.
    """
    for name in ("", "model", "compress", "tradeoffs", "profile", "devices", "jobs"):
        page.goto(f"{fresh_server.url}/{name}?model={model}")
        ready(page)
    inspect(page, fresh_server, model)
    process = psutil.Process(fresh_server.pid)
    assert not [m.path for m in process.memory_maps() if "libtorch" in m.path]
    ends = time.monotonic() + 30  # memory goes back to the system every few seconds
    while process.memory_info().rss >= 250e6 and time.monotonic() < ends:
        time.sleep(1)
    assert process.memory_info().rss < 250e6, f"{process.memory_info().rss / 1e6:.0f} MB"
