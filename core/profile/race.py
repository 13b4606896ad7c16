"""Two variants, runtimes or settings against each other in one session: both loaded, each idle while the other runs.

The two are fresh processes. They take turns in blocks of four stretches, A B B A or B A A B by lot, and every block gives one
paired ratio (``paired_blocks.py``). The number of blocks is fixed beforehand. Between two stretches nobody works for as long
as threads of maths libraries spin; what the other side still takes would count as other programs' time and be flagged.

The run's ``blocks`` frame has one row per stretch: block, side (a, b), order (0 to 3), value_ms (median of its steps),
steps, other_cpu, contended. ``samples`` has every step: block, side, order, iteration, value_ms.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import ExitStack
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from core.entries import base_folder_of, folder_of
from core.errors import BadInput
from core.profile._race_result import WORKLOAD, Runner, result_of_race
from core.profile.built import built
from core.profile.device_lock import exclusive
from core.profile.fresh import partner
from core.profile.measured import Measured, Stretch
from core.profile.paired_blocks import DELTA, FEWEST
from core.profile.protocol import BLOCKS, Blocks, PairedProtocol
from core.profile.reference import reference
from core.profile.runtimes._base import PLAIN, ProfileSettings
from core.recording import record
from core.registry import get
from core.types import Progress, Run, Variant, part_of, silent

if TYPE_CHECKING:
    from core.catalog.store import Catalog

Side = Literal["a", "b"]
RacePhase = Literal["prefill", "decode"]
_SIDE = "core.profile._race_side"


def race(
    catalog: Catalog,
    a: str,
    b: str,
    *,
    phase: RacePhase = "decode",
    runtime_a: str = PLAIN,
    runtime_b: str = PLAIN,
    settings_a: Mapping[str, Any] | None = None,
    settings_b: Mapping[str, Any] | None = None,
    blocks: int | None = None,
    delta: float = DELTA,
    progress: Progress = silent,
    job_id: str | None = None,
) -> Run:
    """Measure variants ``a`` and ``b`` (ids) in turn and say which is faster; entered as a run of ``b``.

    ``settings`` values may be text. ``blocks`` None takes the tier's number. A model that only reads has one phase, whatever
    ``phase`` says. Raises ``BadInput`` where the workloads differ or the blocks are too few, and as profiling does.
    """
    parsed = [_parsed(runtime_a, settings_a), _parsed(runtime_b, settings_b)]
    workload = _same_workload(*parsed)
    if blocks is not None and blocks < FEWEST:
        raise BadInput(f"{blocks} blocks give no interval; take at least {FEWEST}")
    of_tier = BLOCKS[workload.tier]
    count = Blocks(blocks or of_tier.n, of_tier.stretch_s)
    variants = [catalog.variant(id_) for id_ in (a, b)]
    started = datetime.now(UTC)
    device = next((side.device_name for side in parsed if side.device_name != "cpu"), "cpu")
    with exclusive(device, progress):
        runners = [
            _ready(catalog, variant, settings, part_of(progress, share, share + 0.15))
            for variant, settings, share in zip(variants, parsed, (0.0, 0.15), strict=True)
        ]
        protocol = PairedProtocol(workload.protocol(), phase, count, delta)
        timed, measured = _run(runners, protocol, part_of(progress, 0.3, 1.0))
    result = result_of_race(timed, runners, measured, protocol, (datetime.now(UTC) - started).total_seconds())
    return record(catalog, "race", b, result, started, job_id=job_id)


def _parsed(runtime: str, given: Mapping[str, Any] | None) -> ProfileSettings:
    """Settings from values that may be text (command line) or data (job spec)."""
    text = {k: v if isinstance(v, str) else json.dumps(v) for k, v in (given or {}).items()}
    parsed = get("profile", runtime).parse_text(text)
    assert isinstance(parsed, ProfileSettings), f"{runtime}: settings must be ProfileSettings"
    return parsed


def _same_workload(a: ProfileSettings, b: ProfileSettings) -> ProfileSettings:
    for name in WORKLOAD:
        if getattr(a, name) != getattr(b, name):
            raise BadInput(
                f"a and b must do the same work: {name} is {getattr(a, name)} and {getattr(b, name)}; give both the same"
            )
    return a


def _ready(catalog: Catalog, variant: Variant, settings: ProfileSettings, progress: Progress) -> Runner:
    """Everything that is made before the session: files of the runtime, kept answers of the artifact and its base."""
    folder = folder_of(catalog, variant, progress=progress)
    files = built(folder, settings.runtime, settings, progress)
    own = base = None
    if settings.parity:
        own = reference(folder, progress)
        if (original := base_folder_of(catalog, variant)) is not None:
            base = reference(original, progress)
    return Runner(variant, settings, folder, files, own, base)


def _run(
    runners: list[Runner], protocol: PairedProtocol, progress: Progress
) -> tuple[pd.DataFrame, list[Measured]]:
    """Every step of the session (block, side, order, iteration, value_ms, other_cpu), and what each process says of itself."""
    rows = []
    with ExitStack() as stack:
        sides = [
            stack.enter_context(partner(_SIDE, progress, threads=runner.settings.n_threads))
            for runner in runners
        ]
        phases = [
            side.ask(
                _start(runner, protocol),
                message=f"starting {runner.variant.name} in {runner.settings.runtime}",
            )
            for side, runner in zip(sides, runners, strict=True)
        ]
        if phases[0] != phases[1]:
            raise BadInput(f"a and b do not do the same work: {phases[0]['phase']} and {phases[1]['phase']}")
        for block, turn in enumerate(_order(protocol)):
            for order, side in enumerate(turn):
                time.sleep(protocol.settle_s)
                message = f"block {block + 1} of {protocol.blocks.n}, {side}"
                request = _stretch(phases[0]["phase"], protocol)
                share = (block + order / len(turn)) / protocol.blocks.n
                said = sides["ab".index(side)].ask(request, message=message, share=share)
                stretch = Stretch.model_validate(said)
                rows += [
                    (block, side, order, i, ms, stretch.other_cpu) for i, ms in enumerate(stretch.values_ms)
                ]
        measured = [
            Measured.model_validate(side.ask(_finish(runner), message="checking its answers", share=1.0))
            for side, runner in zip(sides, runners, strict=True)
        ]
    columns = ["block", "side", "order", "iteration", "value_ms", "other_cpu"]
    return pd.DataFrame(rows, columns=columns), measured


def _order(protocol: PairedProtocol) -> list[str]:
    """ABBA in one half of the blocks and BAAB in the other, in an order by lot."""
    turns = ["abba" if block % 2 else "baab" for block in range(protocol.blocks.n)]
    return [str(turn) for turn in np.random.default_rng(protocol.workload.seed).permutation(turns)]


def _start(runner: Runner, protocol: PairedProtocol) -> dict[str, Any]:
    return {
        "do": "start",
        "runtime": runner.settings.runtime,
        "folder": str(runner.folder),
        "files": str(runner.files),
        "settings": runner.settings.model_dump(mode="json"),
        "phase": protocol.phase,
    }


def _stretch(phase: str, protocol: PairedProtocol) -> dict[str, Any]:
    return {
        "do": "stretch",
        "phase": phase,
        "seconds": protocol.blocks.stretch_s,
        "fewest_steps": protocol.fewest_steps,
    }


def _finish(runner: Runner) -> dict[str, Any]:
    paths = {"reference": runner.own, "base": runner.base}
    return {"do": "finish", **{name: str(path) if path else None for name, path in paths.items()}}
