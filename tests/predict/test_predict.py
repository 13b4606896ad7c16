"""Prediction: bytes by hand, fits to a byte, a formula recovered from its own rows, and a track record that is not read back."""

from __future__ import annotations

from dataclasses import replace
from math import ceil

import numpy as np
import pytest

from core.devices.registry import Device, published
from core.errors import BadInput
from core.predict.anchors import Observed, anchor_of
from core.predict.classes import efficiencies, fit
from core.predict.config import Bits, of_config
from core.predict.fits import COLUMNS, fits_on
from core.predict.memory import longest_context, need
from core.predict.model import Shape
from core.predict.predict import Workload, predict
from core.predict.published import Row, config_of, formats, rows
from core.predict.rate import Pace, decode_bytes, decode_seconds, prefill_flops, prefill_seconds
from core.predict.source import routed
from core.predict.track_record import (
    anchored_band,
    band,
    by_class,
    implausible,
    lint,
    median_error,
    track_record,
)

F16 = Bits(16, 16, 16, 16)
LLAMA3 = {
    "num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8,
    "intermediate_size": 14336, "vocab_size": 128256, "max_position_embeddings": 8192,
}  # fmt: skip
MIXTRAL = {**LLAMA3, "vocab_size": 32000, "num_local_experts": 8, "num_experts_per_tok": 2}
DEEPSEEK_V2_LITE = {
    "num_hidden_layers": 27, "hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 16,
    "intermediate_size": 10944, "vocab_size": 102400, "kv_lora_rank": 512, "q_lora_rank": None,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 64,
    "num_experts_per_tok": 6, "n_shared_experts": 2, "moe_intermediate_size": 1408, "first_k_dense_replace": 1,
}  # fmt: skip
DEEPSEEK_V3 = {
    **DEEPSEEK_V2_LITE, "num_hidden_layers": 61, "hidden_size": 7168, "num_attention_heads": 128,
    "intermediate_size": 18432, "vocab_size": 129280, "q_lora_rank": 1536, "n_routed_experts": 256,
    "num_experts_per_tok": 8, "n_shared_experts": 1, "moe_intermediate_size": 2048, "first_k_dense_replace": 3,
}  # fmt: skip
GEMMA2 = config_of("gemma-2-2b")


# --- what a model is, by hand ----------------------------------------------------------------------------


def test_llama_3_8b_by_hand():
    shape = of_config("llama", LLAMA3, F16)
    assert shape.kept_numbers(1) * 2 == 131_072  # 2 · 32 layers · 8 heads · 128 · 2 bytes
    assert shape.kept_numbers(8192) * 2 == 1 << 30  # 1 GiB at its whole context
    attention = 2 * 4096 * 4096 + 2 * 4096 * 1024
    blocks = 32 * (attention + 3 * 4096 * 14336)
    assert (
        shape.parameters == blocks + 2 * 128256 * 4096 == 8_029_995_008
    )  # 8,030,261,248 less 65 norms of 4,096
    assert shape.weights_read() == 2 * (blocks + 128256 * 4096)  # the embedding is read by the row


def test_an_explicit_head_width_is_read_never_derived():
    shape = of_config("qwen", {**LLAMA3, "head_dim": 256}, F16)
    assert shape.kept_numbers(1) == 32 * 2 * 8 * 256


def test_gemma_2_slides_in_every_other_layer():
    shape = of_config("gemma", {**GEMMA2, "max_position_embeddings": 8192}, F16)
    per_layer = 2 * 4 * 256
    assert shape.kept_numbers(4096) == 26 * per_layer * 4096  # nothing is cut yet
    assert shape.kept_numbers(8192) == 13 * per_layer * (4096 + 8192)


def test_windows_as_configs_tell_them():
    def kept(**told: object) -> list[int | None]:
        return [
            layer.window for layer in of_config("x", {**LLAMA3, "num_hidden_layers": 6, **told}, F16).layers
        ]

    assert kept(sliding_window=100) == [100] * 6  # Mistral
    assert kept(sliding_window=100, use_sliding_window=False) == [None] * 6  # Qwen2
    assert kept(sliding_window=100, model_type="gemma2") == [100, None] * 3
    assert kept(sliding_window=100, sliding_window_pattern=6) == [100] * 5 + [None]  # Gemma 3
    kinds = ["full_attention", "sliding_attention"] * 3
    assert kept(sliding_window=100, layer_types=kinds) == [None, 100] * 3
    with pytest.raises(BadInput, match="linear_attention"):
        kept(layer_types=["linear_attention"] * 6)


