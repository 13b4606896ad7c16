"""A grid of measurements: variants × runtimes × settings as cells, which of them are measured already, and how long the rest take.

A cell is one run of one variant in one runtime with one whole set of settings. It is measured already where the catalog has
a profile of that variant with the same runtime, settings, protocol and environment. The estimate of its seconds follows
the protocol's own stopping rules, with the paces that were measured before, or a guess by size where none were.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd

from core.errors import BadInput, BadSettings, Cancelled, SlimscopeError
from core.loop import profile_variant
from core.profile.environment import environment
from core.profile.offers import Offer, offers
from core.profile.protocol import Effort
from core.profile.runtimes._base import ProfileSettings
from core.registry import get
from core.types import Progress, Run, Variant, content_hash, part_of, silent

if TYPE_CHECKING:
    from core.catalog.store import Catalog

MOST = 512
"""Cells of one grid: at half a minute each, a night's work."""
USUAL = ("prompt_tokens", "new_tokens", "batch", "threads")
"""A cell moves its variant's headline numbers only where these are the runtime's defaults."""
SHOWN = ("ttft_ms", "prefill_tokens_per_s", "tpot_ms", "decode_tokens_per_s", "latency_ms", "images_per_s")
START_S = 10.0
"""Guess for a process that imports its libraries, loads a model and holds its answers against kept ones."""
GUESSED_FLOPS, GUESSED_BYTES_PER_S = 3e10, 8e9
"""Guess for a core's matrix products and a machine's memory where nothing was measured yet."""


@dataclass(frozen=True)
class Cell:
    """One measurement of a grid."""

    variant: str
    name: str
    runtime: str
    settings: Mapping[str, Any]
    """Every setting, defaults included."""
    key: str
    """Hash of the variant's content, runtime and settings."""
    measured_run: str | None
    """The newest run that measured exactly this here, a valid one before a flagged one."""
    flags: tuple[str, ...]
    """Of that run."""
    seconds: float
    """Expected, if it is measured now."""
    basis: Literal["paces measured before", "guess by size"]
    headline: bool
    """Whether its numbers become its variant's headline numbers."""
    refused: str
    """Why it cannot be measured here; else empty."""

    @property
    def to_do(self) -> bool:
        """Whether it is still to be measured, and can be."""
        return self.measured_run is None and not self.refused


@dataclass(frozen=True)
class _Pace:
    """Seconds of a variant in a runtime: per token read, per token and sequence decoded, and of everything else of a run."""

    token_s: float
    step_s: float
    rest_s: float
    basis: Literal["paces measured before", "guess by size"]


def cells(
    catalog: Catalog,
    variants: Sequence[str],
    runtimes: Sequence[str] = ("torch_eager",),
    *,
    threads: Sequence[Any] = (),
    batches: Sequence[Any] = (),
    prompts: Sequence[Any] = (),
    depths: Sequence[Any] = (),
    others: Mapping[str, Sequence[Any]] | None = None,
) -> list[Cell]:
    """Every combination, without repeats; an axis without values keeps the runtime's default.

    ``variants`` are ids. ``others`` are values of any further settings, e.g. ``{"tier": ["rapid"], "weights": ["int8"]}``;
    a setting that a runtime does not have is left out there. Values may be text. Raises ``BadInput`` for a setting that none
    has, a value that is not allowed, and more than ``MOST`` cells.
    """
    axes = {"threads": threads, "batch": batches, "prompt_tokens": prompts, "depth": depths, **(others or {})}
    axes = {name: values for name, values in axes.items() if values}
    offered = {offer.id: offer for offer in offers()}
    fields = {runtime: get("profile", runtime).settings.model_fields for runtime in runtimes}
    for name in axes:
        if not any(name in known for known in fields.values()):
            raise BadSettings(
                f"none of {', '.join(runtimes)} has a setting {name!r}; see `slimscope methods`"
            )
    found: dict[str, Cell] = {}
    for variant in (catalog.variant(id_) for id_ in dict.fromkeys(variants)):
        runs = [run for run in catalog.runs(variant.id) if run.kind == "profile"]
        for runtime in runtimes:
            own = {name: values for name, values in axes.items() if name in fields[runtime]}
            for values in product(*own.values()):
                cell = _cell(variant, offered[runtime], dict(zip(own, values, strict=True)), runs)
                found.setdefault(cell.key, cell)
                if len(found) > MOST:
                    raise BadInput(f"a grid has at most {MOST} cells; give fewer values")
    return list(found.values())


