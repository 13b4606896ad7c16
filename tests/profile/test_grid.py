"""Grids: which cells there are, which were measured, what they would take; and real cells through the command line."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pandas as pd
import pytest

from core import cli, errors
from core.catalog.queries import tradeoff_frame
from core.catalog.store import Catalog
from core.loop import register
from core.profile.autotune import candidates, fewest_close
from core.profile.environment import environment
from core.profile.grid import MOST, cells, differing
from core.profile.runtimes._loading import settings_of
from core.types import Measurement, Run
from tests.tiny import tiny_folder


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grid")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLIMSCOPE_HOME", str(folder / "home"))
        patch.setenv("SLIMSCOPE_CACHE", str(folder / "cache"))
        patch.delenv("SLIMSCOPE_CATALOG", raising=False)
        yield folder


@pytest.fixture
def catalog(home, tmp_path) -> Catalog:
    return Catalog(f"sqlite:///{tmp_path / 'catalog.sqlite'}")


@pytest.fixture
def decoder(catalog, home) -> str:
    return register(catalog, str(tiny_folder("llama", home / "llama"))).id


def measured(cell, *, took_s: float = 40.0, tpot_ms: float = 10.0, **changed) -> Run:
    """A finished profile of a cell, as ``record`` would enter it."""
    settings = settings_of(cell.runtime, cell.settings)
    facts, now = environment("cpu"), datetime.now(UTC)
    conditions = {
        "method": cell.runtime,
        "settings": dict(cell.settings),
        "protocol_hash": settings.protocol().hash,
        "threads": settings.n_threads,
    }
    numbers = (
        Measurement("ttft_ms", 640.0, "ms", "lower", 12, 630.0, 650.0),
        Measurement("tpot_ms", tpot_ms, "ms", "lower", 30, 9.5, 10.5),
        Measurement("decode_tokens_per_s", 1e3 / tpot_ms, "tokens/s", "higher", 30, 95.0, 105.0),
    )
    start = now - timedelta(seconds=took_s)
    made = Run(
        cell.key[:12], "profile", cell.variant, "valid", (), "p", conditions, facts["hash"], start, now, None, numbers
    )  # fmt: skip
    return replace(made, **changed)


def test_cells_are_all_combinations_once(catalog, decoder):
    found = cells(
        catalog, [decoder, decoder], threads=["1", 2], prompts=[64, 256], others={"tier": ["rapid"], "seed": [0, "0"]}
    )  # fmt: skip
    asked = [(cell.settings["threads"], cell.settings["prompt_tokens"]) for cell in found]
    assert sorted(asked) == [(1, 64), (1, 256), (2, 64), (2, 256)]
    assert len({cell.key for cell in found}) == 4
    assert set(differing(found)) == {"threads", "prompt_tokens"}
    assert all(cell.to_do and cell.settings["tier"] == "rapid" for cell in found)


def test_a_setting_that_one_runtime_lacks_is_left_out_there(catalog, decoder):
    found = cells(catalog, [decoder], ["torch_eager", "llama_cpp"], others={"weights": ["q8_0", "q4_0"]})
    assert [cell.runtime for cell in found] == ["torch_eager", "llama_cpp", "llama_cpp"]
    assert [cell.settings.get("weights") for cell in found] == [None, "q8_0", "q4_0"]


def test_what_no_runtime_has_or_allows_is_refused(catalog, decoder):
    with pytest.raises(errors.BadSettings, match="none of torch_eager has a setting 'weights'"):
        cells(catalog, [decoder], others={"weights": ["q8_0"]})
    with pytest.raises(errors.BadSettings, match="threads"):
        cells(catalog, [decoder], threads=["many"])
    with pytest.raises(errors.UnknownMethod):
        cells(catalog, [decoder], ["no_such_runtime"])
    with pytest.raises(errors.BadInput, match=f"at most {MOST}"):
        cells(catalog, [decoder], threads=range(1, 1000))


def test_a_runtime_that_cannot_take_the_model_says_why(catalog, home):
    encoder = register(catalog, str(tiny_folder("bert", home / "bert"))).id
    (cell,) = cells(catalog, [encoder], ["llama_cpp"])
    assert "encoder" in cell.refused or "install" in cell.refused
    assert not cell.to_do


def test_a_cell_is_measured_where_everything_is_the_same(catalog, decoder):
    (cell,) = cells(catalog, [decoder], others={"tier": ["rapid"]})
    facts = environment("cpu")
    other = {**facts, "hash": "another machine"}
    run = measured(cell)
    protocol = run.conditions | {"protocol_hash": "older"}
    settings = run.conditions | {"settings": {**cell.settings, "threads": 7}}
    for i, wrong in enumerate(
        (replace(run, environment=other["hash"]), replace(run, conditions=protocol), replace(run, conditions=settings))
    ):  # fmt: skip
        catalog.record_run(replace(wrong, id=f"wrong{i}"), environment=other)
        assert cells(catalog, [decoder], others={"tier": ["rapid"]})[0].measured_run is None
    catalog.record_run(run, environment=facts)
    flagged = replace(run, id="later", status="flagged", flags=("contention",))
    catalog.record_run(replace(flagged, ended_at=run.ended_at + timedelta(1)), environment=facts)
    (found,) = cells(catalog, [decoder], others={"tier": ["rapid"]})
    assert (found.measured_run, found.flags, found.to_do) == (run.id, (), False), (
        "a valid one before a flagged one"
    )


def test_the_estimate_follows_the_protocols_rules_at_measured_paces(catalog, decoder):
    """Prompts of 256 tokens take 0.64 s, steps 10 ms: 12 + 12 prompts; 8 tokens after each prompt's reading."""
    others = {"tier": ["rapid"], "new_tokens": [8]}
    (cell,) = cells(catalog, [decoder], others=others)
    assert cell.basis == "guess by size"
    catalog.record_run(measured(cell, took_s=30.0), environment=environment("cpu"))
    same, half = cells(catalog, [decoder], prompts=[256, 128], others=others)
    assert same.basis == half.basis == "paces measured before"
    assert same.seconds == pytest.approx(30.0), "the same again takes as long again"
    # Prefill: min(5, 12 · 0.64) + min(7, 12 · 0.64); of 128 tokens 12 · 0.32 twice; decode: (0.01 + 0.64 / 8) · 12 twice.
    decode = {tokens: 12 * (0.01 + 0.64 * tokens / 256 / 8) for tokens in (256, 128)}
    before = 5 + 7 + decode[256] + max(1, decode[256])
    after = 2 * 12 * 0.32 + decode[128] + max(1, decode[128])
    assert half.seconds == pytest.approx(30 - before + after, rel=0.02)


