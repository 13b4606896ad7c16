"""The command line and the short script that give the numbers on the screen.

A method's script is ``app/scripts/<id>.py``: real Python on public libraries that runs by itself, with its
inputs as constants at the top, which are replaced here by those of the page. A method without one gets the
same call through Slimscope's own engine.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from core.profile.runtimes._base import PLAIN
from core.recipe import Recipe
from core.registry import Method, Settings, get
from core.types import Prompt, Run

SCRIPTS = Path(__file__).parent / "scripts"

_OWN_ENGINE = '''"""{title}, through Slimscope's own engine."""
from core.calling import run_probe
from core.catalog.store import Catalog
from core.entries import opened
from core.registry import get
from core.types import Prompt, silent

catalog = Catalog()
method = get("{kind}", "{id}")
settings = method.parse({settings!r})
model, reference = opened(catalog, {source!r}), {reference}
result = run_probe(method, model, {prompt!r}, silent, settings, reference=reference)
print(result.frame)
'''


def probe_command(
    method: Method, source: str, prompt: Prompt, settings: Settings, reference: str | None = None
) -> str:
    """The ``slimscope probe`` line with the settings that differ from their defaults."""
    parts = ["slimscope", "probe", method.id, "--model", source]
    parts += ["--image", prompt.image] if prompt.image is not None else ["--text", prompt.text]
    parts += [] if prompt.second is None else ["--second", prompt.second]
    parts += [] if reference is None else ["--reference", reference]
    for name, value in changed(settings).items():
        parts += ["--set", f"{name}={value}"]
    return shlex.join(parts)


def probe_script(
    method: Method,
    source: str,
    folder: str,
    prompt: Prompt,
    settings: Settings,
    reference: str | None = None,
) -> str:
    """The Python script; ``folder`` is where plain transformers finds the model: a hub id or a folder."""
    path = SCRIPTS / f"{method.id}.py"
    if not path.is_file():
        return _OWN_ENGINE.format(
            title=method.title,
            kind=method.kind,
            id=method.id,
            settings=changed(settings),
            source=source,
            prompt=prompt,
            reference=None if reference is None else f"opened(catalog, {reference!r})",
        )
    constants = {"MODEL": folder, "TEXT": prompt.text, "SECOND": prompt.second, "IMAGE": prompt.image}
    constants |= {name.upper(): value for name, value in settings.model_dump(mode="json").items()}
    return with_constants(path.read_text(encoding="utf-8"), constants)


def recipe_command(recipe: Recipe, source: str) -> str:
    """The ``slimscope`` lines that make the recipe's variant of ``source``."""
    text = recipe.canonical()
    return f"cat > recipe.json <<'JSON'\n{text}\nJSON\n{shlex.join(['slimscope', 'run', 'recipe.json', '--model', source, '--json'])}"


def recipe_script(recipe: Recipe, folder: str) -> str:
    """What every step does to the weights, in plain torch: one script per step."""
    return "\n\n".join(
        with_constants(
            (SCRIPTS / f"{step.method}.py").read_text(encoding="utf-8"),
            {"MODEL": folder, **{name.upper(): value for name, value in step.settings.items()}},
        )
        for step in recipe.steps
        if (SCRIPTS / f"{step.method}.py").is_file()
    )


def with_constants(script: str, constants: Mapping[str, Any]) -> str:
    """A script with the right-hand sides of its ``NAME = …`` lines replaced, where ``constants`` has the name."""

    def replaced(line: re.Match[str]) -> str:
        name = line[1]
        return f"{name} = {constants[name]!r}" if name in constants else line[0]

    return re.sub(r"^([A-Z_]+) = .*$", replaced, script, flags=re.MULTILINE)


def changed(settings: Settings) -> dict[str, Any]:
    """The settings that differ from their defaults."""
    values = settings.model_dump(mode="json")
    return {
        name: value for name, value in values.items() if value != type(settings).model_fields[name].default
    }


def profile_command(source: str, run: Run | None) -> str:
    """The ``slimscope profile`` line that measures the run's cell again; the defaults without a run."""
    asked = {} if run is None else dict(run.conditions["settings"])
    method = get("profile", PLAIN if run is None else str(run.conditions["method"]))
    parts = ["slimscope", "profile", source, "--runtime", method.id]
    for name, value in asked.items():
        if name in method.settings.model_fields and method.settings.model_fields[name].default != value:
            parts += ["--tier", str(value)] if name == "tier" else ["--set", f"{name}={value}"]
    return shlex.join([*parts, "--json"])


def profile_script(source: str, run: Run | None) -> str:
    """Timing decode steps with transformers alone: the yardstick, without our protocol."""
    seen = {} if run is None else run.conditions
    constants = {"MODEL": source, "PROMPT": seen.get("prompt_tokens", 256), "THREADS": seen.get("threads", 0)}
    return with_constants((SCRIPTS / "profile.py").read_text(encoding="utf-8"), constants)
