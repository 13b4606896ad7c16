"""The Formats page: a typed number in every format, and the same asked of the opened model's weights."""

from __future__ import annotations

import pytest

from app import number_views as views
from app.components.weight_picker import names_of
from core.errors import BadInput
from core.models.open import open_model
from core.models.sizes import model_card
from core.numerics.catalogue import FORMATS, store
from core.probes._weight_tensors import weights
from core.types import ModelRef


def plain(text: str) -> str:
    return text.replace("\\", "")


def headers(app) -> list[str]:
    return [plain(header.value) for header in app.header]


def metrics(app) -> dict[str, str]:
    return {metric.label: metric.value for metric in app.metric}


@pytest.mark.parametrize(
    ("text", "value"),
    [("0.1", 0.1), ("-3", -3), ("1e-3", 1e-3), ("1/3", 1 / 3), ("2^-9", 2**-9), (" 1,5 ", 1.5)],
)
def test_numbers_are_read_as_people_type_them(text, value):
    assert views.parse_number(text) == value


@pytest.mark.parametrize(
    "text", ["", "x", "1/0", "nan", "inf", "1e99", "2^200", "1e999999999", "__import__('os')"]
)
def test_what_is_no_number_is_refused_in_words(text):
    with pytest.raises(BadInput, match="type"):
        views.parse_number(text)


def test_a_number_needs_no_model(opened, monkeypatch):
    monkeypatch.setattr("app.engine.open_model", lambda source: pytest.fail("a model was opened"))
    app = opened("formats", number="0.1", format="mxfp4")
    assert app.title[0].value == "What can a number hold?"
    assert headers(app)[:2] == ["0.1 in every format", "MXFP4: 1 sign, 2 exponent, 1 mantissa bits, scaled"]
    shown = metrics(app)
    assert (shown["Bits per weight"], shown["Off by"], shown["Spacing here"]) == ("4.25", "+25 %", "0.125")
    assert "0.125" in app.latex[-1].value
    table = app.dataframe[0].value
    assert list(table["format"]) == [one.title for one in FORMATS.values()]


def test_a_larger_neighbour_moves_the_number(opened):
    before = metrics(opened("formats", number="0.1", format="int4", largest="1"))
    after = metrics(opened("formats", number="0.1", format="int4", largest="10"))
    assert (before["Off by"], after["Off by"]) == ("+33 %", "−100 %")


@pytest.mark.parametrize("id_", ["float32", "mxfp6_e3m2", "nf4", "ternary"])
def test_every_kind_of_format_is_drawn(opened, id_):
    app = opened(
        "formats", number="-0.7", format=id_, zoom="near", axis="log", curve="spacing", signal="uniform_db"
    )
    assert not app.exception
    assert plain(headers(app)[1]).startswith(FORMATS[id_].title)


@pytest.mark.parametrize(("number", "zoom"), [("0", "near"), ("1e-30", "all"), ("-3e38", "near")])
def test_extreme_numbers_are_drawn(opened, number, zoom):
    app = opened("formats", number=number, zoom=zoom, axis="log")
    assert not app.exception


@pytest.mark.parametrize("number", [0.0, 1e-30, -65520.0, 3e38])
@pytest.mark.parametrize("axis", ["linear", "log"])
@pytest.mark.parametrize("zoom", ["block", "all", "near"])
def test_the_line_has_two_ends_whatever_the_number(number, axis, zoom):
    for one in FORMATS.values():
        line = views.on_a_line(one, number, max(1.0, abs(number)), "even", zoom=zoom, axis=axis)
        low, high = line.domain
        assert low < high
        assert axis == "linear" or low > 0
        assert len(line.values) < 3000


@pytest.mark.parametrize("zoom", ["block", "near"])
def test_a_number_below_every_value_is_on_the_logarithmic_line_too(zoom):
    line = views.on_a_line(FORMATS["mxfp4"], 0.1, 3.0, "even", zoom=zoom, axis="log")
    assert line.domain[0] < 0.1


def test_a_word_instead_of_a_number_is_said_beneath_its_field(opened):
    app = opened("formats", number="pi")
    assert any("is no number" in plain(said.value) for said in app.markdown)
    assert not app.metric


def test_a_row_of_bits_is_what_is_stored():
    rows = views.bit_rows(0.1, 1.0, "even")
    e4m3 = next(row for row in rows if row.title == "float8 e4m3")
    assert [part.bits for part in e4m3.parts] == ["0", "0011", "101"]
    assert (e4m3.value, e4m3.off) == ("0.1015625", "+1.6 %")
    assert all(0 <= row.error <= 1 for row in rows)


def test_the_line_has_every_value_and_ends_around_the_number():
    one = FORMATS["mxfp4"]
    line = views.on_a_line(one, 0.1, 1.0, "even", zoom="block", axis="linear")
    own = line.values[line.values["format"] == one.title]["value"]
    assert len(own) == 15
    assert store(0.1, one, largest=1.0).value in set(own)
    assert set(line.marks["format"]) == {other.title for other in views.alike(one)}
    near = views.on_a_line(one, 0.1, 1.0, "even", zoom="near", axis="linear")
    assert near.domain[0] < 0.1 < near.domain[1]


def test_the_weights_of_a_model_are_asked_without_a_prompt(opened, tiny_vit):
    app = opened(
        "formats", model=str(tiny_vit), part="weights", weight_formats_bits="4", weight_formats_rows="4"
    )
    if any(button.key == "probe_now" for button in app.button):
        app.button(key="probe_now").click().run()
    assert not app.exception
    assert plain(app.title[0].value).startswith("Formats by layer of")
    assert not app.text_area, "no prompt is asked for"
    ranked = app.dataframe[0].value
    assert {"MXFP4", "NVFP4", "NF4", "int4"} <= set(ranked["format"])


def test_a_link_to_a_probe_opens_the_weights(opened, tiny_llama):
    app = opened("formats", model=str(tiny_llama), probe="weight_histogram", weight_histogram_part="q_proj")
    assert plain(app.title[0].value).startswith("A weight over its grid")


def test_a_weight_is_chosen_among_those_of_the_model(opened, tiny_llama):
    name = "model.layers.1.self_attn.q_proj"
    app = opened("formats", model=str(tiny_llama), probe="weight_histogram", weight_histogram_part=name)
    assert not app.exception
    box = app.selectbox(key="weight_histogram_part")
    assert box.value == name
    assert "model.layers.0.mlp.down_proj" in box.options
    assert not [option for option in box.options if "norm" in option]


def test_fused_experts_are_offered_by_their_two_matrices(tiny_moe):
    loaded = open_model(ModelRef(str(tiny_moe)))
    names, there = names_of(model_card(loaded)), {one.name.removesuffix(".weight") for one in weights(loaded)}
    assert set(names) == there
