"""Is it still that model? The measured process answers real text, and is held against the artifact itself.

A speed is that of a model only while the answers are that model's. So the process that was measured reads the first 24
tokens of 16 texts, as wide as it was measured, and is then forced through 16 more tokens each: 272 positions. A
runtime that keeps the weights as they are stored and computes in float32 must give the same logits up to rounding, or
the run is refused; a runtime that rounds is another model, whose loss is measured and told.

Legend: ``T`` texts, ``S`` positions per text, ``V`` vocabulary, classes or hidden width.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import numpy as np

from core.errors import CannotMeasure
from core.profile.measured import Facts, Parity
from core.profile.reference import Reference, read
from core.profile.runtimes._base import PARITY_PROMPT, ProfileSettings, Runtime
from core.types import Family, Metric

EXACT = 1e-3
"""Largest difference of a logit, as a share of the logits' range, that float32 sums in another order may make."""
LOSS_FLAGGED = 0.1
"""Nats per token beyond which a run is flagged: the model in this runtime answers noticeably otherwise."""
FEWEST = 4
"""Texts that are always asked, however slow the model is."""
DRAWS = 2000
_BASE: ContextVar[Path | None] = ContextVar("base", default=None)


@contextmanager
def against_base(folder: Path | None) -> Iterator[None]:
    """Hold the runs made inside also against a base's own answers; its folder, or None."""
    token = _BASE.set(folder)
    try:
        yield
    finally:
        _BASE.reset(token)


def base_folder() -> Path | None:
    """The base that this run is also held against."""
    return _BASE.get()


def check(
    runtime: Runtime,
    family: Family,
    settings: ProfileSettings,
    own: Path,
    base: Path | None,
    *,
    longest_s: float,
) -> Parity:
    """Ask the runtime what the artifact was asked, and compare; stops asking after ``longest_s``, at a whole text.

    Raises ``CannotMeasure`` where the answers have another shape.
    """
    wanted = read(own)
    found, seconds = _ask(runtime, family, wanted, settings.batch, longest_s)
    expected = wanted.answers[: len(found)]
    if found.shape != expected.shape:
        raise CannotMeasure(
            f"{settings.runtime} answers in shape {found.shape[1:]} where the model answers in {expected.shape[1:]}; "
            "measure it in another runtime, or set parity=false"
        )
    kl, top1 = _distance(found, expected, names_classes=family == "decoder" or expected.ndim == 2)
    kl_base: tuple[float, ...] = ()
    if base is not None:
        original = read(base)
        same = (
            np.array_equal(original.inputs, wanted.inputs) and original.answers.shape == wanted.answers.shape
        )
        if same and kl:
            kl_base, _ = _distance(found, original.answers[: len(found)], names_classes=True)
    return Parity(
        texts=len(found),
        positions=int(np.prod(expected.shape[:-1])),
        kl=kl,
        top1=top1,
        kl_base=kl_base,
        cosine=None if kl else _cosine(found, expected),
        max_abs=float(np.abs(found - expected).max()),
        span=float(np.ptp(expected)),
        rounds_inputs=wanted.rounds_inputs,
        seconds=seconds,
    )


def refuse_another_model(parity: Parity, facts: Facts, settings: ProfileSettings) -> None:
    """Raise ``CannotMeasure`` where a runtime that changes nothing answers otherwise than the artifact."""
    exact = facts.exact if facts.exact is not None else facts.dtype == "float32" and not settings.marks
    if not np.isfinite(parity.max_abs) or (
        exact and not parity.rounds_inputs and parity.max_abs > EXACT * parity.span
    ):
        raise CannotMeasure(
            f"{settings.runtime} does not run this model as it is: over {parity.positions} positions of real text its "
            f"answers differ by up to {parity.max_abs:.3g}, {parity.max_abs / parity.span:.1e} of their range "
            f"({EXACT:.0e} is rounding). Its speed would be another model's; measure it in another runtime"
        )


