"""``slimscope doctor``: what this machine has, and what would stop Slimscope from working here.

Each check states what was found and, where it is not well, the next move. It changes nothing.
"""

from __future__ import annotations

import importlib.metadata
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import psutil

from core.errors import SlimscopeError
from core.lazy import torch
from core.paths import cache_dir, catalog_url, data_dir

PACKAGES = (
    "torch",
    "transformers",
    "compressed-tensors",
    "safetensors",
    "gguf",
    "streamlit",
    "altair",
    "sqlalchemy",
)


@dataclass(frozen=True)
class Check:
    """One finding."""

    name: str
    state: Literal["ok", "note", "problem"]
    found: str
    next_move: str = ""


def examine() -> list[Check]:
    """Every check, in the order a newcomer meets them; a check that raises is itself a finding."""
    checks: list[Callable[[], Check]] = [
        _python,
        _versions,
        _memory,
        _disk,
        _demo_models,
        _catalog,
        _cpu,
        _cuda,
    ]
    return [_guarded(check) for check in checks]


def _guarded(check: Callable[[], Check]) -> Check:
    try:
        return check()
    except (SlimscopeError, OSError, ImportError) as error:
        return Check(check.__name__.strip("_").replace("_", " "), "problem", str(error))


def _python() -> Check:
    return Check("python", "ok", sys.version.split()[0])


def _versions() -> Check:
    return Check(
        "versions", "ok", ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    )


def _memory() -> Check:
    memory = psutil.virtual_memory()
    found = f"{memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB free, {psutil.cpu_count(logical=False)} cores"
    if memory.available < 4e9:
        return Check(
            "memory", "note", found, "models above ~0.5 B parameters will not fit; close other programs"
        )
    return Check("memory", "ok", found)


def _disk() -> Check:
    free = shutil.disk_usage(data_dir()).free
    found = f"{free / 1e9:.1f} GB free for {data_dir()} (cache: {cache_dir()})"
    if free < 5e9:
        return Check("disk", "note", found, "variants need room; move SLIMSCOPE_HOME or purge old ones")
    return Check("disk", "ok", found)


def _demo_models() -> Check:
    from core.models.demo import demo_files, demos

    return Check("demo models", "ok", ", ".join(f"demo:{name} ({demo_files(name).name})" for name in demos()))


def _catalog() -> Check:
    from core.catalog.store import Catalog

    return Check("catalog", "ok", f"{catalog_url()}, {len(Catalog().variants())} variants")


def _cpu() -> Check:
    from core.models.fp32_path import fast_fp32

    with fast_fp32() as path:
        return Check("float32 on this CPU", "ok", f"{path.name}; {torch.get_num_threads()} threads")


def _cuda() -> Check:
    if not torch.cuda.is_available():
        return Check("cuda", "note", "no CUDA device", "everything works on the CPU")
    return Check("cuda", "ok", torch.cuda.get_device_name())