def test_deepseek_keeps_its_latent_only():
    """576 numbers per layer and position: 31,104 bytes for V2-Lite and 70,272 for V3 in 16 bits."""
    lite, large = (of_config("deepseek", told, F16) for told in (DEEPSEEK_V2_LITE, DEEPSEEK_V3))
    assert lite.kept_numbers(1) * 2 == 31_104
    assert large.kept_numbers(1) * 2 == 70_272
    # As published: 15.7 and 671 billion, of which 2.4 and 37 are active (embeddings left out of the first count).
    assert lite.parameters == pytest.approx(15.7e9, rel=0.005)
    assert large.parameters == pytest.approx(671e9, rel=0.005)
    assert large.active_parameters == pytest.approx(37e9, rel=0.02)
    assert [layer.n_experts for layer in lite.layers] == [0] + [64] * 26


def test_mixtrals_bytes_per_token_by_hand():
    shape = of_config("mixtral", MIXTRAL, F16)
    assert shape.weights_read(1) == pytest.approx(25_497_174_016)  # attention, routers, 2 of 8 experts, head
    expert = 3 * 4096 * 14336 * 2
    touched = 8 * (1 - (1 - 2 / 8) ** 4)  # of four independent tokens
    assert shape.weights_read(4) - shape.read_bytes == pytest.approx(32 * touched * expert)


def test_recorded_routing_changes_what_a_batch_reads():
    shape = of_config("mixtral", MIXTRAL, F16)
    steady = routed(shape, {layer: [0.5, 0.5, 0, 0, 0, 0, 0, 0] for layer in range(32)})
    assert steady.weights_read(64) == pytest.approx(shape.weights_read(1))  # always the same two
    skewed = routed(shape, {0: [0.3, 0.2, 0.1, 0.1, 0.1, 0.1, 0.05, 0.05]})
    assert skewed.weights_read(1) == pytest.approx(shape.weights_read(1))
    assert skewed.layers[0].touched(4) < shape.layers[0].touched(4)
    assert skewed.layers[1] == shape.layers[1]
    assert routed(shape, {0: [0.5, 0.5]}) == shape  # another model's experts


def test_a_prompts_multiplications_by_hand():
    """Two positions of one layer: weights twice, the head once, scores of 1 and 2 positions."""
    shape = of_config("tiny", {**LLAMA3, "num_hidden_layers": 1}, F16)
    weights = shape.read_parameters - shape.head_parameters
    by_hand = 2 * 2 * weights + 2 * shape.head_parameters + 4 * 4096 * (1 + 2)
    assert prefill_flops(shape, 2) == by_hand
    assert prefill_seconds(shape, Pace(1e30, 1e12, 0.0), 2) == pytest.approx(by_hand / 1e12)
    assert prefill_seconds(shape, Pace(1e9, None, 0.0), 2) is None
    pace = Pace(1e9, None, 0.0)
    assert decode_seconds(shape, pace, 512) == pytest.approx(
        (shape.weights_read() + 2 * shape.kept_numbers(512)) / 1e9
    )


def test_a_config_without_sizes_is_refused():
    with pytest.raises(BadInput, match="hidden_size"):
        of_config("x", {"num_hidden_layers": 2}, F16)


# --- whether it fits --------------------------------------------------------------------------------------


def board(usable: float) -> Device:
    return replace(published()["raspberry-pi-5-8gb"], usable_bytes=ceil(usable))


def test_it_fits_to_the_byte_and_says_what_is_too_big():
    shape = of_config("llama", LLAMA3, Bits(4.5, 4.5, 4.5, 4.5))
    exactly = need(shape, 1000, engine="sbc_cpu").total
    one_token = need(shape, 1, engine="sbc_cpu").total
    assert exactly == int(exactly)
    assert one_token == int(one_token)
    for usable, why in (
        (exactly, ""),
        (exactly - 1, "context too long"),
        (one_token, "context too long"),
        (one_token - 1, "weights too big"),
    ):
        found = predict(shape, board(usable), Workload(context=1000))
        assert (found.fits, found.why) == (not why, why)
        assert (found.decode_tokens_per_s is not None) == found.fits
        assert bool(found.next_step) == bool(why)
    longest = longest_context(shape, exactly, engine="sbc_cpu")
    assert longest >= 1000
    assert need(shape, longest, engine="sbc_cpu").total <= exactly
    assert need(shape, longest + 1, engine="sbc_cpu").total > exactly


