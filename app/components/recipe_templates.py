"""Students worth one click, as cards: what each is, how large it would be, what its training would take."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import streamlit as st

from app import format as fmt
from app.distil_views import student_of, work_share
from app.text import esc
from app.training_views import training_of
from core.models.sizes import ModelCard
from core.recipe import Recipe
from core.student_recipes import Template


def recipe_templates(
    offered: Sequence[Template], card: ModelCard, *, chosen: str | None, on_choose: Callable[[Recipe], None]
) -> None:
    """Draw a card per template; ``on_choose`` is called with the recipe of the one that is clicked."""
    cards = st.grid(min(6, len(offered)), min_column_width=150)
    for template in offered:
        recipe = template.recipe(card.anatomy.n_layers)
        with cards.container(border=True, height="stretch", key=f"template_{template.id}", gap="xsmall"):
            st.header(template.title, anchor=False)
            st.markdown(f":gray[{template.sentence}]")
            with st.container(height="stretch", vertical_alignment="bottom", gap="xsmall"):
                st.caption(esc(telling(card, recipe)))
                now = template.id == chosen
                st.button(
                    "Chosen" if now else "Choose",
                    icon=":material/check:" if now else None,
                    disabled=now,
                    on_click=on_choose,
                    args=(recipe,),
                    key=f"choose_{template.id}",
                    width="stretch",
                )


def telling(card: ModelCard, recipe: Recipe) -> str:
    """Bytes, work per token and minutes of a template's student, as far as they can be told."""
    student, training = student_of(card, recipe), training_of(card, recipe)
    if student.parts is None:
        return "Size found by its steps"
    parts = [f"≈ {fmt.size(student.parts.bytes)}", f"{work_share(card, student.parts):.0%} of the work"]
    if training is not None:
        parts.append(f"≈ {fmt.seconds(training.seconds)} of training")
    return " · ".join(parts)
