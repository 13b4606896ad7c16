"""How quick Trade-offs is in a real browser on 100 000 runs: ``python benchmarks/tradeoffs_page.py``.

Fills a catalog of its own (25 000 variants, 100 000 runs, 1 000 000 measurements, all invented), starts the real
server on it, and times two things in Chromium: from the request for the page to a drawn chart with the script at
rest (a cold first session, then fresh ones), and from a click on a point or a row to the detail panel on the
screen. Prints every sample; one JSON line ends the output. Budgets: first draw 1.5 s, click to detail 0.4 s.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright
from playwright.sync_api import TimeoutError as NotInTime

from benchmarks.catalog import fill
from core.catalog.store import Catalog

FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"]
DRAWN = """() => document.querySelector('[data-testid="stApp"]')?.dataset.testScriptState === 'notRunning'
  && document.querySelector('[class*="st-key-front_"] canvas, [class*="st-key-front_"] svg.marks')"""
PANEL = """() => document.querySelector('.st-key-clear_variant')
  ?.closest('[data-testid="stHorizontalBlock"]')?.querySelector('h2')?.textContent ?? ''"""
DETAIL = f"before => {{ const now = ({PANEL})(); return now && now !== before; }}"


@contextmanager
def server(home: Path) -> Iterator[str]:
    """The real dashboard on a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "SLIMSCOPE_HOME": str(home), "SLIMSCOPE_CATALOG": ""}
    process = subprocess.Popen(
        [sys.executable, "-m", "app.server", "--port", str(port)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.STDOUT,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(400):
            try:
                urllib.request.urlopen(f"{url}/_stcore/health", timeout=1)
                break
            except OSError:
                time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait(20)


def fresh(browser: Browser) -> Page:
    """A page of a new session."""
    return browser.new_context(viewport={"width": 1440, "height": 1300}).new_page()


def first_draw(page: Page, url: str) -> float:
    """Seconds from the request to a drawn chart."""
    started = time.perf_counter()
    page.goto(f"{url}/tradeoffs?base=big", wait_until="commit")
    page.wait_for_function(DRAWN, timeout=60_000)
    return time.perf_counter() - started


def clicks(page: Page, selector: str, spots: list[tuple[float, float]], *, wanted: int) -> list[float]:
    """Seconds from a click to another variant's panel, for the spots (fractions of the element) that hit one."""
    box = page.locator(selector).first.bounding_box()
    assert box is not None
    samples: list[float] = []
    for across, down in spots:
        before = page.evaluate(PANEL)
        started = time.perf_counter()
        page.mouse.click(box["x"] + across * box["width"], box["y"] + down * box["height"])
        try:
            page.wait_for_function(DETAIL, arg=before, timeout=3000)
        except NotInTime:
            continue  # the spot was empty, or held the point that is picked already
        samples.append(time.perf_counter() - started)
        page.wait_for_function(DRAWN)
        page.wait_for_timeout(500)
        if len(samples) == wanted:
            break
    return samples


def main() -> None:
    """Build, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=100_000)
    parser.add_argument("--samples", type=int, default=6)
    parser.add_argument("--home", type=Path, help="a folder to keep the catalog in; filled when it is empty")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        home = args.home or Path(scratch)
        home.mkdir(parents=True, exist_ok=True)
        file = home / "catalog.sqlite"
        if not file.exists():
            catalog = Catalog(f"sqlite:///{file}")
            fill(catalog, args.runs)
            catalog.close()
        with server(home) as url, sync_playwright() as driver:
            browser = driver.chromium.launch(
                executable_path=os.environ.get("CHROMIUM", "/usr/bin/chromium"), args=FLAGS
            )
            draws = [first_draw(fresh(browser), url) for _ in range(args.samples + 1)]
            page = fresh(browser)
            first_draw(page, url)
            page.wait_for_timeout(1500)
            grid = [(0.3 + 0.05 * i, 0.35 + 0.04 * j) for i in range(10) for j in range(8)]
            on_chart = clicks(
                page,
                '[class*="st-key-front_"] canvas, [class*="st-key-front_"] svg.marks',
                grid,
                wanted=args.samples,
            )
            rows = [(0.02, (i + 1.5) * 35 / 318) for i in range(8)]
            on_table = clicks(page, ".st-key-variants canvas", rows, wanted=args.samples)
            browser.close()
    report = {
        "first_draw_cold_s": draws[0],
        "first_draw_s": statistics.median(draws[1:]),
        "click_on_point_s": statistics.median(on_chart) if on_chart else None,
        "click_on_row_s": statistics.median(on_table) if on_table else None,
    }
    for name, samples in (("first draw", draws), ("point", on_chart), ("row", on_table)):
        print(f"{name:10}", " ".join(f"{sample:.2f}" for sample in samples), "s")
    print(json.dumps({name: value and round(value, 3) for name, value in report.items()}))


if __name__ == "__main__":
    main()
