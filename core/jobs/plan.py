"""Which jobs one click means: the specs that ``core.jobs.tasks`` reads, and the order they wait in.

Submitting a recipe is "make it, prove it, evaluate it, profile it"; its base is measured along with it when that
was never done. A probe or a training is one job. Nothing is run here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from core.catalog.queries import bases
from core.jobs.queue import Queue, device_token
from core.jobs.states import ACTIVE
from core.located import located_source
from core.recipe import Recipe
from core.registry import get
from core.types import Job, ModelRef, Prompt

EVALUATE: dict[str, Any] = {"method": None, "settings": {}, "documents": {"source": "pydoc"}}
"""The default evaluation: by the model's family, on the text every machine has."""
PROFILE: dict[str, Any] = {"method": "torch_eager", "settings": {}}
RECENT = 200
"""How far back the queue is searched for the same work still waiting."""


def submit_variant(
    queue: Queue,
    *,
    model: str,
    recipe: Recipe,
    evaluate: Mapping[str, Any] | None = None,
    profile: Mapping[str, Any] | None = None,
    group_id: str | None = None,
) -> list[Job]:
    """Queue compress, then evaluate and profile, of ``recipe`` on ``model``, and the base's own measurements if missing.

    ``evaluate`` (``method``, ``settings``, ``documents``) and ``profile`` (``method``, ``settings``) override the
    defaults. The same recipe still waiting or running is returned as it is, not queued twice. All jobs share a
    group, a new one unless ``group_id`` names it. Raises ``BadInput`` for a model, method or settings that cannot be.
    """
    source, recipe = ModelRef.parse(model).located, recipe.located  # the worker runs in another folder
    quality, speed = _evaluation(evaluate), _profiling(profile)
    written = json.loads(recipe.canonical())
    waiting = [job for job in _active(queue, source) if "recipe" in job.spec]
    again = [job for job in waiting if job.spec.get("recipe") == written]
    if again:
        return again[::-1]
    made = queue.submit("compress", {"model": source, "recipe": written}, group_id=group_id)
    jobs = [
        made,
        *_measure(queue, source, written, quality, speed, after=made, group_id=made.group_id),
    ]
    base_waits = any(job.spec.get("recipe") is None for job in waiting)
    if not base_waits and not _base_is_measured(queue, source):
        jobs += _measure(queue, source, None, quality, speed, group_id=made.group_id)
    return jobs


def submit_sweep(
    queue: Queue,
    *,
    model: str,
    recipes: Sequence[Recipe],
    evaluate: Mapping[str, Any] | None = None,
    profile: Mapping[str, Any] | None = None,
) -> list[Job]:
    """Queue every recipe as ``submit_variant`` does, in order and in one group; the base is measured once."""
    jobs: list[Job] = []
    for recipe in recipes:
        group_id = jobs[0].group_id if jobs else None
        jobs += submit_variant(
            queue, model=model, recipe=recipe, evaluate=evaluate, profile=profile, group_id=group_id
        )
    return jobs


def submit_probe(
    queue: Queue,
    *,
    model: str,
    method: str,
    prompt: Prompt,
    settings: Mapping[str, Any],
    reference: str | None = None,
) -> Job:
    """Queue one probe call; the same call still waiting or running is returned as it is.

    Raises ``BadInput`` for a model, probe or settings that cannot be.
    """
    get("probe", method).parse(dict(settings))
    return _submit_once(queue, "probe", probe_spec(model, method, prompt, settings, reference))


def probe_spec(
    model: str, method: str, prompt: Prompt, settings: Mapping[str, Any], reference: str | None
) -> dict[str, Any]:
    """What a probe's job is given: equal calls have equal specs."""
    image = prompt.image
    if image is not None and Path(image).is_file():
        image = str(Path(image).resolve())  # the worker runs in another folder
    asked = {"text": prompt.text, "second": prompt.second, "image": image}
    return {
        "model": ModelRef.parse(model).located,
        "method": method,
        "prompt": asked,
        "settings": dict(settings),
        "reference": None if reference is None else ModelRef.parse(reference).located,
    }


def submit_train(queue: Queue, *, model: str, method: str, text: str, settings: Mapping[str, Any]) -> Job:
    """Queue one training; the same one still waiting or running is returned as it is.

    Raises ``BadInput`` for a model, method or settings that cannot be.
    """
    get("train", method).parse(dict(settings))
    spec = {
        "model": ModelRef.parse(model).located,
        "method": method,
        "documents": {"source": located_source(text)},
        "settings": dict(settings),
    }
    return _submit_once(queue, "train", spec)


def submit_export(queue: Queue, *, model: str, method: str, settings: Mapping[str, Any]) -> Job:
    """Queue one export as a package; the same one still waiting or running is returned as it is.

    Raises ``BadInput`` for a model, format or settings that cannot be.
    """
    get("export", method).parse(dict(settings))
    spec = {"model": ModelRef.parse(model).located, "method": method, "settings": dict(settings)}
    return _submit_once(queue, "export", spec)


def _submit_once(queue: Queue, kind: str, spec: dict[str, Any]) -> Job:
    for job in _active(queue, spec["model"]):
        if job.kind == kind and job.spec == spec:
            return job
    return queue.submit(kind, spec)


def _measure(
    queue: Queue,
    model: str,
    recipe: dict[str, Any] | None,
    quality: dict[str, Any],
    speed: dict[str, Any],
    *,
    after: Job | None = None,
    group_id: str | None = None,
) -> list[Job]:
    """Evaluate, and profile alone on this host; neither waits for the other, so one's failure costs only its own."""
    subject, first = {"model": model, "recipe": recipe}, after.id if after else None
    return [
        queue.submit("evaluate", {**subject, **quality}, depends_on=first, group_id=group_id),
        queue.submit(
            "profile", {**subject, **speed}, depends_on=first, token=device_token(), group_id=group_id
        ),
    ]


def _evaluation(asked: Mapping[str, Any] | None) -> dict[str, Any]:
    full = {**EVALUATE, **(asked or {})}
    if full["method"] is not None:
        get("evaluate", full["method"]).parse(full["settings"])
    return {**full, "documents": {"source": located_source(full["documents"]["source"])}}


def _profiling(asked: Mapping[str, Any] | None) -> dict[str, Any]:
    full = {**PROFILE, **(asked or {})}
    get("profile", full["method"]).parse(full["settings"])
    return full


def _active(queue: Queue, model: str) -> list[Job]:
    """This model's jobs that still wait or run, newest first."""
    return [job for job in queue.jobs(RECENT) if job.state in ACTIVE and job.spec.get("model") == model]


def _base_is_measured(queue: Queue, model: str) -> bool:
    """Whether what is compressed has been evaluated and profiled; a variant was measured when it was made."""
    ref = ModelRef.parse(model)
    known = bases(queue.catalog)
    ids = (
        [ref.source.removeprefix("variant:")]
        if ref.kind == "variant"
        else list(known.loc[known["source"] == model, "id"])
    )
    kinds = {run.kind for id_ in ids for run in queue.catalog.runs(id_)}
    return {"evaluate", "profile"} <= kinds
