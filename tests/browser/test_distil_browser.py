"""The Distil page in a real browser: who teaches whom by pointer and keyboard, and the recipe that follows."""

from __future__ import annotations

import re

import pytest

from tests.browser.waiting import ready

playwright = pytest.importorskip("playwright.sync_api")
expect = playwright.expect
pytestmark = [pytest.mark.browser, pytest.mark.timeout(300)]


def test_blocks_are_kept_and_dropped_by_click_and_keyboard_and_are_a_link(page, server, model):
    page.goto(f"{server.url}/distil?model={model}&profile_tier=rapid")
    expect(page.get_by_role("button", name="Train the student")).to_be_visible(timeout=180_000)
    ready(page)
    teacher = page.get_by_role("group", name=re.compile("Teacher with 3 blocks")).get_by_role("checkbox")
    expect(teacher).to_have_count(3)
    expect(page.locator("[role=checkbox][aria-checked=false]")).to_have_count(1)
    teacher.nth(2).hover()
    expect(page.get_by_text(re.compile("^Teacher block 2: .* parameters"))).to_be_visible()
    teacher.nth(2).click()
    page.wait_for_url(re.compile("recipe=.*listed.*distil"))
    expect(page.get_by_role("group", name="Teacher with 3 blocks, student with 1")).to_be_visible()
    ready(page)
    teacher.nth(1).focus()
    page.keyboard.press("Space")
    expect(page.get_by_role("group", name="Teacher with 3 blocks, student with 2")).to_be_visible()
    ready(page)
    page.get_by_role("link", name="Edit as recipe").click()
    expect(page.locator(".step")).to_have_count(2, timeout=60_000)
    expect(page.locator(".step").nth(1)).to_contain_text("Distil")
