"""Stretches of time that lie inside each other: what a pass over a model is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

Category = Literal["module", "operator"]


@dataclass(frozen=True)
class Span:
    """One call of a module or an operator."""

    name: str
    """A module's path (empty for the whole model), or an operator's name."""
    category: Category
    start_ns: int
    end_ns: int
    module: str = ""
    """Path of the innermost module around it; its own path for a module; empty where nobody knows."""
    depth: int = 0
    """Spans around it."""
    children_ns: int = 0
    """Of it, in spans directly inside."""

    @property
    def total_ns(self) -> int:
        """From start to end."""
        return self.end_ns - self.start_ns

    @property
    def self_ns(self) -> int:
        """What no span inside it accounts for."""
        return self.total_ns - self.children_ns


def nested(spans: Sequence[Span]) -> list[Span]:
    """The same spans of one thread by their start, with depth, children and surrounding module filled in."""
    found: list[Span] = []
    around: list[int] = []  # indices of the spans that are open
    for span in sorted(spans, key=lambda s: (s.start_ns, -s.end_ns)):
        while around and found[around[-1]].end_ns <= span.start_ns:
            around.pop()
        parent = found[around[-1]] if around else None
        module = span.name if span.category == "module" else (parent.module if parent else span.module)
        if parent:
            found[around[-1]] = replace(parent, children_ns=parent.children_ns + span.total_ns)
        found.append(replace(span, module=module, depth=len(around), children_ns=0))
        around.append(len(found) - 1)
    return found
