"""Prediction: bytes by hand, fits to a byte, a formula recovered from its own rows, and a track record that is not read back."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from core.devices.registry import Device, devices, published
from core.errors import BadInput
from core.predict.classes import fit
from core.predict.fits import COLUMNS, fits_on
from core.predict.memory import longest_context, need
from core.predict.model import Bits, Layer, Shape, of_config
from core.predict.published import Row, rows
from core.predict.rate import Pace, decode_seconds, prefill_flops, prefill_seconds
from core.predict.track_record import band, by_class, held_out, lint, median_error, track_record

F16 = Bits(16, 16, 16, 16)
LLAMA3 = {
    "num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8,
    "intermediate_size": 14336, "vocab_size": 128256, "max_position_embeddings": 8192,
}  # fmt: skip
MIXTRAL = {**LLAMA3, "vocab_size": 32000, "num_local_experts": 8, "num_experts_per_tok": 2}


def test_llama_3_8b_by_hand():
    shape = of_config("llama", LLAMA3, F16)
    assert shape.kept_numbers(1) * 2 == 131_072  # 2 · 32 layers · 8 heads · 128 · 2 bytes
    attention = 2 * 4096 * 4096 + 2 * 4096 * 1024
    blocks = 32 * (attention + 3 * 4096 * 14336)
    assert shape.parameters == blocks + 2 * 128256 * 4096
    assert shape.weights_read() == 2 * (blocks + 128256 * 4096)  # the embedding is read by the row


def test_a_head_width_of_its_own_and_windows_count():
    explicit = of_config("qwen", {**LLAMA3, "head_dim": 256}, F16)
    assert explicit.kept_numbers(1) == 32 * 2 * 8 * 256
    gemma = of_config("gemma", {**LLAMA3, "sliding_window": 4096, "sliding_window_every": 2}, F16)
    assert gemma.kept_numbers(8192) == 2048 * 16 * (4096 + 8192)
    latent = replace(
        gemma, layers=(Layer(kept=512 + 64),) * 61
    )  # DeepSeek-V3: a latent of 512 and a shared key of 64
    assert latent.kept_numbers(1000) * 2 == 70_272_000


def test_a_mixture_reads_the_experts_that_are_chosen():
    shape = of_config("mixtral", MIXTRAL, F16)
    expert = 3 * 4096 * 14336
    read = shape.weights_read(1) - shape.read_bytes
    assert read == pytest.approx(32 * 2 * expert * 2)
    touched = 8 * (1 - (1 - 2 / 8) ** 4)  # of four independent tokens
    assert shape.weights_read(4) - shape.read_bytes == pytest.approx(32 * touched * expert * 2)
    always = replace(shape.layers[0], chosen=(1, 1, 0, 0, 0, 0, 0, 0))  # a recorded router that never varies
    steady = replace(shape, layers=(always,) * 32)
    assert steady.weights_read(4) == pytest.approx(steady.weights_read(1))


def test_a_prompts_multiplications_by_hand():
    """Two positions of one layer: weights twice, the head once, scores of 1 and 2 positions."""
    shape = replace(of_config("tiny", {**LLAMA3, "num_hidden_layers": 1}, F16))
    weights = shape.read_parameters - shape.head_parameters
    by_hand = 2 * 2 * weights + 2 * shape.head_parameters + 4 * 4096 * (1 + 2)
    assert prefill_flops(shape, 2) == by_hand
    assert prefill_seconds(shape, Pace(1e30, 1e12, 0.0), 2) == pytest.approx(by_hand / 1e12)
    assert prefill_seconds(shape, Pace(1e9, None, 0.0), 2) is None


def board(usable: float, **changes: object) -> Device:
    return replace(published()["raspberry-pi-5-8gb"], usable_bytes=int(usable), **changes)  # type: ignore[arg-type]


def test_it_fits_to_the_byte_and_says_what_is_too_big():
    shape = of_config("llama", LLAMA3, Bits(4.5, 4.5, 4.5, 4.5))
    exactly = need(shape, 1000, engine="sbc_cpu").total
    for usable, fits, why in (
        (exactly, True, ""),
        (exactly - 1, False, "context too long"),
        (shape.weight_bytes, False, "weights too big"),
    ):
        (row,) = fits_on(
            shape, context=1000, known={"x": board(np.ceil(usable) if fits else usable)}
        ).to_dict("records")
        assert (row["fits"], row["why"]) == (fits, why)
        assert np.isfinite(row["decode_tokens_per_s"]) == fits
    longest = longest_context(shape, exactly, engine="sbc_cpu")
    assert (
        need(shape, longest, engine="sbc_cpu").total
        <= exactly
        < need(shape, longest + 1, engine="sbc_cpu").total
    )


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
    assert found.share == pytest.approx(share, rel=0.01)
    assert found.layer_s == pytest.approx(layer_s, abs=5e-6)
    assert median_error(held_out(made, "device")) < 0.01


def test_a_row_is_predicted_without_its_device():
    known = [row for row in rows() if row.engine == "jetson_gpu"]
    slug = known[0].device.slug
    changed = [replace(row, decode=row.decode * 3) if row.device.slug == slug else row for row in known]
    mine = [row.device.slug == slug for row in known]
    before, after = (held_out(table, "device").loc[mine, "predicted"] for table in (known, changed))
    assert np.array_equal(before, after)
    others = [not own for own in mine]
    assert not np.array_equal(
        held_out(known, "device").loc[others, "predicted"],
        held_out(changed, "device").loc[others, "predicted"],
    )


def test_the_published_figures_are_predicted_within_sixteen_percent():
    record = track_record()
    assert len(record) == len(rows()) >= 100
    assert median_error(record) <= 0.16
    assert median_error(track_record("chip")) <= 0.20
    classes = by_class(record)
    assert classes["rows"].sum() == len(record)
    assert classes.set_index("engine").loc["laptop_npu", "median_error"] > 0.5, (
        "known to be bad; tell it if it changes"
    )


def test_our_byte_counts_agree_with_counts_by_hand():
    pairs = [(row.read_bytes, row.peer_bytes) for row in rows() if row.peer_bytes is not None]
    assert len(pairs) > 80
    off = [abs(ours / peer - 1) for ours, peer in pairs]
    assert np.median(off) < 0.03
    assert np.quantile(off, 0.9) < 0.15


def test_what_physics_forbids_is_flagged():
    assert (lint(1.01), lint(0.5), lint(0.04)) == ("over the peak", "", "under 5 %")
    flagged = track_record()["lint"] != ""
    assert flagged.mean() < 0.05


def test_a_band_holds_its_class_and_every_device_has_a_row():
    low, high = band("apple_gpu")
    assert 0 < low <= 1 <= high < 4
    shape = of_config(
        "small", {**LLAMA3, "num_hidden_layers": 4, "hidden_size": 512, "intermediate_size": 1024}, F16
    )
    frame = fits_on(shape, context=512, known=published())
    assert list(frame.columns) == list(COLUMNS)
    assert len(frame) == len(published())
    told = frame[frame["decode_tokens_per_s"].notna()]
    assert (told["decode_tokens_per_s_low"] <= told["decode_tokens_per_s"]).all()
    assert (told["decode_tokens_per_s"] <= told["decode_tokens_per_s_high"]).all()
    pace = Pace(1e9, None, 0.0)
    assert decode_seconds(shape, pace, 512) == pytest.approx(
        (shape.weights_read() + 2 * shape.kept_numbers(512)) / 1e9
    )


def test_own_devices_lie_over_the_published_ones(tmp_path):
    file = tmp_path / "devices.yaml"
    file.write_text("my-pi:\n  like: raspberry-pi-5-8gb\n  name: The one on my desk\n  usable_gib: 5\n")
    found = devices(file)
    assert found["my-pi"].own
    assert found["my-pi"].usable_bytes == 5 << 30
    assert found["my-pi"].bandwidth == published()["raspberry-pi-5-8gb"].bandwidth
    for wrong, said in (
        ("a: {like: nothing}", "not a published device"),
        ("a: [", "not YAML"),
        ("a: {name: x}", "a: "),
        ("my-pi: {like: raspberry-pi-5-8gb, transport: ssh}", "needs an address"),
    ):
        file.write_text(wrong)
        with pytest.raises(BadInput, match=said):
            devices(file)


def test_an_encoder_has_no_decode_rate():
    shape: Shape = replace(of_config("x", {**LLAMA3, "num_hidden_layers": 2}, F16), family="encoder")
    frame = fits_on(shape, context=128, known=published())
    assert frame["decode_tokens_per_s"].isna().all()
    assert (frame["kv_bytes"] == 0).all()
