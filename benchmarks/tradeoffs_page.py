"""How quick Trade-offs is in a real browser on 100 000 runs: ``python -m benchmarks.tradeoffs_page``.

Fills a catalog of its own (25 000 variants, 100 000 runs, 1 000 000 measurements, all invented), starts the real
server on it, and times in Chromium, always until the chart is drawn and the script at rest:

- a cold tab: a new browser profile asks for the address, so four megabytes of Streamlit's scripts are read first;
- the same for the nearly empty Jobs page: what Streamlit itself costs on this machine at this moment;
- a change of page: a click on "Trade-offs" in a dashboard that is open;
- a click on a point or a row, until the detail panel is on the screen.

Prints every sample and the load of the machine; one JSON line ends the output, its ``..._cpu_s`` being the CPU
seconds of server and browser together, which other work on the machine disturbs least. Budgets: first draw 1.5 s,
click to detail 0.4 s.
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import psutil
from playwright.sync_api import Browser, Page, sync_playwright

from benchmarks.catalog import fill
from core.catalog.store import Catalog

FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"]
AT_REST = """() => document.querySelector('[data-testid="stApp"]')?.dataset.testScriptState === 'notRunning'
  && document.querySelector('h1') && !document.querySelector('[class*="st-key-front_"]')"""
POINTS = '[class*="st-key-front_"] g.mark-symbol.role-mark path[aria-roledescription="point"]'
ROW = 35
"""Height of a row of Streamlit's table in pixels."""
DRAWN = """() => document.querySelector('[data-testid="stApp"]')?.dataset.testScriptState === 'notRunning'
  && document.querySelector('[class*="st-key-front_"] canvas, [class*="st-key-front_"] svg.marks')"""
PANEL = """() => document.querySelector('.st-key-clear_variant')
  ?.closest('[data-testid="stHorizontalBlock"]')?.querySelector('h2')?.textContent ?? ''"""
DETAIL = f"before => {{ const now = ({PANEL})(); return now && now !== before; }}"


@contextmanager
def server(home: Path) -> Iterator[tuple[str, psutil.Process]]:
    """The real dashboard on a free port: its address and its process."""
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
        yield url, psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(20)


def fresh(browser: Browser) -> Page:
    """A page of a new session in a new profile."""
    return browser.new_context(viewport={"width": 1440, "height": 1300}).new_page()


def cpu_seconds(server: psutil.Process) -> float:
    """CPU seconds so far of the server and of everything this process started: the driver and the browser."""
    ours = {server, *psutil.Process().children(recursive=True)}
    return sum(sum(process.cpu_times()[:2]) for process in ours)


def cold_tab(page: Page, url: str, drawn: str) -> float:
    """Seconds from the request for an address to a page that is drawn."""
    started = time.perf_counter()
    page.goto(url, wait_until="commit")
    page.wait_for_function(drawn, timeout=60_000)
    return time.perf_counter() - started


def change_of_page(page: Page) -> float:
    """Seconds from a click in the navigation to a drawn chart; leaves the page again."""
    started = time.perf_counter()
    page.get_by_role("link", name="Trade-offs", exact=True).click()
    page.wait_for_function(DRAWN, timeout=60_000)
    took = time.perf_counter() - started
    page.get_by_role("link", name="Jobs", exact=True).click()
    page.wait_for_function(AT_REST, timeout=60_000)
    page.wait_for_timeout(500)
    return took


def to_detail(page: Page, click: Callable[[], None]) -> float:
    """Seconds from a click to another variant's panel."""
    before = page.evaluate(PANEL)
    started = time.perf_counter()
    click()
    page.wait_for_function(DETAIL, arg=before, timeout=15_000)
    took = time.perf_counter() - started
    page.wait_for_function(DRAWN)
    page.wait_for_timeout(500)
    return took


def click_on_points(page: Page, n: int) -> list[float]:
    """Clicks on the last marks: the front, which is drawn on top; once one is picked its ring is the very last."""
    points = page.locator(POINTS)
    last = [-1, *range(-3, -2 - n, -1)]
    return [to_detail(page, partial(points.nth(at).click, force=True)) for at in last]


def click_on_rows(page: Page, n: int) -> list[float]:
    """Clicks into the selection column of the first rows."""
    table = page.locator(".st-key-variants canvas").first
    table.scroll_into_view_if_needed()
    box = table.bounding_box()
    assert box is not None
    x, first = box["x"] + 0.02 * box["width"], box["y"] + 1.5 * ROW
    return [to_detail(page, partial(page.mouse.click, x, first + ROW * i)) for i in range(n)]


def main() -> None:
    """Build, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=100_000)
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument("--home", type=Path, help="a folder to keep the catalog in; filled when it is empty")
    args = parser.parse_args()
    n = args.samples
    with tempfile.TemporaryDirectory() as scratch:
        home = args.home or Path(scratch)
        home.mkdir(parents=True, exist_ok=True)
        file = home / "catalog.sqlite"
        if not file.exists():
            catalog = Catalog(f"sqlite:///{file}")
            fill(catalog, args.runs)
            catalog.close()
        with server(home) as (url, process), sync_playwright() as driver:
            browser = driver.chromium.launch(
                executable_path=os.environ.get("CHROMIUM", "/usr/bin/chromium"), args=FLAGS
            )
            address, samples, cpu = f"{url}/tradeoffs?base=big", {}, {}

            def timed(name: str, takes: Callable[[], list[float]]) -> None:
                before = cpu_seconds(process)
                samples[name] = takes()
                cpu[name] = (cpu_seconds(process) - before) / len(samples[name])

            timed("first_session", lambda: [cold_tab(fresh(browser), address, DRAWN)])
            timed("empty_page", lambda: [cold_tab(fresh(browser), f"{url}/jobs", AT_REST) for _ in range(n)])
            timed("first_draw", lambda: [cold_tab(fresh(browser), address, DRAWN) for _ in range(n)])
            page = fresh(browser)
            cold_tab(page, f"{url}/jobs", AT_REST)
            change_of_page(page)  # reads the chart's scripts once
            timed("change_of_page", lambda: [change_of_page(page) for _ in range(n)])
            cold_tab(page, address, DRAWN)
            page.wait_for_timeout(1500)
            timed("click_on_point", lambda: click_on_points(page, n))
            timed("click_on_row", lambda: click_on_rows(page, n))
            browser.close()
    for name, taken in samples.items():
        print(f"{name:15}", " ".join(f"{sample:.2f}" for sample in taken), f"s  ({cpu[name]:.2f} s CPU each)")
    report = {f"{name}_s": statistics.median(taken) for name, taken in samples.items()}
    report |= {f"{name}_cpu_s": seconds for name, seconds in cpu.items()}
    report |= {"load_1_min": os.getloadavg()[0], "cores": os.cpu_count()}
    print(json.dumps({name: round(value, 3) for name, value in report.items()}))


if __name__ == "__main__":
    main()
