"""What a reader asks, and the probes that answer it for one model; plain functions over the registry."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import pandas as pd

from core.registry import Example, Method, Need, Question, methods
from core.types import Family

Page = Literal["inspect", "routing", "formats"]
"""The pages that put questions to a model."""
FIRST: dict[Page, str] = {"inspect": "logit_lens", "routing": "expert_load", "formats": "weight_formats"}
"""What each of them opens on where the model has it."""

QUESTIONS: tuple[Question, ...] = (
    "Why this token?",
    "Which heads matter?",
    "Where is the fact?",
    "What does this layer know?",
    "What did it compute?",
    "Which expert does what?",
    "What if it routed otherwise?",
    "What did compression break?",
    "What can a number hold?",
)
"""In the order in which they are offered."""
FALLBACK: Question = "What did it compute?"
"""What a probe answers that does not say."""
_NEED_WORDS: dict[Need, str] = {
    "decoder": "a decoder",
    "encoder": "an encoder",
    "vision": "a vision model",
    "classifier": "a text classifier",
    "text": "text",
    "heads": "plain attention heads in every layer",
    "moe": "experts",
    "dense": "a dense model",
    "cuda": "a CUDA device",
}


def page_of(probe: Method) -> Page:
    """The page that draws a probe: what asks about experts has its own, and what asks about number formats."""
    if question_of(probe) == "What can a number hold?":
        return "formats"
    return "routing" if "moe" in probe.needs else "inspect"


def page_of_id(probe: str) -> Page | None:
    """The same for a probe's id; None for an id that no probe has."""
    known = methods("probe")
    return page_of(known[probe]) if probe in known else None


def of_page(page: Page) -> dict[str, Method]:
    """The probes of a page, by id."""
    return {id_: probe for id_, probe in methods("probe").items() if page_of(probe) == page}


def question_of(probe: Method) -> Question:
    """The question a probe answers."""
    return probe.answers or FALLBACK


def usable(probes: Mapping[str, Method], offers: frozenset[Need]) -> dict[str, Method]:
    """The probes that apply to a model, by id."""
    return {id_: probe for id_, probe in probes.items() if probe.needs <= offers}


def by_question(probes: Iterable[Method]) -> dict[Question, list[Method]]:
    """Probes under their questions, in the order of asking; questions without a probe are left out."""
    probes = list(probes)
    found = {question: [p for p in probes if question_of(p) == question] for question in QUESTIONS}
    return {question: answers for question, answers in found.items() if answers}


def first_of(probes: Mapping[str, Method], first: str) -> Method:
    """What is shown when nothing was asked for yet: ``first``, else the first answer to the first question."""
    return probes.get(first) or next(iter(by_question(probes.values()).values()))[0]


def misfits(probes: Mapping[str, Method], offers: frozenset[Need]) -> pd.DataFrame:
    """The probes that do not apply to a model: columns probe, needs, answers."""
    rows = [
        {
            "probe": probe.title,
            "needs": " and ".join(_NEED_WORDS.get(need, need) for need in sorted(probe.needs - offers)),
            "answers": question_of(probe),
        }
        for probe in probes.values()
        if not probe.needs <= offers
    ]
    return pd.DataFrame(rows, columns=["probe", "needs", "answers"])


def examples_for(probe: Method, family: Family) -> list[Example]:
    """The worked examples of a probe whose input a model of this family can take."""
    return [
        example
        for example in probe.examples
        if (example.prompt.image is not None) == (family == "vision")
        and (example.prompt.second is None or family == "encoder")
    ]
