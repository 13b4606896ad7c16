"""Minutes of unbroken decoding: what is left of the first minute's pace at the end, and what fell with it.

Phones keep 38–67 % of their burst after ten minutes, so a short measurement is a promise about a cold device. The
``minutes`` frame has one row per started minute: minute, steps, tokens_per_s (median) with low and high, other_cpu,
clock_mhz, temperature_c, joules (NaN where nothing tells). ``steps`` has every step: at_s, value_ms.
"""

from __future__ import annotations

MINUTES = (
    *("minute", "steps", "tokens_per_s", "tokens_per_s_low", "tokens_per_s_high"),
    *("other_cpu", "clock_mhz", "temperature_c", "joules"),
)
STEPS = ("at_s", "value_ms")
