"""What only a browser can show on Profile and Devices: clicks on marks, links that bring them back, nothing waits for long."""

from __future__ import annotations

import json
import re
import time

import pytest

from tests.browser.waiting import ready

playwright = pytest.importorskip("playwright.sync_api")
expect = playwright.expect
pytestmark = pytest.mark.browser
CHART = '[class*="st-key-distributions_"] svg.marks'


def drawn(page, where: str) -> None:
    ready(page)
    expect(page.locator(where)).to_be_visible(timeout=30_000)


def test_a_click_on_a_median_opens_its_run_and_the_link_brings_it_back(page, server, measured):
    page.goto(server.url + measured)
    drawn(page, CHART)
    page.locator('[class*="st-key-distributions_"] g.mark-symbol.role-mark path').nth(1).click(force=True)
    page.wait_for_url(re.compile("run="))
    notes = page.get_by_text(re.compile("^Run [0-9a-z]+ · "))
    expect(notes).to_be_visible(timeout=20_000)
    said = notes.inner_text()
    page.goto(page.url)
    drawn(page, CHART)
    expect(page.get_by_text(said)).to_be_visible()
    page.get_by_role("button", name="Clear", exact=True).click()
    expect(page).not_to_have_url(re.compile("run="))


def test_parts_are_links_and_the_trace_is_a_chrome_trace(page, server, measured):
    page.goto(server.url + measured)
    drawn(page, CHART)
    page.get_by_role("radio", name="Where the time goes").or_(
        page.get_by_text("Where the time goes", exact=True)
    ).first.click()
    page.wait_for_url(re.compile("part=where"))
    expect(page.get_by_role("heading", name=re.compile("One step"))).to_be_visible(timeout=20_000)
    ready(page)
    with page.expect_download() as download:
        page.get_by_role("button", name="Chrome trace").click()
    events = json.loads(download.value.path().read_bytes())["traceEvents"]
    assert any(event["ph"] == "X" and event["dur"] > 0 for event in events)


@pytest.mark.parametrize("path", ["profile", "devices?part=record", "devices?variant=named:llama-3-8b"])
def test_a_page_is_light_and_there_at_once(page, server, measured, path):
    """At most 10 000 marks, and nothing of a second visit waits for over two seconds of work."""
    page.goto(f"{server.url}/{path}" if path != "profile" else server.url + measured)
    ready(page)
    expect(page.locator("svg.marks, canvas.marks").first).to_be_visible(timeout=30_000)
    assert page.locator("svg.marks path, svg.marks rect").count() <= 10_000
    began = time.monotonic()
    page.reload()
    expect(page.locator("svg.marks, canvas.marks").first).to_be_visible(timeout=30_000)
    assert time.monotonic() - began < 15, "a browser on a busy machine; the script itself takes half a second"
