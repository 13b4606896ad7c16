"""The UI process must stay without torch; the guard is shown to be able to fail."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROBE = """
import importlib, pkgutil, sys
import app
for module in pkgutil.walk_packages(app.__path__, "app."):
    if not module.name.startswith("app.scripts"):
        importlib.import_module(module.name)
{more}
heavy = {{"torch", "transformers", "datasets", "vl_convert"}} & set(sys.modules)
sys.exit(f"loaded {{sorted(heavy)}}" if heavy else 0)
"""


def imported(more: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROBE.format(more=more)], capture_output=True, text=True, check=False
    )


def test_importing_all_of_the_dashboard_loads_nothing_heavy():
    done = imported("from core.registry import PACKAGES, methods; [methods(kind) for kind in PACKAGES]")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_guard_can_fail():
    done = imported("from core.lazy import torch; torch.float32")
    assert "loaded ['torch'" in done.stderr
