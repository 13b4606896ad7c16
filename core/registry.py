"""One registry for every probe, compressor, evaluation and profile: a decorated function plus typed settings.

A method is one file in ``core/probes``, ``core/compress``, ``core/evaluate`` or ``core/profile``; its name is
the method's id. From the decorated function come the page's form, its deep link, the CLI's flags, the recipe's
schema and the docs' row. Files whose name starts with ``_`` are shared parts of their folder, not methods.
"""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from core.errors import BadInput, BadSettings, UnknownMethod
from core.types import Cost, Prompt

if TYPE_CHECKING:
    from core.models.anatomy import Anatomy

Kind = Literal["probe", "train", "compress", "evaluate", "profile", "export"]
Need = Literal[
    "decoder", "encoder", "vision", "classifier", "text", "heads", "moe", "dense", "calibration", "cuda"
]
Question = Literal[
    "What did it compute?",
    "Why this token?",
    "Which heads matter?",
    "Where is the fact?",
    "What does this layer know?",
    "What did compression break?",
    "Which expert does what?",
    "What if it routed otherwise?",
    "What can a number hold?",
]
"""What a reader of a model asks; every probe says which one it answers, and the page opens on them."""
Group = Literal["quantize", "prune", "experts", "transform", "convert"]
"""What kind of compress step it is: fewer bits, fewer weights, other experts, the same function in other numbers, another
architecture."""
PACKAGES: dict[Kind, str] = {
    "probe": "core.probes",
    "train": "core.train",
    "compress": "core.compress",
    "evaluate": "core.evaluate",
    "profile": "core.profile.runtimes",
    "export": "core.export",
}


class Settings(BaseModel):
    """Base of every method's settings: immutable, no unknown keys, every field described with its unit."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @property
    def reads_prompt(self) -> bool:
        """Whether a probe with these settings looks at the prompt; some read a text that is named here instead."""
        return True


@dataclass(frozen=True)
class Example:
    """A worked example of a probe: one click fills prompt and settings."""

    title: str
    prompt: Prompt
    settings: Mapping[str, Any] = field(default_factory=dict)


CostOf = Callable[["Anatomy", int, Any], Cost]
"""Expected cost of one call from the model's anatomy, the prompt's tokens and the parsed settings; needs no torch."""

LeftOf = Callable[["Anatomy", Any], Mapping[str, float]]
"""Component → share of its parameters that a compress step leaves, from the anatomy and the parsed settings; components
that are not named stay whole. Raises where the step would be refused."""


@dataclass(frozen=True)
class Method:
    """One registered method and everything that is derived from its file."""

    id: str
    kind: Kind
    title: str
    summary: str
    explanation: str
    settings: type[Settings]
    needs: frozenset[Need]
    paper: str
    run: Callable[..., Any]
    answers: Question | None = None
    """Probes: the question it answers."""
    examples: tuple[Example, ...] = ()
    cost: CostOf | None = None
    """None: about one forward pass."""
    left: LeftOf | None = None
    """Compress: what a step that changes the structure leaves. None where it stores weights otherwise, or says nothing."""
    group: Group | None = None
    """Compress: among which steps it is offered. None where its needs and settings say it."""

    @property
    def takes_reference(self) -> bool:
        """Whether it looks at two models at once: ``run(loaded, reference, prompt, progress, settings)``."""
        return "reference" in inspect.signature(self.run).parameters

    @property
    def takes_scratch(self) -> bool:
        """Compress: whether it keeps finished work: ``run(loaded, calibration, progress, scratch, settings)``."""
        return "scratch" in inspect.signature(self.run).parameters

    def parse(self, values: dict[str, Any]) -> Settings:
        """Validate settings; raises ``BadSettings`` naming each wrong field, its value and what is allowed."""
        try:
            return self.settings.model_validate(values)
        except ValidationError as error:
            raise BadSettings(f"{self.id}: {_sentence(error, self.settings)}") from None

    def parse_text(self, pairs: Mapping[str, str]) -> Settings:
        """Settings from text (``--set key=value``, a query string): each value is read as its field's type."""
        values: dict[str, Any] = {}
        for name, text in pairs.items():
            values[name] = text
            if name in self.settings.model_fields:
                values[name] = _read(text, self.settings.model_fields[name].annotation)
        return self.parse(values)

    def refuse_if(self, missing: Iterable[Need], model: str) -> None:
        """Raise ``BadInput`` when a model misses something this method needs."""
        missing = tuple(missing)
        if missing:
            others = [m.id for m in methods(self.kind).values() if not m.needs & set(missing)]
            instead = f"; use {', '.join(others)}" if others else ""
            raise BadInput(f"{self.id} needs {' and '.join(missing)}, which {model} does not offer{instead}")

    def describe(self) -> dict[str, Any]:
        """The method as plain data: what ``slimscope methods --json`` prints."""
        return {
            "id": self.id,
            "kind": self.kind,
            "title": self.title,
            "summary": self.summary,
            "needs": sorted(self.needs),
            "paper": self.paper,
            "settings": self.settings.model_json_schema(),
        }