def test_more_context_than_the_model_has_is_refused():
    shape = of_config("llama", LLAMA3, F16)
    with pytest.raises(BadInput, match="at most 8192"):
        predict(shape, board(1e12), Workload(context=8193))
    with pytest.raises(BadInput, match="1 or more"):
        predict(shape, board(1e12), Workload(batch=0))
    with pytest.raises(BadInput, match="no engine"):
        predict(shape, board(1e12), engine="cuda_hbm")


def test_every_device_has_a_row_and_no_prediction_beats_its_bandwidth():
    shape = of_config("llama", LLAMA3, formats()["q4_k_m"])
    frame = fits_on(shape, known=published())
    assert list(frame.columns) == list(COLUMNS)
    assert set(frame["slug"]) == set(published())
    assert set(frame["why"]) == {"", "weights too big", "context too long"}
    told = frame[frame["decode_tokens_per_s"].notna()].set_index("slug")
    assert len(told) >= 25
    assert (told["decode_tokens_per_s_low"] <= told["decode_tokens_per_s"]).all()
    assert (told["decode_tokens_per_s"] <= told["decode_tokens_per_s_high"]).all()
    best = [
        published()[slug].bandwidth / decode_bytes(shape, 2048, batch=1, kv_bytes=2) for slug in told.index
    ]
    assert (told["decode_tokens_per_s_high"].to_numpy() <= np.array(best) * 1.000001).all()
    prompts = told[told["ttft_ms"].notna()]
    assert (prompts["ttft_ms_low"] <= prompts["ttft_ms"]).all()
    assert not told["anchored"].any()
    assert frame["fits"].is_monotonic_decreasing


def test_what_a_step_waits_for():
    dense = of_config("llama", {**LLAMA3, "max_position_embeddings": 1 << 17}, formats()["q4_k_m"])
    there = replace(published()["rtx-4090"], usable_bytes=1 << 40)
    assert predict(dense, there).bound == "weights"
    assert predict(dense, there, Workload(context=1 << 17)).bound == "cache"
    assert predict(dense, there, Workload(context=128, batch=1024)).bound == "compute"
    narrow = {
        **LLAMA3,
        "hidden_size": 64,
        "intermediate_size": 64,
        "vocab_size": 64,
        "num_key_value_heads": 1,
    }
    called = of_config("narrow", narrow, F16)
    assert predict(called, there, Workload(context=8)).bound == "calls"


def test_an_encoder_has_no_decode_rate():
    shape: Shape = replace(of_config("x", {**LLAMA3, "num_hidden_layers": 2}, F16), family="encoder")
    frame = fits_on(shape, workload=Workload(context=1 << 20), known=published())
    assert frame["decode_tokens_per_s"].isna().all()
    assert (frame["kv_bytes"] == 0).all()
    assert frame["ttft_ms"].notna().any()


# --- the track record -------------------------------------------------------------------------------------


def synthetic(share: float, layer_s: float) -> list[Row]:
    """Rows that obey the formula exactly."""
    made = []
    for row in (row for row in rows() if row.engine == "cuda_gddr"):
        seconds = row.read_bytes / (share * row.bandwidth) + len(row.shape.layers) * layer_s
        made.append(replace(row, decode=1 / seconds))
    return made


@pytest.mark.parametrize(("share", "layer_s"), [(0.6, 0.0), (0.8, 20e-6)])
def test_rows_that_obey_the_formula_give_its_numbers_back(share: float, layer_s: float):
    made = synthetic(share, layer_s)
    found = fit(made, "cuda_gddr")
    assert found.share == pytest.approx(share, rel=1e-6)
    assert found.layer_s == pytest.approx(layer_s, abs=1e-12)
    record = track_record(made)
    assert median_error(record) < 1e-6
    assert record["error"].abs().max() < 1e-6


@pytest.mark.parametrize("by", ["device", "chip"])
def test_a_row_is_predicted_without_its_device(by: str):
    """Even its band: nothing of a held-out row's own device or chip is looked at."""
    known = [row for row in rows() if row.engine in ("jetson_gpu", "cuda_hbm")]
    mine = [row.chip == "jetson-orin-nano" for row in known]
    slug = "jetson-orin-nano-super"
    changed = [
        replace(row, decode=row.decode * 3)
        if (row.chip == "jetson-orin-nano" if by == "chip" else row.device.slug == slug)
        else row
        for row in known
    ]
    if by == "device":
        mine = [row.device.slug == slug for row in known]
    before, after = (track_record(table, by=by) for table in (known, changed))  # type: ignore[arg-type]
    for column in ("predicted", "low", "high"):
        assert np.array_equal(before.loc[mine, column], after.loc[mine, column])
    others = [not own and row.engine == "jetson_gpu" for own, row in zip(mine, known, strict=True)]
    assert not np.array_equal(before.loc[others, "predicted"], after.loc[others, "predicted"])


