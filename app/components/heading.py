"""The head of every page: its title, what one is looking at, and how to get the same numbers without us."""

from __future__ import annotations

from dataclasses import dataclass

import streamlit as st

from app.text import esc
from core.registry import Method


@dataclass(frozen=True)
class About:
    """What am I looking at: three sentences, the formula (LaTeX) and the paper."""

    sentences: str
    formula: str = ""
    paper: str = ""

    @classmethod
    def of(cls, method: Method) -> About:
        """A method's own explanation: its docstring and its paper."""
        return cls(method.explanation, paper=method.paper)


@dataclass(frozen=True)
class Reproduction:
    """The same numbers elsewhere: a Python script on public libraries, and the command line."""

    script: str
    command: str


def heading(title: str, *, about: About, reproduce: Reproduction | None = None) -> None:
    """Draw the page's title (plain text) with its two popovers beside it."""
    with st.container(horizontal=True, vertical_alignment="bottom", gap="small"):
        st.title(esc(title), anchor=False, width="stretch")
        with st.popover("What am I looking at?", icon=":material/help:", type="tertiary"):
            st.markdown("\n\n".join(esc(part.replace("\n", " ")) for part in about.sentences.split("\n\n")))
            if about.formula:
                st.latex(about.formula)
            if about.paper:
                st.markdown(f"[{esc(about.paper.removeprefix('https://'))}]({about.paper})")
        if reproduce is not None:
            with st.popover("Reproduce", icon=":material/terminal:", type="tertiary"):
                st.caption("On the command line")
                st.code(reproduce.command, language="bash", wrap_lines=True)
                st.caption("In Python, on public libraries")
                st.code(reproduce.script, language="python")
