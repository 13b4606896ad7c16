"""Where a recipe comes from on the Compress page: a preset, a method's form, or the JSON itself."""

from __future__ import annotations

import json
from dataclasses import dataclass

import streamlit as st

from app import state
from app.forms import settings_form
from app.text import esc
from core.errors import BadInput
from core.recipe import CALIBRATION, Recipe
from core.registry import Method, Need, methods

FIRST = "rtn"
"""The method that the form shows when none was chosen."""
LONGEST = 20_000
"""Characters of a recipe that may be typed or uploaded."""


@dataclass(frozen=True)
class Preset:
    """A recipe worth one click."""

    id: str
    title: str
    sentence: str
    method: str
    settings: dict[str, object]

    @property
    def recipe(self) -> Recipe:
        """The whole recipe, defaults filled in."""
        return Recipe.of(self.method, **self.settings)


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
        {"bits": 4, "group_size": "32", "scheme": "symmetric"},
    ),
    Preset(
        "int4_affine",
        "int4 affine, groups of 32",
        "As int4, with a zero point: closer where weights are lopsided.",
        "rtn",
        {"bits": 4, "group_size": "32", "scheme": "affine"},
    ),
    Preset(
        "bf16",
        "bfloat16",
        "Half of float32; the baseline all others have to beat.",
        "cast",
        {"dtype": "bfloat16"},
    ),
)


def recipe_editor(offers: frozenset[Need] | None) -> Recipe | None:
    """Draw the form or the JSON, whichever the address asks for; None after saying what is wrong.

    ``offers`` is what the model can give to a method, None while it is not known: the form lists what fits.
    """
    given = "recipe" in st.query_params
    with st.container(horizontal=True, vertical_alignment="center"):
        st.header("Your own recipe", anchor=False, width="stretch")
        mode = st.segmented_control(
            "Write it as",
            ["Form", "JSON"],
            default="JSON" if given else "Form",
            required=True,
            key="write_as",
            label_visibility="collapsed",
        )
    return _as_json() if mode == "JSON" else _as_form(offers)


def fitting(offers: frozenset[Need] | None) -> dict[str, Method]:
    """The compression methods for a model, by id; all of them while it is not known what it offers."""
    known = methods("compress")
    if offers is None:
        return known
    return {id_: method for id_, method in known.items() if method.needs - {"calibration"} <= offers}


def _as_form(offers: frozenset[Need] | None) -> Recipe | None:
    known = fitting(offers)
    id_ = state.choice(
        st.selectbox,
        "Method",
        {id_: method.title for id_, method in known.items()},
        key="method",
        default=FIRST,
    )
    st.caption(esc(known[id_].summary))
    settings = settings_form(known[id_])
    if settings is None:
        return None
    recipe = Recipe.of(id_, **settings.model_dump(mode="json"))
    if recipe.reads_text:
        text = st.text_input(
            "Calibration text",
            CALIBRATION,
            key="calibration",
            bind="query-params",
            help="What the method measures the model on: pydoc (the reference prose every Python ships), domains, "
            "domain:NAME, a text file's path, or hub:ID. Evaluation reads other documents.",
        )
        recipe = recipe.calibrated_on(text.strip() or None)
    with st.expander("Recipe JSON", icon=":material/data_object:"):
        st.code(written(recipe), language="json")
        st.caption("The same JSON is a file for the command line: `slimscope run recipe.json --model MODEL`")
    return recipe


def _as_json() -> Recipe | None:
    """Typed or uploaded; the text is in the address, so that a recipe is a link."""
    uploaded = st.file_uploader(
        "Recipe file", type="json", key="recipe_file", max_upload_size=1, on_change=_take_upload
    )
    del uploaded  # its callback has put the text where it belongs
    text = st.text_area(
        "Recipe JSON",
        written(PRESETS[1].recipe),
        key="recipe",
        bind="query-params",
        height=260,
        max_chars=LONGEST,
        help="Steps are applied in order; a setting that is missing takes its default",
    )
    try:
        return Recipe.parse(json.loads(text or ""))
    except ValueError as error:
        said = error if isinstance(error, BadInput) else f"This is not JSON: {error}"
        st.markdown(f":red[{esc(said)}]")
        return None


def _take_upload() -> None:
    file = st.session_state["recipe_file"]
    if file is not None:
        st.session_state["recipe"] = file.getvalue()[:LONGEST].decode("utf-8", errors="replace")


def written(recipe: Recipe) -> str:
    """The recipe as people read it."""
    return json.dumps(recipe.model_dump(mode="json"), indent=2)
