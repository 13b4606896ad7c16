"""Model syntax and canonical JSON."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import BadInput
from core.types import ModelRef, canonical_json, content_hash


@pytest.mark.parametrize(
    ("text", "kind", "source", "revision"),
    [
        ("demo:smollm2", "demo", "demo:smollm2", None),
        ("variant:abc123", "variant", "variant:abc123", None),
        ("org/name", "hub", "org/name", None),
        ("org/name@main", "hub", "org/name", "main"),
        ("gpt2", "hub", "gpt2", None),
        ("/models/x", "folder", "/models/x", None),
        ("./x", "folder", "./x", None),
        ("x.gguf", "gguf", "x.gguf", None),
        ("/a/b@c/model.GGUF", "gguf", "/a/b@c/model.GGUF", None),
    ],
)
def test_model_syntax(text, kind, source, revision):
    ref = ModelRef.parse(text)
    assert (ref.kind, ref.source, ref.revision) == (kind, source, revision)
    assert str(ref) == text


def test_a_folder_that_exists_wins_over_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert ModelRef.parse("org/name").kind == "hub"
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert ModelRef.parse("org/name").kind == "folder"


@pytest.mark.parametrize("text", ["", "  ", "a\x00b"])
def test_no_model_is_refused_with_the_choices(text):
    with pytest.raises(BadInput, match="demo:smollm2"):
        ModelRef.parse(text)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(st.dictionaries(st.text(), JSON))
def test_canonical_json_ignores_key_order(value):
    backwards = dict(reversed(list(value.items())))
    assert canonical_json(value) == canonical_json(backwards)
    assert content_hash(value) == content_hash(backwards)


def test_canonical_json_refuses_what_json_cannot_say():
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json(float("nan"))
