"""The agent's verbs. A request is JSON on standard input, an answer one JSON line; ``error`` is a sentence for a person.

Everything is in the folder the agent is called in: ``files/<sha256>`` (``.part`` while they come), ``jobs/<id>/`` with
``spec.json``, ``lines.jsonl``, ``words.txt`` and a lock that the system frees when the measuring process dies, however.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import signal
import sys
import time
import zipfile
from typing import Any

from . import calibrate, look, measure

FILES, JOBS = "files", "jobs"


class Refused(Exception):
    """A request that cannot be done, in one sentence."""


def main() -> None:
    """Answer one request, or run the job that was packed with the agent."""
    if len(sys.argv) < 2:
        return standalone()
    for folder in (FILES, JOBS):
        os.makedirs(folder, mode=0o700, exist_ok=True)
    text = sys.stdin.read()
    request = json.loads(text) if text.strip() else {}
    try:
        answer = VERBS[sys.argv[1]](request)
    except (Refused, measure.CannotRun) as error:
        answer = {"error": str(error)}
    except OSError as error:
        answer = {"error": f"the device's system refused: {error.strerror or error}"}
    sys.stdout.write(json.dumps(answer) + "\n")
    return None


def probe(_: dict[str, Any]) -> dict[str, Any]:
    """What the device is, how it fares, what it has."""
    return {
        "host": look.host(),
        "software": look.software(),
        "state": look.state("."),
        "engines": look.engines(),
    }


def roofs(_: dict[str, Any]) -> dict[str, Any]:
    """The micro-calibration, alone on the device."""
    with open("lock", "a") as lock:
        if not _locked(lock):
            raise Refused("a measurement is running there; wait for it, or stop it (slimscope devices stop)")
        return {"roofs": calibrate.roofs(), "host": look.host(), "software": look.software()}


def have(request: dict[str, Any]) -> dict[str, Any]:
    """Bytes of each wanted file that are there, and free space, after older files made room where it is short."""
    wanted: dict[str, int] = request["files"]
    here = {sha: _size(sha) for sha in wanted}
    missing = sum(size - here[sha] for sha, size in wanted.items())
    for path in sorted(_files(), key=os.path.getmtime):
        if _free() >= missing + request["spare"] or _running():
            break
        if os.path.basename(path).split(".")[0] not in wanted:
            os.unlink(path)
    if missing and _free() < missing + request["spare"]:
        raise Refused(
            f"no space: {missing >> 20} MiB are missing there and {_free() >> 20} MiB are free ({request['spare'] >> 20} MiB stay "
            "free); make room, or take a smaller variant"
        )
    return {"here": here}


def keep(request: dict[str, Any]) -> dict[str, Any]:
    """Take a file that came whole, after its hash was checked."""
    sha = request["sha"]
    path = os.path.join(FILES, sha)
    if os.path.exists(path):
        return {"kept": True}
    total = hashlib.sha256()
    with open(path + ".part", "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            total.update(block)
    if total.hexdigest() != sha:
        os.unlink(path + ".part")
        return {"kept": False}
    os.replace(path + ".part", path)
    return {"kept": True}


def start(spec: dict[str, Any]) -> dict[str, Any]:
    """Begin a job, or find the same one again."""
    folder = os.path.join(JOBS, spec["id"])
    if os.path.exists(os.path.join(folder, "spec.json")):
        return {"found": True}
    if running := _running():
        raise Refused(f"the job {running} is running there; wait for it, or stop it (slimscope devices stop)")
    measure.fit(spec)
    os.makedirs(os.path.join(folder, "model"), exist_ok=True)
    for name, sha in spec["files"].items():
        os.utime(os.path.join(FILES, sha))
        link = os.path.join(folder, "model", os.path.basename(name))
        if not os.path.lexists(link):
            os.symlink(os.path.abspath(os.path.join(FILES, sha)), link)
    with open(os.path.join(folder, "spec.json"), "w") as file:
        json.dump(spec, file)
    ready, told = os.pipe()
    if os.fork() == 0:
        os.close(ready)
        _detached(spec, folder, told)
    os.close(told)
    os.read(ready, 1)  # until the measuring process holds its locks, or is gone
    os.close(ready)
    return {"found": False}


def _detached(spec: dict[str, Any], folder: str, told: int) -> None:
    """Become a process of its own, so that a lost link ends nothing, and measure."""
    os.setsid()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    words = os.open(os.path.join(folder, "words.txt"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    empty = os.open(os.devnull, os.O_RDONLY)
    for number, handle in ((0, empty), (1, words), (2, words)):
        os.dup2(handle, number)
    alive, lock = open(os.path.join(folder, "alive"), "w"), open("lock", "a")  # noqa: SIM115 - until the process ends
    _locked(alive)
    os.set_inheritable(alive.fileno(), True)  # an engine that outlives us still counts as running
    alive.write(str(os.getpid()))
    alive.flush()
    signal.alarm(int(spec["limit_s"]))  # a hard end, should the engine hang
    with open(os.path.join(folder, "lines.jsonl"), "a", buffering=1) as lines:
        if _locked(lock):
            os.write(told, b"1")
            _measured(spec, os.path.join(folder, "model"), lines)
        else:
            lines.write(
                json.dumps({"error": "another measurement is running there; try again when it is done"})
                + "\n"
            )
    os._exit(0)


def _measured(spec: dict[str, Any], model: str, lines: Any) -> None:
    def write(line: dict[str, Any]) -> None:
        lines.write(json.dumps(line) + "\n")

    try:
        measure.run(spec, model, write)
    except measure.CannotRun as error:
        write({"error": str(error)})
    except MemoryError:
        write({"error": "the engine ran out of memory; take a smaller variant, batch or prompt"})
    except Exception as error:  # noqa: BLE001 - whatever an engine raises is told to the person who waits
        write(
            {
                "error": "the engine failed: {}: {}".format(
                    type(error).__name__, " ".join(str(error).split())[:300]
                )
            }
        )


def lines(request: dict[str, Any]) -> dict[str, Any]:
    """Whole lines from a byte on, and whether the job still runs."""
    folder = _job(request["id"])
    running = _alive(folder)
    data = b""
    if os.path.exists(os.path.join(folder, "lines.jsonl")):
        with open(os.path.join(folder, "lines.jsonl"), "rb") as file:
            file.seek(request["from"])
            data = file.read(4 << 20)
    data = data[: data.rfind(b"\n") + 1]
    return {
        "lines": data.decode().splitlines(),
        "next": request["from"] + len(data),
        "running": running,
        "words": (look.read(os.path.join(folder, "words.txt")) or "")[-400:],
    }


def jobs(_: dict[str, Any]) -> dict[str, Any]:
    """Every job there."""
    found = []
    for id_ in sorted(os.listdir(JOBS)):
        text = look.read(os.path.join(JOBS, id_, "spec.json"))
        spec = json.loads(text) if text else {}
        ended = '"end"' in (look.read(os.path.join(JOBS, id_, "lines.jsonl")) or "")
        state = "running" if _alive(os.path.join(JOBS, id_)) else "finished" if ended else "died"
        told = {name: spec.get(name, "") for name in ("variant", "engine", "started_at")}
        found.append(dict(told, id=id_, state=state))
    return {"jobs": found}


def stop(request: dict[str, Any]) -> dict[str, Any]:
    """End a job and all that it started."""
    folder = _job(request["id"])
    was = _alive(folder)
    _end(folder)
    return {"stopped": was}


def drop(request: dict[str, Any]) -> dict[str, Any]:
    """Forget a job, ended where it still runs; the model's files stay for the next one."""
    folder = _job(request["id"])
    _end(folder)
    shutil.rmtree(folder)
    return {}


