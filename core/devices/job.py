"""A measurement on a device as data: what it is asked to do, and the run that its lines become.

Raw samples come back; their statistics are made here, by the same code as this machine's (``core.profile.summary``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd
from pydantic import Field

from core.devices.bundle import agent_name, sha256
from core.entries import folder_of
from core.errors import BadInput, CannotMeasure
from core.profile.built import FACTS, built
from core.profile.measured import Facts, Measured, Memory, Sample
from core.profile.protocol import Protocol
from core.profile.runtimes._base import ProfileSettings
from core.profile.runtimes._loading import settings_of
from core.profile.summary import summarise
from core.recording import record
from core.types import Progress, Run, Variant, content_hash

if TYPE_CHECKING:
    from core.catalog.store import Catalog

Engine = Literal["llama_bench", "onnxruntime", "torch"]
BUILDS: dict[Engine, str] = {"llama_bench": "llama_cpp", "onnxruntime": "onnx_runtime"}
"""The runtime of this machine whose files an engine opens; torch opens the artifact itself."""
USUAL: dict[Engine, str] = {"llama_bench": "q8_0", "onnxruntime": "stored", "torch": "stored"}
NEEDS, FIXED = 1.3, 192 << 20
"""Memory asked for: the files' bytes times the first (activations, cache, repacked weights) and the engine itself."""


class DeviceSettings(ProfileSettings):
    """A workload on a device."""

    engine: Engine = "torch"
    slug: str = "device"
    weights: str = Field("", description="How the engine keeps the weights; empty: what is usual for it")
    parity: bool = Field(False, description="Answers are not held against the artifact's on a device")

    @property
    def device_name(self) -> str:
        """The registry's name of it."""
        return self.slug

    @property
    def suffix(self) -> str:
        """``_<engine>[_<weights>]_on_<slug>``, with the depth where it is not the prompt's."""
        kept = () if self.weights == "stored" else (self.weights,)
        deep = (f"depth_{self.depth}",) if self.depth else ()
        return "_" + "_".join((self.engine, *kept, "on", self.slug, *deep))

    def protocol(self) -> Protocol:
        """The agent's own loop: the tiers' counts and times, windows without a trend test, no parity."""
        usual = super().protocol()
        effort = replace(usual.effort, max_half_width=None, quiet_wait_s=0.0)
        return replace(usual, effort=effort, name="device-agent", version=1)


def engine_named(name: str) -> Engine:
    """The engine of that name; raises ``BadInput``."""
    for known in USUAL:
        if known == name:
            return known
    raise BadInput(f"no engine {name!r}; there are {', '.join(USUAL)}")


@dataclass(frozen=True)
class Job:
    """What a device is asked to do, and the files it needs for it."""

    spec: Mapping[str, Any]
    files: Mapping[str, Path]

    @property
    def id(self) -> str:
        """The same for the same variant, engine, settings, files and agent: how a job is found again."""
        return str(self.spec["id"])


def settings_for(slug: str, engine: Engine, given: Mapping[str, Any] | None, threads: int) -> DeviceSettings:
    """Settings from values that may be text; ``threads`` stands in where none are named. Raises ``BadInput``."""
    told: dict[str, Any] = {"weights": USUAL[engine], **(given or {}), "engine": engine, "slug": slug}
    if not int(told.get("threads") or 0):
        told["threads"] = threads
    try:
        parsed = DeviceSettings.model_validate(told)
    except ValueError as error:
        raise BadInput(f"settings of a device: {' '.join(str(error).split())[:300]}") from error
    if engine == "llama_bench" and parsed.batch > 1:
        raise BadInput(
            f"llama-bench decodes one sequence, not {parsed.batch}; set batch=1 or take another engine"
        )
    return parsed


