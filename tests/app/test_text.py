from __future__ import annotations

import re

import pytest

from app.text import esc, visible

HOSTILE = [
    "![x](http://evil/a.png)",
    "<img src=x onerror=alert(1)>",
    ":red[x] $x$ `x` **x**",
    "[x](javascript:1)",
    "# h\n- a",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_every_character_markdown_acts_on_is_escaped(text):
    assert not re.search(r"(?<!\\)[`*_{}\[\]()<>#+.!|$:~-]", esc(text))
    assert "\n" not in esc(text)


@pytest.mark.parametrize("text", HOSTILE)
def test_escaping_loses_nothing(text):
    assert re.sub(r"\\(.)", r"\1", esc(text)) == text.replace("\n", "⏎")


@pytest.mark.parametrize(
    ("token", "shown"), [(" the", " the"), ("\n", "⏎"), ("  ", "␣␣"), ("", "∅"), ("a\tb", "a⇥b")]
)
def test_invisible_tokens_are_shown(token, shown):
    assert visible(token) == shown
