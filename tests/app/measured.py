"""A catalog with real measurements of a tiny random model: how they were made, and how the recorded ones come back.

``measure`` takes minutes, since every profile is a fresh process of a real runtime. What it once measured lies in
``tests/fixtures/measured`` (``python -m tests.app.measured`` makes it anew), and ``recorded`` enters it into a new catalog. The
speeds mean nothing: a toy on a busy machine; that they are real shows that the pages draw what the runtimes say.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pandas as pd

from core.catalog.store import Catalog
from core.loop import make_variant, profile_variant, register
from core.profile.environment import environment
from core.profile.race import race
from core.profile.where.kept import look_at
from core.recipe import Recipe
from core.types import Measurement, Run, Variant

FIXTURE = Path(__file__).resolve().parents[1] / "fixtures" / "measured"
FAST = {"tier": "rapid", "prompt_tokens": 16, "new_tokens": 4, "threads": 1}
RUNTIMES = (("torch_eager", {}), ("openvino", {}), ("openvino", {"weights": "int8"}), ("llama_cpp", {}))
WARM_UP, KEPT_SAMPLES = 20, 100
"""First and last samples of each phase in the fixture."""


@dataclass(frozen=True)
class Measured:
    """What is in the catalog."""

    base: Variant
    variant: Variant
    profiles: tuple[Run, ...]
    race: Run
    looks: tuple[Run, ...]


def measure(catalog: Catalog, model: Path, *, everything: bool = True) -> Measured:
    """A base and its int8 variant: profiles in several runtimes (or plain torch alone), a race, two looks."""
    base = register(catalog, str(model))
    variant = make_variant(catalog, str(model), Recipe.of("rtn", bits=8)).variant
    profiles = tuple(
        profile_variant(catalog, base.id, method=runtime, settings={**FAST, **more})
        for runtime, more in (RUNTIMES if everything else RUNTIMES[:1])
    )
    profiles += (profile_variant(catalog, variant.id, settings=FAST),)
    run = race(catalog, base.id, variant.id, settings_a=FAST, settings_b=FAST, blocks=8)
    looks = tuple(look_at(catalog, id_, settings=FAST) for id_ in (base.id, variant.id))
    return Measured(base, variant, profiles, run, looks)


def keep(catalog: Catalog, found: Measured, folder: Path = FIXTURE) -> None:
    """Write everything into ``folder``: records as JSON, frames as Parquet, looks as they were kept."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    runs = (*found.profiles, found.race, *found.looks)
    document = {
        "base": asdict(replace(found.base, source="MODEL", name="tiny")),
        "variant": asdict(replace(found.variant, artifact=None)),
        "runs": [asdict(run) for run in runs],
    }
    (folder / "records.json").write_text(json.dumps(document, default=str, indent=1) + "\n", encoding="utf-8")
    for number, run in enumerate(runs):
        if "result" in run.conditions:
            shutil.copytree(catalog.artifact_folder(run.conditions["result"]), folder / f"{number}-result")
        for name in ("samples", "blocks") if "result" not in run.conditions else ():
            if name == "samples" or run.kind == "race":
                frame = catalog.frame(run.id, name)
                _fewer(frame).to_parquet(folder / f"{number}-{name}.parquet", compression="zstd")


def _fewer(frame: pd.DataFrame) -> pd.DataFrame:
    """The first samples of each phase, which warm up, and the last."""
    if "phase" not in frame:
        return frame
    back = frame.groupby("phase").cumcount(ascending=False)
    return frame[(frame.groupby("phase").cumcount() < WARM_UP) | (back < KEPT_SAMPLES)]


def recorded(catalog: Catalog, source: str, folder: Path = FIXTURE) -> Measured:
    """Enter the recorded measurements; ``source`` is how the base is opened, and their machine is said to be this one."""
    document = json.loads((folder / "records.json").read_text(encoding="utf-8"))
    base = catalog.add_variant(_variant(document["base"], source=source))
    variant = catalog.add_variant(
        _variant(document["variant"], source=f"variant:{document['variant']['id']}")
    )
    here, runs = environment("cpu"), []
    for number, told in enumerate(document["runs"]):
        result = folder / f"{number}-result"
        if result.is_dir():
            copy = catalog.artifacts.incoming()
            shutil.copytree(result, copy, dirs_exist_ok=True)
            told["conditions"]["result"] = catalog.put_artifact(copy)
        elif "environment" in told["conditions"]:
            told["conditions"] |= {"environment": here, "environment_hash": here["hash"]}
        frames = {
            file.stem.partition("-")[2]: pd.read_parquet(file) for file in folder.glob(f"{number}-*.parquet")
        }
        runs.append(catalog.record_run(_run(told, here["hash"]), environment=here, frames=frames))
    profiles = tuple(run for run in runs if run.kind == "profile")
    (raced,) = (run for run in runs if run.kind == "race")
    return Measured(base, variant, profiles, raced, tuple(run for run in runs if run.kind == "probe"))


def _variant(told: dict[str, Any], source: str) -> Variant:
    kept = {**told, "source": source, "parents": tuple(told["parents"]), "created_at": None}
    return Variant(**kept)


def _run(told: dict[str, Any], environment_hash: str) -> Run:
    times = {name: datetime.fromisoformat(told[name]) for name in ("started_at", "ended_at")}
    numbers = tuple(Measurement(**one) for one in told["measurements"])
    own = {
        "flags": tuple(told["flags"]),
        "measurements": numbers,
        "environment": environment_hash,
        "job_id": None,
    }
    return Run(**{**told, **times, **own})


if __name__ == "__main__":
    from tests.tiny import tiny_folder

    with tempfile.TemporaryDirectory() as scratch:
        store = Catalog(f"sqlite:///{Path(scratch) / 'catalog.sqlite'}")
        keep(store, measure(store, tiny_folder("llama", Path(scratch))))
