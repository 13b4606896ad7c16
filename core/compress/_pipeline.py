"""From a recipe to a proven variant on disk: apply the steps, save, prove, or leave nothing behind."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from core.compress._proof import Proof, expect, prove
from core.compress._report import headline
from core.compress._store import SavedFiles, add_to_provenance, save_variant
from core.errors import ProofFailed
from core.lazy import torch, transformers
from core.models.loaded import LoadedModel
from core.numerics.sizes import bits_per_weight
from core.recipe import Recipe, Step
from core.registry import get
from core.types import Documents, Metric, Progress, Result, part_of

_ERROR = ["relative_error", "sqnr_db"]


@dataclass(frozen=True)
class Compressed:
    """A variant that was made: what happened to each tensor, what is on disk, and that it reloads."""

    result: Result
    saved: SavedFiles
    proof: Proof


def compress(
    loaded: LoadedModel, recipe: Recipe, calibration: Documents | None, folder: Path, progress: Progress
) -> Compressed:
    """Apply a recipe to ``loaded`` (which is changed), write it to ``folder`` and prove the reload.

    Raises ``BadInput`` or ``CannotCompress`` where a step does not apply, ``ProofFailed`` (after removing ``folder``)
    where the files do not reload to the model that was saved.
    """
    share = 0.5 / len(recipe.steps)
    with loaded.lock, torch.inference_mode():
        results = [
            _step(loaded, step, calibration, part_of(progress, index * share, (index + 1) * share))
            for index, step in enumerate(recipe.steps)
        ]
        frame = _whole_recipe([result.frame for result in results])
        progress(0.5, 1.0, "running the probe before saving")
        expected = expect(loaded)
        progress(0.6, 1.0, "writing the files")
        saved = save_variant(
            loaded,
            folder,
            touched=frozenset(frame.loc[frame["touched"], "module"]),
            bytes_before=dict(zip(frame["module"], frame["bytes_before"].astype(int), strict=True)),
            provenance=_provenance(loaded, recipe, results),
        )
        try:
            proof = prove(saved, loaded=loaded, expected=expected, progress=part_of(progress, 0.75, 1.0))
            if not proof.passed:
                raise ProofFailed(f"{recipe.label()}: {proof.failure}; the files were removed")
            add_to_provenance(folder, proof=_timeless(asdict(proof)))
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    progress(1.0, 1.0, "proved")
    return Compressed(_combined(results, frame, saved), saved, proof)


def _step(loaded: LoadedModel, step: Step, calibration: Documents | None, progress: Progress) -> Result:
    chosen = get("compress", step.method)
    chosen.refuse_if(loaded.missing_needs(chosen.needs), str(loaded.ref))
    result: Result = chosen.run(loaded, calibration, progress, step.parsed())
    return result


def _whole_recipe(frames: list[pd.DataFrame]) -> pd.DataFrame:
    """The last step's table, with bytes before the first step, and the error of the last step that touched a tensor."""
    frame = frames[-1].copy()
    frame["bytes_before"] = frames[0]["bytes_before"]
    for earlier in reversed(frames[:-1]):
        only = earlier["touched"] & ~frame["touched"]
        frame.loc[only, _ERROR] = earlier.loc[only, _ERROR]
        frame["touched"] |= only
    frame.loc[frame["touched"], "reason"] = ""
    return frame


def _combined(results: list[Result], frame: pd.DataFrame, saved: SavedFiles) -> Result:
    """One result for the whole recipe, with the sizes that were really written."""
    sizes = (
        Metric("stored_bytes", saved.bytes, "B", "lower"),
        Metric("predicted_bytes", saved.predicted_bytes, "B", "neither"),
        Metric("bits_per_weight", bits_per_weight(saved.bytes, saved.parameters), "bit", "lower"),
    )
    notes = [note for result in results for note in result.notes]
    if len(results) > 1:
        notes.append(
            "A tensor's error is of the last step that touched it, against that step's input; bytes before are those "
            "before the first step."
        )
    frames = {"main": frame, **{f"step_{i}": r.frame for i, r in enumerate(results[:-1], 1)}}
    seconds = sum(result.provenance.seconds for result in results)
    last = results[-1]
    return replace(
        last,
        frames=frames,
        metrics=(*headline(frame), *sizes),
        notes=tuple(notes),
        provenance=replace(last.provenance, seconds=seconds),
    )


def _provenance(loaded: LoadedModel, recipe: Recipe, results: list[Result]) -> dict[str, Any]:
    """What ``slimscope.json`` says of where the files come from: no times, so that a variant made again is the same
    bytes, and so the same artifact."""
    return {
        "schema_version": 1,
        "base": {"source": str(loaded.ref), "fingerprint": loaded.fingerprint},
        "recipe": recipe.model_dump(mode="json"),
        "steps": [_timeless(asdict(result.provenance)) for result in results],
        "notes": [note for result in results for note in result.notes],
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def _timeless(facts: dict[str, Any]) -> dict[str, Any]:
    return {name: fact for name, fact in facts.items() if not name.endswith("seconds")}