def measure_cells(catalog: Catalog, chosen: Sequence[Cell], *, progress: Progress = silent) -> pd.DataFrame:
    """Measure what is to do, one after another; a row per cell, in order.

    Columns: variant, name, runtime, the settings that differ between cells, state (measured now, measured before, refused,
    failed), then ``SHOWN`` with their intervals as far as measured, flags, run, reason. A cell that fails keeps its row and
    the others go on; raises its error where nothing else is left to show.
    """
    to_do, rows, errors, done = sum(cell.seconds for cell in chosen if cell.to_do), [], [], 0.0
    for cell in chosen:
        row: dict[str, Any] = {"variant": cell.variant, "name": cell.name, "runtime": cell.runtime}
        row |= {name: cell.settings.get(name) for name in differing(chosen)}
        if not cell.to_do:
            state = "refused" if cell.refused else "measured before"
            run = next((r for r in catalog.runs(cell.variant) if r.id == cell.measured_run), None)
            rows.append({**row, "state": state, "reason": cell.refused, **_numbers(run)})
            continue
        part = part_of(progress, done / to_do, (done + cell.seconds) / to_do)
        done += cell.seconds
        try:
            run = profile_variant(
                catalog,
                cell.variant,
                method=cell.runtime,
                settings=cell.settings,
                headline=cell.headline,
                progress=part,
            )
            rows.append({**row, "state": "measured now", "reason": "", **_numbers(run)})
        except Cancelled:
            raise
        except SlimscopeError as error:
            errors.append(error)
            rows.append({**row, "state": "failed", "reason": str(error)})
    if errors and len(errors) == len(rows):
        raise errors[0]
    return pd.DataFrame(rows)


def differing(chosen: Sequence[Cell]) -> list[str]:
    """Names of the settings that are not the same in all cells whose runtime has them."""
    values: dict[str, set[str]] = {}
    for cell in chosen:
        for name, value in cell.settings.items():
            values.setdefault(name, set()).add(str(value))
    return [name for name, found in values.items() if len(found) > 1]


def _cell(variant: Variant, offer: Offer, values: Mapping[str, Any], runs: Sequence[Run]) -> Cell:
    method = get("profile", offer.id)
    text = {name: v if isinstance(v, str) else json.dumps(v) for name, v in values.items()}
    parsed = method.parse_text(text)
    assert isinstance(parsed, ProfileSettings), f"{offer.id}: settings must be ProfileSettings"
    settings = parsed.model_dump(mode="json")
    known = next(iter(_same(runs, parsed, settings)), None)
    pace = _pace(variant, parsed, runs)
    usual = method.parse({})
    return Cell(
        variant=variant.id,
        name=variant.name,
        runtime=offer.id,
        settings=settings,
        key=content_hash([variant.fingerprint, offer.id, settings]),
        measured_run=known.id if known else None,
        flags=known.flags if known else (),
        seconds=_phases_s(variant, parsed, pace) + pace.rest_s,
        basis=pace.basis,
        headline=all(getattr(parsed, name) == getattr(usual, name) for name in USUAL),
        refused=_refused(variant, offer, "decoder" in method.needs),
    )


