"""Roofs with round numbers, for answers that can be worked out by hand."""

from __future__ import annotations

import json
from typing import Any

from core.profile import machine
from core.profile.environment import environment
from core.profile.machine import Roofs

BANDWIDTH, FLOAT32, BFLOAT16, INT8 = 1e10, 1e11, 2e11, 4e11
LAYER_S, STEP_S = 1e-4, 2e-4


def said(*, flags: tuple[str, ...] = ()) -> dict[str, Any]:
    """What the measuring process would say of such a machine."""
    rates = (("float32", FLOAT32), ("bfloat16", BFLOAT16), ("int8", INT8))
    rows = [
        ("read_bandwidth", "", 64, 1, BANDWIDTH / 2, BANDWIDTH / 3, 9, "bytes/s", "amax"),
        ("read_bandwidth", "", 64, 2, BANDWIDTH, BANDWIDTH / 2, 9, "bytes/s", "amax"),
        ("copy_bandwidth", "", 64, 2, 2 * BANDWIDTH, BANDWIDTH, 9, "bytes/s", "copy"),
        *(("matrix_rate", dtype, 512, 2, rate, rate / 2, 9, "FLOP/s", "matmul") for dtype, rate in rates),
        *(("matrix_rate", dtype, 256, 2, rate / 4, rate / 8, 9, "FLOP/s", "matmul") for dtype, rate in rates),
        ("layer_overhead", "", 10, 1, LAYER_S, LAYER_S, 9, "s", "Llama"),
        ("step_overhead", "", 10, 1, STEP_S, STEP_S, 9, "s", "Llama"),
    ]
    return {
        "device": "cpu",
        "environment": environment("cpu")["hash"],
        "taken_at": "2026-11-24T00:00:00+00:00",
        "rows": rows,
        "other_cpu": 0.0,
        "flags": list(flags),
    }


def hand_roofs() -> Roofs:
    """10 GB/s; 100, 200 and 400 GFLOP/s in float32, bfloat16 and int8; 0.1 ms a layer and 0.2 ms a step."""
    return machine._roofs(said())


def keep(*, flags: tuple[str, ...] = ()) -> None:
    """Put them where this machine's kept roofs lie."""
    machine._file("cpu").write_text(json.dumps(said(flags=flags)))
