"""Measuring tiny models in a real fresh process: numbers, refusals, deaths, cancels, locks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest
import torch
from safetensors.torch import load_file

from core import errors
from core.profile import device_lock, fresh
from core.profile.device_lock import exclusive
from core.profile.runtimes.torch_eager import TorchEagerSettings, run
from core.types import silent
from tests.tiny import tiny_folder

SETTINGS = TorchEagerSettings(tier="rapid", prompt_tokens=16, new_tokens=8, threads=1)


@pytest.fixture(autouse=True)
def _own_home(tmp_path, monkeypatch):
    monkeypatch.setenv("SLIMSCOPE_HOME", str(tmp_path / "home"))


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True)}


@pytest.mark.slow
def test_a_decoder_is_measured_whole(tmp_path):
    before = children()
    result = run(tiny_folder("llama", tmp_path), silent, SETTINGS)
    found = {metric.name: metric for metric in result.metrics}
    for name in ("prefill_tokens_per_s", "decode_tokens_per_s", "ttft_ms", "tpot_ms", "load_ms"):
        assert found[name].value > 0
    assert found["prefill_tokens_per_s"].value == pytest.approx(16e3 / found["ttft_ms"].value)
    assert found["tpot_ms"].low <= found["tpot_ms"].value <= found["tpot_ms"].high
    assert found["peak_memory_bytes"].value >= found["baseline_memory_bytes"].value > 50e6
    assert set(result.frame["phase"]) == {"load", "first_forward", "prefill", "decode"}
    assert result.frame.query("phase == 'decode' and not warmup").shape[0] >= 12
    conditions = result.provenance.conditions
    assert conditions["torch_threads"] == 1
    assert conditions["fp32_path"]
    assert conditions["environment"]["hash"] == conditions["environment_hash"]
    assert children() == before


@pytest.mark.slow
def test_an_encoder_is_measured_in_bfloat16(tmp_path):
    result = run(tiny_folder("bert", tmp_path), silent, SETTINGS.model_copy(update={"dtype": "bfloat16"}))
    found = {metric.name: metric.value for metric in result.metrics}
    assert found["latency_ms"] > 0
    assert "decode_tokens_per_s" not in found
    assert result.provenance.dtype == "bfloat16"
    assert result.provenance.conditions["fp32_path"].startswith("unused")


@pytest.mark.slow
def test_a_vision_model_is_measured(tmp_path):
    folder = tiny_folder("vit", tmp_path)
    result = run(folder, silent, SETTINGS)
    stored = sum(tensor.nbytes for tensor in load_file(folder / "model.safetensors").values())
    measured = {metric.name: metric.value for metric in result.metrics}
    assert measured["weights_memory_bytes"] == stored, "the classifier is measured too, and nothing random"
    assert {metric.name: metric.value for metric in result.metrics}["images_per_s"] > 0


def test_a_prompt_longer_than_the_context_is_refused_with_the_numbers(tmp_path):
    with pytest.raises(errors.BadInput, match=r"100008 tokens .* do not fit .* 256"):
        run(tiny_folder("llama", tmp_path), silent, SETTINGS.model_copy(update={"prompt_tokens": 100_000}))


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(errors.BadInput, match=r"holds no config\.json"):
        run(tmp_path, silent, SETTINGS)


def test_damaged_weights_are_refused_with_the_cause(tmp_path):
    folder = tiny_folder("llama", tmp_path)
    (file,) = folder.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(errors.CannotOpen, match="header is damaged"):
        run(folder, silent, SETTINGS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_missing_gpu_is_refused(tmp_path):
    with pytest.raises(errors.CannotMeasure, match="no CUDA device"):
        run(tiny_folder("llama", tmp_path), silent, SETTINGS.model_copy(update={"device": "cuda"}))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_decoder_is_measured_on_a_gpu(tmp_path):
    result = run(tiny_folder("llama", tmp_path), silent, SETTINGS.model_copy(update={"device": "cuda"}))
    found = {metric.name: metric.value for metric in result.metrics}
    assert 0 < found["peak_memory_bytes"] < found["host_peak_memory_bytes"]
    assert found["tpot_ms"] > 0


class KillTheChild:
    """A progress that kills the measuring process with a signal once it exists."""

    def __init__(self, signal_: signal.Signals) -> None:
        self._before, self._signal = children(), signal_

    def __call__(self, done: float, total: float, message: str) -> None:
        for pid in children() - self._before:
            os.kill(pid, self._signal)


@pytest.mark.parametrize(
    ("signal_", "kind", "cause"),
    [(signal.SIGKILL, errors.OutOfMemory, "memory"), (signal.SIGSEGV, errors.WorkerDied, "SIGSEGV")],
)
def test_a_child_that_dies_is_an_error_with_its_cause(tmp_path, monkeypatch, signal_, kind, cause):
    monkeypatch.setattr(fresh, "WAKE_S", 0.2)
    with pytest.raises(kind, match=cause):
        run(tiny_folder("llama", tmp_path), KillTheChild(signal_), SETTINGS)


def test_cancelling_kills_the_child_and_frees_the_device(tmp_path, monkeypatch):
    monkeypatch.setattr(fresh, "WAKE_S", 0.2)
    before = children()
    seen: set[int] = set()

    def cancel(done: float, total: float, message: str) -> None:
        seen.update(children() - before)
        if seen:
            raise errors.Cancelled("stopped")

    with pytest.raises(errors.Cancelled):
        run(tiny_folder("llama", tmp_path), cancel, SETTINGS)
    assert seen
    assert not any(psutil.pid_exists(pid) for pid in seen)
    with exclusive("cpu", lambda *_: pytest.fail("the device is still locked")):
        pass


def test_the_child_dies_with_a_parent_that_was_killed(tmp_path):
    code = (
        "import sys; from pathlib import Path; from core.types import silent\n"
        "from core.profile.runtimes.torch_eager import TorchEagerSettings, run\n"
        "run(Path(sys.argv[1]), silent, TorchEagerSettings(tier='full', prompt_tokens=16))"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tiny_folder("llama", tmp_path))]) as parent:
        deadline, found = time.monotonic() + 60, []
        while not found and time.monotonic() < deadline:
            found = psutil.Process(parent.pid).children()
            time.sleep(0.1)
        (child,) = found
        time.sleep(1.5)
        parent.kill()
    psutil.wait_procs([child], timeout=20)
    assert not child.is_running()


def test_a_second_measurement_waits_for_the_first_and_says_so(monkeypatch):
    monkeypatch.setattr(device_lock, "LOOK_AGAIN_S", 0.05)
    said, order = [], []

    def second() -> None:
        with exclusive("cpu", lambda done, total, message: said.append(message)):
            order.append("second")

    with exclusive("cpu", silent):
        thread = threading.Thread(target=second)
        thread.start()
        deadline = time.monotonic() + 10
        while not said and time.monotonic() < deadline:
            time.sleep(0.02)
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"]
    assert "another profile is running on cpu" in said[0]


def test_the_peak_can_start_anew():
    from core.profile.memory import peak_resident_bytes, reset_peak, resident_bytes

    block = bytearray(200 * 2**20)
    block[::4096] = b"x" * len(block[::4096])
    high = peak_resident_bytes()
    del block
    if not reset_peak():
        pytest.skip("this system does not reset its high-water mark")
    assert peak_resident_bytes() < high - 150 * 2**20
    assert peak_resident_bytes() >= resident_bytes() - 5 * 2**20


def test_the_parent_imports_no_torch():
    code = (
        "import sys, core.profile.runtimes.torch_eager; print('torch' in sys.modules, 'scipy' in sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.split() == ["False", "False"]
