"""Calling a probe on open models: what it needs is checked first, and a second model is given to those that compare.

The inspector, the jobs and the command line call probes through here. Knows no catalog.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from core.errors import BadInput
from core.registry import Method, Settings
from core.types import Progress, Prompt, Result

if TYPE_CHECKING:
    from core.models.loaded import LoadedModel


def refuse_misfit(method: Method, loaded: LoadedModel) -> None:
    """Raise ``BadInput`` when the model cannot give what the method needs."""
    name = f"{loaded.ref} ({loaded.family}, {loaded.anatomy.model_type})"
    method.refuse_if(loaded.missing_needs(method.needs), name)


def run_probe(
    method: Method,
    loaded: LoadedModel,
    prompt: Prompt,
    progress: Progress,
    settings: Settings,
    *,
    reference: LoadedModel | None = None,
) -> Result:
    """Run a probe; ``reference`` is the original that a comparing probe holds the model against.

    Raises ``BadInput`` where a model misses something, or the reference is missing or superfluous.
    """
    refuse_misfit(method, loaded)
    if not method.takes_reference:
        if reference is not None:
            raise BadInput(f"{method.id} looks at one model; leave the reference out")
        result: Result = method.run(loaded, prompt, progress, settings)
        return result
    if reference is None:
        raise BadInput(
            f"{method.id} holds a compressed copy against its original; name the original as reference, "
            "e.g. --reference demo:smollm2"
        )
    refuse_misfit(method, reference)
    with reference.lock:
        compared: Result = method.run(loaded, reference, prompt, progress, settings)
    return compared
