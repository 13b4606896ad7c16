"""What holds a phase back (weights, KV cache, arithmetic, or calls), by how much, and what to try next.

A step cannot be shorter than reading its weights and its cache at the machine's bandwidth, nor than its multiplications
at its matrix rate; reading and multiplying overlap, so the longer of the two is the floor. What was measured beyond the
floor is calls between kernels and kernels that do not reach the roofs. The cause is the largest of the parts.

Every action changes one of these numbers, and the step is counted anew: the action that leaves the shortest step is the
next best, and that step is a bound (modelled, from measured roofs), never a promise.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import pandas as pd

from core.profile.machine import Roofs
from core.profile.roofline import matrix_rate, measured_steps
from core.profile.runtimes._base import PLAIN
from core.profile.work import NUMBER_BYTES, Step, Work
from core.types import Progress, silent

if TYPE_CHECKING:
    from core.catalog.store import Catalog

Cause = Literal["weights", "kv", "compute", "overhead"]
CAUSES: dict[Cause, str] = {
    "weights": "reading its weights",
    "kv": "reading its KV cache",
    "compute": "its multiplications",
    "overhead": "calls, and kernels below the roofs",
}
COLUMNS = (
    *("variant", "run", "runtime", "phase", "cause", "seconds"),
    *("weights_s", "kv_s", "compute_s", "rest_s", "sentence", "action", "gain"),
)
NEXT_BITS = ((12.0, 8.5, "8"), (6.0, 4.5, "4"))
"""Above so many bits per weight: bits with scales that the next smaller format takes, and its name."""
WORTH = 1.05
"""A gain below this is none."""
SHORTER = 0.75
"""Layers left where nothing else helps."""


@dataclass(frozen=True)
class Action:
    """Something to try."""

    text: str
    seconds: float
    """Of the step at best, once it is done; modelled."""
    gain: float
    """Times as fast, at most."""


@dataclass(frozen=True)
class Verdict:
    """Why a phase takes as long as it does."""

    phase: str
    cause: Cause
    seconds: float
    weights_s: float
    """What reading the weights once takes at this machine's measured bandwidth."""
    kv_s: float
    compute_s: float
    """What the multiplications take at the measured matrix rate; runs beside the reading, so only the larger counts."""
    rest_s: float
    """Measured less the larger of the two: calls between kernels, and kernels slower than the roofs."""
    calls_s: float | None
    """Of the rest, what calls take: those of empty layers in eager torch here; None for another runtime."""
    sentence: str
    action: str
    """The next best thing to try, and what it could bring at most."""
    actions: tuple[Action, ...]
    """Everything that could bring something, the best first."""


def verdict(step: Step, roofs: Roofs) -> Verdict:
    """Why a measured step takes its time on the machine with these roofs, and what to try next."""
    weights_s, kv_s, compute_s = _parts(step.work, step.dtype, roofs)
    floor = max(weights_s + kv_s, compute_s)
    rest_s = max(0.0, step.seconds - floor)
    parts: dict[Cause, float] = {"overhead": rest_s}
    if compute_s > weights_s + kv_s:
        parts["compute"] = compute_s
    else:
        parts |= {"weights": weights_s, "kv": kv_s}
    cause = max(parts, key=lambda name: parts[name])
    calls_s = None
    if step.runtime == PLAIN:
        calls_s = step.n_layers * roofs.layer_overhead_s + roofs.step_overhead_s
        calls_s = min(calls_s, rest_s)
    actions = tuple(sorted(_actions(step, roofs, rest_s, calls_s), key=lambda action: action.seconds))
    sentence = (
        f"{step.phase} takes {_ms(step.seconds)}, most of it {CAUSES[cause]} ({parts[cause] / step.seconds:.0%}): "
        f"at this machine's roofs weights would take {_ms(weights_s)}, cache {_ms(kv_s)}, multiplications "
        f"{_ms(compute_s)}"
    )
    if calls_s is not None:
        sentence += f"; beyond that, calls of layers take {_ms(calls_s)} and kernels {_ms(rest_s - calls_s)}"
    best = actions[0]
    return Verdict(
        phase=step.phase,
        cause=cause,
        seconds=step.seconds,
        weights_s=weights_s,
        kv_s=kv_s,
        compute_s=compute_s,
        rest_s=rest_s,
        calls_s=calls_s,
        sentence=sentence,
        action=f"{best.text}: at most {best.gain:.2f} × as fast ({_ms(best.seconds)}, modelled)",
        actions=actions,
    )


