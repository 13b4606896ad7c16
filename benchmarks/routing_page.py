"""How quick the Routing page is at 48 layers of 128 experts, in a real browser: ``python -m benchmarks.routing_page``.

Builds a random OLMoE of that shape (narrow, so that opening it is not what is measured), opens it in a dashboard of
its own, and times until the load of all 6,144 experts is drawn: a change of page to Routing, and a cold tab. What the
page needs was counted before, as it is when one comes back to it. Budget: 1.5 s. One JSON line ends the output.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

from benchmarks.tradeoffs_page import AT_REST, FLAGS, fresh, server
from core.lazy import torch, transformers
from core.models.demo import demo_files

LAYERS, EXPERTS = 48, 128
DRAWN = """() => document.querySelector('[data-testid="stApp"]')?.dataset.testScriptState === 'notRunning'
  && [...document.querySelectorAll('*')].some((node) => node.shadowRoot?.querySelector('canvas[role="img"]'))"""


def build(folder: Path) -> Path:
    """A random mixture of experts of that shape, with the tokenizer of the demo."""
    torch.manual_seed(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(demo_files("moe"))
    config = transformers.OlmoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=8,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=EXPERTS,
        num_experts_per_tok=8,
        max_position_embeddings=512,
    )
    transformers.OlmoeForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def change_of_page(page: Page) -> float:
    """Seconds from a click in the navigation to the drawn map; leaves the page again."""
    started = time.perf_counter()
    page.get_by_role("link", name="Routing", exact=True).click()
    page.wait_for_function(DRAWN, timeout=60_000)
    took = time.perf_counter() - started
    page.get_by_role("link", name="Jobs", exact=True).click()
    page.wait_for_function(AT_REST, timeout=60_000)
    page.wait_for_timeout(500)
    return took


def main() -> None:
    """Build, open, time, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        model = build(Path(home) / "model")
        with server(Path(home)) as (url, _), sync_playwright() as driver:
            browser = driver.chromium.launch(
                executable_path=os.environ.get("CHROMIUM", "/usr/bin/chromium"), args=FLAGS
            )
            address = f"{url}/routing?model={model}"
            first = fresh(browser)
            first.goto(address)
            first.wait_for_function(DRAWN, timeout=300_000)
            changes = [change_of_page(first) for _ in range(args.samples)]
            cold = []
            for _ in range(args.samples):
                page = fresh(browser)
                started = time.perf_counter()
                page.goto(address, wait_until="commit")
                page.wait_for_function(DRAWN, timeout=60_000)
                cold.append(time.perf_counter() - started)
                page.context.close()
            browser.close()
    print(f"{LAYERS} layers × {EXPERTS} experts = {LAYERS * EXPERTS:,} cells")
    print("change of page", *(f"{took:.2f}" for took in changes), "s")
    print("cold tab      ", *(f"{took:.2f}" for took in cold), "s")
    report = {"page_s": statistics.median(changes), "cold_tab_s": statistics.median(cold)}
    report |= {"load_1_min": os.getloadavg()[0], "cores": os.cpu_count()}
    print(json.dumps({name: round(value, 3) for name, value in report.items()}))


if __name__ == "__main__":
    main()
