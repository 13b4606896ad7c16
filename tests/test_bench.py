"""Probes and trainings as runs: what a page opens again is what was computed."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from core.bench import probe_model
from core.catalog.purge import purge
from core.catalog.queries import run_of, trained, variant_detail
from core.catalog.results import put_result, read_result, result_of, write_result
from core.catalog.store import Catalog
from core.errors import BadInput
from core.estimate import estimate
from core.models.pace import Pace, measure_pace, n_positions
from core.registry import get
from core.types import Cost, Metric, Prompt, Provenance, Result, View, silent
from tests.tiny import tiny_folder, tiny_model

PROMPT = Prompt("one two three one two")


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    return Catalog(f"sqlite:///{tmp_path / 'home' / 'catalog.sqlite'}")


def same(first: Result, second: Result) -> None:
    assert list(first.frames) == list(second.frames)
    for name, frame in first.frames.items():
        pd.testing.assert_frame_equal(second.frames[name], frame)
    assert (first.views, first.notes, first.flags, first.images) == (
        second.views,
        second.notes,
        second.flags,
        second.images,
    )
    assert first.metrics == second.metrics
    assert first.provenance == second.provenance


def test_a_result_comes_back_equal(tmp_path: Path) -> None:
    result = Result(
        frames={
            "main/odd name": pd.DataFrame(
                {"x": [1, 2], "w": [0.5, np.nan], "token": ["<img>", "\n"], "k": pd.array([1, None], "Int64")}
            ),
            "empty": pd.DataFrame({"a": pd.Series([], dtype=float)}),
        },
        views=(View("heatmap", "x", "k", "w", frame="main/odd name", midpoint=0.0, tooltip=("token",)),),
        metrics=(Metric("m", 0.1 + 0.2, "nats", "lower", 3, 0.1, math.pi, "bootstrap"),),
        provenance=Provenance(
            "m", {"a": 1.5}, "f", {"prompt": "p"}, conditions={"n": 3}, exactness_gap=1e-17
        ),
        notes=("a", "b"),
        flags=("preview",),
        images={"main/odd name": b"\x89PNG\x00"},
    )
    write_result(result, tmp_path)
    same(result, read_result(tmp_path))


@pytest.mark.parametrize("id_", ["attention_pattern", "logit_lens", "residual_norms", "token_surprisal"])
def test_a_probes_result_comes_back_equal(id_: str, tmp_path: Path) -> None:
    method = get("probe", id_)
    result = method.run(tiny_model("llama"), PROMPT, silent, method.parse({}))
    write_result(result, tmp_path)
    same(result, read_result(tmp_path))


def test_a_probe_run_holds_what_is_needed_to_ask_again(catalog: Catalog, tmp_path: Path) -> None:
    folder = str(tiny_folder("llama", tmp_path / "model"))
    run = probe_model(catalog, folder, "logit_lens", PROMPT, settings={"top_k": 3}, job_id="j1")
    assert (run.kind, run.job_id) == ("probe", "j1")
    again = run_of(catalog, run.id)
    assert again.conditions["prompt"] == {"text": PROMPT.text, "second": None, "image": None}
    assert again.conditions["settings"]["top_k"] == 3
    assert again.conditions["model"] == folder
    kept = result_of(catalog, run.id)
    assert kept.provenance.settings["top_k"] == 3
    assert kept.views
    assert variant_detail(catalog, run.variant_id).runs == (), "the trade-offs list what compares variants"
    with pytest.raises(BadInput, match="no run is called 'nobody'"):
        result_of(catalog, "nobody")


def test_purge_keeps_what_runs_need(catalog: Catalog, tmp_path: Path) -> None:
    run = probe_model(catalog, str(tiny_folder("llama", tmp_path / "model")), "token_surprisal", PROMPT)
    base = catalog.variant(run.variant_id)
    # A hidden variant whose files happen to be the run's own: the run keeps them.
    catalog.add_variant(replace(base, id="v", artifact=run.conditions["result"], recipe='{"steps":[]}'))
    catalog.hide_variant("v")
    assert purge(catalog, dry_run=False).artifacts == ()
    assert result_of(catalog, run.id).frames


def test_a_stored_result_is_found_by_content(catalog: Catalog) -> None:
    result = Result({"main": pd.DataFrame({"x": [1]})}, (View("table", "x"),))
    assert put_result(catalog, result) == put_result(catalog, result)


def test_an_untrained_model_has_no_trainings(catalog: Catalog) -> None:
    assert trained(catalog, "nobody") == []


# --- estimates ----------------------------------------------------------------------------------------


def test_an_estimate_is_the_cost_in_this_models_forward_passes() -> None:
    pace = Pace(fixed_s=0.1, per_token_s=0.01, threads=2)
    method = replace(
        get("probe", "logit_lens"), cost=lambda anatomy, n, settings: Cost(n * anatomy.n_layers, 7)
    )
    anatomy = tiny_model("llama").anatomy
    told = estimate(method, anatomy, pace, 10, method.parse({}))
    assert told.forwards == 10 * anatomy.n_layers
    assert told.seconds == pytest.approx(told.forwards * (0.1 + 10 * 0.01))
    assert told.extra_bytes == 7
    assert estimate(replace(method, cost=None), anatomy, pace, 10, method.parse({})).forwards == 1


@pytest.mark.parametrize("family", ["llama", "bert", "vit"])
def test_a_pace_is_measured_for_every_family(family: str) -> None:
    loaded = tiny_model(family)
    pace = measure_pace(loaded)
    n = n_positions(loaded, PROMPT)
    assert 0 < pace.seconds(n) < 5
    assert pace.seconds(4 * n) >= pace.seconds(n)
