"""Heal routers: after pruning, merging or quantizing, teach the routers alone to say what the base model says."""

from __future__ import annotations

import time

import pandas as pd
from pydantic import Field

from core.compress._router_descent import Curve, descend, router_parameters
from core.errors import CannotCompress
from core.models.loaded import LoadedModel
from core.models.targets import Target, targets
from core.registry import Settings, method
from core.saving.report import Error, headline, row, table
from core.train._residuals import TextParts, cut_text
from core.types import Documents, Metric, Progress, Provenance, Result, View

SAME = 1e-9
"""KL in nats below which nothing was changed that could be healed."""


class HealRoutersSettings(Settings):
    """How long, and on how much text."""

    steps: int = Field(default=200, ge=1, le=20_000, description="Updates of the router weights")
    batch: int = Field(default=8, ge=1, le=256, description="Windows per update")
    window: int = Field(default=128, ge=16, le=4096, description="Tokens that are read together")
    calibration_tokens: int = Field(
        default=32_768,
        ge=256,
        le=4_194_304,
        description="Calibration tokens; the last fifth is held out to measure on",
    )
    learning_rate: float = Field(
        default=0.01,
        gt=0,
        le=1,
        description="Size of an update, as a share of the router weights' root mean square; falls to 0",
    )
    checks: int = Field(
        default=4, ge=1, le=50, description="Times the KL on held-out text is measured on the way"
    )
    seed: int = Field(default=0, ge=0, le=1_000_000, description="Seed of the order of windows")


@method(
    "compress",
    title="Heal routers",
    needs=["moe", "text", "calibration"],
    paper="https://arxiv.org/abs/2603.02217",
    left=lambda anatomy, settings: {},  # all parameters stay
)
def run(
    loaded: LoadedModel,
    reference: LoadedModel,
    calibration: Documents | None,
    progress: Progress,
    settings: HealRoutersSettings,
) -> Result:
    """Train the routers, and nothing else, until the model says again what its base says: the cheapest recovery.

    Minimised is KL(base ‖ this model) of the next token over calibration text, by Adam, with every other weight frozen.
    Routers are a thousandth of a model, so it takes minutes on a CPU. A router learns through the routing weights of the
    experts it chose; the choice itself has no gradient. Of the weights seen, those with the smallest KL on the held-out
    fifth of the text are kept, the ones it began with included: on that text it cannot get worse, and where nothing
    helped, nothing is changed. Put it behind pruning, merging or quantizing, in the same recipe or in one of its own.
    """
    assert calibration is not None, "the registry's `needs` bring calibration text"
    started = time.monotonic()
    _refuse_other_vocabulary(loaded, reference)
    parts = cut_text(loaded, calibration, window=settings.window, max_tokens=settings.calibration_tokens)
    before = {name: p.detach().clone() for name, p in router_parameters(loaded).items()}
    with reference.lock:
        curve = descend(
            reference, loaded, parts.training, parts.held_out, steps=settings.steps, batch=settings.batch,
            learning_rate=settings.learning_rate, checks=settings.checks, seed=settings.seed, progress=progress,
        )  # fmt: skip
    parameters = dict(loaded.model.named_parameters())
    frame = table([_row(loaded, t, parameters[t.name], before.get(t.name)) for t in targets(loaded)])
    return Result(
        {"main": frame, "curve": _curve_frame(curve)},
        _VIEWS,
        (*_metrics(curve, parts), *headline(frame)),
        Provenance(
            "heal_routers", settings.model_dump(mode="json"), loaded.fingerprint,
            inputs={"calibration": calibration.fingerprint, "reference": reference.fingerprint},
            dtype=loaded.dtype, device=loaded.device,
            conditions={
                "calibration": calibration.name, "training_tokens": parts.n_training,
                "held_out_tokens": parts.n_held_out,
            },
            seconds=time.monotonic() - started,
        ),
        (_note(curve, parts, calibration),),
    )  # fmt: skip


def _refuse_other_vocabulary(loaded: LoadedModel, reference: LoadedModel) -> None:
    ours, theirs = loaded.anatomy.vocab_size, reference.anatomy.vocab_size
    if ours != theirs:
        raise CannotCompress(
            f"{loaded.ref} speaks {ours} tokens and its base {reference.ref} {theirs}: they cannot be compared; "
            "heal a variant against the base it was made from"
        )


def _row(loaded: LoadedModel, target: Target, parameter: object, before: object) -> dict[str, object]:
    """One tensor's line: a router with how far it moved, anything else as it is, packed or not."""
    weight = parameter.data  # type: ignore[attr-defined]
    packed = loaded.packed.get(target.module)
    if packed is not None:
        return row(
            target, parameter, format_=" + ".join(scheme.label for scheme in packed.schemes),
            bits=8 * packed.stored_bytes / weight.numel(), group_size="none", bytes_before=packed.stored_bytes,
            bytes_after=packed.stored_bytes, error=Error(0.0, None), touched=False, reason="not a router",
        )  # fmt: skip
    error = Error(0.0, None) if before is None else Error.between(before, weight)  # type: ignore[arg-type]
    touched = error.relative > 0
    return row(
        target, parameter, format_=str(weight.dtype).removeprefix("torch."), bits=8 * weight.element_size(),
        group_size="none", bytes_before=weight.nbytes, bytes_after=weight.nbytes, error=error, touched=touched,
        reason="" if touched else "not a router" if before is None else "training found nothing better",
    )  # fmt: skip


def _curve_frame(curve: Curve) -> pd.DataFrame:
    training = pd.DataFrame({"step": curve.step, "text": "training", "kl_nats": curve.training})
    held_out = pd.DataFrame({"step": curve.step, "text": "held out", "kl_nats": curve.held_out})
    return pd.concat([held_out, training.dropna()], ignore_index=True)


def _metrics(curve: Curve, parts: TextParts) -> tuple[Metric, ...]:
    n = parts.n_held_out
    return (
        Metric("router_kl_before", curve.held_out[0], "nats", "lower", n=n),
        Metric("router_kl_after", min(curve.held_out), "nats", "lower", n=n),
    )


def _note(curve: Curve, parts: TextParts, calibration: Documents) -> str:
    start, best = curve.held_out[0], min(curve.held_out)
    on = f"{parts.n_held_out:,} held-out tokens of {calibration.name}"
    if start < SAME:
        return f"The model says what its base says (KL {start:.2g} nats): there was nothing to heal, put it behind a change."
    if best >= start:
        return f"Healing did not help: no router weights seen had a smaller KL than the {start:.4f} nats they began with on {on}."
    return (
        f"KL to the base fell from {start:.4f} to {best:.4f} nats ({1 - best / start:.0%}) on {on}. The same text chose "
        "which weights to keep; the evaluation's KL, on other text, is the one to believe."
    )


_VIEWS = (
    View(
        "line", x="step", y="kl_nats", color="text", frame="curve", title="KL to the base model on the way", unit="nats"
    ),
    View(
        "table", x="module", text="format", title="Every tensor", tooltip=("relative_error", "touched", "reason")
    ),
)  # fmt: skip
