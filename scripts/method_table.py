"""Rewrite the method table in README.md from the registry; `make docs` runs it, a test holds the table current."""

from __future__ import annotations

from pathlib import Path

from core.registry import PACKAGES, methods

README = Path(__file__).resolve().parents[1] / "README.md"
BEGIN, END = "<!-- methods: made by `make docs` -->", "<!-- end of methods -->"


def table() -> str:
    """The registry as a Markdown table, one row per method."""
    rows = ["| kind | method | what it does | needs |", "|---|---|---|---|"]
    for kind in PACKAGES:
        for method in methods(kind).values():
            needs = ", ".join(sorted(method.needs)) or "–"
            rows.append(f"| {kind} | `{method.id}` | {method.summary} | {needs} |")
    return "\n".join(rows)


def with_table(text: str) -> str:
    """README's text with the part between the two markers made anew."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    README.write_text(with_table(README.read_text(encoding="utf-8")), encoding="utf-8")