def test_a_cell_beside_the_usual_workload_leaves_the_headline_alone(catalog, decoder):
    usual, unusual = cells(catalog, [decoder], threads=[0, 1], others={"tier": ["rapid"]})
    assert (usual.headline, unusual.headline) == (True, False)
    facts = environment("cpu")
    catalog.record_run(measured(usual, tpot_ms=10.0), environment=facts)
    run = measured(unusual, tpot_ms=40.0)
    catalog.record_run(replace(run, conditions=run.conditions | {"headline": False}), environment=facts)
    assert tradeoff_frame(catalog, decoder)["decode_tokens_per_s"].tolist() == [100.0]


def test_fewest_threads_within_3_percent_of_the_fastest():
    tried = pd.DataFrame(
        {
            "threads": [1, 2, 4, 8],
            "ttft_ms": [100.0, 52.0, 30.0, 30.5],
            "tpot_ms": [20.0, 12.2, 12.0, float("nan")],
        }
    )
    assert fewest_close(tried, "ttft_ms") == 4
    assert fewest_close(tried, "tpot_ms") == 2


def test_candidates_are_powers_of_two_and_what_there_is():
    found = candidates()
    assert found[0] == 1
    assert list(found) == sorted(set(found))


@pytest.mark.slow
@pytest.mark.rotating
def test_a_grid_from_the_command_line(home, capfd):
    def ask(*arguments: str):
        code = cli.main([*arguments, "--json"])
        out, err = capfd.readouterr()
        assert code == 0, err
        return json.loads(out)

    model = str(tiny_folder("smollm", home / "smollm"))
    small = ("--set", "new_tokens=4", "--set", "parity=false", "--tier", "rapid")
    planned = ask("profile", model, *small, "--set", "prompt_tokens=16,32", "--set", "threads=1", "--dry-run")
    assert [row["state"] for row in planned] == ["to do", "to do"]
    first = ask("profile", model, *small, "--set", "prompt_tokens=16", "--set", "threads=1")
    assert first["kind"] == "profile", "one cell is one run"
    rows = ask("profile", model, *small, "--set", "prompt_tokens=16,32", "--set", "threads=1")
    assert [row["state"] for row in rows] == ["measured before", "measured now"]
    assert rows[0]["run"] == first["id"]
    assert all(row["decode_tokens_per_s_low"] <= row["decode_tokens_per_s"] for row in rows)
    (tuned, *_) = ask("profile", model, *small, "--set", "prompt_tokens=16", "--set", "threads=auto")
    assert tuned["threads"] in (tuned["prefill_threads"], tuned["decode_threads"])
    assert {runtime["id"] for runtime in ask("runtimes")} >= {"torch_eager", "llama_cpp"}
