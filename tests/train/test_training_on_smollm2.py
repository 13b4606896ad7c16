"""Both trainings on the real demo model, small enough for a test: the numbers that must not get worse."""

from __future__ import annotations

from pathlib import Path

import pytest

from core.models.loaded import LoadedModel
from core.models.open import open_model
from core.probes.sae_features import SaeFeaturesSettings, sae_features
from core.probes.tuned_lens import TunedLensProbeSettings
from core.probes.tuned_lens import tuned_lens as lens_probe
from core.text.documents import load_documents
from core.train.sparse_autoencoder import SparseAutoencoderSettings, sparse_autoencoder
from core.train.tuned_lens import TunedLensSettings, tuned_lens
from core.types import ModelRef, Prompt, silent

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800), pytest.mark.rotating]
PROMPT = Prompt("The capital of France is")


@pytest.fixture(scope="module")
def smollm2() -> LoadedModel:
    return open_model(ModelRef.parse("demo:smollm2"))


def test_least_squares_alone_takes_most_of_the_lens_kl(smollm2: LoadedModel, tmp_path: Path):
    """The logit lens is 15 nats off in the first half of this model; the tuned lens, from 4,096 tokens, under 6."""
    settings = TunedLensSettings(max_tokens=4096, positions=64, held_out_positions=64, epochs=0)
    found = tuned_lens(smollm2, load_documents("pydoc", split="calibration"), silent, settings)
    frame = found.result.frame
    assert (frame["kl_tuned_lens"] <= frame["kl_logit_lens"]).all()
    half = frame[frame["layer"].between(1, 15)]
    assert half["kl_logit_lens"].mean() > 12
    assert half["kl_tuned_lens"].mean() < 6
    found.save(tmp_path / "a")
    result = lens_probe(
        smollm2, PROMPT, silent, TunedLensProbeSettings(artifact=str(tmp_path / "a"), target=" Paris")
    )
    assert result.provenance.exactness_gap is not None
    assert result.provenance.exactness_gap < 1e-4
    last = result.frame[result.frame["position"] == result.frame["position"].max()]
    assert last.iloc[-1]["rank_of_target"] == 1


def test_a_dictionary_keeps_most_of_a_middle_layer(smollm2: LoadedModel, tmp_path: Path):
    settings = SparseAutoencoderSettings(
        layer=15, expansion=4, max_tokens=8192, epochs=8, batch=512, dead_after=8000, loss_windows=2
    )
    found = sparse_autoencoder(smollm2, load_documents("pydoc", split="calibration"), silent, settings)
    metrics = {metric.name: metric.value for metric in found.result.metrics}
    assert metrics["l0"] == 32
    assert metrics["fvu"] < 0.6
    assert metrics["ce_recovered"] > 0.5
    assert metrics["dead_share"] < 0.5
    found.save(tmp_path / "a")
    result = sae_features(smollm2, PROMPT, silent, SaeFeaturesSettings(artifact=str(tmp_path / "a")))
    assert result.provenance.exactness_gap is not None
    assert result.provenance.exactness_gap < 1e-5
    assert (result.frame["activation"] > 0).all()
