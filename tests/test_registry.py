"""A walk over every registered method: this file does not change when a method is added."""

from __future__ import annotations

import json
import runpy
import tempfile
from functools import cache
from pathlib import Path

import pytest
from pydantic import BaseModel

from core.errors import BadInput, BadSettings, UnknownMethod
from core.models.loaded import LoadedModel
from core.registry import PACKAGES, Method, get, method, methods
from core.types import Result
from tests.asking import ask, damage
from tests.compress.making import own_model
from tests.tiny import FAMILIES, tiny_model

ROOT = Path(__file__).resolve().parents[1]
ALL = [m for kind in PACKAGES for m in methods(kind).values()]


@pytest.mark.parametrize("m", ALL, ids=lambda m: f"{m.kind}:{m.id}")
class TestEveryMethod:
    def test_id_is_its_file(self, m: Method):
        assert m.run.__module__ == f"{PACKAGES[m.kind]}.{m.id}"

    def test_says_what_it_is(self, m: Method):
        assert m.summary.endswith(".")
        assert len(m.explanation) > len(m.summary), "the docstring is the page's `What am I looking at?`"
        assert m.title[0].isupper() or m.title == "llama.cpp", (
            "a title is a sentence, but for this proper name"
        )

    def test_every_setting_is_described_and_bounded(self, m: Method):
        for name, info in m.settings.model_fields.items():
            assert info.description, f"{name} has no description"
            assert not info.is_required(), f"{name} has no default"
            if info.annotation in (int, float):
                limits = {type(limit).__name__ for limit in info.metadata}
                assert limits & {"Ge", "Gt"}, f"{name} has no lower bound"
                assert limits & {"Le", "Lt"}, f"{name} has no upper bound"

    def test_defaults_round_trip_through_json_and_text(self, m: Method):
        default = m.parse({})
        assert m.parse(json.loads(default.model_dump_json())) == default
        as_text = {
            name: value if isinstance(value, str) else json.dumps(value)
            for name, value in default.model_dump(mode="json").items()
        }
        assert m.parse_text(as_text) == default

    def test_unknown_setting_is_refused_with_the_known_ones(self, m: Method):
        with pytest.raises(BadSettings, match="unknown setting 'nonsense'"):
            m.parse({"nonsense": 1})


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("m", methods("probe").values(), ids=lambda m: m.id)
def test_a_probe_runs_on_every_family_it_claims_and_refuses_the_others(m: Method, family: str):
    loaded = tiny_model(family)
    if loaded.missing_needs(m.needs):
        pytest.skip(f"{m.id} does not claim {family}")
    if "artifact" in m.settings.model_fields:
        with pytest.raises(BadInput, match="slimscope train"):
            ask(m, loaded, lambda: loaded)
        return
    result = ask(m, loaded, lambda: _damaged(family))
    assert isinstance(result, Result)
    assert result.views, "a result says how it wants to be drawn"
    for view in result.views:
        assert set(view.columns) <= set(result.frames[view.frame].columns)
        assert len(result.frames[view.frame]) <= 10_000
    assert result.provenance.model_fingerprint == loaded.fingerprint


@cache
def _damaged(family: str) -> LoadedModel:
    """A variant of the tiny model for probes that look at two models."""
    with tempfile.TemporaryDirectory() as folder:
        return damage(own_model(family, Path(folder)))


def test_the_readme_table_is_current():
    script = runpy.run_path(str(ROOT / "scripts" / "method_table.py"))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert script["with_table"](readme) == readme, "run `make docs`"


def test_an_unknown_method_lists_the_known():
    with pytest.raises(UnknownMethod, match="logit_lens"):
        get("probe", "logit_lense")


def test_a_method_without_settings_as_last_parameter_is_our_bug():
    with pytest.raises(AssertionError, match="last parameter"):

        @method("probe", title="Wrong")
        def wrong(settings: BaseModel, loaded: object) -> None:
            """Wrong order."""
