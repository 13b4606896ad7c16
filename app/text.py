"""Model and user text on its way into a Markdown sink: escaped, so that it stays text.

Even safe Markdown fetches images named in a token. Prefer ``st.text``, ``st.code``, ``st.dataframe``, a chart or a
component that writes ``textContent``; use :func:`esc` where only a label, caption, toast or metric will do.
"""

from __future__ import annotations

import re

_SPECIAL = re.compile(r"([\\`*_{}\[\]()<>#+\-.!|$:~&=])")
_VISIBLE = {"\n": "⏎", "\t": "⇥", "\r": "␍"}


def esc(text: object) -> str:
    """``text`` as one Markdown line that shows exactly its characters: no image, link, HTML, colour or emoji code."""
    line = "".join(_VISIBLE.get(c, c) for c in str(text))
    return _SPECIAL.sub(r"\\\1", line)


def visible(token: str) -> str:
    """A token for a table or a chart cell: line breaks and tabs as signs, blanks alone as ␣, nothing as ∅."""
    shown = "".join(_VISIBLE.get(c, c) for c in token)
    return shown if shown.strip() else "␣" * len(shown) or "∅"