def clean(_: dict[str, Any]) -> dict[str, Any]:
    """Remove all of ours."""
    if running := _running():
        raise Refused(f"the job {running} is running there; stop it first (slimscope devices stop)")
    root = os.getcwd()
    sizes = [os.lstat(os.path.join(at, name)).st_size for at, _, names in os.walk(root) for name in names]
    shutil.rmtree(root)
    return {"freed": sum(sizes)}


def standalone() -> None:
    """Run the job that lies in this file, and leave its result beside it: for a device that nothing reaches."""
    here = os.path.abspath(sys.argv[0])
    with zipfile.ZipFile(here) as pack:
        if "job/spec.json" not in pack.namelist():
            raise SystemExit("this file holds no job; slimscope devices script makes one that does")
        spec = json.loads(pack.read("job/spec.json"))
        work, result = here + ".work", os.path.splitext(here)[0] + ".jsonl"
        try:
            for name in spec["files"]:
                pack.extract("job/model/" + name, work)
            with open(result, "w", buffering=1) as lines_:
                lines_.write(json.dumps({"spec": spec}) + "\n")
                if not spec["threads"]:
                    spec["threads"] = look.cores()
                _measured(spec, os.path.join(work, "job", "model"), lines_)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    with open(result) as lines_:
        last = json.loads(lines_.readlines()[-1])
    if "error" in last:
        raise SystemExit(last["error"])
    sys.stdout.write(
        f"done; take {result} back and run: slimscope devices import {os.path.basename(result)}\n"
    )


VERBS = {
    "probe": probe,
    "roofs": roofs,
    "have": have,
    "keep": keep,
    "start": start,
    "lines": lines,
    "jobs": jobs,
    "stop": stop,
    "drop": drop,
    "clean": clean,
}


def _job(id_: str) -> str:
    folder = os.path.join(JOBS, id_)
    if not id_.isalnum() or not os.path.isdir(folder):
        raise Refused(f"there is no job {id_}; slimscope devices jobs lists them")
    return folder


def _locked(file: Any) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _alive(folder: str) -> bool:
    """Whether the job's measuring process lives: it holds the lock."""
    try:
        with open(os.path.join(folder, "alive")) as file:
            return not _locked(file)
    except FileNotFoundError:
        return False


def _end(folder: str) -> None:
    """Kill the job's process group, which is its own session, while its lock shows that the number is still its."""
    if _alive(folder):
        pid = int(look.read(os.path.join(folder, "alive")) or 0)
        if pid > 1:
            os.killpg(pid, signal.SIGKILL)
    for _ in range(50):
        if not _alive(folder):
            return
        time.sleep(0.1)


def _running() -> str | None:
    return next((id_ for id_ in os.listdir(JOBS) if _alive(os.path.join(JOBS, id_))), None)


def _files() -> list[str]:
    return [os.path.join(FILES, name) for name in os.listdir(FILES)]


def _size(sha: str) -> int:
    for path in (os.path.join(FILES, sha), os.path.join(FILES, sha + ".part")):
        if os.path.exists(path):
            return os.path.getsize(path)
    return 0


def _free() -> int:
    return shutil.disk_usage(".").free
