"""The faster float32 path is taken only where it is float32, and leaves nothing behind."""

from __future__ import annotations

import threading

import pytest
import torch

from core.models import fp32_path
from core.models.fp32_path import TOLERANCE, Parity, choose_path, fast_fp32, max_difference, parity


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SLIMSCOPE_CACHE", str(tmp_path))
    monkeypatch.delenv("SLIMSCOPE_FP32_PATH", raising=False)
    monkeypatch.setattr(fp32_path, "_known", {})


def precision() -> str:
    return torch.backends.mkldnn.matmul.fp32_precision


def rounded(mantissa_bits: int):
    """Products of inputs rounded to so many mantissa bits (8: bfloat16, 11: TF32), computed in float32."""

    def round_(x: torch.Tensor) -> torch.Tensor:
        mantissa, exponent = torch.frexp(x)
        return torch.ldexp((mantissa * 2**mantissa_bits).round() / 2**mantissa_bits, exponent)

    return lambda x, w, bias: fp32_path._products(round_(x), round_(w), bias)


def test_true_float32_passes_the_check():
    assert max_difference(fp32_path._products) < TOLERANCE / 5


@pytest.mark.parametrize("bits", [8, 11])
def test_rounding_like_bfloat16_or_tf32_fails_the_check(bits):
    assert max_difference(rounded(bits)) > 5 * TOLERANCE


def test_rounding_agrees_with_torch_bfloat16():
    by_torch = max_difference(
        lambda x, w, bias: fp32_path._products(x.bfloat16().float(), w.bfloat16().float(), bias)
    )
    assert max_difference(rounded(8)) == pytest.approx(by_torch, rel=1e-6)


def test_parity_measures_both_paths_and_restores():
    before = precision()
    found = parity()
    assert precision() == before
    assert found.exact < TOLERANCE
    if torch.backends.mkl.is_available():  # two libraries sum in another order: both were really run
        assert found.fast != found.exact


def test_path_is_used_inside_and_restored_outside():
    before = precision()
    x, w = torch.randn(64, 576), torch.randn(1536, 576)
    plain = torch.nn.functional.linear(x, w)
    with fast_fp32() as path:
        assert (precision() == "bf16") == path.fast
        inside = torch.nn.functional.linear(x, w)
    assert precision() == before
    assert torch.equal(torch.nn.functional.linear(x, w), plain)
    assert (inside - plain).abs().max() <= TOLERANCE * plain.square().mean().sqrt()


def test_restored_after_an_exception():
    before = precision()
    with pytest.raises(RuntimeError, match="boom"), fast_fp32():
        raise RuntimeError("boom")
    assert precision() == before


def test_overlapping_threads_keep_the_path_until_the_last_one_leaves(monkeypatch):
    monkeypatch.setattr(fp32_path, "known_parity", lambda: Parity(0.0, 0.0))
    before, entered, leave = precision(), threading.Event(), threading.Event()

    def other() -> None:
        with fast_fp32():
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    with fast_fp32():
        thread.start()
        assert entered.wait(10)
    assert precision() == "bf16"
    leave.set()
    thread.join()
    assert precision() == before


def test_exact_leaves_torch_alone(monkeypatch):
    before = precision()
    with fast_fp32("exact") as path:
        assert not path.fast
        assert precision() == before
    monkeypatch.setenv("SLIMSCOPE_FP32_PATH", "exact")
    assert not choose_path("auto").fast


def test_a_machine_that_rounds_is_refused_and_told(monkeypatch):
    monkeypatch.setattr(fp32_path, "parity", lambda: Parity(7e-3, 4e-6))
    path = choose_path()
    assert not path.fast
    assert "7.0e-03" in path.name


def test_answer_is_kept_on_disk_and_a_damaged_one_is_made_again(tmp_path, monkeypatch):
    first = fp32_path.known_parity()
    (file,) = (tmp_path / "fp32-parity").glob("*.json")
    monkeypatch.setattr(fp32_path, "_known", {})
    monkeypatch.setattr(fp32_path, "parity", lambda: pytest.fail("was not read from disk"))
    assert fp32_path.known_parity() == first
    monkeypatch.setattr(fp32_path, "_known", {})
    monkeypatch.setattr(fp32_path, "parity", lambda: Parity(1.0, 1.0))
    file.write_text("{")
    assert fp32_path.known_parity() == Parity(1.0, 1.0)


def test_a_model_of_experts_is_left_alone():
    before = torch.backends.mkldnn.matmul.fp32_precision
    with fast_fp32(n_experts=16) as path:
        assert torch.backends.mkldnn.matmul.fp32_precision == before
    assert not path.fast
    assert "experts" in path.name
