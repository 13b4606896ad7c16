"""A runtime's module by its id, and what it says of itself."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from core.profile.runtimes._base import ProfileSettings, Runtime
from core.registry import get


def module_of(runtime: str) -> ModuleType:
    """The file of a runtime; raises ``UnknownMethod`` listing the known ids."""
    return importlib.import_module(get("profile", runtime).run.__module__)


def settings_of(runtime: str, values: Mapping[str, Any]) -> ProfileSettings:
    """A runtime's settings from plain data; raises ``BadSettings``."""
    settings = get("profile", runtime).parse(dict(values))
    assert isinstance(settings, ProfileSettings), f"{runtime}: settings must be ProfileSettings"
    return settings


def create(runtime: str, settings: ProfileSettings, files: Path) -> Runtime:
    """The runtime itself, in the process that measures."""
    made: Runtime = module_of(runtime).create(settings, files)
    return made
