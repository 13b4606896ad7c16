"""Small questions about module paths: what is there, what it is called, and the first of several names."""

from __future__ import annotations

from typing import Any


def submodule(module: Any, path: str | None) -> Any | None:
    """The module at a dotted path, or None where there is none."""
    if not path:
        return None
    try:
        return module.get_submodule(path)
    except AttributeError:
        return None


def path_or_none(model: Any, path: str) -> str | None:
    """The path itself if a module is there."""
    return path if submodule(model, path) is not None else None


def first_present(model: Any, base: str, names: tuple[str, ...]) -> str | None:
    """The first of these names, below ``base``, at which there is a module."""
    paths = (join(base, name) for name in names)
    return next((path for path in paths if submodule(model, path) is not None), None)


def path_of(model: Any, module: Any | None) -> str | None:
    """The path of a module by identity."""
    paths = (str(path) for path, candidate in model.named_modules() if candidate is module)
    return next(paths, None)


def join(base: str, name: str) -> str:
    """Two dotted paths as one."""
    return f"{base}.{name}" if base else name
