"""The input of a probe: a prompt, for an encoder a second text beside it, for a vision model an image.

Everything is in the address: texts as they are, an image as ``digits:N`` or as the name of a kept upload. Also the
worked examples, each one click that fills input and settings.
"""

from __future__ import annotations

from collections.abc import Callable

import streamlit as st

from app import images
from app.forms import default_settings
from app.questions import examples_for
from app.text import esc
from core.errors import BadInput
from core.registry import Example, Method, methods
from core.types import Family, Prompt

PROMPT = "When Mary and John went to the store, John gave a drink to Mary. When Mary and John went home, John gave a"
IMAGE = "digits:0"
LAST_DIGIT = 1796
"""Row of the last image of scikit-learn's digits."""


def prompt_box(family: Family, on_change: Callable[[], None], *, read: bool) -> Prompt | None:
    """Draw the input a model of this family takes; None after saying what is wrong with it.

    ``on_change`` is called with a new text in place, before the page is drawn. ``read`` is false where the probe
    looks at other text.
    """
    if family == "vision":
        return _image_box()
    text = st.text_area(
        "Prompt",
        PROMPT,
        key="text",
        bind="query-params",
        height=82,
        max_chars=20_000,
        on_change=on_change,
        disabled=not read,
        help=None if read else "Not read: with these settings the probe looks at other text",
    )
    if family not in ("encoder", "classifier"):
        return Prompt(text)
    second = st.text_input(
        "Second text (optional)",
        key="second",
        bind="query-params",
        max_chars=20_000,
        help="An encoder can read two texts as a pair; probes of similarity compare them",
    )
    return Prompt(text, second or None)


def _image_box() -> Prompt | None:
    st.session_state["digit"] = _row()
    left, right = st.columns([2, 3], gap="small")
    with left:
        st.number_input(
            "Row of the digits data set",
            min_value=0,
            max_value=LAST_DIGIT,
            key="digit",
            on_change=lambda: use_image(f"digits:{st.session_state['digit']}"),
        )
    with right:
        upload = st.file_uploader(
            "Or an image of yours",
            type=list(images.KINDS.values()),
            max_upload_size=images.LIMIT_BYTES // 1_000_000,
            key="upload",
        )
    if upload is not None and st.session_state.get("upload_used") != upload.file_id:
        st.session_state["upload_used"] = upload.file_id
        try:
            use_image(images.keep(upload.getvalue()))
        except BadInput as error:
            st.markdown(f":red[{esc(error)}]")
            return None
    name = image_name()
    try:
        source = images.source_of(name)
    except BadInput as error:
        st.markdown(f":red[{esc(error)}]")
        return None
    if not images.DIGITS.fullmatch(name):
        st.caption(esc(f"Looking at your image {name[:12]}; a change of the row goes back to the digits."))
    return Prompt(image=source)


def image_name() -> str:
    """The image that is looked at: the address's, else the one of this session."""
    return st.query_params.get("image") or st.session_state.get("image") or IMAGE


def use_image(name: str) -> None:
    """Make an image the input."""
    st.session_state["image"] = st.query_params["image"] = name


def _row() -> int:
    name = image_name()
    return min(int(name.removeprefix("digits:")), LAST_DIGIT) if images.DIGITS.fullmatch(name) else 0


# --- worked examples ----------------------------------------------------------------------------------


def example_row(probe: Method, family: Family) -> None:
    """One button per worked example of a probe."""
    examples = examples_for(probe, family)
    if not examples:
        return
    with st.container(horizontal=True, gap="small", vertical_alignment="center"):
        st.caption("Worked examples", width="content")
        for number, example in enumerate(examples):
            st.button(
                esc(example.title),
                icon=":material/lightbulb:",
                type="tertiary",
                key=f"{probe.id}_example{number}",
                on_click=use_example,
                args=(probe, example),
            )


def use_example(probe: Method, example: Example) -> None:
    """Fill prompt and settings as the example says, other settings with their defaults; only from a callback."""
    fill(probe, example.prompt, {**default_settings(probe), **example.settings})


def fill(probe: Method, prompt: Prompt, settings: dict[str, object]) -> None:
    """Put an input and settings into the widgets, and so into the address; before those are drawn."""
    st.query_params.pop("cell", None)
    if prompt.image is not None:
        use_image(images.name_of(prompt.image))
    else:
        st.session_state["text"] = prompt.text
        st.session_state["second"] = prompt.second or ""
    for name, value in settings.items():
        if name == "artifact":
            st.query_params[f"{probe.id}_{name}"] = str(value)
        st.session_state[f"{probe.id}_{name}"] = value


def take_up(probe: Method, family: Family) -> None:
    """When a probe is chosen while the input is still one of ours, start it on its first worked example."""
    ours = {PROMPT} | {
        example.prompt.text for method in methods("probe").values() for example in method.examples
    }
    examples = examples_for(probe, family)
    if examples and family != "vision" and st.session_state.get("text", PROMPT) in ours:
        use_example(probe, examples[0])
