"""How a student is trained: the settings of its last step, what they are expected to take, and the controls made beside it."""

from __future__ import annotations

from functools import partial

import streamlit as st

from app import drafts, state
from app.distil_views import misfit
from app.drafts import Draft
from app.forms import settings_form
from app.text import esc
from app.training_views import control_of, equal_bytes, sections_of, training_lines, training_of
from core.distill.settings import DistilSettings
from core.models.sizes import ModelCard
from core.prediction import predicted_bytes
from core.recipe import Recipe, Step
from core.registry import get

AUTO = "auto"
LOSSES = {
    "forward_kl": "KL(teacher ‖ student)",
    "reverse_kl": "KL(student ‖ teacher)",
    "jsd": "Jensen-Shannon, β",
    "skew_kl": "Skew KL, α",
    "skew_reverse_kl": "Skew reverse KL, α",
}


def training_form(draft: Draft, card: ModelCard) -> Recipe | None:
    """Draw the form of the draft's chosen step, which trains; the recipe as it is now, or None while a setting is refused."""
    step = draft.steps[draft.chosen]
    method, prefix = get("compress", step.method), f"train{draft.version}"
    st.caption(esc(method.summary))
    own = {}
    if "teacher" in method.settings.model_fields:
        own["teacher"] = partial(_teacher, str(step.settings["teacher"]), f"{prefix}_teacher")
        own["loss"] = partial(_loss, str(step.settings["loss"]), f"{prefix}_loss")
    settings = settings_form(
        method, prefix=prefix, start=step.settings, bind=False, own=own, sections=sections_of(method)
    )
    if settings is None:
        return None
    new = Step(method=step.method, settings=settings.model_dump(mode="json"))
    return drafts.edited(draft, new, draft.calibration).recipe


def _loss(now: str, key: str) -> str:
    """How far from the teacher counts."""
    return str(
        st.selectbox(
            "Loss",
            list(LOSSES),
            index=list(LOSSES).index(now),
            format_func=LOSSES.__getitem__,
            key=key,
            help=DistilSettings.model_fields["loss"].description,
        )
    )


def _teacher(now: str, key: str) -> str:
    """Whom the student learns from: the model it is made from, or any other."""
    titles = {AUTO: "The model it is made from", **state.known_models()}
    titles.setdefault(now, now)
    chosen = st.selectbox(
        "Teacher",
        list(titles),
        index=list(titles).index(now),
        format_func=lambda id_: titles.get(id_, id_),
        key=key,
        accept_new_options=True,
        help="With the same tokenizer as the student, and no smaller; a hub id, a folder or variant:ID may be typed",
    )
    return str(chosen or AUTO)


def cost_lines(card: ModelCard, recipe: Recipe, *, n_tokens: int | None) -> None:
    """What the training is expected to take, from the model's measured pace."""
    for line in training_lines(training_of(card, recipe, n_tokens=n_tokens), counted=n_tokens is not None):
        st.caption(esc(line))


def controls(card: ModelCard, recipe: Recipe) -> list[Recipe] | None:
    """Draw which controls are made with the student; the recipes that are wished, None where the rows cannot teach it."""
    if refusal := misfit(card, recipe):
        st.markdown(f":orange[:material/warning: {esc(refusal)}]")
        return None
    plain, nbytes = control_of(recipe), predicted_bytes(card, recipe)
    wished = []
    if plain is not None and st.toggle(
        "Also the same student without a teacher",
        key="control_plain",
        help="Trained on the same text for as many tokens by its next tokens or labels alone: what the teacher adds is the "
        "difference",
    ):
        wished.append(plain)
    if nbytes is not None and st.toggle(
        "Also the quantized model of equal bytes",
        key="control_quantized",
        help="The teacher itself in as many bytes, by mixed precision: what a student has to beat",
    ):
        wished.append(equal_bytes(nbytes))
    return wished
