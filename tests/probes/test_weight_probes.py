"""Probes of weights and formats: shares that add up, every family, refusals, and sums whose errors are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from core.errors import BadInput
from core.numerics.quantize import quantize
from core.numerics.schemes import MxScheme
from core.probes._weight_tensors import chosen_weight, weights
from core.probes.accumulation import AccumulationSettings, accumulation, in_chunks, in_order, kahan
from core.probes.weight_formats import WeightFormatsSettings, weight_formats
from core.probes.weight_histogram import WeightHistogramSettings, weight_histogram
from core.probes.weight_outliers import WeightOutliersSettings, weight_outliers
from core.types import Prompt, silent
from tests.tiny import tiny_model

NONE = Prompt()
FOUR = WeightFormatsSettings(bits="4", rows=4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "olmoe", "vit"])
def test_every_weight_of_every_family_is_read(family: str) -> None:
    loaded = tiny_model(family)
    found = weights(loaded)
    assert {one.layer for one in found} >= set(range(loaded.anatomy.n_layers))
    own = [(one.layer, one.part) for one in found]
    assert len(set(own)) == len(own), "parts of a layer have names of their own"
    result = weight_formats(loaded, NONE, silent, FOUR)
    parts = result.frames["parts"]
    assert len(parts) == len(result.frames["ranked"]) * sum(one.layer is not None for one in found)
    assert result.frames["ranked"]["weights"].eq(sum(one.parameters for one in found)).all()


def test_all_rows_give_the_norm_of_the_whole_and_some_rows_are_near() -> None:
    loaded = tiny_model("llama")
    exact = weight_formats(loaded, NONE, silent, WeightFormatsSettings(bits="4", rows=0))
    noise = energy = 0.0
    for one in weights(loaded):
        rows = one.rows(0)
        noise += float((quantize(rows, MxScheme("e2m1")).dequantize() - rows).double().square().sum())
        energy += float(rows.double().square().sum())
    ranked = exact.frames["ranked"].set_index("format")
    assert ranked.loc["MXFP4", "sqnr_db"] == pytest.approx(10 * np.log10(energy / noise), abs=1e-6)
    assert ranked["low"].isna().all(), "what was read whole has no interval"
    near = weight_formats(loaded, NONE, silent, WeightFormatsSettings(bits="4", rows=16)).frames["ranked"]
    near = near.set_index("format")
    assert (near["low"] < near["sqnr_db"]).all()
    assert near.loc["MXFP4", "sqnr_db"] == pytest.approx(ranked.loc["MXFP4", "sqnr_db"], abs=0.3)


def test_a_block_that_does_not_divide_is_left_out_and_said() -> None:
    loaded = tiny_model("llama")
    columns = {one.columns for one in weights(loaded)}
    assert any(width % 256 for width in columns)
    result = weight_formats(loaded, NONE, silent, WeightFormatsSettings(bits="4", rows=2, block="256"))
    assert any("does not divide" in note for note in result.notes)
    with pytest.raises(BadInput, match="do not divide"):
        weight_histogram(loaded, NONE, silent, WeightHistogramSettings(part="q_proj", block="256"))


def test_a_histograms_shares_are_all_weights_and_its_values_the_formats() -> None:
    loaded = tiny_model("llama")
    result = weight_histogram(loaded, NONE, silent, WeightHistogramSettings(part="q_proj"))
    values = result.frames["values"]
    assert values["share"].sum() == pytest.approx(1)
    assert set(values["value"].abs()) <= {0, 0.5, 1, 1.5, 2, 3, 4, 6}
    assert result.frames["main"]["share"].sum() == pytest.approx(1)
    by_name = {metric.name: metric.value for metric in result.metrics}
    assert 0 < by_name["entropy_of_the_codes"] <= np.log2(15)
    assert by_name["clipped"] == 0
    floor = WeightHistogramSettings(part="q_proj", scale_rule="floor")
    clipping = {m.name: m.value for m in weight_histogram(loaded, NONE, silent, floor).metrics}
    assert clipping["clipped"] > 0


def test_a_wrong_part_names_those_there_are() -> None:
    with pytest.raises(BadInput, match="q_proj"):
        chosen_weight(tiny_model("llama"), 0, "nothing")
    with pytest.raises(BadInput, match="layers 0"):
        chosen_weight(tiny_model("llama"), 99, "")


def test_a_weight_is_found_by_its_whole_name_or_its_modules() -> None:
    name = "model.layers.1.self_attn.q_proj.weight"
    for said in (name, name.removesuffix(".weight")):
        assert chosen_weight(tiny_model("llama"), 0, said).name == name
    experts = chosen_weight(tiny_model("olmoe"), 0, "model.layers.1.mlp.experts")
    assert experts.name == "model.layers.1.mlp.experts.down_proj"
    with pytest.raises(BadInput, match="no weight 'model'"):
        chosen_weight(tiny_model("llama"), 0, "model")


def test_a_planted_outlier_is_found() -> None:
    loaded = tiny_model("qwen2")
    weight = chosen_weight(loaded, 1, "v_proj")
    before = weight._tensor.data[:, 5].clone()
    try:
        weight._tensor.data[:, 5] *= 50
        result = weight_outliers(loaded, NONE, silent, WeightOutliersSettings(top=3))
    finally:
        weight._tensor.data[:, 5] = before
    first = result.frames["ranked"].iloc[0]
    assert (first["layer"], first["part"], first["axis"], first["index"]) == (1, "v_proj", "column", 5)
    assert result.provenance.exactness_gap == pytest.approx(0, abs=1e-9)


# --- sums ---------------------------------------------------------------------------------------------

ONES = torch.ones(1, 4096)
WHOLE = torch.tensor([4096])


def test_sums_of_ones_stop_where_the_next_integer_is_missing() -> None:
    assert in_order(ONES.bfloat16(), WHOLE).item() == 256
    assert in_order(ONES.half(), WHOLE).item() == 2048
    assert in_order(ONES, WHOLE).item() == 4096
    assert kahan(ONES.bfloat16(), WHOLE).item() == 4096
    assert in_chunks(ONES.bfloat16(), WHOLE).item() == 4096


def test_partial_sums_are_those_of_the_prefixes() -> None:
    terms = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([2, 32, 40])
    exact = terms.double().cumsum(1)[:, lengths - 1]
    for added in (in_order, kahan, in_chunks):
        assert torch.allclose(added(terms, lengths), exact, atol=1e-5)


def test_real_products_lose_most_in_bfloat16_and_kahan_gives_it_back() -> None:
    prompt = Prompt("one two three one two three one two")
    result = accumulation(tiny_model("gpt2"), prompt, silent, AccumulationSettings(outputs=32))
    error = {metric.name: metric.value for metric in result.metrics}
    assert error["error_in_float32"] < error["error_in_float16"] < error["error_in_bfloat16"]
    assert error["error_in_bfloat16_Kahan"] < error["error_in_bfloat16"] / 2
    assert error["error_in_bfloat16_chunks_in_float32"] < error["error_in_bfloat16"]
