"""The sparse autoencoder against a dictionary that is known, an identity, a zero, and plain algebra on its own text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from core.errors import BadInput, Cancelled
from core.models.loaded import LoadedModel
from core.train._residuals import TextWindow, cut_text, residual_after
from core.train._sparse_code import SparseCode, direction_by_name, feature_direction
from core.train._sparse_quality import Quality, fvu, mean_l0, measure_losses
from core.train._sparse_training import Recipe, _auxiliary, fit
from core.train._trained import Trained
from core.train.sparse_autoencoder import SparseAutoencoderSettings, sparse_autoencoder
from core.types import Documents, silent
from tests.induction import induction_model, repeated_prompt
from tests.tiny import CORPUS, DECODERS, tiny_model

WIDTH = 32
TEXT = " ".join(CORPUS)
DOCUMENTS = Documents("corpus", "calibration", tuple(f"{n} {TEXT}" for n in range(6)))
SMALL = SparseAutoencoderSettings(
    layer=2, expansion=2, k=6, max_tokens=700, window=32, epochs=8, batch=64, dead_after=1000, loss_windows=2
)


@pytest.fixture(scope="module")
def trained() -> Trained:
    return sparse_autoencoder(tiny_model("llama"), DOCUMENTS, silent, SMALL)


# --- a dictionary that is known -----------------------------------------------------------------------


def dictionary_rows(n: int = 3000) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows that are sums of 3 of 32 orthogonal directions, with coefficients in 1 … 2; and the directions."""
    generator = torch.Generator().manual_seed(0)
    directions, _ = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator))
    chosen = torch.rand(n, WIDTH, generator=generator).topk(3).indices
    coefficients = torch.zeros(n, WIDTH).scatter_(1, chosen, 1 + torch.rand(n, 3, generator=generator))
    return coefficients @ directions, directions


RECIPE = Recipe(n_features=2 * WIDTH, k=3, epochs=25, batch=128, learning_rate=1e-2, dead_after=1500)


def recovered(decoder: torch.Tensor, directions: torch.Tensor) -> float:
    return float((directions @ decoder.T).max(-1).values.mean())


def test_an_orthogonal_dictionary_is_recovered():
    rows, directions = dictionary_rows()
    found = fit(rows, RECIPE, silent)
    assert recovered(found.decoder_FD, directions) >= 0.95
    assert torch.allclose(found.decoder_FD.norm(dim=-1), torch.ones(2 * WIDTH), atol=1e-5)
    assert found.curve[-1][2] < 0.05


def test_rows_without_a_dictionary_recover_none():
    """The twin: the same numbers, each column shuffled by itself, hold no directions to find."""
    rows, directions = dictionary_rows()
    shuffled = torch.stack([column[torch.randperm(len(rows))] for column in rows.T], dim=1)
    assert recovered(fit(shuffled, RECIPE, silent).decoder_FD, directions) < 0.9


def test_the_auxiliary_loss_moves_dead_features_only_towards_the_error():
    """A dead feature whose direction and size are the error's explains all of it; the living ones get no gradient."""
    directions, _ = torch.linalg.qr(torch.randn(WIDTH, WIDTH))
    decoder = directions.clone().requires_grad_()
    dead = torch.zeros(WIDTH, dtype=torch.bool)
    dead[5:7] = True
    pre = torch.full((4, WIDTH), -1.0)
    pre[:, 5], pre[:, 6], pre[:, 0] = 2.0, 0.0, 9.0
    pre.requires_grad_()
    exact = _auxiliary(pre, 2 * directions[5].expand(4, -1), dead, decoder)
    assert exact.item() == pytest.approx(0, abs=1e-6)
    loss = _auxiliary(pre, 2 * directions[6].expand(4, -1), dead, decoder)
    assert loss.item() == pytest.approx(2, abs=1e-5)
    loss.backward()
    assert decoder.grad is not None
    assert pre.grad is not None
    assert decoder.grad[~dead].abs().max() == 0
    assert decoder.grad[5].norm() > 0
    assert (pre.grad[:, 6] < 0).all(), "descent raises the feature that points to the error"
    assert _auxiliary(pre, directions[:4], torch.zeros(WIDTH, dtype=torch.bool), decoder).item() == 0


def test_the_same_seed_gives_the_same_weights():
    rows, _ = dictionary_rows(1000)
    recipe = replace(RECIPE, epochs=2)
    assert torch.equal(fit(rows, recipe, silent).decoder_FD, fit(rows, recipe, silent).decoder_FD)
    other = fit(rows, replace(recipe, seed=1), silent).decoder_FD
    assert not torch.equal(fit(rows, recipe, silent).decoder_FD, other)