def metrics(parity: Parity) -> Iterator[Metric]:
    """KL and agreement by position, or the cosine of hidden states; and the largest difference."""
    n = parity.positions
    for name, values, unit, better in (
        ("parity_kl", parity.kl, "nats/token", "lower"),
        ("parity_kl_base", parity.kl_base, "nats/token", "lower"),
        ("parity_top1", parity.top1, "", "higher"),
    ):
        if values:
            low, high, how = _interval(values)
            yield Metric(name, float(np.mean(values)), unit, better, n, low, high, how)  # type: ignore[arg-type]
    if parity.cosine is not None:
        yield Metric(
            "parity_cosine", parity.cosine, "", "higher", n, interval="none: one number of all positions"
        )
    yield Metric("parity_max_abs", parity.max_abs, "", "lower", n, interval="none: a largest value")


def flags(parity: Parity) -> Iterator[str]:
    """``parity_loss`` where the answers have moved noticeably."""
    if parity.kl and np.mean(parity.kl) > LOSS_FLAGGED:
        yield "parity_loss"


def notes(parity: Parity) -> Iterator[str]:
    """What was compared, in a sentence."""
    said = (
        f"KL {np.mean(parity.kl):.2g} nats per token, the likeliest answer the same at {np.mean(parity.top1):.1%}"
        if parity.kl
        else f"cosine of hidden states {parity.cosine:.5f}"
    )
    yield (
        f"held against the artifact itself in float32 at {parity.positions} positions of {parity.texts} texts: {said}, "
        f"largest difference {parity.max_abs:.2g} of a range of {parity.span:.3g}"
    )
    if parity.rounds_inputs:
        yield "the artifact also rounds what its layers read, which this runtime need not do"


def _ask(
    runtime: Runtime, family: Family, wanted: Reference, batch: int, longest_s: float
) -> tuple[np.ndarray, float]:
    """The runtime's answers to the first texts, as many as there was time for, and the seconds."""
    n, start, parts = len(wanted.inputs), time.perf_counter(), []
    for first in range(0, n, batch):
        rows = np.take(wanted.inputs, range(first, first + batch), axis=0, mode="wrap")
        parts.append(_ask_rows(runtime, family, rows)[: n - first])
        if first + batch >= FEWEST and time.perf_counter() - start > longest_s:
            break
    return np.concatenate(parts), time.perf_counter() - start


def _ask_rows(runtime: Runtime, family: Family, rows: np.ndarray) -> np.ndarray:
    if family != "decoder":
        runtime.prefill(rows)
        return runtime.logits()
    runtime.prefill(rows[:, :PARITY_PROMPT])
    answers = [runtime.logits()]
    for place in range(PARITY_PROMPT, rows.shape[1]):
        runtime.decode(rows[:, place : place + 1])
        answers.append(runtime.logits())
    return np.stack(answers, axis=1)


def _distance(
    found: np.ndarray, expected: np.ndarray, *, names_classes: bool
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Per text: mean KL(expected ‖ found) in nats, and share of equal likeliest answers; empty for hidden states."""
    from scipy.special import log_softmax

    if not names_classes:
        return (), ()
    kl, top1 = [], []
    for one, other in zip(expected, found, strict=True):  # a text at a time: float64 logits of all are large
        p, q = (log_softmax(np.atleast_2d(logits).astype(np.float64), axis=-1) for logits in (one, other))
        kl.append(max(0.0, float((np.exp(p) * (p - q)).sum(-1).mean())))
        top1.append(float((p.argmax(-1) == q.argmax(-1)).mean()))
    return tuple(kl), tuple(top1)


def _cosine(found: np.ndarray, expected: np.ndarray) -> float:
    """Mean cosine of the hidden states of each position."""
    lengths = np.linalg.norm(found, axis=-1) * np.linalg.norm(expected, axis=-1)
    return float(((found * expected).sum(-1) / lengths).mean())


def _interval(values_T: tuple[float, ...]) -> tuple[float | None, float | None, str]:
    from core.evaluate._intervals import Bootstrap

    found = Bootstrap(len(values_T), draws=DRAWS, seed=0, unit="texts").ratio(
        np.asarray(values_T), np.ones(len(values_T))
    )
    return found.low, found.high, found.how or "none: too few texts"
