"""A recipe: ordered compression steps, the same JSON in the page, on the command line and in a file.

Its canonical JSON holds every setting, defaults included, so that a later change of a default cannot change
what an old recipe means. The hash of that JSON together with the base's fingerprint is the variant's id.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from core.errors import BadInput, SlimscopeError
from core.registry import Settings, get
from core.types import canonical_json, content_hash

SCHEMA = 1


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
        return " ".join([self.method, *(f"{name}={getattr(parsed, name)}" for name in telling)])


class Recipe(BaseModel):
    """Ordered steps that make a variant from a base."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int = Field(default=SCHEMA, description="Version of this file's layout")
    steps: tuple[Step, ...] = Field(min_length=1, description="Steps in the order they are applied")

    @field_validator("schema_version")
    @classmethod
    def _known_version(cls, value: int) -> int:
        if value != SCHEMA:
            raise ValueError(f"recipe schema {value} is not {SCHEMA}; update Slimscope or rewrite the recipe")
        return value

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
        return cls(steps=full)

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

    def canonical(self) -> str:
        """The recipe's canonical JSON."""
        return canonical_json(self.model_dump(mode="json"))

    @property
    def hash(self) -> str:
        """SHA-256 of the canonical JSON."""
        return content_hash(self.model_dump(mode="json"))

    def variant_id(self, base_fingerprint: str) -> str:
        """The id of the variant this recipe makes from that base: 12 hex digits."""
        return content_hash([base_fingerprint, self.model_dump(mode="json")])[:12]

    def label(self) -> str:
        """A short human name, e.g. ``rtn bits=4 scheme=symmetric``."""
        return " + ".join(step.label() for step in self.steps)
