"""A catalog full of invented variants, made through the real Catalog: for looking at pages and testing them.

Every number is drawn from a seeded generator and means nothing; names say ``synthetic``. Never shipped as a result.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import count

import numpy as np
import pandas as pd

from core.catalog.store import Catalog
from core.types import Better, Measurement, Run, RunKind, RunStatus, Variant, canonical_json, content_hash

START = datetime(2026, 11, 1, 9, 0, tzinfo=UTC)
PARAMETERS = 134_515_008
LAYERS = 30
_RUN_IDS = count()


def measurement(
    name: str, value: float, unit: str, better: Better, *, spread: float = 0.0, n: int | None = None
) -> Measurement:
    """One number with a symmetric interval of relative half-width ``spread``."""
    if not spread:
        return Measurement(name, value, unit, better, n)
    how = "order statistics" if unit in ("tokens/s", "ms") else "paired bootstrap over documents, 2000 draws"
    low, high = value * (1 - spread), value * (1 + spread)
    return Measurement(name, value, unit, better, n, low, high, how, {"prompt_tokens": 128})


def run(
    kind: RunKind,
    variant: str,
    measurements: list[Measurement],
    *,
    minute: int,
    flags: tuple[str, ...] = (),
    **conditions: object,
) -> Run:
    """A finished run, ``minute`` minutes after the start of time."""
    status: RunStatus = "flagged" if flags else "valid"
    ended = START + timedelta(minutes=minute)
    return Run(
        id=f"synthetic{next(_RUN_IDS):07d}",
        kind=kind,
        variant_id=variant,
        status=status,
        flags=flags,
        protocol="fixed-ids/1 quick 0123456789ab" if kind == "profile" else "",
        conditions={"device": "cpu", "dtype": "float32", "threads": 2, **conditions},
        environment="",
        started_at=ended - timedelta(seconds=40),
        ended_at=ended,
        measurements=tuple(measurements),
    )


def recipe(method: str, **settings: object) -> str:
    """The canonical JSON of a one-step recipe."""
    return canonical_json({"schema_version": 1, "steps": [{"method": method, "settings": settings}]})


def layer_stats(bits: float, random: np.random.Generator) -> pd.DataFrame:
    """Invented per-weight errors: more bits, less error, the ends of the model worse."""
    parts = {"q": 331776, "k": 110592, "v": 110592, "o": 331776, "gate": 884736, "up": 884736, "down": 884736}
    rows = []
    for layer in range(LAYERS):
        edge = 1 + 1.5 * (layer in (0, 1, LAYERS - 1))
        for part, parameters in parts.items():
            error = edge * 2.0 ** (1 - bits) * random.uniform(0.7, 1.3)
            rows.append(
                (
                    f"model.layers.{layer}.{part}_proj",
                    layer,
                    part,
                    bits,
                    parameters,
                    error,
                    -20 * np.log10(error),
                    True,
                )
            )
    rows.append(("model.embed_tokens", None, "embedding", 16.0, 28_311_552, 0.0, None, False))
    columns = ["module", "layer", "component", "bits", "parameters", "relative_error", "sqnr_db", "touched"]
    return pd.DataFrame(rows, columns=columns)


def add_base(
    catalog: Catalog, name: str = "SmolLM2-135M-Instruct (synthetic)", source: str = "demo:smollm2"
) -> Variant:
    """A base with its own evaluation and profile."""
    base = catalog.add_base(
        source,
        name=name,
        fingerprint=content_hash(["synthetic", name]),
        architecture="llama",
        family="decoder",
        parameters=PARAMETERS,
        nbytes=PARAMETERS * 4,
        bits_per_weight=32.0,
        format="float32",
    )
    catalog.record_run(run("evaluate", base.id, quality(0.0, 0.0), minute=0, documents="synthetic"))
    catalog.record_run(run("profile", base.id, speed(19.0, 540e6), minute=1))
    return base


def quality(kl: float, spread: float) -> list[Measurement]:
    """Invented quality numbers that go with a KL."""
    return [
        measurement("kl", kl, "nats", "lower", spread=spread, n=24),
        measurement("bits_per_byte", 0.98 + kl * 0.8, "bits", "lower", spread=spread * 0.1, n=24),
        measurement("perplexity", 14.2 * np.exp(kl), "", "lower", spread=spread * 0.2, n=24),
        measurement(
            "top1_agreement", max(0.05, 1 - 1.6 * kl**0.5), "", "higher", spread=0.004 * bool(kl), n=9000
        ),
        measurement("flips", min(0.9, 1.6 * kl**0.5), "", "lower", spread=spread, n=9000),
    ]


def speed(decode: float, memory: float, spread: float = 0.03) -> list[Measurement]:
    """Invented speed numbers that go with a decode speed."""
    return [
        measurement("prefill_tokens_per_s", decode * 11, "tokens/s", "higher", spread=spread, n=30),
        measurement("decode_tokens_per_s", decode, "tokens/s", "higher", spread=spread, n=60),
        measurement("ttft_ms", 128_000 / (decode * 11), "ms", "lower", spread=spread, n=30),
        measurement("tpot_ms", 1000 / decode, "ms", "lower", spread=spread, n=60),
        measurement("peak_memory_bytes", memory, "bytes", "lower", n=1),
    ]


def add_variant(
    catalog: Catalog,
    base: Variant,
    method: str,
    bits: float,
    *,
    seed: int,
    proven: bool = True,
    measured: bool = True,
    flags: tuple[str, ...] = (),
    **settings: object,
) -> Variant:
    """One variant with its compress, proof, evaluate and (twice) profile runs."""
    random = np.random.default_rng(seed)
    written = recipe(method, bits=bits, **settings)
    id_ = content_hash([base.fingerprint, written, seed])[:12]
    nbytes = int(PARAMETERS * bits / 8)
    shown = " ".join([method, f"bits={bits:g}", *(f"{name}={value}" for name, value in settings.items())])
    variant = catalog.add_variant(
        Variant(
            id=id_,
            name=shown,
            source=f"variant:{id_}",
            base_id=base.id,
            recipe=written,
            artifact=None,
            format=f"compressed-tensors int{bits:g}",
            fingerprint=content_hash([base.fingerprint, written]),
            architecture="llama",
            family="decoder",
            parameters=PARAMETERS,
            bytes=nbytes,
            bits_per_weight=bits,
            proven=proven,
            parents=(base.id,),
        )
    )
    minute = 10 + seed * 5
    catalog.record_run(run("compress", id_, [], minute=minute), layer_stats=layer_stats(bits, random))
    proof = [
        measurement("max_logit_difference", 0.0 if proven else 3.2, "", "lower"),
        measurement("predicted_bytes", nbytes * 1.001, "bytes", "neither"),
        measurement("real_bytes", nbytes, "bytes", "neither"),
        measurement("share_parameters", 0.789, "", "neither"),
        measurement("share_bytes", 0.93, "", "neither"),
    ]
    catalog.record_run(
        run("proof", id_, proof, minute=minute + 1, loader="AutoModelForCausalLM", ties_kept=True)
    )
    if measured:
        kl = float(2.2 * np.exp(-0.95 * bits) * random.lognormal(0, 0.45))
        catalog.record_run(run("evaluate", id_, quality(kl, 0.15), minute=minute + 2, documents="synthetic"))
        for repeat in range(2):
            decode = float(19 * (1 + (16 - min(bits, 16)) / 14) * random.lognormal(0, 0.08))
            measured_run = run(
                "profile", id_, speed(decode, nbytes * 1.3 + 9e7), minute=minute + 3 + repeat, flags=flags
            )
            catalog.record_run(measured_run)
    return variant


def fill(catalog: Catalog, n: int = 60) -> Variant:
    """A base and ``n`` variants of every state the pages know: proven, unproven, unmeasured, flagged."""
    base = add_base(catalog)
    random = np.random.default_rng(7)
    methods = [("rtn", b) for b in (2, 3, 4, 4.25, 4.5, 5, 6, 8)] + [("cast", 16)]
    for seed in range(n):
        method, bits = methods[seed % len(methods)]
        add_variant(
            catalog,
            base,
            method,
            round(bits + (0.0 if method == "cast" else float(random.uniform(0, 0.6))), 2),
            seed=seed,
            proven=seed % 17 != 16,
            measured=seed % 23 != 22,
            flags=("contention",) if seed % 13 == 12 else (),
            group_size=int(random.choice([32, 64, 128])),
        )
    return base
