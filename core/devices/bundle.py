"""What is sent to a device: the agent as one file, and what a variant is in an engine's own form."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

_ENTRY = "from agent.main import main\n\nmain()\n"
_DATE = (2020, 1, 1, 0, 0, 0)


@cache
def agent() -> bytes:
    """The agent as a zipapp; the same bytes for the same sources."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as pack:
        _put(pack, "__main__.py", _ENTRY.encode())
        for source in sorted(Path(__file__).with_name("agent").glob("*.py")):
            _put(pack, f"agent/{source.name}", source.read_bytes())
    return packed.getvalue()


def agent_name() -> str:
    """Its name on a device, with the version in it."""
    return f"agent-{hashlib.sha256(agent()).hexdigest()[:16]}.pyz"


def sha256(path: Path) -> str:
    """Content hash of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_script(target: Path, spec: Mapping[str, Any], files: Mapping[str, Path]) -> None:
    """Agent, job and model as one file that a device's Python runs: ``python3 FILE``."""
    target.write_bytes(agent())
    with zipfile.ZipFile(target, "a", zipfile.ZIP_STORED) as pack:
        _put(pack, "job/spec.json", json.dumps(spec).encode())
        for name, path in files.items():
            pack.write(path, f"job/model/{name}")


def _put(pack: zipfile.ZipFile, name: str, data: bytes) -> None:
    facts = zipfile.ZipInfo(name, _DATE)
    facts.compress_type = zipfile.ZIP_DEFLATED
    pack.writestr(facts, data)
