"""Measuring over a real sshd on loopback: no mock between us and the measured process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from core.catalog.store import Catalog
from core.devices import link, remote
from core.devices.link import append, link_to
from core.devices.registry import Device
from core.devices.ssh import known_hosts, offered_key, pin
from core.errors import BadInput, CannotConnect, CannotMeasure
from tests.devices.loopback import Loopback, executable

RAPID = {"tier": "rapid", "prompt_tokens": "8", "new_tokens": "4", "threads": "1"}
LLAMA_BENCH = """# A shim, not llama-bench: answers in its format, 10 ms per prompt and 4 ms per 4 tokens, the second longer.
# The log shows that its processes were asked for what the protocol says.
echo "$@" >> {log}
n=1; p=0; g=0
while [ $# -gt 0 ]; do case $1 in -r) n=$2;; -p) p=$2;; -n) g=$2;; esac; shift; done
[ "$g" = 0 ] && one=10000000 || one=4000000
echo '[{{"build_commit": "shim", "model_size": 1000, "samples_ns": ['"$(yes $one | head -n $n | paste -sd,)"']}}]'"""


def jobs_folder(loop: Loopback) -> list[str]:
    return sorted(path.name for path in (loop.root / "jobs").glob("*"))


def test_a_device_says_what_it_is_over_ssh(ssh: Loopback):
    found = remote.probe(ssh.device)
    assert {engine.id for engine in found.engines} == {"llama_bench", "onnxruntime", "torch"}
    assert found.state["disk_free_bytes"] > 0
    assert all(engine.install for engine in found.engines)
    assert remote.clean(ssh.device) > 10_000
    assert not ssh.root.exists()


def test_a_key_must_be_pinned_and_a_changed_one_ends_the_connection(unpinned: Loopback):
    device = unpinned.device
    with pytest.raises(CannotConnect, match="not pinned yet; run `slimscope devices trust loop`"):
        remote.probe(device)
    with pytest.raises(CannotConnect, match="not SHA256:wrong"):
        pin(device, "SHA256:wrong")
    pin(device, offered_key(device)[1])
    assert link_to(device).run("echo yes").out.strip() == b"yes"
    unpinned.new_key()
    with pytest.raises(CannotConnect, match="another host key than the one that was pinned"):
        remote.probe(device)
    pin(device, offered_key(device)[1])
    assert link_to(device).run("true").code == 0
    assert len(known_hosts().read_text().splitlines()) == 1


def test_a_device_that_is_off_and_one_without_python_say_so(ssh: Loopback):
    with pytest.raises(CannotConnect, match="has no nopython; install Python"):
        remote.probe(replace(ssh.device, python="nopython"))
    assert not ssh.root.exists()
    ssh.stop()
    with pytest.raises(CannotConnect, match=r"no connection to loop .*check that it is on"):
        remote.probe(ssh.device)
    with pytest.raises(BadInput, match="has no address"):
        remote.probe(replace(ssh.device, transport="none"))


def test_no_space_is_found_before_anything_is_sent(
    ssh: Loopback, variant: tuple[Catalog, str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(remote, "SPARE_BYTES", 1 << 60)
    with pytest.raises(CannotMeasure, match="loop: no space"):
        remote.profile_on_device(*variant, ssh.device, engine="torch", settings=RAPID)
    assert list((ssh.root / "files").iterdir()) == []
    assert jobs_folder(ssh) == []


def test_an_upload_goes_on_where_it_was_cut_off_and_a_damaged_one_is_sent_anew(
    ssh: Loopback, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import hashlib

    from core.devices.job import Job

    monkeypatch.setattr(link, "CHUNK", 1000)
    data, sent = os.urandom(3500), []
    file = tmp_path / "weights"
    file.write_bytes(data)
    sha = hashlib.sha256(data).hexdigest()
    job = Job({"files": {"weights": sha}, "sizes": {"weights": 3500}}, {"weights": file})

    def count(done: float, total: float, message: str) -> None:
        sent.append(done)

    remote.probe(ssh.device)
    there = link_to(ssh.device)
    append(there, f"files/{sha}.part", data[:2000])
    remote._upload(ssh.device, there, job, count)
    assert (ssh.root / "files" / sha).read_bytes() == data
    assert sent == [2000, 3000]
    (ssh.root / "files" / sha).unlink()
    append(there, f"files/{sha}.part", b"x" * 2000)
    remote._upload(ssh.device, there, job, count)
    assert (ssh.root / "files" / sha).read_bytes() == data


def bench(ssh: Loopback, bin_: Path, tmp_path: Path, text: str | None = None) -> Path:
    log = tmp_path / "asked"
    executable(bin_ / "llama-bench", text or LLAMA_BENCH.format(log=log))
    with (ssh.folder / "as_device").open("r+") as file:
        script = file.read().replace("export HOME", f"export PATH={bin_}:$PATH HOME")
        file.seek(0)
        file.write(script)
    return log


def test_llama_bench_is_driven_and_its_samples_become_a_run(
    ssh: Loopback, variant: tuple[Catalog, str], bin_: Path, tmp_path: Path
):
    log = bench(ssh, bin_, tmp_path)
    run = remote.profile_on_device(*variant, ssh.device, settings=RAPID)
    values = {m.name: m.value for m in run.measurements}
    assert values["prefill_tokens_per_s_llama_bench_q8_0_on_loop"] == pytest.approx(800)
    assert values["decode_tokens_per_s_llama_bench_q8_0_on_loop"] == pytest.approx(1000)
    assert run.conditions["device"] == "loop"
    assert run.conditions["environment_hash"] == run.environment
    asked = log.read_text().splitlines()
    assert "--no-warmup" in asked[0]
    assert "-n 4 -d 8" in asked[2]
    assert jobs_folder(ssh) == []


def test_a_lost_link_costs_nothing_and_a_killed_agent_is_told_and_cleaned_away(
    ssh: Loopback, variant: tuple[Catalog, str], bin_: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    gate = tmp_path / "gate"
    slow = f"while [ ! -e {gate} ]; do sleep 0.1; done\n" + LLAMA_BENCH.format(log=tmp_path / "asked")
    bench(ssh, bin_, tmp_path, slow)
    monkeypatch.setattr(remote, "PATIENCE_S", 0.5)
    monkeypatch.setattr(remote, "POLL_S", 0.2)
    cable = threading.Timer(0, ssh.stop)

    def pull(done: float, total: float, message: str) -> None:
        if message.startswith("measuring") and not cable.ident:
            cable.start()
            cable.join()

    with pytest.raises(CannotConnect, match="goes on there, and the same command fetches it"):
        remote.profile_on_device(*variant, ssh.device, engine="llama_bench", settings=RAPID, progress=pull)
    ssh.start()
    (job,) = remote.unfinished(ssh.device)
    assert job.state == "running"
    with pytest.raises(CannotMeasure, match=f"the job {job.id} is running there"):
        remote.clean(ssh.device)
    gate.touch()
    run = remote.profile_on_device(*variant, ssh.device, engine="llama_bench", settings=RAPID)
    assert run.measurements
    assert (tmp_path / "asked").read_text().count("--no-warmup") == 1, "measured once"

    gate.unlink()

    def kill(done: float, total: float, message: str) -> None:
        for alive in (ssh.root / "jobs").glob("*/alive") if message.startswith("measuring") else ():
            pid = int(alive.read_text())
            if pid > 1:
                os.killpg(pid, signal.SIGKILL)

    with pytest.raises(CannotMeasure, match="was killed before it was done"):
        remote.profile_on_device(*variant, ssh.device, engine="llama_bench", settings=RAPID, progress=kill)
    assert jobs_folder(ssh) == []
    assert remote.clean(ssh.device) > 0
    assert not ssh.root.exists()


def test_a_job_can_be_stopped(ssh: Loopback):
    remote.probe(ssh.device)
    with pytest.raises(CannotMeasure, match="there is no job nowhere"):
        remote.stop(ssh.device, "nowhere")


def test_roofs_come_back_with_their_spread(adb: Device):
    result = remote.calibrate(adb)
    names = {metric.name for metric in result.metrics}
    assert {"read_1_on_loop", "copy_1_on_loop", "call_1_on_loop"} <= names
    assert all(metric.low <= metric.value <= metric.high for metric in result.metrics)


def test_an_adb_shim_is_probed_and_left_clean(adb: Device, tmp_path: Path):
    assert remote.probe(adb).host["architecture"]
    assert (tmp_path / "phone").is_dir()
    assert remote.clean(adb) > 0
    assert not (tmp_path / "phone").exists()
    with pytest.raises(CannotConnect, match="adb knows no device OTHER"):
        remote.probe(replace(adb, address="OTHER"))
    with pytest.raises(CannotConnect, match="has no nopython"):
        remote.probe(replace(adb, python="nopython"))


def test_a_script_runs_by_itself_and_its_result_is_imported(
    adb: Device, variant: tuple[Catalog, str], bin_: Path, tmp_path: Path
):
    executable(bin_ / "llama-bench", LLAMA_BENCH.format(log=tmp_path / "asked"))
    file = remote.script_for(
        *variant, adb, "llama_bench", tmp_path / "carried.pyz", {**RAPID, "threads": "0"}
    )
    done = subprocess.run(
        [sys.executable, str(file)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "carried.pyz.work").exists()
    run = remote.import_result(variant[0], tmp_path / "carried.jsonl")
    assert "decode_tokens_per_s_llama_bench_q8_0_on_loop" in {m.name for m in run.measurements}
    assert run.conditions["threads"] >= 1
    (tmp_path / "cut.jsonl").write_text((tmp_path / "carried.jsonl").read_text().rsplit("\n", 2)[0])
    with pytest.raises(CannotMeasure, match="has no end"):
        remote.import_result(variant[0], tmp_path / "cut.jsonl")
    (tmp_path / "other.json").write_text(json.dumps({"a": 1}))
    with pytest.raises(BadInput, match="not the result of a script"):
        remote.import_result(variant[0], tmp_path / "other.json")


@pytest.mark.slow
@pytest.mark.rotating
@pytest.mark.parametrize("engine", ["torch", "onnxruntime"])
def test_an_engine_measures_a_model_over_ssh(ssh: Loopback, variant: tuple[Catalog, str], engine: str):
    started = time.monotonic()
    run = remote.profile_on_device(*variant, ssh.device, engine=engine, settings=RAPID)
    values = {m.name: m.value for m in run.measurements}
    assert values[f"decode_tokens_per_s_{engine}_on_loop"] > 1
    assert values[f"tpot_ms_{engine}_on_loop"] * values[
        f"decode_tokens_per_s_{engine}_on_loop"
    ] == pytest.approx(1e3)
    assert values[f"ttft_ms_{engine}_on_loop"] < (time.monotonic() - started) * 1e3
    frame = variant[0].frame(run.id, "samples")
    assert set(frame["phase"]) == {"load", "first_forward", "prefill", "decode"}