def job_for(catalog: Catalog, variant: Variant, settings: DeviceSettings, progress: Progress) -> Job:
    """Make or find the engine's files. Raises ``CannotMeasure`` and what building raises."""
    if variant.family not in ("decoder", "encoder"):
        raise CannotMeasure(f"the agent feeds texts; {variant.name} is of family {variant.family}")
    if settings.engine == "llama_bench" and variant.family != "decoder":
        raise CannotMeasure(f"llama-bench runs decoders only, and {variant.name} is an encoder")
    folder = folder_of(catalog, variant, progress=progress)
    files = _files(folder, settings, progress)
    config = json.loads((folder / "config.json").read_text())
    text = config.get("text_config", config)
    sizes = {name: path.stat().st_size for name, path in files.items()}
    protocol = settings.protocol()
    limit = text.get("max_position_embeddings")
    wanted = max(protocol.prompt_tokens, settings.decode_depth + protocol.new_tokens)
    if limit and wanted > limit:
        raise BadInput(
            f"{wanted} tokens do not fit into this model's context of {limit}; lower prompt_tokens or depth"
        )
    rule = protocol.effort.warmup
    spec: dict[str, Any] = {
        "variant": variant.id,
        "family": variant.family,
        "vocab_size": text["vocab_size"],
        "engine": settings.engine,
        "weights": settings.weights,
        "threads": settings.threads,
        "prompt_tokens": protocol.prompt_tokens,
        "new_tokens": protocol.new_tokens,
        "depth": settings.decode_depth,
        "batch": protocol.batch,
        "seed": protocol.seed,
        "settings": settings.model_dump(mode="json"),
        "effort": {
            "window": rule.window,
            "tolerance": rule.tolerance,
            "windows": rule.windows,
            "warmup_cap_s": protocol.effort.warmup_cap_s,
            "min_samples": protocol.effort.min_samples,
            "min_seconds": protocol.effort.min_seconds,
            "phase_cap_s": protocol.effort.phase_cap_s,
        },
        "limit_s": 600 + 4 * protocol.longest_s,
        "files": {name: sha256(path) for name, path in files.items()},
        "sizes": sizes,
        "needs_bytes": int(sum(sizes.values()) * NEEDS) + FIXED,
        "agent": agent_name(),
    }
    return Job({**spec, "id": content_hash(spec)[:16]}, files)


def _files(folder: Path, settings: DeviceSettings, progress: Progress) -> dict[str, Path]:
    if settings.engine == "torch":
        kept = folder
    else:
        runtime = BUILDS[settings.engine]
        asked = {"weights": settings.weights, "batch": settings.batch}
        kept = built(folder, runtime, settings_of(runtime, asked), progress)
    return {path.name: path for path in sorted(kept.iterdir()) if path.is_file() and path.name != FACTS}


def recorded(
    catalog: Catalog,
    spec: Mapping[str, Any],
    lines: Sequence[Mapping[str, Any]],
    *,
    job_id: str | None = None,
) -> Run:
    """Enter what a device measured. Raises ``CannotMeasure`` with the agent's sentence, or where its end is missing."""
    for line in lines:
        if "error" in line:
            raise CannotMeasure(f"on {spec['settings']['slug']}: {line['error']}")
    end = next((line["end"] for line in lines if "end" in line), None)
    if end is None:
        raise CannotMeasure("the result has no end: the agent was killed before it was done; measure again")
    settings = DeviceSettings.model_validate(spec["settings"])
    facts = {"host": end["host"], "software": end["software"]}
    taken_on = {**facts, "hash": content_hash(facts)}
    readings = [line for line in lines if "telemetry" in line]
    throttled = [line["throttled"] for line in readings if line.get("throttled")]
    hot = [
        line["telemetry"]["temperature_c"]
        for line in readings
        if line["telemetry"]["temperature_c"] is not None
    ]
    conditions = {
        "measured_by": "agent on the device",
        "temperature_c": {"first": hot[0], "highest": max(hot)} if hot else None,
        "throttled": throttled or None,
        "parity": "not checked on the device",
    }
    measured = Measured(
        family=spec["family"],
        samples=tuple(Sample.model_validate(line["sample"]) for line in lines if "sample" in line),
        phases=end["phases"],
        memory=Memory.model_validate(end["memory"]),
        facts=Facts(
            **{**end["facts"], "notes": tuple(end["facts"]["notes"])},
            device_peak_bytes=None,
            conditions=conditions,
        ),
        environment=taken_on,
        files=content_hash(spec["files"]),
        other_cpu_at_start=end["other_cpu_at_start"],
        load_average=end["load_average"],
        seconds=end["seconds"],
    )
    result = summarise(measured, settings.engine, settings)
    if any(int(text.split("=")[-1], 16) & 0xF for text in throttled if "=0x" in text):
        result = replace(result, flags=(*result.flags, "throttled"))
    telemetry = pd.DataFrame([line["telemetry"] for line in readings], dtype=float)
    result = replace(result, frames={**result.frames, "telemetry": telemetry})
    started = datetime.now(UTC) - timedelta(seconds=measured.seconds)
    return record(catalog, "profile", spec["variant"], result, started, job_id=job_id, taken_on=taken_on)
