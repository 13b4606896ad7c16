"""What only a browser can show on Trade-offs: a click on a point, a drag over points, a link that brings both back."""

from __future__ import annotations

import re

import pytest
from playwright.sync_api import Page, expect

pytestmark = pytest.mark.browser
CHART = '[class*="st-key-front_"] svg.marks'


def ready(page: Page) -> None:
    app = page.get_by_test_id("stApp")
    expect(app).to_have_attribute("data-test-script-state", "notRunning", timeout=60_000)
    expect(page.get_by_test_id("stException")).to_have_count(0)
    expect(page.locator(CHART)).to_be_visible(timeout=30_000)


def test_a_click_on_a_point_opens_it_and_the_link_brings_it_back(page, tradeoffs):
    page.goto(tradeoffs)
    ready(page)
    page.locator('[class*="st-key-front_"] g.mark-symbol.role-mark path').nth(-3).click(force=True)
    page.wait_for_url(re.compile("variant="))
    heading = page.get_by_role("heading", name=re.compile("the evidence"))
    expect(heading).to_be_visible(timeout=20_000)
    said = heading.inner_text()
    page.goto(page.url)
    ready(page)
    expect(page.get_by_role("heading", name=said)).to_be_visible()
    page.get_by_role("button", name="Clear", exact=True).click()
    expect(page).not_to_have_url(re.compile("variant="))


def test_a_drag_over_points_chooses_the_rows(page, tradeoffs):
    page.goto(tradeoffs)
    ready(page)
    box = page.locator(CHART).bounding_box()
    page.mouse.move(box["x"] + 0.2 * box["width"], box["y"] + 0.2 * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + 0.6 * box["width"], box["y"] + 0.6 * box["height"], steps=6)
    page.mouse.up()
    page.wait_for_url(re.compile("brush="))
    expect(page.get_by_role("button", name="Clear brush")).to_be_visible(timeout=20_000)
    page.mouse.move(5, 5)
    page.get_by_role("button", name="Clear brush").click()
    expect(page).not_to_have_url(re.compile("brush="))