# --- an identity, and nothing -------------------------------------------------------------------------


def identity_code(width: int) -> SparseCode:
    """Every coordinate and its negative is a feature; exactly half of them are positive."""
    both = torch.cat([torch.eye(width), -torch.eye(width)])
    return SparseCode(both.T, torch.zeros(2 * width), both, torch.zeros(width), width, 1.0, 1e9)


def induction_losses(code: SparseCode) -> tuple[float, float, float]:
    loaded = induction_model(40.0)
    ids = tuple(loaded.tokenizer(repeated_prompt(10).text)["input_ids"])
    return measure_losses(loaded, code, 1, (TextWindow(0, ids),), silent)


def quality(losses: tuple[float, float, float]) -> Quality:
    return Quality(0, 0, 0, *losses, 1, 1)


def test_an_identity_loses_nothing():
    rows = torch.randn(50, 8)
    assert fvu(identity_code(8), rows) == 0
    losses = induction_losses(identity_code(induction_model(40.0).anatomy.d_model))
    assert losses[1] == pytest.approx(losses[0], abs=1e-6)
    assert quality(losses).ce_recovered == pytest.approx(1, abs=1e-5)


def test_zeros_recover_nothing():
    code = identity_code(induction_model(40.0).anatomy.d_model)
    losses = induction_losses(replace(code, decoder_FD=torch.zeros_like(code.decoder_FD)))
    assert losses[0] < losses[2], "the induction model needs its first layer"
    assert losses[1] == losses[2]
    assert quality(losses).ce_recovered == 0


def test_a_wrong_scale_is_seen():
    """Sabotage: an autoencoder that forgets to scale back."""
    code = identity_code(8)
    wrong = replace(code, decoder_FD=code.decoder_FD * 0.9)
    assert fvu(wrong, torch.randn(50, 8)) > 0.005


def test_a_layer_the_model_does_not_need_has_no_recovered_loss():
    assert quality((2.0, 2.0, 2.0)).ce_recovered is None


# --- trained on text ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", DECODERS)
def test_every_row_has_exactly_k_features(family: str):
    loaded = tiny_model(family)
    settings = SMALL.model_copy(update={"max_tokens": 300, "epochs": 1.0})
    found = sparse_autoencoder(loaded, DOCUMENTS, silent, settings)
    assert found.facts["l0"] == 6
    assert found.result.provenance.exactness_gap == 0
    metrics = {metric.name: metric.value for metric in found.result.metrics}
    assert 0 < metrics["fvu"] < 1
    assert all(np.isfinite(value) for value in metrics.values())
    tensors = found.tensors
    assert tensors["encoder"].shape == (loaded.anatomy.d_model, 2 * loaded.anatomy.d_model)


def test_the_layer_is_the_one_transformers_calls_so(trained: Trained):
    loaded = tiny_model("llama")
    window = cut_text(loaded, DOCUMENTS, window=32, max_tokens=64).training[0]
    with torch.inference_mode():
        hidden = loaded.model(torch.tensor([window.ids]), output_hidden_states=True).hidden_states
        assert torch.equal(residual_after(loaded, 2, window), hidden[2][0])
        assert not torch.equal(residual_after(loaded, 1, window), hidden[2][0])
    assert trained.facts["layer"] == 2


def by_hand(trained: Trained, hidden: torch.Tensor, feature: int) -> list[float]:
    """A feature's activation at every position, in float64 over all features."""
    weights = {name: tensor.double() for name, tensor in trained.tensors.items()}
    scaled = hidden.double() / trained.facts["scale"]
    pre = (scaled - weights["bias"]) @ weights["encoder"] + weights["encoder_bias"]
    values = []
    for row in pre.relu():
        kth = sorted(row.tolist())[-trained.facts["k"]]
        values.append(float(row[feature]) if float(row[feature]) >= kth else 0.0)
    return values


