from __future__ import annotations

from typing import Literal

import pytest
from pydantic import Field, model_validator
from streamlit.testing.v1 import AppTest

from app.forms import default_settings, validated
from core.registry import PACKAGES, Settings, methods


class Example(Settings):
    bits: Literal[2, 4, 8] = Field(4, description="Bits")
    group: int = Field(64, ge=8, le=128, description="Group")

    @model_validator(mode="after")
    def _fits(self) -> Example:
        if self.bits == 2 and self.group > 64:
            raise ValueError("2 bits need groups of 64 at most")
        return self


def test_validation_names_the_field():
    settings, problems = validated(Example, {"bits": 4, "group": 4})
    assert settings is None
    assert problems == {"group": "Input should be greater than or equal to 8"}


def test_a_rule_over_fields_has_no_field():
    assert validated(Example, {"bits": 2, "group": 128})[1] == {"": "2 bits need groups of 64 at most"}


def draw(kind: str, id_: str) -> None:
    import streamlit as st

    from app.forms import settings_form
    from core.registry import get

    settings = settings_form(get(kind, id_))
    st.json(settings.model_dump(mode="json") if settings else {})


ALL = [(kind, id_) for kind in PACKAGES for id_ in methods(kind)]


@pytest.mark.parametrize(("kind", "id_"), ALL, ids=[f"{kind}-{id_}" for kind, id_ in ALL])
def test_every_method_has_a_form_that_starts_at_its_defaults(kind, id_):
    import json

    app = AppTest.from_function(draw, args=(kind, id_)).run(timeout=20)
    assert not app.exception
    assert json.loads(app.json[0].value) == default_settings(methods(kind)[id_])


def test_settings_come_from_the_address():
    app = AppTest.from_function(draw, args=("probe", "logit_lens"))
    app.query_params["logit_lens_top_k"] = "9"
    app.run(timeout=20)
    assert app.number_input(key="logit_lens_top_k").value == 9


def draw_example() -> None:
    import streamlit as st

    from app.forms import settings_form
    from core.registry import Method
    from tests.app.test_forms import Example

    st.text(settings_form(Method("example", "probe", "Example", "", "", Example, frozenset(), "", print)))


def test_what_the_settings_refuse_is_said_beneath_the_form():
    app = AppTest.from_function(draw_example)
    app.query_params["example_bits"], app.query_params["example_group"] = "2", "128"
    app.run(timeout=20)
    assert any("2 bits need groups" in said.value.replace("\\", "") for said in app.markdown)
    assert app.text[0].value == "None"