def _refused(variant: Variant, offer: Offer, decoders_only: bool) -> str:
    if not offer.available:
        return offer.reason or f"{' and '.join(offer.missing)} missing: {offer.install}"
    if variant.family not in offer.families or (decoders_only and variant.family != "decoder"):
        return f"{offer.title} does not take a {variant.family}"
    return ""


def _same(runs: Sequence[Run], parsed: ProfileSettings, settings: Mapping[str, Any]) -> list[Run]:
    """The runs that measured exactly this here: valid ones first, then newest first."""
    protocol, here = parsed.protocol().hash, _environment_hash(parsed.device_name)
    same = [
        run
        for run in runs
        if run.environment == here
        and run.conditions.get("method") == parsed.runtime
        and run.conditions.get("protocol_hash") == protocol
        and run.conditions.get("settings") == settings
    ]
    return sorted(same, key=lambda run: run.status != "valid")


@cache
def _environment_hash(device: str) -> str | None:
    """Of this machine and software; None where it has no such device, so that nothing was measured on it."""
    try:
        return str(environment(device)["hash"])
    except (RuntimeError, AssertionError):  # torch's words for no CUDA
        return None


# --- how long ---------------------------------------------------------------------------------------------


def _pace(variant: Variant, settings: ProfileSettings, runs: Sequence[Run]) -> _Pace:
    """From the newest run in the same runtime with as many threads, then in the same runtime, then of the variant at all."""

    def likeness(run: Run) -> tuple[bool, bool]:
        same = run.conditions.get("method") == settings.runtime
        return not same, run.conditions.get("threads") != settings.n_threads

    for run in sorted(runs, key=likeness):
        times = {m.name.split("_ms")[0]: m.value / 1e3 for m in run.measurements if "_ms" in m.name}
        read = times.get("ttft", times.get("latency"))
        given = run.conditions.get("settings", {})
        if read is None or not given:
            continue
        token_s = read / (given["prompt_tokens"] * given["batch"])
        step_s = times.get("tpot", 0.0)
        pace = _Pace(token_s, step_s, 0.0, "paces measured before")
        then = get("profile", run.conditions["method"]).parse(given)
        assert isinstance(then, ProfileSettings)
        took = (run.ended_at - run.started_at).total_seconds() - _phases_s(variant, then, pace)
        return _Pace(token_s, step_s, max(2.0, took), "paces measured before")
    token_s = 2 * variant.parameters / (GUESSED_FLOPS * settings.n_threads)
    return _Pace(token_s, variant.bytes / GUESSED_BYTES_PER_S, START_S, "guess by size")


def _phases_s(variant: Variant, settings: ProfileSettings, pace: _Pace) -> float:
    """Seconds of warming up and measuring by the protocol's rules."""
    effort, batch = settings.protocol().effort, settings.batch
    seconds = _phase_s(effort, pace.token_s * settings.prompt_tokens * batch, 0.0)
    if variant.family == "decoder":
        before = pace.token_s * settings.decode_depth * batch / settings.new_tokens
        seconds += _phase_s(effort, pace.step_s, before)
    return seconds


def _phase_s(effort: Effort, step_s: float, untimed_s: float) -> float:
    """Of one phase, whose every step comes with so much that is not timed."""
    each = step_s + untimed_s
    warm = min(effort.warmup_cap_s, max(effort.warmup.smallest_n * each, 0.2))
    return warm + min(effort.phase_cap_s, max(effort.min_seconds, effort.min_samples * each))


def _numbers(run: Run | None) -> dict[str, Any]:
    """The shown measurements of a run with their intervals, whatever suffix its runtime gives them."""
    if run is None:
        return {}
    found: dict[str, Any] = {}
    for m in run.measurements:
        stem = next((name for name in SHOWN if m.name == name or m.name.startswith(f"{name}_")), None)
        if stem is not None:
            found |= {stem: m.value, f"{stem}_low": m.low, f"{stem}_high": m.high}
    return {**found, "flags": " ".join(run.flags), "run": run.id}
