"""From a recipe to a proven variant on disk: apply the steps, save, prove, or leave nothing behind."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from core.compress._references import references_of
from core.errors import CannotCompress, ProofFailed
from core.lazy import torch, transformers
from core.models.loaded import LoadedModel
from core.models.open import open_model
from core.numerics.sizes import bits_per_weight
from core.recipe import Recipe, Step
from core.registry import get
from core.saving.description import settle
from core.saving.proof import Proof, expect, prove
from core.saving.report import headline
from core.saving.room import amount_told, refuse_without_room
from core.saving.store import SavedFiles, add_to_provenance, save_variant
from core.types import Documents, Metric, Progress, Result, View, part_of

_ERROR = ["relative_error", "sqnr_db"]
_BEFORE = ["parameters_before", "bytes_before"]


@dataclass(frozen=True)
class Compressed:
    """A variant that was made: what happened to each tensor, what is on disk, and that it reloads."""

    result: Result
    saved: SavedFiles
    proof: Proof


def compress(
    loaded: LoadedModel,
    recipe: Recipe,
    calibration: Documents | None,
    folder: Path,
    progress: Progress,
    *,
    references: Mapping[int, LoadedModel] | None = None,
    scratch: Path | None = None,
) -> Compressed:
    """Apply a recipe to ``loaded`` (which is changed), write it to ``folder`` and prove the reload.

    ``references`` are the second models of the steps that look at one (``core.compress._references``); without them it
    is what ``loaded`` was opened from. Steps keep finished work in ``scratch``, and the next call with the same recipe goes on from there; removing it is the
    caller's matter. Raises ``BadInput`` or ``CannotCompress`` where a step does not apply or the disk has no room,
    ``OutOfMemory`` with the amount needed, ``ProofFailed`` (after removing ``folder``) where the files do not reload to
    the model that was saved.
    """
    if references is None and (wanted := references_of(recipe)):
        start = open_model(replace(loaded.ref, source=str(loaded.folder), revision=None))
        references = dict.fromkeys(wanted, start)
    needed = refuse_without_room(loaded, recipe, folder)
    with loaded.lock, torch.inference_mode(), amount_told(loaded, recipe, needed):
        results = apply_steps(
            loaded,
            recipe,
            calibration,
            part_of(progress, 0.0, 0.5),
            references=references or {},
            scratch=scratch,
        )
        frame = _whole_recipe([result.frame for result in results])
        progress(0.5, 1.0, "running the probe before saving")
        expected = expect(loaded)
        progress(0.6, 1.0, "writing the files")
        saved = save_variant(
            loaded,
            folder,
            frame=frame,
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


def apply_steps(
    loaded: LoadedModel,
    recipe: Recipe,
    calibration: Documents | None,
    progress: Progress,
    *,
    references: Mapping[int, LoadedModel],
    scratch: Path | None,
) -> list[Result]:
    """Apply every step to ``loaded``, and write nothing but what steps keep in ``scratch``. Hold ``loaded.lock``."""
    share = 1 / len(recipe.steps)
    with torch.inference_mode():
        results = [
            _step(
                loaded, step, calibration, references.get(index),
                part_of(progress, index * share, (index + 1) * share),
                None if scratch is None else scratch / f"step_{index}",
            )
            for index, step in enumerate(recipe.steps)
        ]  # fmt: skip
        settle(loaded)
    return results


def _step(
    loaded: LoadedModel,
    step: Step,
    calibration: Documents | None,
    reference: LoadedModel | None,
    progress: Progress,
    scratch: Path | None,
) -> Result:
    chosen = get("compress", step.method)
    chosen.refuse_if(loaded.missing_needs(chosen.needs), str(loaded.ref))
    if loaded.library is not None:
        raise CannotCompress(
            f"{loaded.library.library} has quantized this model, which no other step can change; make it the last step"
        )
    models = (loaded, reference) if chosen.takes_reference else (loaded,)
    kept = (scratch,) if chosen.takes_scratch else ()
    result: Result = chosen.run(*models, calibration, progress, *kept, step.parsed())
    return result


def _whole_recipe(frames: list[pd.DataFrame]) -> pd.DataFrame:
    """The steps' tables as one, matched by module: each tensor as the last step left it, before as the first found it.

    A tensor's error is that of the last step that touched it. Values that several steps touched count once, as far as
    their numbers can tell: the sum, but never more than there were.
    """
    whole = frames[0].set_index("module")
    for frame in frames[1:]:
        step = frame.set_index("module")
        both = step.index.intersection(whole.index)
        earlier, merged = whole.loc[both], step.copy()
        merged.loc[both, _BEFORE] = earlier[_BEFORE]
        changed = (earlier["parameters_touched"] + step.loc[both, "parameters_touched"]).clip(
            upper=earlier["parameters_before"]
        )
        merged.loc[both, "parameters_touched"] = changed
        only_earlier = both[(earlier["touched"] & ~step.loc[both, "touched"]).to_numpy()]
        merged.loc[only_earlier, _ERROR] = whole.loc[only_earlier, _ERROR]
        merged.loc[only_earlier, "touched"] = True
        gone = whole.loc[whole.index.difference(step.index, sort=False)]
        whole = pd.concat([merged, gone]) if len(gone) else merged
    whole.loc[whole["touched"], "reason"] = ""
    return whole.reset_index()[list(frames[0].columns)]


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
    last, headlines = results[-1], headline(frame)
    named = {metric.name: metric for result in results for metric in result.metrics}
    of_steps = [metric for name, metric in named.items() if name not in {m.name for m in headlines}]
    frames, views = _frames_and_views(results)
    return replace(
        last,
        frames={**frames, "main": frame},
        views=views,
        metrics=(*of_steps, *headlines, *sizes),
        notes=tuple(notes),
        provenance=replace(last.provenance, seconds=sum(result.provenance.seconds for result in results)),
    )


def _frames_and_views(results: list[Result]) -> tuple[dict[str, pd.DataFrame], tuple[View, ...]]:
    """Every step's frames and how to draw them; an earlier step's under ``step_N``, its tables of tensors undrawn."""
    frames, views = dict(results[-1].frames), list(results[-1].views)
    for number, result in enumerate(results[:-1], 1):
        new = {n: f"step_{number}" if n == "main" else f"step_{number}_{n}" for n in result.frames}
        frames |= {new[name]: frame for name, frame in result.frames.items()}
        views += [replace(view, frame=new[view.frame]) for view in result.views if view.frame != "main"]
    return frames, tuple(views)


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