_METHODS: dict[tuple[Kind, str], Method] = {}
F = TypeVar("F", bound=Callable[..., Any])


def method(
    kind: Kind,
    *,
    title: str,
    needs: Iterable[Need] = (),
    paper: str = "",
    answers: Question | None = None,
    examples: Iterable[Example] = (),
    cost: CostOf | None = None,
    left: LeftOf | None = None,
    group: Group | None = None,
) -> Callable[[F], F]:
    """Register the decorated function under its file's name; its last parameter is ``settings``.

    The docstring's first line is the summary, the whole of it the page's "What am I looking at?".
    """
    unknown = set(needs) - set(get_args(Need))
    if unknown:
        raise ValueError(f"needs {sorted(unknown)} are not among {get_args(Need)}")

    def register(run: F) -> F:
        id_ = run.__module__.rsplit(".", 1)[-1]
        *_, last = inspect.signature(run).parameters.values()
        assert last.name == "settings", (
            f"{run.__module__}: the last parameter must be `settings`, not {last.name!r}"
        )
        settings = inspect.get_annotations(run, eval_str=False)["settings"]
        if isinstance(settings, str):
            settings = run.__globals__[settings]
        known = _METHODS.get((kind, id_))
        if known is not None and known.run.__module__ != run.__module__:
            raise ValueError(
                f"two {kind} methods are called {id_!r}: {known.run.__module__} and {run.__module__}"
            )
        text = inspect.getdoc(run)
        assert text, f"{run.__module__}: a method needs a docstring; its first line is the summary"
        _METHODS[kind, id_] = Method(
            id_,
            kind,
            title,
            text.splitlines()[0],
            text,
            settings,
            frozenset(needs),
            paper,
            run,
            answers,
            tuple(examples),
            cost,
            left,
            group,
        )
        return run

    return register


@cache
def _discover() -> None:
    for package in PACKAGES.values():
        folder = importlib.import_module(package)
        for module in pkgutil.iter_modules(folder.__path__, package + "."):
            if not module.name.rsplit(".", 1)[-1].startswith("_"):
                importlib.import_module(module.name)


def methods(kind: Kind) -> dict[str, Method]:
    """Every method of a kind by id, in alphabetical order."""
    _discover()
    return {id_: m for (k, id_), m in sorted(_METHODS.items()) if k == kind}


def get(kind: Kind, id_: str) -> Method:
    """One method; raises ``UnknownMethod`` listing the known ids."""
    known = methods(kind)
    if id_ not in known:
        raise UnknownMethod(f"no {kind} method is called {id_!r}; there are: {', '.join(known)}")
    return known[id_]


def _read(text: str, annotation: Any) -> Any:
    """The text itself where the field takes it, else the JSON value it spells, else the text for a clear error."""
    adapter: TypeAdapter[Any] = TypeAdapter(annotation)
    with suppress(ValidationError):
        return adapter.validate_python(text, strict=True)
    with suppress(ValueError):  # ValidationError is one; so is a JSON syntax error
        return adapter.validate_python(json.loads(text))
    return text


def _sentence(error: ValidationError, settings: type[Settings]) -> str:
    """Turn pydantic's report into one line a user can act on."""
    parts = []
    for problem in error.errors():
        name = ".".join(map(str, problem["loc"])) or "settings"
        if problem["type"] == "extra_forbidden":
            parts.append(f"unknown setting {name!r}; there are: {', '.join(settings.model_fields)}")
        else:
            said = problem["msg"].removeprefix("Value error, ")
            parts.append(f"{name} = {problem['input']!r}: {said[0].lower()}{said[1:]}")
    return "; ".join(parts)
