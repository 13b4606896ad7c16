"""Verdicts by construction: steps whose cause and whose bound can be worked out by hand."""

from __future__ import annotations

import pytest

from core.profile.bottleneck import Action, verdict
from core.profile.work import NUMBER_BYTES, Step, Work
from tests.profile.hand_roofs import BANDWIDTH, FLOAT32, INT8, LAYER_S, STEP_S, hand_roofs

ROOFS = hand_roofs()
GB = 1e9


def step(seconds: float, work: Work, *, dtype: str = "float32", runtime: str = "llama_cpp") -> Step:
    return Step("decode", seconds, work, dtype, runtime, n_layers=10)


def dense(gb: float, *, kv_gb: float = 0.0, flops: float = 0.0, bytes_each: float = 4.0) -> Work:
    nbytes = gb * GB
    return Work(flops, nbytes, kv_gb * GB, nbytes / bytes_each, kv_gb * GB / 4, stored_bytes=nbytes)


def texts(actions: tuple[Action, ...]) -> list[str]:
    return [action.text for action in actions]


def test_weights():
    found = verdict(step(0.11, dense(1.0)), ROOFS)
    assert found.cause == "weights"
    assert found.weights_s == pytest.approx(0.1)
    assert found.rest_s == pytest.approx(0.01)
    assert found.calls_s is None
    best = found.actions[0]
    assert best.text == "keep the weights in 8 bits, in a runtime that reads them so"
    assert best.seconds == pytest.approx(0.1 * 8.5 / 32 + 0.01)
    assert best.gain == pytest.approx(0.11 / best.seconds)
    assert "at most 3.01 ×" in found.action
    assert "modelled" in found.action


def test_weights_that_a_runtime_unpacked():
    work = Work(0.0, 1.0 * GB, 0.0, weights=0.25 * GB, stored_bytes=0.25 * GB)
    found = verdict(step(0.11, work, runtime="torch_eager"), ROOFS)
    assert found.cause == "weights"
    runtime, packed = found.actions[:2]
    assert runtime.text.startswith("run it in a runtime with kernels of its own")
    assert runtime.seconds == pytest.approx(0.025), "which reads what is stored"
    assert "250 MB are stored, 1000 MB are read" in packed.text
    assert packed.seconds == pytest.approx(0.025 + 0.01)


def test_weights_of_8_bits_go_to_4_and_those_of_4_nowhere():
    eight = verdict(step(0.11, dense(1.0, bytes_each=1.06)), ROOFS)
    assert eight.actions[0].text.startswith("keep the weights in 4 bits")
    four = verdict(step(0.1, dense(1.0, bytes_each=0.5)), ROOFS)
    assert "leave out a quarter of the layers" in four.actions[0].text
    assert four.actions[0].seconds == pytest.approx(0.075)


def test_kv():
    found = verdict(step(0.32, dense(1.0, kv_gb=2.0, bytes_each=0.5)), ROOFS)
    assert found.cause == "kv"
    assert found.kv_s == pytest.approx(0.2)
    best = found.actions[0]
    assert best.text == "keep the KV cache in 8 bits"
    assert best.seconds == pytest.approx(0.1 + 0.2 * NUMBER_BYTES["int8"] / 4 + 0.02)


def test_compute():
    found = verdict(step(1.05, dense(1.0, flops=1.0 * FLOAT32)), ROOFS)
    assert found.cause == "compute"
    assert found.compute_s == pytest.approx(1.0)
    best = found.actions[0]
    assert best.text.startswith("multiply in int8")
    assert best.seconds == pytest.approx(FLOAT32 / INT8 + 0.05)


def test_fewer_bits_are_not_offered_where_multiplications_bind():
    found = verdict(step(1.05, dense(1.0, flops=1.0 * FLOAT32)), ROOFS)
    assert not [text for text in texts(found.actions) if "bits" in text]


def test_overhead_of_eager_torch_and_what_bits_would_not_bring():
    found = verdict(step(0.02, dense(0.02), runtime="torch_eager"), ROOFS)
    assert found.cause == "overhead"
    assert found.rest_s == pytest.approx(0.018)
    assert found.calls_s == pytest.approx(10 * LAYER_S + STEP_S)
    assert found.actions[0].text.startswith("run it in a runtime with kernels of its own")
    assert found.actions[0].seconds == pytest.approx(0.002)
    graph = next(action for action in found.actions if "one graph" in action.text)
    assert graph.seconds == pytest.approx(0.02 - 10 * LAYER_S - STEP_S), "a graph spares calls, not kernels"
    bits = next(action for action in found.actions if "bits" in action.text)
    assert bits.gain < 1.1


def test_reading_and_multiplying_overlap():
    found = verdict(step(0.2, dense(1.0, flops=0.09 * FLOAT32)), ROOFS)
    assert found.rest_s == pytest.approx(0.1), "the shorter of the two takes no time of its own"


@pytest.mark.parametrize("seconds", [0.05, 0.1, 0.2, 1.0])
@pytest.mark.parametrize("flops", [0.0, 0.15 * FLOAT32])
@pytest.mark.parametrize("runtime", ["torch_eager", "llama_cpp"])
def test_every_bound_lies_between_nothing_and_what_was_measured(seconds, flops, runtime):
    work = dense(1.0, kv_gb=0.5, flops=flops)
    found = verdict(step(seconds, work, runtime=runtime), ROOFS)
    assert found.actions
    assert list(found.actions) == sorted(found.actions, key=lambda action: action.seconds)
    for action in found.actions:
        assert 0 < action.seconds <= seconds
        assert action.gain == pytest.approx(seconds / action.seconds)
    assert found.rest_s >= 0, "a step from a cache faster than the memory has no negative rest"
    assert max(found.weights_s + found.kv_s, found.compute_s) == pytest.approx(
        max(work.bytes / BANDWIDTH, flops / FLOAT32)
    )
