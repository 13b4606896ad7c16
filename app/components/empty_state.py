"""What a page shows when there is nothing yet: one sentence and the button that changes it."""

from __future__ import annotations

import streamlit as st


def empty_state(
    sentence: str,
    *,
    icon: str = "inbox",
    page: str | None = None,
    action: str = "",
    query: dict[str, str] | None = None,
    border: bool = True,
) -> None:
    """Draw a quiet card with ``sentence`` (ours, Markdown) and a link to ``page`` (a file name) that does it.

    ``border`` is off where it already stands in a card.
    """
    with st.container(border=border, horizontal_alignment="center", gap="small"):
        st.space("small")
        st.markdown(f":material/{icon}: :gray[{sentence}]", text_alignment="center")
        if page:
            st.page_link(
                f"../pages/{page}.py", label=action, icon=":material/arrow_forward:", query_params=query
            )
        st.space("small")