def verdicts(catalog: Catalog, base_id: str, roofs: Roofs, progress: Progress = silent) -> pd.DataFrame:
    """A verdict for every row of ``roofline``: variant, run, runtime, phase, cause, parts in s, sentence, action, gain.

    Raises what ``roofline`` raises.
    """
    rows = []
    for variant, run, _, step in measured_steps(catalog, base_id, roofs.device, progress):
        found = verdict(step, roofs)
        rows.append(
            {
                "variant": variant.id,
                "run": run.id,
                "runtime": step.runtime,
                **{name: getattr(found, name) for name in COLUMNS[3:-1]},
                "gain": found.actions[0].gain,
            }
        )
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _parts(work: Work, dtype: str, roofs: Roofs) -> tuple[float, float, float]:
    """Seconds of weights, cache and multiplications at the roofs."""
    bandwidth = roofs.read_bytes_per_s()
    return work.weight_bytes / bandwidth, work.kv_bytes / bandwidth, work.flops / matrix_rate(roofs, dtype)


def _actions(step: Step, roofs: Roofs, rest_s: float, calls_s: float | None) -> Iterator[Action]:
    """What could make the step shorter, with the step that each would leave."""
    found = [
        action
        for text, work, dtype, rest in _changes(step, roofs, rest_s, calls_s)
        if (action := _action(step, roofs, text, work, dtype, rest)).gain >= WORTH
    ]
    yield from found
    if not found:
        less = step.work
        work = replace(
            less,
            flops=less.flops * SHORTER,
            weight_bytes=less.weight_bytes * SHORTER,
            kv_bytes=less.kv_bytes * SHORTER,
        )
        text = "the machine is used up; leave out a quarter of the layers, or take a faster machine"
        yield _action(step, roofs, text, work, step.dtype, rest_s * SHORTER)


def _action(step: Step, roofs: Roofs, text: str, work: Work, dtype: str, rest_s: float) -> Action:
    weights_s, kv_s, compute_s = _parts(work, dtype, roofs)
    seconds = min(step.seconds, max(weights_s + kv_s, compute_s) + rest_s)
    return Action(text, seconds, step.seconds / seconds)


def _changes(
    step: Step, roofs: Roofs, rest_s: float, calls_s: float | None
) -> Iterator[tuple[str, Work, str, float]]:
    """Each action: its words, and the work, dtype and rest that it would leave."""
    work = step.work
    packed = replace(work, weight_bytes=min(work.weight_bytes, work.stored_bytes))
    if work.stored_bytes < 0.9 * work.weight_bytes:
        reads = f"{_mb(work.stored_bytes)} are stored, {_mb(work.weight_bytes)} are read"
        yield f"keep the weights packed in memory, as these files do: {reads}", packed, step.dtype, rest_s
    else:
        for above, bits, name in NEXT_BITS:
            if work.weights and 8 * work.weight_bytes / work.weights > above:
                fewer = replace(work, weight_bytes=work.weights * bits / 8)
                yield (
                    f"keep the weights in {name} bits, in a runtime that reads them so",
                    fewer,
                    step.dtype,
                    rest_s,
                )
                break
    small = NUMBER_BYTES["int8"]
    if work.kv_numbers and work.kv_bytes / work.kv_numbers > 1.2 * small:
        yield (
            "keep the KV cache in 8 bits",
            replace(work, kv_bytes=work.kv_numbers * small),
            step.dtype,
            rest_s,
        )
    faster = max(("float32", "bfloat16", "int8"), key=roofs.flops_per_s)
    if roofs.flops_per_s(faster) > matrix_rate(roofs, step.dtype):
        yield f"multiply in {faster}, which this machine does faster", work, faster, rest_s
    if calls_s is None:
        text = "look for kernels that come nearer to the roofs: other thread counts, another runtime"
        yield text, work, step.dtype, 0.0
        return
    if calls_s > 0:
        text = "run it as one graph (torch.compile, CUDA graphs), without Python between layers"
        yield text, work, step.dtype, rest_s - calls_s
    text = "run it in a runtime with kernels of its own (llama.cpp, OpenVINO, ONNX Runtime)"
    yield text, packed, step.dtype, 0.0


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"


def _mb(nbytes: float) -> str:
    return f"{nbytes / 1e6:.0f} MB"
