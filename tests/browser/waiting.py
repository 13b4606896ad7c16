"""Opening a page and waiting until it stands still."""

from __future__ import annotations

import re
from urllib.parse import urlencode

import pytest

playwright = pytest.importorskip("playwright.sync_api")
expect = playwright.expect


def ready(page) -> None:
    """The script has run, the inspector has answered, and nothing went wrong."""
    app = page.get_by_test_id("stApp")
    expect(page.get_by_test_id("stProgress")).to_have_count(0, timeout=180_000)
    expect(app).to_have_attribute("data-test-script-state", "notRunning", timeout=30_000)
    expect(page.get_by_test_id("stSkeleton")).to_have_count(0, timeout=30_000)
    expect(page.get_by_test_id("stException")).to_have_count(0)


def inspect(page, server, model: str, **query: str) -> None:
    """Open the Inspect page on a short text and wait until the model is open and asked."""
    page.goto(f"{server.url}/inspect?{urlencode({'model': model, 'text': 'one two three one two', **query})}")
    ready(page)
    expect(page.get_by_test_id("stHeading").first).to_be_visible(timeout=120_000)
    expect(page.get_by_role("heading", name=re.compile("^Opening"))).to_have_count(0, timeout=180_000)
    ready(page)
