"""Head scores against loops, and against a model whose heads are known."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from core.capture import capture
from core.errors import BadInput
from core.models.anatomy import Anatomy
from core.models.anatomy_verify import eager_attention
from core.models.open import open_model
from core.probes import attention_pattern as module
from core.probes._head_scores import PatternScorer
from core.probes._kernel import attention_by
from core.probes.attention_pattern import AttentionPatternSettings, attention_pattern
from core.types import ModelRef, Prompt, silent
from tests.induction import induction_model, repeated_prompt
from tests.references.slow_heads import value_norms_by_hand
from tests.references.slow_probes import head_scores_by_hand
from tests.tiny import DECODERS, FAMILIES, tiny_folder, tiny_model

PROMPT = Prompt(
    "John gave Mary a drink, and John gave Mary a transformer that reads one two three four tokens"
)
TEXT_FAMILIES = [family for family in FAMILIES if family != "vit"]


def head(frame: pd.DataFrame, layer: int, index: int) -> pd.Series:
    return frame.set_index(["layer", "head"]).loc[(layer, index)]


@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_rows_sum_to_one_and_nothing_looks_ahead(family: str) -> None:
    loaded = tiny_model(family)
    kernel = loaded.model.config._attn_implementation
    result = attention_pattern(loaded, PROMPT, silent, AttentionPatternSettings(layer=1, head=2))
    assert result.provenance.exactness_gap == pytest.approx(0, abs=2e-6)
    assert len(result.frame) == loaded.anatomy.n_layers * loaded.anatomy.n_heads
    assert loaded.model.config._attn_implementation == kernel, "the model's own kernel must be put back"
    rows = result.frames["pattern"].groupby("query")["weight"].sum()
    assert rows.to_numpy() == pytest.approx(1, abs=1e-5)
    ahead = result.frames["pattern"].query("key > query")
    assert ahead.empty == (loaded.family == "decoder")


def test_the_gap_sees_a_head_that_looks_ahead() -> None:
    loaded = tiny_model("llama")
    ids = module.encode(loaded, PROMPT).ids
    scorer = PatternScorer(ids, causal=True, device="cpu")
    n = len(ids)
    scorer.score(torch.full((1, n, n), 1 / n), window=None)
    assert scorer.gap == pytest.approx(1 / n)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_scores_equal_the_slow_reference(family: str) -> None:
    loaded = tiny_model(family)
    result = attention_pattern(loaded, PROMPT, silent, AttentionPatternSettings())
    ids = loaded.tokenizer(PROMPT.text)["input_ids"]
    paths = [block.attention for block in loaded.anatomy.blocks]
    with torch.inference_mode(), eager_attention(loaded.model), capture(loaded.model, paths, item=1) as maps:
        loaded.model(torch.tensor([ids]))
    for layer, path in enumerate(paths):
        for index in range(loaded.anatomy.n_heads):
            expected = head_scores_by_hand(maps[path][0, index].tolist(), ids)
            found = head(result.frame, layer, index)
            assert dict(found[list(expected)]) == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("beta", [5.0, 10.0, 40.0])
def test_induction_model_has_the_closed_form_answers(beta: float) -> None:
    length = 12
    result = attention_pattern(
        induction_model(beta), repeated_prompt(length), silent, AttentionPatternSettings()
    )
    positions = range(1, 2 * length + 1)
    previous = np.mean([1 / (1 + p * math.exp(-beta)) for p in positions])
    assert head(result.frame, 0, 0)["previous_token_share"] == pytest.approx(previous, abs=1e-5)
    induction = {5.0: 0.886826, 10.0: 0.999161, 40.0: 1.0}[beta]
    assert head(result.frame, 1, 0)["induction_score"] == pytest.approx(induction, abs=1e-5)
    dead = head(result.frame, 1, 1)
    assert dead["entropy_share"] == pytest.approx(1, abs=1e-5), (
        "a head without weights looks everywhere alike"
    )
    assert dead["previous_token_share"] == pytest.approx(np.mean([1 / (p + 1) for p in positions]), abs=1e-6)


def test_a_window_limits_the_largest_possible_entropy() -> None:
    n, window = 12, 4
    scorer = PatternScorer(range(n), causal=True, device="cpu")
    near = torch.ones(n, n).tril().triu(1 - window)
    scores = scorer.score((near / near.sum(-1, keepdim=True))[None], window=window)
    assert float(scores["entropy_share"]) == pytest.approx(1, abs=1e-5)


def test_a_prompt_without_repeats_has_no_induction_score() -> None:
    result = attention_pattern(induction_model(10.0), Prompt("@ a b c d"), silent, AttentionPatternSettings())
    assert result.frame["induction_score"].isna().all()
    assert all(view.color != "induction_score" for view in result.views)
    assert any("not scored" in note for note in result.notes)


@pytest.mark.parametrize(("n", "most"), [(5, 8), (8, 8), (9, 8), (300, 128)])
def test_binned_maps_keep_their_rows(n: int, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_BINS_CAUSAL", most)
    pattern = torch.rand(n, n, generator=torch.Generator().manual_seed(0)).tril().numpy()
    pattern /= pattern.sum(-1, keepdims=True)
    loaded = tiny_model("llama")
    encoded = module.encode(loaded, Prompt("a"))
    stretched = type(encoded)(encoded.inputs, (0,) * n, ("x",) * n, (1,) * n)
    frame = module._pattern_frame(pattern, pattern, stretched, causal=True)
    assert frame["query"].nunique() <= most
    assert frame.groupby("query")["weight"].sum().to_numpy() == pytest.approx(1, abs=1e-5)
    if n <= most:
        assert frame["weight"].to_numpy() == pytest.approx(pattern[np.tril_indices(n)])


def test_a_head_that_does_not_exist_is_refused() -> None:
    with pytest.raises(BadInput, match=r"head 4 does not exist: .* has 4, from 0 to 3"):
        attention_pattern(tiny_model("llama"), PROMPT, silent, AttentionPatternSettings(head=4))
    with pytest.raises(BadInput, match="layer 3 does not exist"):
        attention_pattern(tiny_model("llama"), PROMPT, silent, AttentionPatternSettings(layer=3))


def test_a_pair_of_texts_goes_to_an_encoder() -> None:
    result = attention_pattern(
        tiny_model("bert"), Prompt("water boils", "paris"), silent, AttentionPatternSettings()
    )
    assert result.frames["tokens"]["token"].tolist().count("[SEP]") == 2


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "qwen3", "opt"])
def test_the_weighted_pattern_is_weight_times_what_it_moves(family: str) -> None:
    loaded = tiny_model(family)
    settings = AttentionPatternSettings(layer=1, head=3, sources=2)
    result = attention_pattern(loaded, PROMPT, silent, settings)
    ids = loaded.tokenizer(PROMPT.text)["input_ids"]
    norms = np.array(value_norms_by_hand(loaded, ids, 1, 3))
    pattern = result.frames["pattern"]
    weighted = pattern["weight"] * norms[pattern["key"]]
    expected = weighted / weighted.groupby(pattern["query"]).transform("sum")
    assert pattern["weighted_share"].to_numpy() == pytest.approx(expected.to_numpy(), abs=1e-5)
    sources = result.frames["sources"]
    best = weighted.groupby(pattern["query"]).max()
    first = sources[sources["rank"] == 1].set_index("query")["weighted"].sort_index()
    assert first.to_numpy() == pytest.approx(best.to_numpy(), rel=1e-4)
    assert (sources.groupby("query").size() <= 2).all()


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3_moe"])
def test_a_wrong_key_value_grouping_breaks_the_sum_of_heads(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = tiny_model(family)
    assert attention_pattern(
        loaded, PROMPT, silent, AttentionPatternSettings()
    ).provenance.exactness_gap == pytest.approx(0, abs=5e-6)
    monkeypatch.setattr(Anatomy, "kv_head", lambda self, head: (head + 1) % self.n_kv_heads)
    result = attention_pattern(loaded, PROMPT, silent, AttentionPatternSettings())
    assert result.provenance.exactness_gap > 0.1


def test_every_frame_stays_small_enough_for_a_browser() -> None:
    loaded = tiny_model("llama")
    text = Prompt("one two three four " * 60)
    n = module.encode(loaded, text).n_tokens
    assert 128 < n <= 256
    result = attention_pattern(loaded, text, silent, AttentionPatternSettings(sources=4))
    assert all(len(frame) <= 10_000 for frame in result.frames.values())
    assert result.frames["pattern"].groupby("query")["weighted_share"].sum().to_numpy() == pytest.approx(1)


def test_float64_patterns_and_sums_of_heads_are_exact(tmp_path: Path) -> None:
    """GPT-2's softmax keeps float64; most families round it to float32 on purpose."""
    loaded = open_model(ModelRef(str(tiny_folder("gpt2", tmp_path))))
    loaded.model.double()
    result = attention_pattern(loaded, PROMPT, silent, AttentionPatternSettings(layer=2))
    assert result.provenance.exactness_gap == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs_and_says_how_exact_it_is(dtype: torch.dtype, tmp_path: Path) -> None:
    loaded = open_model(ModelRef(str(tiny_folder("llama", tmp_path))))
    loaded.model.to(dtype)
    result = attention_pattern(loaded, PROMPT, silent, AttentionPatternSettings(layer=1))
    assert 0 < result.provenance.exactness_gap < 0.05
    assert not result.frames["pattern"].isna().any().any()


