"""Asks a fresh process to measure an artifact, and makes a result of what it says."""

from __future__ import annotations

from pathlib import Path

from core.errors import BadInput
from core.profile.built import built
from core.profile.device_lock import exclusive
from core.profile.fresh import ask
from core.profile.measured import Measured
from core.profile.parity import base_folder
from core.profile.reference import reference
from core.profile.runtimes._base import ProfileSettings
from core.profile.summary import summarise
from core.types import Progress, Result, part_of


def profile_artifact(folder: Path, runtime: str, progress: Progress, settings: ProfileSettings) -> Result:
    """Measure the artifact in a folder with a runtime, alone on its device.

    Raises ``BadInput`` (no such artifact, prompt longer than the context), ``CannotMeasure`` (machine busy and
    ``when_busy`` is ``refuse``, no such device, answers that are not the artifact's), ``MissingLibrary``,
    ``OutOfMemory``, ``WorkerDied``, and what ``progress`` raises.
    """
    if not (folder / "config.json").is_file():
        raise BadInput(f"{folder} holds no config.json; give the folder of a model saved by transformers")
    with exclusive(settings.device_name, progress):
        files = built(folder, runtime, settings, part_of(progress, 0.0, 0.3))
        own = base = None
        if settings.parity:
            own = reference(folder, part_of(progress, 0.3, 0.35))
            if (original := base_folder()) is not None:
                base = reference(original, part_of(progress, 0.35, 0.4))
        measured = measure_in_child(
            folder, files, runtime, part_of(progress, 0.4, 1.0), settings, own=own, base=base
        )
    return summarise(measured, runtime, settings)


def measure_in_child(
    folder: Path,
    files: Path,
    runtime: str,
    progress: Progress,
    settings: ProfileSettings,
    *,
    own: Path | None = None,
    base: Path | None = None,
) -> Measured:
    """Run the measuring process to its end and return what it measured.

    ``files`` is what the runtime opens; ``own`` and ``base`` are the kept answers it is held against.
    """
    request = {
        "runtime": runtime,
        "folder": str(folder),
        "files": str(files),
        "settings": settings.model_dump(mode="json"),
        "reference": str(own) if own else None,
        "base": str(base) if base else None,
    }
    said = ask(
        "core.profile._measure",
        request,
        progress,
        threads=settings.n_threads,
        message="starting a fresh process",
    )
    return Measured.model_validate(said)
