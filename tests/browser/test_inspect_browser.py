"""The bench in a real browser: questions, examples, stored jobs, two models, a picture and its patches."""

from __future__ import annotations

import re
from io import BytesIO

import pytest

from core.catalog.store import Catalog
from core.jobs.plan import submit_probe
from core.jobs.queue import Queue
from core.jobs.supervisor import ensure_supervisor
from core.registry import methods
from core.types import Prompt
from tests.browser.waiting import inspect, ready

playwright = pytest.importorskip("playwright.sync_api")
expect = playwright.expect
pytestmark = [pytest.mark.browser, pytest.mark.timeout(400)]

PATIENCE_MS = 120_000
"""A slow machine takes its time; nothing here waits longer than it must."""


@pytest.fixture(scope="session")
def other(tmp_path_factory) -> str:
    from tests.tiny import tiny_folder

    return str(tiny_folder("llama", tmp_path_factory.mktemp("other"), seed=1))


@pytest.fixture(scope="session")
def vision(tmp_path_factory) -> str:
    from tests.tiny import tiny_folder

    return str(tiny_folder("vit", tmp_path_factory.mktemp("vision")))


def test_a_question_and_an_example_are_a_click_each_and_a_link(page, server, model):
    inspect(page, server, model)
    page.get_by_role("radio", name="Which heads matter?").click()
    page.wait_for_url("**probe=*", timeout=PATIENCE_MS)
    ready(page)
    probe = re.search(r"probe=(\w+)", page.url)[1]
    assert methods("probe")[probe].answers == "Which heads matter?"
    if methods("probe")[probe].examples:
        page.locator(f".st-key-{probe}_example0 button").click()
        text = methods("probe")[probe].examples[0].prompt.text
        expect(page.get_by_role("textbox", name="Prompt")).to_have_value(text, timeout=PATIENCE_MS)
        ready(page)
        page.reload()
        ready(page)
        expect(page.get_by_role("textbox", name="Prompt")).to_have_value(text, timeout=PATIENCE_MS)


def test_two_models_stand_side_by_side_and_a_cell_opens_both(page, server, model, other):
    inspect(page, server, model, compare=other)
    expect(page.get_by_role("heading", name="What changed")).to_be_visible(timeout=PATIENCE_MS)
    ready(page)
    page.locator(".st-key-logit_lens_map0_grid .cell").nth(7).click()
    page.wait_for_url("**cell=1*", timeout=PATIENCE_MS)
    expect(page.get_by_role("heading", name=re.compile("^Layer 1, position"))).to_have_count(
        3, timeout=PATIENCE_MS
    )
    colours = [
        page.locator(f".st-key-{key}_grid .cell").first.evaluate("el => getComputedStyle(el).backgroundColor")
        for key in ("logit_lens_map0", "logit_lens_b_map0")
    ]
    assert all(colours)


def test_a_jobs_result_opens_from_the_queue(page, server, model):
    url = f"sqlite:///{server.home / 'catalog.sqlite'}"
    queue = Queue(Catalog(url))
    settings = methods("probe")["logit_lens"].parse({"top_k": 3}).model_dump(mode="json")
    job = submit_probe(
        queue, model=model, method="logit_lens", prompt=Prompt("a stored text"), settings=settings
    )
    ensure_supervisor(url)
    page.goto(f"{server.url}/jobs?job={job.id}")
    page.get_by_role("link", name="Open the result").click(timeout=300_000)
    expect(page.get_by_text(re.compile("Stored run"))).to_be_visible(timeout=PATIENCE_MS)
    ready(page)
    expect(page.get_by_role("textbox", name="Prompt")).to_have_value("a stored text")
    expect(page.locator(".st-key-logit_lens_map0_grid .cell").first).to_be_visible(timeout=PATIENCE_MS)
    page.get_by_role("button", name="Ask anew").click()
    expect(page.get_by_text(re.compile("Stored run"))).to_have_count(0, timeout=PATIENCE_MS)


def test_a_picture_is_uploaded_drawn_and_its_patches_open_the_drawer(page, server, vision):
    from PIL import Image

    page.goto(f"{server.url}/inspect?model={vision}&probe=attention_rollout&image=digits:3")
    ready(page)
    picture = BytesIO()
    Image.new("RGB", (64, 64), (20, 120, 220)).save(picture, "PNG")
    upload = {"name": "mine.png", "mimeType": "image/png", "buffer": picture.getvalue()}
    page.locator("input[type=file]").set_input_files(upload)
    page.wait_for_url(re.compile(r"image=[0-9a-f]{64}\.png"), timeout=PATIENCE_MS)
    ready(page)
    drawn = page.locator(".image img")
    expect(drawn).to_have_count(1, timeout=PATIENCE_MS)
    assert drawn.evaluate("img => img.complete && img.naturalWidth > 0"), "the policy lets it through"
    page.locator(".patch").nth(1).click()
    page.wait_for_url("**cell=*", timeout=PATIENCE_MS)
    expect(page.locator(".patch[aria-selected=true]")).to_have_count(1, timeout=PATIENCE_MS)
