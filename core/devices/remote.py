"""Measuring a variant on a device that is reached by SSH or adb.

The device gets the agent (one file, Python's standard library only) and the variant's files for one of its engines;
it measures by itself and keeps what it found until it is fetched, so a lost link costs nothing: the same call finds
the same job and goes on.
"""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from core.devices import job as jobs
from core.devices.bundle import agent, agent_name, write_script
from core.devices.link import Link, LinkLost, append, chunks, link_to
from core.devices.registry import Device
from core.errors import BadInput, CannotConnect, CannotMeasure
from core.paths import data_dir
from core.profile.device_lock import locked
from core.types import Metric, Progress, Provenance, Result, Run, View, part_of, silent

if TYPE_CHECKING:
    from core.catalog.store import Catalog

SPARE_BYTES = 256 << 20
"""Free space that is left on a device."""
POLL_S = 1.0
PATIENCE_S = 60.0
"""How long a lost link is waited for before the job is left to itself."""
_NO_PYTHON, _OLD_PYTHON, _NO_AGENT = 43, 45, 44


@dataclass(frozen=True)
class Engine:
    """Something on the device that can run a model."""

    id: jobs.Engine
    available: bool
    version: str | None
    install: str
    """What adds it there."""


@dataclass(frozen=True)
class Probed:
    """What a device says of itself; no host name, user or path."""

    host: Mapping[str, Any]
    """Its part of the environment hash: processor, cores, memory, governor, power mode …"""
    software: Mapping[str, Any]
    state: Mapping[str, Any]
    """What changes by the minute: free memory and disk in bytes, temperature, load, clocks."""
    engines: tuple[Engine, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class DeviceJob:
    """A measurement that a device has and we have not fetched."""

    id: str
    state: str
    """running, finished or died."""
    variant: str
    engine: str
    started_at: str


def probe(device: Device) -> Probed:
    """Connect, see what the device is and which engines it has. Raises ``CannotConnect`` with the next move."""
    said = _ask(device, link_to(device), "probe")
    mode, governor = said["host"]["power_mode"], said["host"]["governor"]
    warnings = []
    if device.power_mode and mode != device.power_mode:
        warnings.append(f"power mode is {mode or 'not told'}, the registry has {device.power_mode}")
    if governor not in (None, "performance"):
        warnings.append(f"the clock's governor is {governor}: the first samples may be slower")
    engines = tuple(Engine(**told) for told in said["engines"])
    return Probed(said["host"], said["software"], said["state"], engines, tuple(warnings))


def calibrate(device: Device, *, progress: Progress = silent) -> Result:
    """The device's roofs, about five seconds: read bandwidth by threads, matrix rate where a library is there, overhead."""
    with _alone(device, progress):
        said = _ask(device, link_to(device), "roofs")
    frame = pd.DataFrame(said["roofs"])
    metrics = tuple(
        Metric(
            f"{row['quantity']}_{row['threads']}_on_{device.slug}" if row["threads"] else f"{row['quantity']}_on_{device.slug}",
            row["value"], row["unit"], "lower" if row["quantity"] == "call" else "higher", row["n"], row["low"], row["high"],
            f"lowest and highest of {row['n']}",
        )
        for row in said["roofs"]
    )  # fmt: skip
    conditions = {"host": said["host"], "software": said["software"]}
    return Result(
        frames={"main": frame},
        views=(View("table", x="quantity"),),
        metrics=metrics,
        provenance=Provenance(
            method="device_calibration", settings={}, device=device.slug, conditions=conditions
        ),
    )


def profile_on_device(
    catalog: Catalog,
    variant_id: str,
    device: Device,
    *,
    engine: str | None = None,
    settings: Mapping[str, Any] | None = None,
    progress: Progress = silent,
    job_id: str | None = None,
) -> Run:
    """Measure a variant on a device and enter the run; goes on with a job that an earlier call left there.

    ``engine`` None takes the first available of llama_bench, onnxruntime, torch. ``settings`` are those of every runtime
    (tier, prompt_tokens, new_tokens, batch, threads, depth) and ``weights``. Measurements are named
    ``decode_tokens_per_s_<engine>_on_<slug>``. Raises ``CannotConnect``, ``CannotMeasure``, ``BadInput``.
    """
    variant = catalog.variant(variant_id)
    with _alone(device, progress):
        link = link_to(device)
        found = probe(device)
        chosen = _chosen(found, engine, device, variant.family)
        parsed = jobs.settings_for(device.slug, chosen, settings, int(found.host["physical_cores"]))
        job = jobs.job_for(catalog, variant, parsed, part_of(progress, 0.0, 0.3))
        known = {told["id"]: told["state"] for told in _ask(device, link, "jobs")["jobs"]}
        if known.get(job.id) == "died":
            _ask(device, link, "drop", {"id": job.id})
        if known.get(job.id) in (None, "died"):
            _upload(device, link, job, part_of(progress, 0.3, 0.5))
            _ask(
                device,
                link,
                "start",
                {**job.spec, "started_at": datetime.now(UTC).isoformat(timespec="seconds")},
            )
        try:
            lines = _followed(device, link, job, part_of(progress, 0.5, 1.0))
            run = jobs.recorded(catalog, job.spec, lines, job_id=job_id)
        except CannotMeasure:
            _ask(device, link, "drop", {"id": job.id})
            raise
        _ask(device, link, "drop", {"id": job.id})
        return run


def script_for(
    catalog: Catalog, variant_id: str, device: Device, engine: jobs.Engine, target: Path,
    settings: Mapping[str, Any] | None = None, *, progress: Progress = silent,
) -> Path:  # fmt: skip
    """One self-contained file to run on a device that nothing reaches; its result comes back by ``import_result``."""
    parsed = jobs.settings_for(device.slug, engine, settings, 0)
    job = jobs.job_for(catalog, catalog.variant(variant_id), parsed, progress)
    write_script(target, job.spec, job.files)
    return target


def import_result(catalog: Catalog, path: Path) -> Run:
    """Enter the lines that a script left. Raises ``BadInput`` for another file, ``CannotMeasure`` for a failed one."""
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        spec = lines[0]["spec"]
    except (ValueError, KeyError, IndexError, TypeError, OSError) as error:
        raise BadInput(
            f"{path.name} is not the result of a script of Slimscope; take the .jsonl it left"
        ) from error
    if not spec["settings"]["threads"]:
        end = next((line["end"] for line in lines if "end" in line), {"host": {"physical_cores": 1}})
        spec = {**spec, "settings": {**spec["settings"], "threads": end["host"]["physical_cores"]}}
    return jobs.recorded(catalog, spec, lines[1:])


def unfinished(device: Device) -> tuple[DeviceJob, ...]:
    """Jobs that lie on the device: running, finished and not yet fetched, or died."""
    return tuple(DeviceJob(**told) for told in _ask(device, link_to(device), "jobs")["jobs"])


def stop(device: Device, id_: str) -> None:
    """End a job on the device and forget it. Raises ``CannotMeasure`` where there is none."""
    _ask(device, link_to(device), "drop", {"id": id_})


def clean(device: Device) -> int:
    """Remove everything of ours from the device; bytes freed. Refused while a job runs there."""
    return int(_ask(device, link_to(device), "clean")["freed"])


def _chosen(found: Probed, engine: str | None, device: Device, family: str) -> jobs.Engine:
    by_id = {each.id: each for each in found.engines}
    if engine is None:
        for each in found.engines:
            if each.available and not (each.id == "llama_bench" and family != "decoder"):
                return each.id
        ways = "; ".join(each.install for each in found.engines)
        raise CannotMeasure(f"{device.slug} has no engine that runs this; add one there: {ways}")
    chosen = next((each for id_, each in by_id.items() if id_ == engine), None)
    if chosen is None:
        raise BadInput(f"no engine {engine!r}; there are {', '.join(by_id)}")
    if not chosen.available:
        raise CannotMeasure(f"{device.slug} has no {engine}; add it there: {chosen.install}")
    return chosen.id


def _upload(device: Device, link: Link, job: jobs.Job, progress: Progress) -> None:
    """Send what is missing, from where an earlier call was cut off."""
    shas, sizes = job.spec["files"], job.spec["sizes"]
    wanted = {sha: sizes[name] for name, sha in shas.items()}
    here = _ask(device, link, "have", {"files": wanted, "spare": SPARE_BYTES})["here"]
    total, sent = sum(wanted.values()), sum(here.values())
    for name, sha in shas.items():
        for _attempt in range(2):
            with job.files[name].open("rb") as file:
                for data in chunks(file, here[sha]):
                    progress(sent, total, f"sending {name}")
                    append(link, f"files/{sha}.part", data)
                    sent += len(data)
            if not sizes[name]:
                append(link, f"files/{sha}.part", b"")
            if _ask(device, link, "keep", {"sha": sha})["kept"]:
                break
            here[sha] = 0
        else:
            raise CannotConnect(f"{name} arrived changed twice; check the device's disk and the link")


def _followed(device: Device, link: Link, job: jobs.Job, progress: Progress) -> list[dict[str, Any]]:
    """The job's lines, once it has ended; a lost link is waited for."""
    lines: list[dict[str, Any]] = []
    place, lost_since = 0, None
    while True:
        try:
            said = _ask(device, link, "lines", {"id": job.id, "from": place})
            lost_since = None
        except LinkLost as error:
            lost_since = lost_since or time.monotonic()
            if time.monotonic() - lost_since > PATIENCE_S:
                raise CannotConnect(
                    f"the link to {device.slug} is lost ({error}); the job {job.id} goes on there, and the same command "
                    "fetches it"
                ) from error
            progress(0, 1, "the link is lost; trying again")
            time.sleep(POLL_S)
            continue
        lines += [json.loads(line) for line in said["lines"]]
        place = said["next"]
        progress(0, 1, f"measuring on {device.slug}: {sum('sample' in line for line in lines)} samples")
        if any("end" in line or "error" in line for line in lines[-2:]):
            return lines
        if not said["running"] and not said["lines"]:
            raise CannotMeasure(
                f"the agent on {device.slug} was killed before it was done (out of memory, or somebody ended it)"
                + (f"; its last words: {said['words']}" if said["words"] else "")
                + "; its job is removed there: try again, or take a smaller variant"
            )
        time.sleep(POLL_S)


def _ask(device: Device, link: Link, verb: str, request: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """One verb of the agent, which is brought there first if need be. Raises ``CannotMeasure`` with the agent's sentence."""
    python = shlex.quote(device.python or "python3")
    if device.python.startswith("~/"):
        python = f'"$HOME"/{shlex.quote(device.python[2:])}'
    command = (
        f"command -v {python} >/dev/null 2>&1 || exit {_NO_PYTHON}; "
        f"cd {link.root} 2>/dev/null && [ -f {agent_name()} ] || exit {_NO_AGENT}; "
        f"exec {python} {agent_name()} {verb}"
    )
    given = json.dumps(request or {}).encode()
    said = link.run(command, given)
    if said.code == _NO_AGENT:
        _install(device, link, python)
        said = link.run(command, given)
    if said.code == _NO_PYTHON:
        raise CannotConnect(
            f"{device.slug} has no {device.python or 'python3'}; install Python 3.8 or later there, or name it in devices.yaml "
            "(python: PATH)"
        )
    try:
        answer: dict[str, Any] = json.loads(said.out.decode().strip().splitlines()[-1])
    except (ValueError, IndexError) as error:
        raise CannotMeasure(
            f"the agent on {device.slug} failed ({said.code}): {said.words[-300:] or 'no answer'}; "
            "`slimscope devices clean` starts afresh there"
        ) from error
    if "error" in answer:
        raise CannotMeasure(f"{device.slug}: {answer['error']}")
    return answer


def _install(device: Device, link: Link, python: str) -> None:
    """Bring the agent there, whole or not at all."""
    old = f"{python} -c 'import sys; sys.exit(sys.version_info < (3, 8))' || exit {_OLD_PYTHON}"
    place = f"umask 077; mkdir -p {link.root}/files {link.root}/jobs && cd {link.root} && rm -f agent-*.pyz"
    said = link.run(f"{old}; {place} && cat > agent.part && mv agent.part {agent_name()}", agent())
    if said.code == _OLD_PYTHON:
        raise CannotConnect(
            f"{device.slug}'s Python is older than 3.8; install a newer one and name it in devices.yaml"
        )
    if said.code != 0:
        raise CannotConnect(
            f"the agent cannot be put on {device.slug}: {said.words or said.code}; make room there"
        )


@contextmanager
def _alone(device: Device, progress: Progress) -> Iterator[None]:
    """One of our processes at a time per device; the device's own lock guards it against other computers."""
    folder = data_dir() / "locks"
    folder.mkdir(exist_ok=True)
    with locked(
        folder / f"device-on-{device.slug}.lock",
        progress,
        waiting=f"another process measures on {device.slug}",
    ):
        yield
