"""The agent alone: known answers, and that it stays what runs on an old and bare Python."""

from __future__ import annotations

import ast
import io
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from core.devices.agent import calibrate, engines, look, measure
from core.devices.bundle import agent

SOURCES = sorted((Path(__file__).parents[2] / "core" / "devices" / "agent").glob("*.py"))
OPTIONAL = {"numpy", "onnxruntime", "torch", "transformers"}
QUICK = {
    "window": 2,
    "tolerance": 0.5,
    "windows": 1,
    "warmup_cap_s": 1,
    "min_samples": 5,
    "min_seconds": 0,
    "phase_cap_s": 5,
}


def test_the_agent_is_small_and_the_same_bytes_every_time():
    first = agent()
    agent.cache_clear()
    assert agent() == first
    assert len(first) < 40_000
    assert "agent/main.py" in zipfile.ZipFile(io.BytesIO(first)).namelist()


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_it_is_python_3_8_and_the_standard_library(path: Path):
    tree = ast.parse(path.read_text(), feature_version=(3, 8))
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or ""]
        for name in names:
            assert name.split(".")[0] in sys.stdlib_module_names | OPTIONAL, name


def test_a_stretch_is_steady_when_its_windows_agree():
    assert measure.is_steady([9, 9, 1.0, 1.0, 1.01, 1.01, 1.0, 1.0], 2, 0.03, 2)
    assert not measure.is_steady([9, 9, 1.0, 1.0, 1.2, 1.2, 1.0, 1.0], 2, 0.03, 2)
    assert not measure.is_steady([1.0, 1.0], 2, 0.03, 2)


def test_every_sample_is_a_line_and_the_cache_is_filled_again_before_each_chunk():
    lines, calls = [], []
    recorder = measure.Recorder(QUICK, lines.append)
    ended = recorder.phase("decode", lambda: calls.append("step"), lambda: calls.append("fill"), 3)
    samples = [line["sample"] for line in lines if "sample" in line]
    assert [each["iteration"] for each in samples] == list(range(len(samples)))
    assert sum(not each["warmup"] for each in samples) == 5
    assert ended["ended_by"] == "enough"
    assert calls[:5] == ["fill", "step", "step", "step", "fill"]


def test_what_does_not_fit_is_refused_in_mib():
    with pytest.raises(measure.CannotRun, match=r"needs about 1048576 MiB of memory"):
        measure.fit({"needs_bytes": 1 << 40})


def test_the_workload_is_the_same_for_the_same_seed():
    assert engines.tokens(50, 2, 7, 0) == engines.tokens(50, 2, 7, 0) != engines.tokens(50, 2, 7, 1)
    assert all(0 <= token < 50 for row in engines.tokens(50, 2, 7, 0) for token in row)


def test_roofs_have_plausible_sizes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(calibrate, "LARGEST", 32 << 20)
    rows = {(row["quantity"], row["threads"]): row for row in calibrate.roofs()}
    assert 2e8 < rows["read", 1]["value"] < 1e12
    assert 2e8 < rows["copy", 1]["value"] < 1e12
    assert 1e-8 < rows["call", 1]["value"] < 1e-4
    assert all(row["low"] <= row["value"] <= row["high"] for row in rows.values())


def test_what_a_device_says_has_no_name_of_its_owner():
    import getpass
    import socket

    told = repr((look.host(), look.software(), look.telemetry(), look.engines()))
    assert socket.gethostname() not in told
    assert str(Path.home()) not in told
    assert getpass.getuser() not in told.split("'")


def test_a_bare_agent_says_that_it_holds_no_job(tmp_path: Path):
    file = tmp_path / "agent.pyz"
    file.write_bytes(agent())
    done = subprocess.run([sys.executable, "-S", str(file)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "holds no job" in done.stderr
