"""Small records for catalog tests."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pandas as pd

from core.catalog.store import Catalog, new_id
from core.types import Measurement, Run, RunStatus, Variant, canonical_json

START = datetime(2026, 1, 1, tzinfo=UTC)


def base_of(catalog: Catalog, name: str = "tiny") -> Variant:
    return catalog.add_base(
        f"demo:{name}",
        name=name,
        fingerprint=f"fingerprint of {name}",
        architecture="llama",
        family="decoder",
        parameters=1000,
        nbytes=4000,
        bits_per_weight=32.0,
        format="float32",
    )


def variant_of(base: Variant, id_: str, *, artifact: str | None = None, proven: bool = True) -> Variant:
    recipe = canonical_json({"steps": [{"method": "rtn", "settings": {"bits": 8, "name": id_}}]})
    return Variant(
        id=id_,
        name=f"rtn {id_}",
        source=f"variant:{id_}",
        base_id=base.id,
        recipe=recipe,
        artifact=artifact,
        format="int8",
        fingerprint=f"fingerprint of {id_}",
        architecture="llama",
        family="decoder",
        parameters=1000,
        bytes=1100,
        bits_per_weight=8.5,
        proven=proven,
        parents=(base.id,),
    )


def run_of(variant: Variant, *measurements: Measurement, minute: int = 0, status: RunStatus = "valid") -> Run:
    ended = START + timedelta(minutes=minute)
    return Run(
        id=new_id(),
        kind="evaluate",
        variant_id=variant.id,
        status=status,
        flags=("contention",) if status == "flagged" else (),
        protocol="language_modelling 1",
        conditions={"window": 512, "threads": 2},
        environment="e" * 64,
        started_at=ended - timedelta(minutes=1),
        ended_at=ended,
        measurements=measurements,
    )


def kl(value: float) -> Measurement:
    return Measurement("kl", value, "nats", "lower", 24, value * 0.9, value * 1.1, "bootstrap", {"n": 1})


def folder_of(parent: Path, name: str, **files: bytes) -> Path:
    folder = parent / name
    folder.mkdir()
    for file, content in files.items():
        (folder / file).write_bytes(content)
    return folder


LAYERS = pd.DataFrame(
    {
        "module": ["model.layers.0.mlp.up_proj", "lm_head"],
        "layer": [0, None],
        "component": ["mlp", "unembedding"],
        "bits": [8.0, None],
        "parameters": [600, 400],
        "relative_error": [0.01, 0.0],
        "sqnr_db": [40.0, float("inf")],
        "touched": [True, False],
    }
)
