"""Where Slimscope keeps things on this machine; every path can be moved by an environment variable."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs


def data_dir() -> Path:
    """Catalog, artifacts and job logs: ``SLIMSCOPE_HOME`` or the user's data directory. Created on demand."""
    path = Path(os.environ.get("SLIMSCOPE_HOME") or platformdirs.user_data_dir("slimscope"))
    path.mkdir(parents=True, exist_ok=True)
    return path


def cache_dir() -> Path:
    """Converted GGUF files and other things that can be made again: ``SLIMSCOPE_CACHE`` or the user's cache."""
    path = Path(os.environ.get("SLIMSCOPE_CACHE") or platformdirs.user_cache_dir("slimscope"))
    path.mkdir(parents=True, exist_ok=True)
    return path


def catalog_url() -> str:
    """The catalog's SQLAlchemy URL: ``SLIMSCOPE_CATALOG``, or SQLite in the data directory."""
    return os.environ.get("SLIMSCOPE_CATALOG") or f"sqlite:///{data_dir() / 'catalog.sqlite'}"
