from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from core.corpus.batches import tokenized
from core.corpus.rows import Row, Rows
from core.distill.checkpoint import write_checkpoint
from core.distill.curve import Curve, curve_frame, read_points
from core.distill.held_out import HeldOut, chosen_rows
from core.distill.outcome import metrics, sentences
from core.distill.precision import Narrowed, Weights
from core.distill.schedule import learning_rate
from core.distill.settings import TrainingSettings
from core.distill.standing import Position, Standing
from core.distill.trainer import Trained
from tests.tiny import tiny_model


def test_schedules_at_their_corners() -> None:
    cosine, wsd, constant = (
        TrainingSettings(learning_rate=0.1, warmup=0.1, schedule=kind)
        for kind in ("cosine", "wsd", "constant")
    )
    for settings in (cosine, wsd, constant):
        assert learning_rate(0.05, settings) == pytest.approx(0.05)
        assert learning_rate(0.1, settings) == pytest.approx(0.1)
    assert learning_rate(0.55, cosine) == pytest.approx(0.055), "half-way between 1 and a tenth"
    assert learning_rate(1.0, cosine) == pytest.approx(0.01)
    assert [learning_rate(share, wsd) for share in (0.8, 0.9, 1.0)] == pytest.approx([0.1, 0.05, 0.0])
    assert learning_rate(1.0, constant) == 0.1


def test_updates_too_small_for_bfloat16_add_up_and_frozen_weights_come_back() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(3, 3))
    with torch.no_grad():
        model[0].weight.fill_(1.0)
    frozen = {name: p.detach().clone() for name, p in model[1].named_parameters()}
    weights = Weights(model, {"w": model[0].weight}, "bfloat16")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    for _ in range(100):  # half a unit in the last place of 1 is 2⁻⁸ = 0.0039
        weights.exact["w"] += 1e-4
        weights.follow()
    assert float(model[0].weight.detach()) == 1.0078125, "1.01, rounded"
    model[0].weight.grad = torch.full_like(model[0].weight, 0.5)
    weights.collect()
    assert (float(weights.exact["w"].grad), model[0].weight.grad) == (0.5, None)
    weights.release()
    assert float(model[0].weight.detach()) == pytest.approx(1.01, abs=1e-5)
    for name, p in model[1].named_parameters():
        assert torch.equal(p, frozen[name])


def test_a_narrowed_model_keeps_its_ties() -> None:
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2), "b": torch.nn.Linear(2, 2)})
    model["b"].weight = model["a"].weight
    before = model["a"].weight.detach().clone()
    narrowed = Narrowed(model)
    assert model["b"].weight is model["a"].weight
    assert model["b"].weight.dtype == torch.bfloat16
    narrowed.restore()
    assert model["b"].weight is model["a"].weight
    assert torch.equal(model["b"].weight, before)


def test_a_curve_goes_on_behind_what_it_keeps(tmp_path: Path) -> None:
    file = tmp_path / "curve.jsonl"
    curve = Curve(file)
    for number in range(5):
        curve.add("held_out", tokens=number, values={}, best=False, samples=[])
    file.write_text(file.read_text() + '{"kind": "held_o')
    assert [point["tokens"] for point in read_points(file)] == [0, 1, 2, 3, 4], "a line cut short is none"
    again = Curve(file, keep=2)
    again.add("held_out", tokens=9, values={}, best=False, samples=[])
    assert [point["tokens"] for point in read_points(file)] == [0, 1, 9]
    points = [
        {"kind": "update", "update": n, "tokens": 10 * n, "loss": float(n), "parts": {}, "gradient_norm": 1.0,
         "learning_rate": 0.1, "tokens_per_s": 5.0}
        for n in range(1, 2501)
    ]  # fmt: skip
    frame = curve_frame(points)
    assert len(frame) == 834
    assert frame.iloc[0][["update", "tokens", "loss"]].tolist() == [3, 30, 2.0], "threes are averaged"
    assert frame.iloc[-1]["update"] == 2500


def test_before_and_after_are_compared_row_by_row() -> None:
    n_R = np.full(20, 10.0)
    old_R = np.random.default_rng(0).uniform(1, 50, 20)
    before, after = HeldOut(n_R, {"kl": old_R}), HeldOut(n_R, {"kl": old_R - 2.0})
    found = {metric.name: metric for metric in metrics(before, after, seed=0)}
    change = found["held_out_kl_change"]
    assert change.value == pytest.approx(-0.2)
    assert (change.low, change.high) == pytest.approx((-0.2, -0.2)), "each row fell by as much"
    assert (
        found["held_out_kl_before"].low < found["held_out_kl_before"].value < found["held_out_kl_before"].high
    )
    assert found["held_out_kl_after"].n == 200
    assert HeldOut.of(before.as_json()).sums["kl"].tolist() == old_R.tolist()
    place = Position(tokens=900, best_tokens=600, best=1.0)
    trained = Trained(Curve(None), before, after, list(range(20)), place, "patience", ())
    told = sentences(trained, after, chosen_by="kl", seed=0)
    assert "(change -0.2, 95 % interval -0.2 to -0.2)" in told[0]
    assert "after 600 of 900 tokens" in told[0]
    kept = Trained(Curve(None), before, before, list(range(20)), Position(tokens=900), "epochs", ())
    assert sentences(kept, before, chosen_by="kl", seed=0)[0].startswith("Training did not help")


def test_measured_rows_are_drawn_from_a_file_that_is_sorted_by_label() -> None:
    rows = tuple(Row(text=f"text {n}", label=str(n // 100)) for n in range(400))
    data = tokenized(Rows("sorted", "labelled", rows), tiny_model("bert").tokenizer, window=32)
    chosen = chosen_rows(data, max_tokens=data.n_tokens // 4, seed=0)
    assert chosen == sorted(chosen)
    assert len(chosen) == pytest.approx(100, abs=3)
    assert data.labels_R is not None
    assert np.bincount(data.labels_R[chosen]).min() > 10
    assert chosen != chosen_rows(data, max_tokens=data.n_tokens // 4, seed=1)


def test_a_checkpoint_that_was_never_written_is_not_promised(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, key="ours", tensors={"w": torch.ones(2)}, facts={})
    assert Standing(tmp_path, "ours", Curve(None)).is_kept
    assert not Standing(tmp_path, "another", Curve(None)).is_kept
    assert not Standing(tmp_path / "none", "ours", Curve(None)).is_kept
