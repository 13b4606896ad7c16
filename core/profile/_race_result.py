"""What a race says: its verdict, both sides' times, and everything they depend on. Pure but for the number of its session."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from core.catalog.records import new_id
from core.profile.measured import Measured
from core.profile.paired_blocks import FEWEST, PairVerdict, compare_blocks
from core.profile.protocol import PairedProtocol
from core.profile.quantiles import quantile
from core.profile.runtimes._base import ProfileSettings
from core.types import Metric, Provenance, Result, Variant, View

WORKLOAD = ("tier", "prompt_tokens", "new_tokens", "batch", "seed", "depth")
"""Settings that both sides must have in common; threads, number formats and devices may be what is compared."""


@dataclass(frozen=True)
class Runner:
    """One side, ready to be started."""

    variant: Variant
    settings: ProfileSettings
    folder: Path
    files: Path
    own: Path | None
    base: Path | None


def result_of_race(
    steps: pd.DataFrame,
    runners: list[Runner],
    measured: list[Measured],
    protocol: PairedProtocol,
    seconds: float,
) -> Result:
    """The result of every step (block, side, order, iteration, value_ms, other_cpu) of a session."""
    grouped = steps.groupby(["block", "order", "side"], as_index=False)
    stretches = grouped.agg(
        value_ms=("value_ms", "median"), steps=("value_ms", "size"), other_cpu=("other_cpu", "first")
    )
    stretches["contended"] = stretches["other_cpu"] > protocol.workload.contended_share
    blocks = _blocks_of(stretches)
    clean = blocks[~blocks["contended"]]
    used = clean if len(clean) >= FEWEST else blocks
    verdict = compare_blocks(used["a"].to_numpy(), used["b"].to_numpy(), delta=protocol.delta)
    flags = []
    if used["contended"].any():
        flags.append("contention")
    if any(not end.steady for side in measured for end in side.phases.values()):
        flags.append("no_steady_state")
    notes = [verdict.sentence]
    if len(used) < len(blocks):
        notes.append(f"{len(blocks) - len(used)} of {len(blocks)} blocks were contended and left out")
    notes.append("a verdict is about this session; numbers of other sessions are not paired with it")
    names = {
        "a": f"{runners[0].variant.name}, {runners[0].settings.runtime}",
        "b": f"{runners[1].variant.name}, {runners[1].settings.runtime}",
    }
    return Result(
        frames={"blocks": stretches, "samples": steps.drop(columns="other_cpu")},
        views=(
            View(
                "scatter",
                x="block",
                y="value_ms",
                color="side",
                frame="blocks",
                title=f"Time of a step, stretch by stretch: a is {names['a']}; b is {names['b']}",
                unit="ms",
                tooltip=("order", "steps", "other_cpu"),
            ),
        ),
        metrics=tuple(_metrics(verdict, used, protocol)),
        provenance=_provenance(verdict, runners, measured, protocol, seconds),
        notes=tuple(notes),
        flags=tuple(flags),
    )


def _blocks_of(stretches: pd.DataFrame) -> pd.DataFrame:
    """One row per block from the ``blocks`` frame: a, b (ms, the geometric mean of a side's two stretches), contended."""
    logs = stretches.assign(log_ms=np.log(stretches["value_ms"]))
    times = logs.pivot_table(index="block", columns="side", values="log_ms", aggfunc="mean").transform("exp")
    return times.assign(contended=stretches.groupby("block")["contended"].any())


def _metrics(verdict: PairVerdict, used: pd.DataFrame, protocol: PairedProtocol) -> list[Metric]:
    found = [
        Metric(
            f"speed_ratio_{protocol.phase}", verdict.ratio, "×", "higher", verdict.n_blocks,
            verdict.low, verdict.high, verdict.interval,
        )
    ]  # fmt: skip
    for side in ("a", "b"):
        median = quantile(used[side].tolist(), 0.5)
        assert median is not None, "there are blocks"
        how = "95 % order-statistics interval of the median block"
        found.append(
            Metric(f"step_ms_{side}", median.value, "ms", "lower", median.n, median.low, median.high, how)
        )
    return found


def _provenance(
    verdict: PairVerdict,
    runners: list[Runner],
    measured: list[Measured],
    protocol: PairedProtocol,
    seconds: float,
) -> Provenance:
    session = new_id()
    sides = {
        side: {
            "variant": runner.variant.id,
            "name": runner.variant.name,
            "runtime": runner.settings.runtime,
            "settings": runner.settings.model_dump(mode="json"),
            "threads": runner.settings.n_threads,
            "device": runner.settings.device_name,
            "dtype": own.facts.dtype,
            "conditions": own.facts.conditions,
            "files": own.files,
            "parity_kl": float(np.mean(own.parity.kl)) if own.parity and own.parity.kl else None,
            "parity_max_abs": own.parity.max_abs if own.parity else None,
            "session": session,
        }
        for side, runner, own in zip("ab", runners, measured, strict=True)
    }
    return Provenance(
        method="race",
        settings={"phase": protocol.phase, "blocks": protocol.blocks.n, "delta": protocol.delta},
        inputs={"files_a": measured[0].files, "files_b": measured[1].files},
        dtype=measured[1].facts.dtype,
        device=runners[1].settings.device_name,
        protocol=str(protocol),
        conditions={
            "sides": sides,
            "session": session,
            "verdict": asdict(verdict) | {"sentence": verdict.sentence},
            "phase": protocol.phase,
            "workload": {name: getattr(runners[0].settings, name) for name in WORKLOAD},
            "protocol_hash": protocol.hash,
            "environment_hash": measured[1].environment["hash"],
            "environment": measured[1].environment,
        },
        seconds=seconds,
    )
