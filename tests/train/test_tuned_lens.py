"""The tuned lens: it begins as the logit lens, never ends above it, and finds a map that is known."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from core.errors import BadInput, Cancelled, CannotMeasure
from core.probes.logit_lens import LogitLensSettings, logit_lens
from core.probes.tuned_lens import TunedLensProbeSettings
from core.probes.tuned_lens import tuned_lens as probe
from core.train import _lens_descent
from core.train._lens_moments import Moments
from core.train._residuals import cut_text, spread_positions
from core.train._trained import Trained
from core.train.tuned_lens import TunedLensSettings, tuned_lens
from core.types import Documents, Prompt, silent
from tests.references.slow_probes import lens_by_hand
from tests.tiny import CORPUS, DECODERS, tiny_model

TEXT = " ".join(CORPUS)
DOCUMENTS = Documents("corpus", "calibration", tuple(f"{n} {TEXT}" for n in range(6)))
PROMPT = Prompt("The capital of France is Paris, and Mary gave a drink to John")
SMALL = TunedLensSettings(
    max_tokens=700, window=32, positions=300, held_out_positions=80, epochs=2, batch=32, learning_rate=1e-3
)
NOTHING = {"epochs": 0.0, "regression": False}


@pytest.fixture(scope="module")
def trained() -> Trained:
    return tuned_lens(tiny_model("llama"), DOCUMENTS, silent, SMALL)


@pytest.mark.parametrize("family", DECODERS)
def test_untrained_it_is_the_logit_lens_bit_for_bit(family: str, tmp_path: Path):
    loaded = tiny_model(family)
    start = tuned_lens(loaded, DOCUMENTS, silent, SMALL.model_copy(update=NOTHING))
    start.save(tmp_path / "a")
    tuned = probe(loaded, PROMPT, silent, TunedLensProbeSettings(artifact=str(tmp_path / "a")))
    plain = logit_lens(loaded, PROMPT, silent, LogitLensSettings())
    for name, frame in plain.frames.items():
        assert frame.equals(tuned.frames[name]), name
    assert start.facts["kl"] == start.facts["kl_logit_lens"]


@pytest.mark.parametrize("family", DECODERS)
def test_training_never_ends_above_the_logit_lens(family: str):
    found = tuned_lens(tiny_model(family), DOCUMENTS, silent, SMALL)
    frame = found.result.frame
    assert (frame["kl_tuned_lens"] <= frame["kl_logit_lens"]).all()
    assert found.result.provenance.exactness_gap == 0
    assert frame["kl_tuned_lens"].mean() < 0.9 * frame["kl_logit_lens"].mean()
    assert (frame["kl_tuned_lens"] >= 0).all()


def test_steps_that_do_harm_are_not_kept():
    """Sabotage: a learning rate that breaks every translator; what is left is the start."""
    loaded = tiny_model("llama")
    wild = SMALL.model_copy(update={"learning_rate": 1.0, "regression": False})
    found = tuned_lens(loaded, DOCUMENTS, silent, wild)
    curves = found.result.frames["curves"]
    last = curves[curves["lens"].str.startswith("step")].groupby("layer")["kl_nats"].min()
    plain = curves[curves["lens"] == "logit lens"].set_index("layer")["kl_nats"]
    harmed = (last > plain).tolist()
    assert sum(harmed) >= 2, "the sabotage does harm"
    for layer, harm in enumerate(harmed):
        assert (found.result.frame["kept"][layer] == "logit lens") == harm
        assert found.tensors["delta"][layer].any() != harm
    assert found.result.provenance.exactness_gap == 0


def test_descent_improves_on_its_start():
    loaded = tiny_model("llama")
    found = tuned_lens(loaded, DOCUMENTS, silent, SMALL.model_copy(update={"regression": False}))
    assert set(found.result.frame["kept"]) <= {"step 9", "step 18", "step 19"}


def test_kl_is_what_the_slow_reference_says():
    loaded = tiny_model("qwen3")
    settings = SMALL.model_copy(update=NOTHING)
    found = tuned_lens(loaded, DOCUMENTS, silent, settings)
    parts = cut_text(loaded, DOCUMENTS, window=32, max_tokens=700)
    sums = np.zeros(loaded.anatomy.n_layers)
    n = 0
    chosen = spread_positions(parts.held_out, settings.held_out_positions)
    for window, positions in zip(parts.held_out, chosen, strict=True):
        by_hand = lens_by_hand(loaded, list(window.ids))
        for position in positions:
            sums += [by_hand[layer][position]["kl_to_final_nats"] for layer in range(len(sums))]
            n += 1
    assert n == found.facts["held_out_positions"]
    assert found.facts["kl_logit_lens"] == pytest.approx((sums / n).tolist(), rel=1e-4)


def test_what_is_stored_gives_the_kl_that_was_reported(trained: Trained, tmp_path: Path):
    """The artifact, read back by the probe on held-out text, has the KL that training measured there."""
    loaded = tiny_model("llama")
    trained.save(tmp_path / "a")
    parts = cut_text(loaded, DOCUMENTS, window=32, max_tokens=700)
    chosen = spread_positions(parts.held_out, SMALL.held_out_positions)
    kl = np.zeros(3)
    for window, positions in zip(parts.held_out, chosen, strict=True):
        text = loaded.tokenizer.decode(window.ids)
        if tuple(loaded.tokenizer(text)["input_ids"]) != window.ids:
            pytest.skip("this window does not survive decoding")
        settings = TunedLensProbeSettings(artifact=str(tmp_path / "a"), positions=0)
        frame = probe(loaded, Prompt(text), silent, settings).frame
        picked = frame[frame["position"].isin(positions) & (frame["layer"] < 3)]
        kl += picked.groupby("layer")["kl_to_final_nats"].sum().to_numpy()
    assert trained.facts["kl"] == pytest.approx((kl / trained.facts["held_out_positions"]).tolist(), rel=1e-4)


def test_least_squares_finds_a_map_that_is_known():
    generator = torch.Generator().manual_seed(0)
    width, n = 12, 400
    first = torch.randn(n, width, generator=generator)
    change, shift = torch.randn(width, width, generator=generator), torch.randn(width, generator=generator)
    moments = Moments(1, width, "cpu")
    last = first + first @ change + shift
    for part in range(0, n, 100):
        moments.add(torch.stack([first[part : part + 100], last[part : part + 100]]))
    found = moments.solve(first.square().mean(0).sqrt()[None])
    assert torch.allclose(found.delta_LDD[0], change, atol=0.05)
    moved = found.translate(0, first)
    assert float((moved - last).norm() / last.norm()) < 0.01
    assert torch.equal(found.translate(1, last), last), "the last layer is not translated"


def test_a_variant_with_another_unembedding_is_refused(trained: Trained, tmp_path: Path):
    trained.save(tmp_path / "a")
    base = tiny_model("llama")
    facts = json.loads((tmp_path / "a" / "facts.json").read_text())
    (tmp_path / "a" / "facts.json").write_text(json.dumps({**facts, "unembedding": "0" * 64}))
    with pytest.raises(BadInput, match="has another final norm or unembedding"):
        probe(base, PROMPT, silent, TunedLensProbeSettings(artifact=str(tmp_path / "a")))


def test_another_model_is_refused(trained: Trained, tmp_path: Path):
    trained.save(tmp_path / "a")
    with pytest.raises(BadInput, match="is another model"):
        probe(tiny_model("smollm"), PROMPT, silent, TunedLensProbeSettings(artifact=str(tmp_path / "a")))


def test_the_same_seed_gives_the_same_translators(trained: Trained):
    again = tuned_lens(tiny_model("llama"), DOCUMENTS, silent, SMALL)
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in trained.tensors.items())


def test_half_precision_is_trained_in_single(tmp_path: Path):
    loaded = tiny_model("llama")
    half = replace(loaded, model=type(loaded.model)(loaded.model.config))
    half.model.load_state_dict(loaded.model.state_dict())
    half.model.to(torch.bfloat16).eval().requires_grad_(False)
    found = tuned_lens(half, DOCUMENTS, silent, SMALL)
    assert found.tensors["delta"].dtype == torch.float32
    frame = found.result.frame
    assert frame["kl_tuned_lens"].mean() < frame["kl_logit_lens"].mean()
    found.save(tmp_path / "a")
    result = probe(half, PROMPT, silent, TunedLensProbeSettings(artifact=str(tmp_path / "a")))
    assert result.frame["kl_to_final_nats"].notna().all()


def test_a_kernel_without_gradient_leaves_the_regression(monkeypatch: pytest.MonkeyPatch):
    """Without descent no gradient is taken, and none is asked for."""

    def refuse(loaded: object) -> None:
        raise CannotMeasure("no gradient")

    monkeypatch.setattr("core.train.tuned_lens.require_gradients", refuse)
    loaded = tiny_model("llama")
    found = tuned_lens(loaded, DOCUMENTS, silent, SMALL.model_copy(update={"epochs": 0.0}))
    assert set(found.result.frame["kept"]) == {"regression"}
    with pytest.raises(CannotMeasure):
        tuned_lens(loaded, DOCUMENTS, silent, SMALL)


@pytest.mark.parametrize("after", [0.1, 0.35, 0.7])
def test_cancelling_is_let_through(after: float):
    def stop(done: float, total: float, message: str) -> None:
        if done / total >= after:
            raise Cancelled("enough")

    loaded = tiny_model("llama")
    before = sum(len(m._forward_hooks) for m in loaded.model.modules())
    with pytest.raises(Cancelled):
        tuned_lens(loaded, DOCUMENTS, stop, SMALL)
    assert sum(len(m._forward_hooks) for m in loaded.model.modules()) == before


def test_logits_exist_for_one_batch_at_a_time(monkeypatch: pytest.MonkeyPatch):
    rows: list[int] = []
    real = _lens_descent.unembed

    def watch(model: object, anatomy: object, residual: torch.Tensor) -> torch.Tensor:
        rows.append(len(residual))
        return real(model, anatomy, residual)

    monkeypatch.setattr(_lens_descent, "unembed", watch)
    tuned_lens(tiny_model("llama"), DOCUMENTS, silent, SMALL.model_copy(update={"batch": 16}))
    assert max(rows) == 16


def test_too_little_text_is_refused():
    short = Documents("short", "calibration", ("one two three",))
    with pytest.raises(BadInput, match=r"short gives \d windows .* give more text"):
        tuned_lens(tiny_model("llama"), short, silent, SMALL)