@pytest.mark.parametrize("family", DECODERS)
def test_the_captured_pattern_is_the_one_used_and_editing_it_changes_the_output(family: str) -> None:
    """Identity 5: put back, layer 1's pattern gives the model's logits; its rows reversed, other ones."""
    loaded = tiny_model(family)
    ids = torch.tensor([loaded.tokenizer(PROMPT.text)["input_ids"]])
    path = loaded.anatomy.blocks[1].attention
    with torch.inference_mode(), eager_attention(loaded.model), capture(loaded.model, [path], item=1) as maps:
        plain = loaded.model(ids, use_cache=False).logits
    groups = [loaded.anatomy.kv_head(head) for head in range(loaded.anatomy.n_heads)]

    def with_pattern(pattern: torch.Tensor) -> torch.Tensor:
        def stand_in(layer, kernel, module, q, k, v, mask, arguments):  # type: ignore[no-untyped-def]
            if layer != 1:
                return kernel(module, q, k, v, mask, **arguments)[0]
            return (pattern @ v[:, groups]).transpose(1, 2).contiguous()

        with torch.inference_mode(), attention_by(loaded, stand_in):
            return loaded.model(ids, use_cache=False).logits

    assert torch.allclose(with_pattern(maps[path]), plain, atol=1e-4)
    assert (with_pattern(maps[path].flip(2)) - plain).abs().max() > 1e-2
