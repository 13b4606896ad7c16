"""One question that any probe can answer on a tiny model: the walks over every method ask it."""

from __future__ import annotations

from collections.abc import Callable

from core.models.loaded import LoadedModel
from core.registry import Method
from core.types import Prompt, Result, silent


def ask(m: Method, loaded: LoadedModel, variant: Callable[[], LoadedModel]) -> Result:
    """Run a probe with its default settings; ``variant`` gives the damaged copy for probes that look at two models."""
    second = "three two one" if "encoder" in m.needs else None
    vision = loaded.family == "vision"
    prompt = Prompt(image="digits:0") if vision else Prompt("one two three one two three", second)
    # What no default can be: a second prompt with its answers, and a model's earlier checkpoints.
    given: dict[str, str] = {}
    if "patching" in m.id:
        given = {"corrupted": "two one three one two three", "target": " two", "distractor": " one"}
    elif "checkpoints" in m.settings.model_fields:
        given = {"checkpoints": str(loaded.folder)}
    elif m.id == "calibration_report":  # its defaults read a whole text, which the walk would do twenty times
        given = {"text": "domain:dates", "samples": "8", "sample_tokens": "32", "read_tokens": "128"}
    elif m.takes_reference and {"documents", "tokens"} <= set(m.settings.model_fields):
        # what student and teacher are read side by side on
        given = {"documents": "4", "tokens": "16"}
    settings = m.parse_text(given)
    models = (variant(), loaded) if m.takes_reference else (loaded,)
    return m.run(*models, prompt, silent, settings)


def damage(loaded: LoadedModel) -> LoadedModel:
    """The model with one matrix turned round: a variant that lost something."""
    loaded.model.get_submodule(loaded.anatomy.blocks[1].o).weight.data.mul_(-0.5)
    return loaded
