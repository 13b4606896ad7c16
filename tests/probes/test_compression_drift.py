"""Drift: exact split of the error, against hooked runs by hand; a model against itself is nothing but zeros."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from core.errors import BadInput
from core.models.loaded import LoadedModel
from core.probes.compression_drift import CompressionDriftSettings, compression_drift
from core.probes.restoration import RestorationSettings, restoration
from core.registry import methods
from core.types import Prompt, silent
from tests.compress.making import apply, own_model
from tests.references.slow_drift import block_outputs, kl, run
from tests.tiny import DECODERS, tiny_model

PROMPT = Prompt("The capital of France is Paris, and Mary gave a drink to John")
ALL = CompressionDriftSettings(positions=0)


def quantized(family: str, folder: Path) -> LoadedModel:
    """A copy of the tiny model with every weight on a 4-bit grid."""
    loaded = own_model(family, folder)
    apply(loaded, "rtn", bits=4, group_size=32)
    return loaded


@pytest.mark.parametrize("family", DECODERS)
def test_a_model_against_itself_lost_nothing(family: str) -> None:
    loaded = tiny_model(family)
    result = compression_drift(loaded, loaded, PROMPT, silent, ALL)
    for column in ("lens_kl_nats", "drift", "own_error", "inherited_error"):
        assert (result.frames["main"][column] == 0).all(), column
    assert (result.frames["tokens"]["flipped"] == "kept").all()
    assert result.provenance.exactness_gap == 0
    with pytest.raises(BadInput, match="nothing to restore"):
        restoration(loaded, loaded, PROMPT, silent, RestorationSettings())


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "gemma2", "opt", "olmoe"])
def test_every_number_equals_the_run_by_hand(family: str, tmp_path: Path) -> None:
    original, variant = tiny_model(family), quantized(family, tmp_path)
    result = compression_drift(variant, original, PROMPT, silent, ALL)
    assert result.provenance.exactness_gap < 1e-5
    ids = original.tokenizer(PROMPT.text)["input_ids"]
    paths = [block.path for block in original.anatomy.blocks]
    true, found = block_outputs(original, ids, paths), block_outputs(variant, ids, paths)
    main = result.frames["main"].set_index(["layer", "position"])
    for layer, path in enumerate(paths):
        put = {path: true[paths[layer - 1]][0]} if layer else {}
        alone = block_outputs(variant, ids, [path], put=put)[path][0]
        norm = true[path][0].norm(dim=-1)
        expected = {
            "drift": (found[path][0] - true[path][0]).norm(dim=-1) / norm,
            "inherited_error": (found[path][0] - alone).norm(dim=-1) / norm,
        }
        if layer:  # the first block's original input differs from the variant's by the embedding's error
            expected["own_error"] = (alone - true[path][0]).norm(dim=-1) / norm
            for name, values in expected.items():
                np.testing.assert_allclose(
                    main.loc[layer + 1, name], values, rtol=2e-3, atol=1e-5, err_msg=name
                )
        np.testing.assert_allclose(main.loc[layer + 1, "drift"], expected["drift"], rtol=1e-3, atol=1e-6)
    by_hand = kl(run(original, ids).logits[0], run(variant, ids).logits[0])
    tokens = result.frames["tokens"]
    np.testing.assert_allclose(tokens["kl_nats"], by_hand, rtol=1e-3, atol=1e-5)
    flipped = run(original, ids).logits[0].argmax(-1) != run(variant, ids).logits[0].argmax(-1)
    assert (tokens["flipped"] == "flipped").tolist() == flipped.tolist()


def test_only_the_damaged_block_has_an_error_of_its_own(tmp_path: Path) -> None:
    """Sabotage of one weight: localised exactly, inherited afterwards, absent before."""
    original = tiny_model("llama")
    variant = own_model("llama", tmp_path)
    with torch.no_grad():
        variant.model.get_submodule(variant.anatomy.blocks[1].down).weight.mul_(0.5)
    result = compression_drift(variant, original, PROMPT, silent, ALL)
    by_layer = result.frames["main"].groupby("layer")
    own, inherited = by_layer["own_error"].max(), by_layer["inherited_error"].max()
    assert own.drop(2).max() == 0
    assert own[2] > 1e-3
    assert inherited.loc[:2].max() == 0
    assert inherited[3] > 1e-3
    ranked = restoration(variant, original, PROMPT, silent, RestorationSettings()).frames["ranked"]
    first = ranked.iloc[0]
    assert (first["layer"], first["part"]) == (1, "MLP")
    assert first["recovered"] == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("family", DECODERS)
def test_restoring_all_before_the_unembedding_leaves_its_share(family: str, tmp_path: Path) -> None:
    """With the original's own unembedding, the last residual stream brings back everything: recovered is 1."""
    original, variant = tiny_model(family), quantized(family, tmp_path)
    head = original.model.get_submodule(original.anatomy.unembedding)
    variant.model.get_submodule(variant.anatomy.unembedding).weight = copy.deepcopy(head.weight)
    result = restoration(variant, original, PROMPT, silent, RestorationSettings(positions=5))
    assert result.provenance.exactness_gap < 1e-5
    frame = result.frames["main"].set_index(["part", "layer"])["recovered"]
    assert frame["residual stream", original.anatomy.n_layers - 1] == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "mixtral"])
def test_restored_parts_equal_whole_hooked_runs(family: str, tmp_path: Path) -> None:
    original, variant = tiny_model(family), quantized(family, tmp_path)
    ids = original.tokenizer(PROMPT.text)["input_ids"]
    result = restoration(variant, original, PROMPT, silent, RestorationSettings(positions=512))
    recovered = result.frames["main"].set_index(["part", "layer"])["recovered"]
    true_logits = run(original, ids).logits[0]
    lost = kl(true_logits, run(variant, ids).logits[0]).mean()
    for block in original.anatomy.blocks:
        for part, path in (("attention", block.attention_write), ("MLP", block.mlp_write)):
            value = block_outputs(original, ids, [path])[path][0]
            restored = kl(true_logits, run(variant, ids, {path: value}, at="output").logits[0]).mean()
            assert recovered[part, block.index] == pytest.approx(float(1 - restored / lost), abs=2e-3), path


def test_models_of_another_shape_or_tokenizer_are_refused() -> None:
    with pytest.raises(BadInput, match="differ in"):
        compression_drift(tiny_model("llama"), tiny_model("bert"), PROMPT, silent, ALL)


def test_both_say_that_they_take_two_models() -> None:
    probes = methods("probe")
    assert probes["compression_drift"].takes_reference
    assert not probes["logit_lens"].takes_reference