def test_snippets_are_where_the_feature_is_strongest(trained: Trained):
    loaded = tiny_model("llama")
    parts = cut_text(loaded, DOCUMENTS, window=SMALL.window, max_tokens=SMALL.max_tokens)
    features, snippets = trained.tables["features"], trained.tables["snippets"]
    for feature in features.nlargest(3, "max_activation")["feature"]:
        per_window = []
        for window in (*parts.training, *parts.held_out):
            with torch.inference_mode():
                hidden = loaded.model(torch.tensor([window.ids]), output_hidden_states=True).hidden_states[2][
                    0
                ]
            per_window.append(by_hand(trained, hidden, feature)[1:])
        everywhere = [value for values in per_window for value in values]
        row = features.loc[feature]
        assert row["max_activation"] == pytest.approx(max(everywhere), rel=1e-4)
        assert row["density"] == pytest.approx(np.mean(np.array(everywhere) > 0))
        assert row["mean_activation"] == pytest.approx(np.mean([v for v in everywhere if v > 0]), rel=1e-4)
        rows = snippets[snippets["feature"] == feature]
        best = sorted((max(values) for values in per_window), reverse=True)
        wanted = [value for value in best if value > 0][: len(rows)]
        assert rows["activation"].tolist() == pytest.approx(wanted, rel=1e-4)
        for tokens, activations, peak, top in zip(
            rows["tokens"], rows["activations"], rows["peak"], rows["activation"], strict=True
        ):
            assert len(tokens) == len(activations)
            assert activations[peak] == pytest.approx(top)


def test_a_feature_is_a_direction(trained: Trained, tmp_path: Path):
    loaded = tiny_model("llama")
    trained.save(tmp_path / "a")
    features = trained.tables["features"]
    alive = int(features.nlargest(1, "density")["feature"].iloc[0])
    found = direction_by_name(loaded, f"sae:{tmp_path / 'a'}:{alive}")
    assert found.layer == 2
    assert float(found.direction_D.norm()) == pytest.approx(1, abs=1e-5)
    assert torch.equal(found.direction_D, trained.tensors["decoder"][alive])
    # Adding the direction at its typical strength moves the feature by its mean activation, before top-k.
    code = SparseCode.of(trained)
    moved = (found.direction_D * found.typical_strength / code.scale) @ code.decoder_FD[alive]
    assert float(moved) == pytest.approx(features.loc[alive, "mean_activation"], rel=1e-4)
    with pytest.raises(BadInput, match="there is no feature 256"):
        direction_by_name(loaded, f"sae:{tmp_path / 'a'}:256")
    with pytest.raises(BadInput, match="is another model"):
        direction_by_name(tiny_model("gpt2"), f"sae:{tmp_path / 'a'}:{alive}")
    for name in ("sae:", "sae:x", "sae:x:y", "vec:x:1"):
        with pytest.raises(BadInput, match="sae:ARTIFACT:FEATURE"):
            direction_by_name(loaded, name)


def test_a_dead_feature_is_no_direction(trained: Trained):
    features = trained.tables["features"].assign(density=0.0)
    with pytest.raises(BadInput, match="never active"):
        feature_direction(replace(trained, tables={"features": features}), 3)


def test_attention_sinks_are_left_as_they_are(trained: Trained):
    code = replace(SparseCode.of(trained), largest_norm=1.0)
    rows = torch.stack([torch.full((128,), 0.01), torch.full((128,), 10.0)])
    assert code.readable(rows).tolist() == [True, False]


def test_l0_counts_active_features_only(trained: Trained):
    code = SparseCode.of(trained)
    silent_code = replace(code, encoder_bias_F=torch.full_like(code.encoder_bias_F, -1e6))
    assert mean_l0(silent_code, torch.randn(5, 128)) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer": 9}, "layer 9 does not exist; this model has layers 1 to 3"),
        ({"k": 300}, "k 300 is more than the 256 features"),
        ({"max_tokens": 64, "window": 64}, "training needs at least two"),
    ],
)
def test_what_cannot_be_trained_is_refused(change: dict[str, int], message: str):
    with pytest.raises(BadInput, match=message):
        sparse_autoencoder(tiny_model("llama"), DOCUMENTS, silent, SMALL.model_copy(update=change))


def hooks(loaded: LoadedModel) -> int:
    """transformers keeps some of its own once hidden states were asked for."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in loaded.model.modules())


@pytest.mark.parametrize("after", [0.1, 0.6, 0.95])
def test_cancelling_leaves_no_hook(after: float):
    loaded = tiny_model("llama")

    def stop(done: float, total: float, message: str) -> None:
        if done / total >= after:
            raise Cancelled("enough")

    before = hooks(loaded)
    with pytest.raises(Cancelled):
        sparse_autoencoder(loaded, DOCUMENTS, stop, SMALL)
    assert hooks(loaded) == before
