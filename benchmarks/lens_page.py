"""How quick a warm logit lens is in a real browser: ``python -m benchmarks.lens_page``.

Opens SmolLM2 in a dashboard of its own, then types prompts of 64 tokens that were never asked before, and times
each from Ctrl+Enter until the grid of the new prompt stands on the page. The page says itself how long the probe
took inside the inspector; the rest is the page's. Budget: 1.5 s. One JSON line ends the output.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import tempfile
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

from benchmarks.tradeoffs_page import FLAGS, server

FIRST_WORDS = ("Paris", "London", "When", "While", "After", "Before", "Since", "Because", "Though", "Until")
"""Each one token, so that the first column of the grid names the prompt."""
REST = (
    " it was the name of a city that many people know, and it has been"
    + " the same one every single day" * 7
    + " and every single night"
)


_WATCH = """(word) => {
  const heads = () => [...document.querySelectorAll("*")].flatMap((node) =>
    node.shadowRoot ? [...node.shadowRoot.querySelectorAll(".head.top")] : []);
  const stands = () => heads().some((head) => head.textContent.includes(word));
  window.lensSeconds = new Promise((resolve) => {
    const onKey = (event) => {
      if (event.key !== "Enter") return;
      window.removeEventListener("keydown", onKey, true);
      const pressed = performance.now();
      const look = () => stands()
        ? requestAnimationFrame(() => resolve((performance.now() - pressed) / 1000))
        : setTimeout(look, 25);
      setTimeout(look, 500);
    };
    window.addEventListener("keydown", onKey, true);
  });
}"""
"""A stopwatch inside the page: Playwright looks only every half second by then, which once read as a bimodal 0.4 s."""


def ask(page: Page, word: str) -> tuple[float, float, int]:
    """Seconds from the key to the frame that shows the answer, seconds in the inspector, tokens of the prompt."""
    box = page.get_by_role("textbox", name="Prompt")
    box.fill(word + REST)
    page.wait_for_timeout(500)
    page.evaluate(_WATCH, word)
    box.press("Control+Enter")
    took = float(page.evaluate("window.lensSeconds"))
    page.wait_for_timeout(1000)
    line = page.get_by_text(re.compile(r"exactness gap .* · ")).last.inner_text()
    value, unit = re.findall(r"([\d.]+) (ms|s)\b", line)[-1]
    return took, float(value) / (1000 if unit == "ms" else 1), page.locator(".head.top:not(.corner)").count()


def main() -> None:
    """Open, ask, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo:smollm2")
    parser.add_argument("--samples", type=int, default=6)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as home, server(Path(home)) as (url, _), sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=os.environ.get("CHROMIUM", "/usr/bin/chromium"), args=FLAGS
        )
        page = browser.new_page(viewport={"width": 1440, "height": 900})
        page.goto(f"{url}/inspect?model={args.model}")
        page.locator(".cell").first.wait_for(timeout=300_000)
        ask(page, FIRST_WORDS[0])
        answers = [ask(page, word) for word in FIRST_WORDS[1 : 1 + args.samples]]
        browser.close()
    for took, inside, tokens in answers:
        print(f"{took:.2f} s, {inside:.2f} s of them in the probe, {tokens} tokens")
    took, inside, tokens = (statistics.median(column) for column in zip(*answers, strict=True))
    report = {"lens_s": took, "probe_s": inside, "page_s": took - inside, "tokens": tokens}
    report |= {"load_1_min": os.getloadavg()[0], "cores": os.cpu_count()}
    print(json.dumps({name: round(value, 3) for name, value in report.items()}))


if __name__ == "__main__":
    main()
