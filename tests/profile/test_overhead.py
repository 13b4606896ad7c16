"""What measuring itself costs, and that somebody else's work is told from the model's."""

from __future__ import annotations

import subprocess
import sys

import psutil
import pytest

from core.profile._recorder import Recorder, Steps
from core.profile.runtimes._base import WallClock
from core.profile.runtimes.torch_eager import TorchEagerSettings, run
from core.types import silent
from tests.tiny import tiny_folder

STEP_S = 5e-3
PROTOCOL = TorchEagerSettings(tier="rapid", threads=1).protocol()


def test_taking_a_sample_costs_a_thousandth_of_a_decode_step():
    """Two looks at the clock around a step that does nothing."""
    recorder = Recorder(WallClock(), PROTOCOL, lambda message: None)
    steps = Steps(lambda: None, repeats=32)
    values = recorder.stretch(steps, seconds=0.3, fewest=32).values_ms
    assert sorted(values)[len(values) // 2] <= 1e-3 * STEP_S * 1e3


def burners(seconds: float) -> list[subprocess.Popen[bytes]]:
    """A busy process per core, children of another parent: strangers to the measuring process."""
    code = f"import time\nend = time.time() + {seconds}\nwhile time.time() < end: pass"
    return [subprocess.Popen([sys.executable, "-c", code]) for _ in range(psutil.cpu_count() or 1)]


@pytest.mark.slow
@pytest.mark.rotating
def test_a_process_that_hogs_the_cores_flags_the_run(tmp_path, monkeypatch):
    monkeypatch.setenv("SLIMSCOPE_HOME", str(tmp_path / "home"))
    settings = TorchEagerSettings(tier="rapid", prompt_tokens=16, new_tokens=8, threads=1, parity=False)
    hogs = burners(120)
    try:
        result = run(tiny_folder("llama", tmp_path / "model"), silent, settings)
    finally:
        for hog in hogs:
            hog.kill()
            hog.wait()
    assert {"contention", "load_too_high"} <= set(result.flags)
    assert result.frame["contended"].mean() > 0.5
