"""What the machine can do: which roof is taken, what is kept, and the measuring itself on small sizes."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
import torch

from core import cli
from core.errors import CannotMeasure
from core.profile import _roofs, machine
from core.profile.machine import known_roofs, machine_roofs
from tests.profile import hand_roofs
from tests.profile.hand_roofs import BANDWIDTH, BFLOAT16, FLOAT32, LAYER_S, STEP_S


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SLIMSCOPE_CACHE", str(tmp_path / "cache"))


def test_a_roof_is_the_best_of_its_kind():
    roofs = hand_roofs.hand_roofs()
    assert roofs.read_bytes_per_s() == BANDWIDTH
    assert roofs.read_bytes_per_s(threads=1) == BANDWIDTH / 2
    assert roofs.read_bytes_per_s(threads=64) == BANDWIDTH, "not tried: the best of any"
    assert roofs.flops_per_s("bfloat16") == BFLOAT16
    assert roofs.flops_per_s("float64") == FLOAT32, "not measured: float32's"
    assert (roofs.layer_overhead_s, roofs.step_overhead_s) == (LAYER_S, STEP_S)


def test_kept_roofs_are_not_measured_again():
    assert known_roofs() is None
    hand_roofs.keep()
    found = machine_roofs(progress=_fails)
    assert found.read_bytes_per_s() == BANDWIDTH
    assert found.flags == ()
    pd.testing.assert_frame_equal(found.frame, hand_roofs.hand_roofs().frame)


@pytest.mark.parametrize(("flags", "again"), [(("contention",), False), ((), True)])
def test_roofs_of_a_busy_machine_are_taken_again_and_so_are_those_one_asks_for(flags, again):
    hand_roofs.keep(flags=flags)
    with pytest.raises(_Asked):
        machine_roofs(progress=_fails, again=again)


def test_a_line_through_two_depths_tells_layer_and_step():
    few, many = _roofs.LAYERS
    per_layer, beside = _roofs._line(0.5 + 0.1 * few, 0.5 + 0.1 * many)
    assert per_layer == pytest.approx(0.1)
    assert beside == pytest.approx(0.5)
    assert _roofs._line(2.0, 1.0) == (0.0, 2.0), "a deeper model is never faster: noise counts as nothing"


def test_every_roof_is_measured(monkeypatch):
    for name, value in (("BUFFER_BYTES", 2**22), ("PRODUCTS", (64,)), ("ROOF_S", 0.0), ("REPEATS", 3)):
        monkeypatch.setattr(_roofs, name, value)
    threads = torch.get_num_threads()
    try:
        said = _roofs.answer({"device": "cpu"}, lambda *_: None)
    finally:
        torch.set_num_threads(threads)
    found = machine._roofs({**said, "other_cpu": 0.0, "flags": []})
    assert set(found.frame["quantity"]) == {
        *("read_bandwidth", "copy_bandwidth", "matrix_rate", "layer_overhead", "step_overhead")
    }
    assert set(found.frame.loc[found.frame["quantity"] == "matrix_rate", "dtype"]) == set(_roofs.DTYPES)
    assert (found.frame["n"] >= 3).all()
    rates = found.frame[found.frame["unit"] != "s"]
    assert (rates["value"] >= rates["median"]).all(), "a rate's best is its highest"
    assert np.isfinite(found.frame["value"]).all()
    assert (rates["value"] > 0).all()
    assert 1e8 < found.read_bytes_per_s() < 1e13


def test_an_amount_per_second_is_by_the_shortest_time(monkeypatch):
    monkeypatch.setattr(_roofs, "_times_s", lambda work, device: [0.5, 0.25, 1.0])
    assert _roofs._per_s(lambda: None, 10.0, "cpu") == (40.0, 20.0, 3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(CannotMeasure, match="no CUDA device"):
        _roofs.answer({"device": "cuda"}, lambda *_: None)


def test_the_command_line_tells_the_roofs(capsys):
    hand_roofs.keep()
    assert cli.main(["machine"]) == 0
    shown = capsys.readouterr().out
    assert "10.0" in shown
    assert "GB/s" in shown
    assert "best of n repetitions" in shown
    assert cli.main(["machine", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["frame"]) == len(hand_roofs.hand_roofs().frame)


@pytest.mark.slow
@pytest.mark.rotating
def test_the_roofs_of_this_machine_are_taken_in_a_fresh_process_and_kept():
    taken = machine_roofs()
    kept = known_roofs()
    assert kept is not None
    assert kept.taken_at == taken.taken_at
    assert taken.environment == kept.environment
    assert taken.flops_per_s("float32") > 1e8
    if not taken.flags:
        assert machine_roofs(progress=_fails).taken_at == taken.taken_at


class _Asked(Exception):
    pass


def _fails(*_: object) -> None:
    raise _Asked
