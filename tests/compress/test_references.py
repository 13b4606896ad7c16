from __future__ import annotations

import pytest

from core.compress._references import references_of
from core.recipe import Recipe


def recipe(*steps: tuple[str, dict]) -> Recipe:
    return Recipe.parse({"steps": [{"method": m, "settings": s} for m, s in steps]})


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ((("rtn", {}),), {}),
        ((("heal_routers", {}),), {0: "base"}),
        ((("rtn", {}), ("heal_routers", {})), {1: "base"}),
        ((("distil", {}),), {0: "base"}),
        ((("drop_layers", {}), ("distil", {})), {1: "start"}),
        ((("drop_layers", {}), ("distil", {"teacher": "variant:abc"})), {1: "variant:abc"}),
        ((("distil", {"teacher": "demo:moe"}), ("distil", {})), {0: "demo:moe", 1: "start"}),
    ],
)
def test_which_model_each_step_looks_back_to(steps, expected):
    assert references_of(recipe(*steps)) == expected
