"""Patching on a CUDA device gives the CPU's numbers, in batches that fit whatever memory is free."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from core.models.open import open_model
from core.probes import _batching
from core.registry import get
from core.types import ModelRef, Prompt, silent
from tests.tiny import tiny_folder, tiny_model

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
CLEAN = "a b c d e f g h i j k l m n o p q r"
PAIR = {"corrupted": "a b c d X f g h i j k l m n o p q X", "target": "a", "distractor": "z"}
CASES = [
    ("activation_patching", {}),
    ("activation_patching", {"node": "head"}),
    ("activation_patching", {"node": "k"}),
    ("attribution_patching", {"node": "mlp_out"}),
    ("path_patching", {"receiver": "q", "receiver_layer": 2, "receiver_head": 1}),
]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "qwen3_moe"])
@pytest.mark.parametrize(("id_", "settings"), CASES)
def test_equal_to_the_cpu(id_: str, settings: dict[str, object], family: str, tmp_path: Path) -> None:
    method = get("probe", id_)
    parsed = method.parse({**PAIR, **settings})
    there = open_model(ModelRef(str(tiny_folder(family, tmp_path)), device="cuda"))
    found = method.run(there, Prompt(CLEAN), silent, parsed)
    expected = method.run(tiny_model(family), Prompt(CLEAN), silent, parsed)
    assert found.provenance.device.startswith("cuda")
    assert found.provenance.exactness_gap < 1e-4
    ours, theirs = (result.frames["main"]["effect"].to_numpy() for result in (found, expected))
    assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-3)


def test_a_batch_that_is_too_large_for_the_device_is_halved_and_every_piece_runs() -> None:
    free, _ = torch.cuda.mem_get_info()
    each = free // 8
    seen: list[int] = []

    def run(start: int, stop: int) -> int:
        held = torch.empty((stop - start) * each, dtype=torch.uint8, device="cuda")
        seen.extend(range(start, stop))
        return held.numel()

    sizes = _batching.in_batches(20, run, bytes_each=1, device="cuda")  # an estimate that is far too low
    assert seen == list(range(20))
    assert sum(sizes) == 20 * each
    assert len(sizes) > 2
