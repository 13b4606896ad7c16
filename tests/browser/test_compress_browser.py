"""The workbench of the Compress page in a real browser: steps ordered by keyboard and by dragging, and the link that remains."""

from __future__ import annotations

import re

import pytest

from tests.browser.waiting import ready

playwright = pytest.importorskip("playwright.sync_api")
expect = playwright.expect
pytestmark = [pytest.mark.browser, pytest.mark.timeout(300)]


def test_two_steps_are_ordered_by_keyboard_and_by_dragging_and_are_a_link(page, server, model):
    page.goto(f"{server.url}/compress?model={model}&profile_tier=rapid")
    ready(page)
    page.get_by_role("button", name="Add a step").click()
    page.get_by_role("button", name="Cast to 16 bits").click()
    rows = page.locator(".step")
    expect(rows).to_have_count(2)
    expect(page.get_by_text("Step 2 will be refused")).to_be_visible()
    rows.nth(1).focus()
    page.keyboard.press("Alt+ArrowUp")
    expect(rows.first).to_contain_text("Cast to 16 bits")
    expect(rows.first).to_be_focused()
    page.wait_for_url(re.compile("recipe=.*cast.*rtn"))
    expect(page.get_by_text("will be refused")).to_have_count(0)
    ready(page)
    box = rows.nth(1).bounding_box()
    rows.first.drag_to(rows.nth(1), target_position={"x": box["width"] / 2, "y": box["height"] - 3})
    expect(rows.first).to_contain_text("Round to nearest")
    page.wait_for_url(re.compile("recipe=.*rtn.*cast"))
    page.get_by_role("button", name="Up", exact=True).click()
    expect(rows.first).to_contain_text("Cast to 16 bits")
    page.wait_for_url(re.compile("recipe=.*cast.*rtn"))
    page.reload()
    ready(page)
    expect(rows.first).to_contain_text("Cast to 16 bits")
    page.locator(".st-key-make_own button").click()
    page.wait_for_url("**group=*")
    expect(page.get_by_role("heading", name=re.compile("Under way|Done"))).to_be_visible()
    expect(page.get_by_text(re.compile("Compress · cast .* rtn"))).to_be_visible()