def test_the_published_figures_are_predicted_within_sixteen_percent():
    record = track_record()
    assert len(record) == len(rows()) >= 100
    assert median_error(record) <= 0.16
    assert median_error(track_record(by="chip")) <= 0.20
    assert 0.8 <= record["inside"].mean() <= 0.95
    classes = by_class(record).set_index("engine")
    assert classes["n"].drop("all").sum() == classes.loc["all", "n"] == len(record)
    assert classes.loc["laptop_npu", "median_error"] > 0.5, "known to be bad: one device of its class"
    assert record.loc[record["engine"] == "laptop_npu", "pooled"].all()


def test_our_byte_counts_agree_with_counts_by_hand():
    off = np.array([abs(row.read_bytes / row.peer_bytes - 1) for row in rows() if row.peer_bytes is not None])
    assert len(off) > 80
    assert np.median(off) < 0.03
    assert off.max() < 0.10


def test_what_physics_forbids_is_flagged():
    assert implausible(1.01)
    assert not implausible(0.5)
    assert implausible(0.04)
    assert lint(rows()) == []
    (first, *_) = rows()
    fast, slow = replace(first, decode=first.decode * 2), replace(first, decode=first.decode / 20)
    sentences = lint([fast, first, slow])
    assert len(sentences) == 2
    assert all(first.device.slug in sentence and first.model in sentence for sentence in sentences)


# --- own measurements -------------------------------------------------------------------------------------


def seen(
    slug: str, factor: float, nbytes: float, runtime: str = "llama_cpp", phase: str = "decode"
) -> Observed:
    return Observed(slug, runtime, f"model of {nbytes:.0f} bytes", phase, nbytes, factor)


def test_an_anchor_scales_the_class_and_the_nearest_counts():
    shape = of_config("llama", LLAMA3, formats()["q4_k_m"])
    there = published()["raspberry-pi-5-8gb"]
    plain = predict(shape, there).decode_tokens_per_s
    near = seen(there.slug, 1.5, shape.weights_read())
    far = seen(there.slug, 0.8, shape.weights_read() / 20)
    anchor = anchor_of(there, shape, [near, far, seen("rtx-3090", 9.0, 1e9)])
    assert anchor is not None
    assert (anchor.decode, anchor.prefill) == (1.5, None)
    found = predict(shape, there, anchor=anchor)
    scaled = found.decode_tokens_per_s
    assert plain is not None
    assert scaled is not None
    assert scaled.value == pytest.approx(plain.value / 1.5)
    assert scaled.low == pytest.approx(scaled.value / anchored_band())
    assert found.ttft_ms == predict(shape, there).ttft_ms
    quicker = anchor_of(there, shape, [near, seen(there.slug, 1.1, shape.weights_read(), "openvino")])
    assert quicker is not None
    assert quicker.runtime == "openvino"
    assert anchor_of(there, shape, [seen("rtx-3090", 9.0, 1e9)]) is None
    row = fits_on(shape, known={"x": there}, seen=[near]).iloc[0]
    assert row["anchored"]


def test_a_measured_prompt_tells_the_share_that_no_row_does():
    """A class of processors has no published prompt: one measured at a third of the peak is predicted at a third."""
    shape = of_config("llama", LLAMA3, formats()["q4_k_m"])
    there = published()["raspberry-pi-5-8gb"]
    assert predict(shape, there).ttft_ms is None
    assert there.fp16 is not None
    anchor = anchor_of(there, shape, [seen(there.slug, 3.0, shape.weights_read(), phase="prefill")])
    found = predict(shape, there, anchor=anchor).ttft_ms
    assert found is not None
    assert found.value == pytest.approx(3e3 * prefill_flops(shape, 512) / there.fp16)


def test_a_model_far_smaller_than_any_row_is_told():
    large = of_config("llama", LLAMA3, formats()["q4_k_m"])
    small = of_config("small", {**LLAMA3, "hidden_size": 512, "intermediate_size": 1024}, F16)
    there = published()["h200"]
    assert not predict(large, there).extrapolated
    assert predict(small, there).extrapolated
    assert "extrapolated" in predict(small, there).basis


def test_bands_are_wider_than_nothing():
    assert all(1 < band(engine, "decode") < 2.5 for engine in efficiencies())
    assert 1 < anchored_band() < 2.5
