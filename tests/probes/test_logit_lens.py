"""The lens against the model's own logits, a slow reference, and a model whose answers are known."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from core.capture import capture
from core.errors import BadInput, SlimscopeError
from core.models.open import open_model
from core.models.readout import unembed
from core.probes import _distribution, _lens_grid, _tokens
from core.probes._distribution import Reference, describe, top_entries
from core.probes._lens_frames import _arrow, _movement, settling_layers
from core.probes.logit_lens import LogitLensSettings, logit_lens
from core.types import ModelRef, Prompt, silent
from tests.induction import EPSILON, START, D, induction_model, repeated_prompt
from tests.references.slow_probes import lens_by_hand
from tests.tiny import D_MODEL, DECODERS, tiny_folder, tiny_model

PROMPT = Prompt("The capital of France is Paris, and Mary gave a drink to John")


def cell(frame: pd.DataFrame, layer: int) -> pd.DataFrame:
    return frame[frame["layer"] == layer].reset_index(drop=True)


@pytest.mark.parametrize("family", DECODERS)
def test_last_layer_is_the_model_bit_for_bit(family: str) -> None:
    loaded = tiny_model(family)
    result = logit_lens(loaded, PROMPT, silent, LogitLensSettings(positions=0, fp32_path="exact"))
    assert result.provenance.exactness_gap == 0
    last = cell(result.frame, loaded.anatomy.n_layers)
    assert (last["kl_to_final_nats"] == 0).all()
    with torch.inference_mode():
        logits = loaded.model(torch.tensor([loaded.tokenizer(PROMPT.text)["input_ids"]])).logits[0]
    top = result.frames["topk"].query("layer == @loaded.anatomy.n_layers and rank == 1")
    assert top["token_id"].tolist() == logits.argmax(-1).tolist()
    np.testing.assert_allclose(last["p_top1"], logits.softmax(-1).max(-1).values, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_every_cell_equals_the_slow_reference(family: str) -> None:
    loaded = tiny_model(family)
    result = logit_lens(loaded, PROMPT, silent, LogitLensSettings(positions=0))
    ids = loaded.tokenizer(PROMPT.text)["input_ids"]
    top = result.frames["topk"].query("rank == 1")["token_id"].to_numpy().reshape(-1, len(ids))
    for layer, row in enumerate(lens_by_hand(loaded, ids)):
        found = cell(result.frame, layer)
        for position, expected in enumerate(row):
            assert top[layer, position] == expected.pop("top1_id")
            for name, value in expected.items():
                assert found.loc[position, name] == pytest.approx(value, rel=1e-4, abs=2e-5), (
                    layer,
                    position,
                    name,
                )
        assert math.isnan(found["rank_of_target"].iloc[-1]), "the last position has no true next token"


@pytest.mark.parametrize("family", DECODERS)
def test_bounds_hold(family: str) -> None:
    loaded = tiny_model(family)
    result = logit_lens(loaded, PROMPT, silent, LogitLensSettings(top_k=20))
    frame = result.frame
    vocab = loaded.anatomy.vocab_size
    assert frame["entropy_nats"].between(0, math.log(vocab) + 1e-5).all()
    assert (frame["kl_to_final_nats"] >= 0).all()
    assert frame["rank_of_target"].dropna().between(1, vocab).all()
    per_cell = result.frames["topk"].groupby(["layer", "position"])["probability"]
    assert (per_cell.sum() <= 1 + 1e-5).all()
    assert per_cell.apply(lambda p: p.is_monotonic_decreasing).all()


def test_batches_of_rows_do_not_change_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = tiny_model("llama")
    whole = logit_lens(loaded, PROMPT, silent, LogitLensSettings(positions=0))
    monkeypatch.setattr(_distribution, "ROWS_BYTES", 4 * loaded.anatomy.vocab_size * 7)
    monkeypatch.setattr(_distribution, "SLICE_BYTES", 4 * loaded.anatomy.vocab_size * 3)
    monkeypatch.setattr(_lens_grid, "SPAN", 6)
    parts = logit_lens(loaded, PROMPT, silent, LogitLensSettings(positions=0))
    assert parts.provenance.exactness_gap == pytest.approx(0, abs=1e-5)
    for name in whole.frames:
        pd.testing.assert_frame_equal(whole.frames[name], parts.frames[name], rtol=1e-4, atol=1e-5)


def test_positions_and_stride_choose_cells_without_changing_them() -> None:
    loaded = tiny_model("qwen3")
    whole = logit_lens(loaded, PROMPT, silent, LogitLensSettings(positions=0)).frame
    part = logit_lens(loaded, PROMPT, silent, LogitLensSettings(positions=5, layer_stride=2)).frame
    assert sorted(part["layer"].unique()) == [0, 2, 3], "the last layer is always shown"
    n = whole["position"].max() + 1
    chosen = whole[whole["layer"].isin([0, 2, 3]) & (whole["position"] >= n - 5)].reset_index(drop=True)
    moves = ["rank_movement", "rank_halvings", "movement"]  # are since the row before, which is another one
    pd.testing.assert_frame_equal(part.drop(columns=moves), chosen.drop(columns=moves), rtol=1e-4, atol=1e-5)
    pd.testing.assert_series_equal(
        part.groupby("position")["rank_of_target"].diff(), -part["rank_movement"], check_names=False
    )


def test_induction_model_has_the_closed_form_answers() -> None:
    """Before layer 1 the model knows nothing; after it, the logit of the right answer is 2 / √(8/d + ε)."""
    length = 12
    loaded = induction_model(40.0)
    result = logit_lens(loaded, repeated_prompt(length), silent, LogitLensSettings(positions=0))
    half = range(length + 1, 2 * length)
    blind = cell(result.frame, 1)
    assert blind["entropy_nats"].to_numpy() == pytest.approx(math.log(START + 1), abs=1e-5)
    final = cell(result.frame, 2).loc[list(half)]
    assert (final["top1"] == final["target"]).all()
    assert (final["rank_of_target"] == 1).all()
    logit = 2 / math.sqrt(8 / D + EPSILON)
    assert logit == pytest.approx(8.71697, abs=1e-5)
    assert final["p_target"].to_numpy() == pytest.approx(
        math.exp(logit) / (math.exp(logit) + START), rel=1e-4
    )
    settled = result.frames["tokens"].set_index("position").loc[list(half), "settling_layer"]
    assert (settled == 2).all()


@pytest.mark.parametrize("vocab_size", [40, 128, 3 * 128 + 1, 50 * 128, 50_257])
@pytest.mark.parametrize("k", [1, 5, 20])
def test_top_entries_are_those_of_topk(vocab_size: int, k: int) -> None:
    torch.manual_seed(k)
    x_RV = torch.randn(7, vocab_size)
    x_RV[0] = torch.arange(vocab_size)  # the largest are all in the tail, or in the last block
    x_RV[1] = -torch.arange(vocab_size)  # all in the first block
    values, ids = top_entries(x_RV, k)
    expected = x_RV.topk(k)
    assert torch.equal(values, expected.values)
    assert torch.equal(ids, expected.indices)


def test_top_entries_of_equal_values_are_different_entries() -> None:
    values, ids = top_entries(torch.zeros(2, 50 * 128), 9)
    assert (values == 0).all()
    assert all(len(set(row)) == 9 for row in ids.tolist())


@pytest.mark.parametrize("family", [f for f in DECODERS if f != "gpt_neox"])
def test_the_middle_of_a_block_is_what_its_mlp_norm_is_fed(family: str) -> None:
    loaded = tiny_model(family)
    settings = LogitLensSettings(positions=0, points="attention", fp32_path="exact")
    result = logit_lens(loaded, PROMPT, silent, settings)
    layers = sorted(result.frame["layer"].unique())
    assert layers == [0, 0.5, 1, 1.5, 2, 2.5, 3]
    assert result.provenance.exactness_gap == 0
    norms = [block.mlp_norm for block in loaded.anatomy.blocks]
    ids = torch.tensor([loaded.tokenizer(PROMPT.text)["input_ids"]])
    with torch.inference_mode(), capture(loaded.model, norms, inputs=True) as fed:
        loaded.model(ids)
        for layer, norm in enumerate(norms):
            logits = unembed(loaded.model, loaded.anatomy, fed[norm].view(1, -1, D_MODEL))[0]
            row = cell(result.frame, layer + 0.5)
            np.testing.assert_allclose(row["p_top1"], logits.softmax(-1).max(-1).values, rtol=1e-4)
            assert row["point"].unique().tolist() == [f"layer {layer + 1} after attention"]
    whole = logit_lens(loaded, PROMPT, silent, LogitLensSettings(positions=0, fp32_path="exact")).frame
    assert cell(result.frame, 2)["p_top1"].to_numpy() == pytest.approx(cell(whole, 2)["p_top1"], rel=1e-5)


def test_a_parallel_block_has_no_middle_of_its_own() -> None:
    result = logit_lens(tiny_model("gpt_neox"), PROMPT, silent, LogitLensSettings(points="attention"))
    assert any("read the same stream" in note for note in result.notes)


def test_the_induction_model_knows_after_attention_already() -> None:
    """Its MLPs are empty: the middle of a block is its end."""
    loaded = induction_model(40.0)
    settings = LogitLensSettings(positions=0, points="attention")
    frame = logit_lens(loaded, repeated_prompt(12), silent, settings).frame
    np.testing.assert_allclose(cell(frame, 1.5)["p_top1"], cell(frame, 2)["p_top1"], rtol=1e-6)
    risen = cell(frame, 1.5).loc[list(range(13, 24))]
    assert (risen["rank_of_target"] == 1).all()
    assert (cell(frame, 2).loc[risen.index, "movement"] == "=").all()


def test_rank_movement_is_told_in_places() -> None:
    moved, halvings = _movement(np.array([[8.0, 1.0, np.nan], [2.0, 41.0, np.nan], [2.0, 1.0, np.nan]]))
    assert [[_arrow(places) for places in row] for row in moved] == [
        ["", "", ""],
        ["↑6", "↓40", ""],
        ["=", "↑40", ""],
    ]
    assert halvings[1, 0] == 2


def test_one_token_can_be_followed_at_every_position() -> None:
    loaded = tiny_model("llama")
    frame = logit_lens(loaded, PROMPT, silent, LogitLensSettings(positions=0, target=" Paris")).frame
    assert (frame["target"] == " Paris").all()
    assert frame["rank_of_target"].notna().all(), "the last position has a target now"
    plain = logit_lens(loaded, PROMPT, silent, LogitLensSettings(positions=0)).frame
    same = plain["target"] == " Paris"
    assert same.any()
    np.testing.assert_allclose(frame.loc[same, "p_target"], plain.loc[same, "p_target"], rtol=1e-5)


def test_describe_on_a_uniform_and_a_certain_row() -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, 60.0, 0.0, 0.0]])
    reference = Reference.of(torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]))
    found = describe(logits, torch.tensor([2, 2]), top_k=1, where=str, reference=reference)
    assert found.entropy_R.tolist() == pytest.approx([math.log(4), 0], abs=1e-6)
    assert found.rank_R.tolist() == [1, 2], "ties share the better rank"
    assert found.log_p_target_R.tolist() == pytest.approx([-math.log(4), -60], abs=1e-5)
    assert found.kl_R.tolist() == pytest.approx([0, 45 - math.log(4)], abs=1e-4)


def test_settling_layer_is_where_the_top_token_stops_changing() -> None:
    top1_SN = np.array([[7, 1, 7, 5], [7, 7, 1, 6], [7, 7, 7, 7]])
    assert settling_layers(top1_SN, np.array([0, 2, 3])).tolist() == [0, 2, 3, 3]


def test_bfloat16_unembedding_is_marked_as_a_preview() -> None:
    loaded = tiny_model("llama")
    preview = logit_lens(loaded, PROMPT, silent, LogitLensSettings(unembedding_precision="bfloat16"))
    assert preview.flags == ("preview",)
    assert preview.provenance.exactness_gap is not None
    assert 1e-5 < preview.provenance.exactness_gap < 0.1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the prompt is empty"),
        (" \n", "the prompt is empty"),
        ("word " * 600, r"is this model's context; shorten it by \d+ tokens"),
    ],
)
def test_unusable_prompts_are_refused(text: str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        logit_lens(tiny_model("llama"), Prompt(text), silent, LogitLensSettings())


def test_a_pair_and_a_map_too_large_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = tiny_model("llama")
    with pytest.raises(BadInput, match="second text"):
        logit_lens(loaded, Prompt("a", "b"), silent, LogitLensSettings())
    monkeypatch.setattr(_tokens, "MAX_CELLS", 20)
    with pytest.raises(BadInput, match="set positions to at most 5"):
        logit_lens(loaded, PROMPT, silent, LogitLensSettings())


def test_logits_that_are_not_finite_name_their_layer(tmp_path: Path) -> None:
    loaded = open_model(ModelRef(str(tiny_folder("llama", tmp_path))))
    with torch.no_grad():
        loaded.model.get_submodule(loaded.anatomy.blocks[1].path).mlp.down_proj.weight[3, 3] = math.inf
    with pytest.raises(SlimscopeError, match=r"logits at layer [23] are not finite"):
        logit_lens(loaded, PROMPT, silent, LogitLensSettings())
