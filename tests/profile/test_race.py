"""Races: who may meet, in which order, what a session's steps become, and two real models in two real processes."""

from __future__ import annotations

import os
import shutil
from copy import deepcopy
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
import transformers

from core import errors
from core.catalog.store import Catalog
from core.loop import register
from core.profile._race_result import Runner, result_of_race
from core.profile.comparability import tier_of
from core.profile.fresh import partner
from core.profile.measured import Facts, Measured, Memory, PhaseEnd
from core.profile.protocol import Blocks, PairedProtocol
from core.profile.race import _order, race
from core.profile.runtimes.torch_eager import TorchEagerSettings
from core.types import Variant, silent
from tests.tiny import tiny_folder

SETTINGS = TorchEagerSettings(tier="rapid", prompt_tokens=32, new_tokens=8, threads=1)
PROTOCOL = PairedProtocol(SETTINGS.protocol(), "decode", Blocks(12, 0.25), 0.03)


@pytest.fixture
def catalog(tmp_path, monkeypatch) -> Catalog:
    monkeypatch.setenv("SLIMSCOPE_HOME", str(tmp_path / "home"))
    return Catalog(f"sqlite:///{tmp_path / 'catalog.sqlite'}")


def test_half_of_the_blocks_begin_with_a_in_an_order_by_lot():
    turns = _order(PROTOCOL)
    assert sorted(turns) == ["abba"] * 6 + ["baab"] * 6
    assert turns != sorted(turns)
    assert turns == _order(PROTOCOL), "the lot is drawn by the seed"


def test_a_process_is_asked_twice_and_is_gone_afterwards():
    with partner("tests.profile.echo", silent, threads=1) as child:
        first = child.ask({"say": "one"}, message="")
        second = child.ask({"say": "two"}, message="")
        assert second["asked"] == ["one", "two"]
        assert first["pid"] == second["pid"] != os.getpid()
        with pytest.raises(errors.BadInput, match="refused as asked"):
            child.ask({"say": "refuse"}, message="")
        with pytest.raises(errors.WorkerDied):
            child.ask({"say": "three"}, message="")
    assert not psutil.pid_exists(first["pid"])


def test_different_work_is_refused(catalog, tmp_path):
    id_ = register(catalog, str(tiny_folder("llama", tmp_path / "m"))).id
    with pytest.raises(errors.BadInput, match="prompt_tokens is 32 and 64"):
        race(catalog, id_, id_, settings_a={"prompt_tokens": 32}, settings_b={"prompt_tokens": "64"})
    with pytest.raises(errors.BadInput, match="at least 8"):
        race(catalog, id_, id_, blocks=5)


# --- from steps to a verdict --------------------------------------------------------------------------------


def side(name: str) -> Runner:
    known = Variant(name, name, "", name, None, None, "", name * 8, "", "decoder", 1, 1, 32.0, True)
    return Runner(known, SETTINGS, Path(), Path(), None, None)


def measured(*, steady: bool = True) -> Measured:
    facts = Facts(
        dtype="float32", attention_kernel="", weights_memory_bytes=1, device_peak_bytes=None, conditions={}, notes=()
    )  # fmt: skip
    return Measured(
        family="decoder",
        samples=(),
        phases={"decode": PhaseEnd(steady=steady, ended_by="enough")},
        memory=Memory(baseline_bytes=1, peak_bytes=2, inference_peak_bytes=None),
        facts=facts,
        environment={"hash": "e" * 64, "host": {}},
        files="f",
        other_cpu_at_start=0.0,
        load_average=0.0,
        seconds=1.0,
    )


def steps(b_slower: float, *, busy: tuple[int, ...] = (), blocks: int = 12) -> pd.DataFrame:
    """20 steps a stretch of 10 ms with 1 % of noise; in ``busy`` blocks a stranger makes b three times slower."""
    random, rows = np.random.default_rng(3), []
    for block in range(blocks):
        for order, name in enumerate("abba" if block % 2 else "baab"):
            slow = (3.0 if block in busy else b_slower) if name == "b" else 1.0
            times = 10 * slow * np.exp(random.normal(0, 0.01, 20))
            share = 0.6 if block in busy and name == "b" else 0.0
            rows += [(block, name, order, i, ms, share) for i, ms in enumerate(times)]
    return pd.DataFrame(rows, columns=["block", "side", "order", "iteration", "value_ms", "other_cpu"])


def result(taken: pd.DataFrame, *, steady: bool = True):
    sides = [side("a"), side("b")]
    return result_of_race(taken, sides, [measured(), measured(steady=steady)], PROTOCOL, 1.0)


def test_contended_blocks_are_left_out_while_enough_are_clean():
    found = result(steps(1.0, busy=(2, 7)))
    assert found.provenance.conditions["verdict"]["verdict"] == "equivalent"
    assert found.provenance.conditions["verdict"]["n_blocks"] == 10
    assert found.flags == ()
    assert any("2 of 12 blocks were contended" in note for note in found.notes)
    assert found.frames["blocks"]["contended"].sum() == 4, "kept, and marked"


def test_a_session_with_too_few_clean_blocks_is_flagged():
    found = result(steps(1.0, busy=tuple(range(6))), steady=False)
    assert found.flags == ("contention", "no_steady_state")
    assert found.provenance.conditions["verdict"]["n_blocks"] == 12


def test_numbers_of_a_race():
    found = result(steps(1.25))
    ratio, a, b = found.metrics
    assert (ratio.name, ratio.value) == ("speed_ratio_decode", pytest.approx(0.8, rel=0.01))
    assert (a.value, b.value) == (pytest.approx(10, rel=0.01), pytest.approx(12.5, rel=0.01))
    assert list(found.frames["blocks"].columns[:4]) == ["block", "order", "side", "value_ms"]
    assert len(found.frames["blocks"]) == 48
    assert len(found.frames["samples"]) == 48 * 20
    assert "A is faster" in found.notes[0]
    sides = found.provenance.conditions["sides"]
    assert tier_of(sides["a"], sides["b"]).letter == "A"


# --- two real models ------------------------------------------------------------------------------------------


def deeper(folder: Path, target: Path, times: int) -> Path:
    """The same model with all its layers ``times`` times over."""
    shutil.copytree(folder, target)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    layers = list(model.model.layers)
    model.model.layers = torch.nn.ModuleList(deepcopy(layer) for _ in range(times) for layer in layers)
    model.config.num_hidden_layers *= times
    model.save_pretrained(target, safe_serialization=True)
    return target


@pytest.mark.slow
@pytest.mark.rotating
def test_the_model_with_three_times_the_layers_is_slower(catalog, tmp_path):
    small = tiny_folder("llama", tmp_path / "small")
    a = register(catalog, str(small)).id
    b = register(catalog, str(deeper(small, tmp_path / "large", 3))).id
    told = {"tier": "rapid", "prompt_tokens": 16, "new_tokens": 8, "threads": 1}
    run = race(catalog, a, b, settings_a=told, settings_b=told, blocks=8)
    assert (run.kind, run.variant_id) == ("race", b)
    assert run.conditions["verdict"]["verdict"] == "a is faster"
    ratio = run.measurements[0]
    assert 0.2 < ratio.low <= ratio.value <= ratio.high < 0.75
    blocks = catalog.frame(run.id, "blocks")
    assert blocks.groupby("block")["side"].agg("".join).isin(["abba", "baab"]).all()
    assert (blocks["steps"] >= 5).all()
    assert run.conditions["sides"]["a"]["parity_kl"] < 1e-6
    assert catalog.runs(b)[0].id == run.id
    assert not psutil.Process().children(recursive=True)
