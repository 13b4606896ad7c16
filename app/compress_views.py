"""What the Compress page offers and says, as plain functions: presets, groups of methods, predictions in words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from app import format as fmt
from core.models.sizes import ModelCard
from core.prediction import KeepsBudget, StoresBits, Work, predicted_bytes, predicted_work
from core.recipe import Recipe, Step
from core.registry import Group, Method, Need, get, methods


@dataclass(frozen=True)
class Preset:
    """A recipe worth one click."""

    id: str
    title: str
    sentence: str
    method: str
    settings: Mapping[str, Any]

    @property
    def recipe(self) -> Recipe:
        """The whole recipe, defaults filled in."""
        return Recipe.of(self.method, **self.settings)


INT4 = {"bits": 4, "group_size": "32", "scheme": "symmetric"}
PRESETS = (
    Preset(
        "int8",
        "int8, per channel",
        "A quarter of float32, and usually no difference to be seen.",
        "rtn",
        {"bits": 8, "group_size": "channel", "scheme": "symmetric"},
    ),
    Preset(
        "int4",
        "int4, groups of 32",
        "An eighth of float32 in the layers; one scale for 32 weights.",
        "rtn",
        INT4,
    ),
    Preset(
        "gptq4",
        "GPTQ int4",
        "The bytes of int4; each rounding error is made up for by the weights after it, on your text.",
        "gptq",
        INT4,
    ),
    Preset(
        "mixed",
        "Mixed, 4.5 bits",
        "Each part of each layer at the width it needs, within 4.5 bits per weight.",
        "mixed_precision",
        {"budget": "4.5bpw"},
    ),
    Preset(
        "bf16",
        "bfloat16",
        "Half of float32; the baseline all others have to beat.",
        "cast",
        {"dtype": "bfloat16"},
    ),
)

CAST = "cast"
"""Stores weights otherwise too, but leaves them plain: a quantizing step may follow."""
GROUP_TITLES: dict[Group, str] = {
    "quantize": "Quantize",
    "prune": "Prune",
    "experts": "Experts",
    "transform": "Transform",
    "convert": "Convert",
}


def fitting(offers: frozenset[Need] | None) -> dict[str, Method]:
    """The compression methods for a model, by id; all of them while it is not known what it offers."""
    known = methods("compress")
    if offers is None:
        return known
    return {id_: method for id_, method in known.items() if method.needs - {"calibration"} <= offers}


def presets(offers: frozenset[Need] | None) -> list[Preset]:
    """The presets that a model can have."""
    usable = fitting(offers)
    return [preset for preset in PRESETS if preset.method in usable]


def group_of(method: Method) -> Group:
    """Among which steps a method is offered: what it says, else what its needs and settings say."""
    if method.group is not None:
        return method.group
    if "moe" in method.needs:
        return "experts"
    if issubclass(method.settings, StoresBits) or "bits" in method.settings.model_fields:
        return "quantize"
    return "prune" if method.left is not None else "transform"


def grouped(found: Iterable[Method]) -> dict[Group, list[Method]]:
    """Methods by group, in the order of the groups and then of their titles; groups without any are left out."""
    by_title = sorted(found, key=lambda method: method.title)
    groups = {group: [m for m in by_title if group_of(m) == group] for group in get_args(Group)}
    return {group: members for group, members in groups.items() if members}


def telling(step: Step) -> str:
    """A step's first setting and those that differ from their defaults, e.g. ``bits 4 · scheme symmetric``."""
    label = step.label().removeprefix(step.method).strip()
    return " · ".join(part.replace("=", " ").replace("_", " ") for part in label.split())


def clash(recipe: Recipe) -> str:
    """Why a step will be refused after what an earlier one stored; empty where nothing speaks against the order."""
    stores = [
        at for at, step in enumerate(recipe.steps) if isinstance(step.parsed(), (StoresBits, KeepsBudget))
    ]
    packed = next((at for at in stores if recipe.steps[at].method != CAST), None)
    if packed is None or stores[-1] == packed:
        return ""
    return (
        f"Step {stores[-1] + 1} will be refused: step {packed + 1} has stored the weights already. "
        "Keep one quantizing step, and put a cast before it."
    )


def size_words(card: ModelCard, recipe: Recipe) -> str:
    """The predicted size and its share of the same weights in float32."""
    nbytes = predicted_bytes(card, recipe)
    if nbytes is None:
        return "Size not predicted"
    return f"About {fmt.size(nbytes)}, {nbytes / (card.parameters * 4):.0%} of float32"


def work_words(card: ModelCard, recipe: Recipe) -> str:
    """The time and the memory that the steps take, before the proof and the measurements."""
    work = predicted_work(card, recipe)
    return f"{_time(work)} · {_memory(work)}"


def _time(work: Work) -> str:
    if work.seconds is None:
        return "time not predicted"
    untold = " and ".join(get("compress", method).title for method in work.untold)
    rest = f" ({untold} not counted)" if untold else ""
    told = "under a second" if work.seconds < 1 else f"≈ {fmt.seconds(work.seconds)}"
    return f"{told} to compress{rest}, then proof and measuring"


def _memory(work: Work) -> str:
    return (
        "memory not predicted"
        if work.peak_bytes is None
        else f"{fmt.size(work.peak_bytes)} of weights and activations at the peak"
    )
