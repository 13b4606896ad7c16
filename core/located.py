"""Names of data that mean the same in any process: a path on this machine made absolute, since a job's worker runs in
another folder. Knows no file format.
"""

from __future__ import annotations

from pathlib import Path

NAMES = ("pydoc", "domains", "stdlib", "digits")
PREFIXES = ("hub:", "domain:", "builtin:")


def located_source(source: str) -> str:
    """A text, rows or pictures as the user named them; anything that is no name of Slimscope's is a path."""
    named = source.strip() in NAMES or source.strip().startswith(PREFIXES)
    return source if named else str(Path(source).expanduser().resolve())
