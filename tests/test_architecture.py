"""The house's invariants, each with a twin that shows the test can fail."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("torch", "transformers", "streamlit", "altair", "datasets", "compressed_tensors", "peft")
METHOD_FOLDERS = (
    *("core/probes", "core/train", "core/compress", "core/evaluate", "core/profile/runtimes"),
    "core/export",
)


def loaded_after(code: str) -> set[str]:
    """Which of the heavy packages a fresh interpreter has loaded after running ``code``."""
    report = f"{code}\nimport sys; print(','.join(m for m in {HEAVY!r} if m in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", report], capture_output=True, text=True, cwd=ROOT, check=True
    )
    return set(done.stdout.strip().split(",")) - {""}


WHOLE_CORE = """
import importlib, pkgutil, core
from core import registry
[registry.methods(kind) for kind in registry.PACKAGES]
for module in pkgutil.walk_packages(core.__path__, "core."):
    if not module.name.startswith("core.catalog.migrations."):
        importlib.import_module(module.name)
"""


def test_importing_all_of_core_loads_nothing_heavy():
    assert loaded_after(WHOLE_CORE) == set()


def test_the_import_guard_can_fail():
    assert "torch" in loaded_after("import torch")
    assert "torch" in loaded_after("from core.lazy import torch; torch.Tensor")


def imports_of(source: str) -> set[str]:
    """Absolute names of all modules that a piece of source imports."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def method_modules() -> set[str]:
    return {
        str(path.relative_to(ROOT).with_suffix("")).replace("/", ".")
        for folder in METHOD_FOLDERS
        for path in (ROOT / folder).glob("*.py")
        if not path.name.startswith("_")
    }


@pytest.mark.parametrize("module", sorted(method_modules()))
def test_a_method_file_imports_no_other_method_file(module: str):
    path = ROOT / (module.replace(".", "/") + ".py")
    assert imports_of(path.read_text()) & (method_modules() - {module}) == set()


def test_the_method_import_guard_can_fail():
    assert "core.compress.rtn" in imports_of("from core.compress import rtn")


LAYERS = {
    "core": ("app", "pages", "streamlit", "altair"),
    "app": ("pages", "torch", "transformers"),
    "pages": ("torch", "transformers"),
}


@pytest.mark.parametrize("layer", LAYERS)
def test_dependencies_point_one_way(layer: str):
    for path in (ROOT / layer).rglob("*.py"):
        if path == ROOT / "core" / "cli.py":
            continue  # the one door from the engine's command line to the dashboard: `slimscope ui`
        if path.parent == ROOT / "app" / "scripts":
            continue  # texts of "Reproduce", shown to the user and never imported by the dashboard
        roots = {name.split(".")[0] for name in imports_of(path.read_text())}
        assert not roots & set(LAYERS[layer]), (
            f"{path.relative_to(ROOT)} imports {roots & set(LAYERS[layer])}"
        )


BELOW_COMPRESS = (
    "numerics",
    "models",
    "routing",
    "calibrate",
    "saving",
    "quantize",
    "reshape",
    "distill",
    "budget",
)
"""In the order in which they may import each other, the later the earlier; ``core.compress`` may import all."""


@pytest.mark.parametrize("package", BELOW_COMPRESS)
def test_the_parts_of_compression_point_one_way(package: str):
    later = BELOW_COMPRESS[BELOW_COMPRESS.index(package) + 1 :]
    above = tuple(
        f"core.{name}" for name in (*later, "compress", "entries", "loop", "jobs", "catalog", "cli")
    )
    if package == "models":
        above = tuple(name for name in above if name != "core.routing")  # experts are found by its rules
    for path in (ROOT / "core" / package).rglob("*.py"):
        found = {
            name
            for name in imports_of(path.read_text())
            if name.startswith(tuple(f"{a}." for a in above)) or name in above
        }
        assert not found, f"{path.relative_to(ROOT)} imports {sorted(found)}"


def test_no_page_is_long():
    for path in (ROOT / "pages").glob("*.py"):
        assert len(path.read_text().splitlines()) <= 150, f"{path.name}: shape data in app/, not in pages"


BANNED_IN_UI = ("unsafe_allow_html", "st.html(", "use_container_width", "pickle.load", "torch.load(")


def test_no_sink_that_would_run_model_text():
    for path in [
        *(ROOT / "app").rglob("*.py"),
        *(ROOT / "pages").rglob("*.py"),
        *(ROOT / "core").rglob("*.py"),
    ]:
        text = path.read_text()
        assert not [word for word in BANNED_IN_UI if word in text], path


def test_no_path_of_one_machine_in_the_tree():
    tracked = subprocess.run(
        ["git", "ls-files"], capture_output=True, text=True, cwd=ROOT, check=True
    ).stdout.split()
    homes = tuple(f"/{folder}/" for folder in ("root", "work", "home"))
    for name in tracked:
        path = ROOT / name
        if (
            path.suffix in {".py", ".md", ".toml", ".txt", ".yaml", ""}
            and path.is_file()
            and path.name != "LICENSE"
        ):
            lines = path.read_text(errors="ignore").splitlines()
            assert not [line for line in lines if any(home in line for home in homes)], name


def test_no_button_is_of_type_primary():
    """White on the dark theme's accent is too faint to read (see .streamlit/config.toml)."""
    for path in [*(ROOT / "app").rglob("*.py"), *(ROOT / "pages").rglob("*.py")]:
        assert 'type="primary"' not in path.read_text(), path
