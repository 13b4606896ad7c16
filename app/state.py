"""What pages share, kept in the address: the model that is looked at, and the cell that is picked on a map.

Widgets of one page name their own query parameters (``bind="query-params"``); this file owns the shared ones.
The session holds ids and short texts only, never frames or models.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import streamlit as st

from app import engine
from core.models.demo import demos

DEFAULT_MODEL = "demo:smollm2"
_SEPARATOR = "~"


def known_models() -> dict[str, str]:
    """Sources that can be picked without typing, with their names: demos, bases, then the newest variants."""
    known = {f"demo:{name}": demo.title for name, demo in demos().items()}
    revision = engine.revision()
    for models in (engine.bases(revision), engine.newest_models(revision)):
        for source, name in zip(models["source"], models["name"], strict=True):
            known.setdefault(source, name)
    return known


def choice(
    widget: Callable[..., Any],
    label: str,
    titles: Mapping[str, str],
    *,
    key: str,
    default: str,
    **options: Any,
) -> str:
    """A choice among ids shown by their titles, with the id in the address under ``key``.

    ``widget`` is ``st.selectbox`` or ``st.segmented_control``. Streamlit's own binding would put the title into the
    address, which is no stable link. The address wins over the session, so links and the back button work.
    """
    titles = distinct(titles)
    free = options.get("accept_new_options", False)
    wanted = st.query_params.get(key)
    if wanted and (wanted in titles or free):
        st.session_state[key] = wanted
    elif not st.session_state.get(key) or (st.session_state[key] not in titles and not free):
        st.session_state[key] = default

    if st.session_state[key] not in titles:  # what was typed is an option too
        titles = {**titles, st.session_state[key]: st.session_state[key]}

    def remember() -> None:
        if st.session_state.get(key):
            st.query_params[key] = st.session_state[key]

    chosen: str = widget(
        label,
        list(titles),
        format_func=lambda id_: titles.get(id_, id_),
        key=key,
        persist_state="session",
        on_change=remember,
        **options,
    )
    if chosen and chosen != default and st.query_params.get(key) != chosen:
        st.query_params[key] = chosen  # kept from another page: the address shows it again
    return chosen or default


def distinct(titles: Mapping[str, str]) -> dict[str, str]:
    """Titles of ids, a title that several share followed by the id: a box takes its choice back by the title."""
    times = Counter(titles.values())
    return {id_: title if times[title] == 1 else f"{title} ({id_})" for id_, title in titles.items()}


def model_picker() -> None:
    """Draw the model box of the sidebar. Anything may be typed into it."""
    choice(
        st.selectbox,
        "Model",
        known_models(),
        key="model",
        default=DEFAULT_MODEL,
        accept_new_options=True,
        help="Pick one, or type a hub id (org/name, optionally @revision), a folder, a .gguf file or variant:ID.",
    )


def model() -> str:
    """The source of the model that is looked at."""
    return st.session_state.get("model") or DEFAULT_MODEL


def model_name(source: str) -> str:
    """A short name of a source: its title where it is known, else the last part of what was typed."""
    return known_models().get(source) or source.rstrip("/").rpartition("/")[2]


def choose_model(source: str) -> None:
    """Make ``source`` the model that is looked at; only from a callback, before the picker is drawn."""
    st.session_state["model"] = st.query_params["model"] = source


@dataclass(frozen=True)
class Picked:
    """The picked cell as the address carries it: keys as text, and on which axes where a result has several."""

    row: str
    col: str
    axes: str = ""


def picked_cell() -> Picked | None:
    """The picked cell; the page checks that it exists."""
    parts = st.query_params.get("cell", "").split(_SEPARATOR)
    return Picked(*parts) if len(parts) in (2, 3) else None


def pick_cell(row_key: object, col_key: object, axes: str = "") -> None:
    """Put a cell into the address."""
    st.query_params["cell"] = _SEPARATOR.join([str(row_key), str(col_key), *([axes] if axes else [])])


def clear_cell() -> None:
    """Nothing is picked any more."""
    st.query_params.pop("cell", None)
