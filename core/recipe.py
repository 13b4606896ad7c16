"""A recipe: ordered compression steps, the same JSON in the page, on the command line and in a file.

Its canonical JSON holds every setting, defaults included, so that a later change of a default cannot change
what an old recipe means. The hash of that JSON together with the base's fingerprint is the variant's id. The text
that calibrated steps read is part of it: other text makes another variant.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
)

from core.errors import BadInput, SlimscopeError
from core.located import located_source
from core.registry import Settings, get
from core.types import ModelRef, canonical_json, content_hash

SCHEMA = 1
LONGEST = 20
"""Characters of one setting in a recipe's name."""
CALIBRATION = "pydoc"
"""What calibrated steps read unless a recipe says otherwise."""


class Step(BaseModel):
    """One application of a compress method."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str = Field(description="Id of a compress method")
    settings: dict[str, Any] = Field(
        default_factory=dict, description="Its settings; missing ones take defaults"
    )

    def parsed(self) -> Settings:
        """The step's settings, validated by its method."""
        return get("compress", self.method).parse(self.settings)

    def label(self) -> str:
        """A short name: the method, its first setting, and those that differ from its defaults."""
        parsed = self.parsed()
        fields = type(parsed).model_fields
        telling = [n for i, n in enumerate(fields) if i == 0 or getattr(parsed, n) != fields[n].default]
        return " ".join([self.method, *(f"{name}={_short(getattr(parsed, name))}" for name in telling)])


def _short(value: Any) -> str:
    """A setting as a name can hold it: a long text by its beginning."""
    text = str(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST].rstrip()}…"


def _located(name: str, value: Any) -> Any:
    """A setting with its path made absolute: ``data`` names rows, ``teacher`` and ``model`` a model, if not empty or auto."""
    if name == "data":
        return located_source(value)
    if name in ("teacher", "model") and value not in ("", "auto"):
        return ModelRef.parse(value).located
    return value


class Recipe(BaseModel):
    """Ordered steps that make a variant from a base."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int = Field(default=SCHEMA, description="Version of this file's layout")
    steps: tuple[Step, ...] = Field(min_length=1, description="Steps in the order they are applied")
    calibration: str | None = Field(
        default=None,
        max_length=1000,
        description="Text that calibrated steps read: pydoc, domains, domain:NAME, a file, or hub:ID; only where a step "
        "reads any",
    )

    @field_validator("schema_version")
    @classmethod
    def _known_version(cls, value: int) -> int:
        if value != SCHEMA:
            raise ValueError(f"recipe schema {value} is not {SCHEMA}; update Slimscope or rewrite the recipe")
        return value

    @model_serializer(mode="wrap")
    def _without_what_is_not_read(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A recipe that reads no text says nothing of any, so that the ids of such recipes never changed."""
        written: dict[str, Any] = handler(self)
        if self.calibration is None:
            written.pop("calibration")
        return written

    @classmethod
    def of(cls, method: str, **settings: Any) -> Recipe:
        """A recipe of one step, validated."""
        return cls.parse({"steps": [{"method": method, "settings": settings}]})

    @classmethod
    def parse(cls, value: Any) -> Recipe:
        """Validate a recipe and fill in every default; raises ``BadInput``."""
        try:
            recipe = cls.model_validate(value)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "recipe"
            raise BadInput(
                f'recipe: {where}: {first["msg"]}; a recipe looks like {{"steps": [{{"method": "rtn", "settings": {{"bits": 4}}}}]}}'
            ) from None
        full = tuple(Step(method=s.method, settings=s.parsed().model_dump(mode="json")) for s in recipe.steps)
        return cls(steps=full).calibrated_on(recipe.calibration)

    @property
    def reads_text(self) -> bool:
        """Whether a step is calibrated on text."""
        return any("calibration" in get("compress", step.method).needs for step in self.steps)

    def calibrated_on(self, text: str | None) -> Recipe:
        """The same steps with this calibration text (None: the default); unchanged where no step reads any."""
        return self.model_copy(update={"calibration": text or CALIBRATION}) if self.reads_text else self

    @classmethod
    def read(cls, path: Path) -> Recipe:
        """Read a recipe file; raises ``BadInput`` when it is missing, not JSON, or not a recipe."""
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise BadInput(f"recipe file {path}: {error.strerror}; give the path of a JSON file") from None
        except ValueError as error:
            raise BadInput(f"recipe file {path} is not JSON: {error}") from None
        try:
            return cls.parse(value)
        except SlimscopeError as error:
            raise BadInput(f"{path}: {error}") from None

    @property
    def located(self) -> Recipe:
        """The recipe that means the same in any process: paths of rows, text and models made absolute."""
        steps = tuple(
            step.model_copy(
                update={"settings": {name: _located(name, value) for name, value in step.settings.items()}}
            )
            for step in self.steps
        )
        text = None if self.calibration is None else located_source(self.calibration)
        return self.model_copy(update={"steps": steps, "calibration": text})

    def canonical(self) -> str:
        """The recipe's canonical JSON."""
        return canonical_json(self.model_dump(mode="json"))

    @property
    def hash(self) -> str:
        """SHA-256 of the canonical JSON."""
        return content_hash(self.model_dump(mode="json"))

    def variant_id(self, base_fingerprint: str) -> str:
        """The id of the variant this recipe makes from that base: 12 hex digits; the same for a path however written."""
        return content_hash([base_fingerprint, self.located.model_dump(mode="json")])[:12]

    def label(self) -> str:
        """A short human name, e.g. ``rtn bits=4 scheme=symmetric``."""
        steps = " + ".join(step.label() for step in self.steps)
        return steps if self.calibration in (None, CALIBRATION) else f"{steps} on {self.calibration}"
