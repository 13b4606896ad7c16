"""The Profile page on measurements that real runtimes made of a tiny model, recorded once (``tests.app.measured``)."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from app import profile_views, sample_views, where_views
from app.components.profile_grid import cell_table, total_words
from core.catalog.results import result_of
from core.catalog.tables import JobRow
from core.jobs.queue import Queue
from core.predict.model import Layer, Shape
from core.profile.grid import cells
from core.profile.machine import Roofs
from core.profile.where.tables import join_modules
from tests.app.measured import Measured, measure, recorded
from tests.app.tradeoff_app import checked, new_catalog, open_page


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    home = tmp_path_factory.mktemp("measured")
    return home, recorded(new_catalog(home), str(home / "tiny"))


@pytest.fixture
def found(made, monkeypatch) -> Measured:
    monkeypatch.setenv("SLIMSCOPE_HOME", str(made[0]))
    monkeypatch.delenv("SLIMSCOPE_CATALOG", raising=False)
    # A test starts no daemon: what the supervisor does with the queue has its own tests.
    monkeypatch.setattr("app.engine.start_work", lambda: None)
    return made[1]


@pytest.fixture
def catalog(found, made):
    return new_catalog(made[0])


def runs_of(found: Measured) -> dict:
    runs = {found.base.id: [], found.variant.id: []}
    for run in (*found.profiles, found.race):
        runs[run.variant_id].append(run)
    return runs


def rows_of(found: Measured, phase="decode") -> pd.DataFrame:
    return profile_views.rows_of((found.base, found.variant), runs_of(found), phase)


def plain(text: str) -> str:
    return text.replace("\\", "")


# --- views ----------------------------------------------------------------------------------------------


def test_rows_are_the_runs_own_numbers_the_fastest_first(found):
    rows = rows_of(found)
    assert len(rows) == 5
    assert rows["time_ms"].is_monotonic_increasing
    assert set(rows["runtime"]) == {"torch_eager", "openvino", "llama_cpp"}
    run = found.profiles[2]
    row = rows[rows["run"] == run.id].iloc[0]
    measured = {m.name: m for m in run.measurements}
    assert row["rate"] == measured["decode_tokens_per_s_openvino_int8"].value
    assert row["time_ms"] == measured["tpot_ms_openvino_int8"].value
    assert row["parity_kl"] == row["loss"] == measured["parity_kl_openvino_int8"].value, (
        "the base is its own base"
    )
    assert row["settings"] == "threads=1 weights=int8"
    assert row["workload"] == "prompt 16, new tokens 4, batch 1"


def test_a_variants_loss_is_to_the_base_and_its_parity_to_its_own_files(found):
    row = rows_of(found).query("variant == @found.variant.id").iloc[0]
    measured = {m.name: m.value for m in found.profiles[-1].measurements}
    assert (row["loss"], row["parity_kl"]) == (measured["parity_kl_base"], measured["parity_kl"])
    assert row["loss"] > 1e6 * row["parity_kl"], "int8 loses something, torch itself nothing"


def test_the_fastest_is_taken_only_among_those_that_lost_no_more(found):
    rows = rows_of(found)
    kept, fastest, _, yardstick = profile_views.headlines(rows, 1e-9)
    assert kept.row["loss"] <= 1e-9
    assert fastest.row["run"] == rows["run"].iloc[0]
    assert kept.row["run"] != fastest.row["run"]
    assert yardstick.row["runtime"] == "torch_eager"
    assert yardstick.row["is_base"]
    assert fastest.times == pytest.approx(fastest.row["rate"] / yardstick.row["rate"])
    nothing = profile_views.headlines(rows, -1.0)[0]
    assert (nothing.row, nothing.value) == (None, "–")


def test_an_older_run_of_a_cell_is_kept_and_marked(found):
    runs = runs_of(found)
    first = found.profiles[0]
    again = replace(first, id="again", ended_at=first.ended_at.replace(year=first.ended_at.year + 1))
    runs[found.base.id] = [again, *runs[found.base.id]]
    rows = profile_views.rows_of((found.base, found.variant), runs, "decode").set_index("run")
    assert rows.loc["again", "newest"]
    assert not rows.loc[first.id, "newest"]
    assert rows["newest"].sum() == 5


def test_badges_are_b_between_sessions_of_one_protocol(found):
    rows = rows_of(found)
    runs = {run.id: run for run in found.profiles}
    letters, why = profile_views.badges(rows, runs, rows["run"].iloc[0])
    assert letters[0] == "–"
    assert set(letters[1:]) == {"B"}
    assert "another session" in why[1]


def test_strips_are_the_samples_that_the_median_is_of(found, catalog):
    rows = rows_of(found)
    samples = {run: catalog.frame(run, "samples") for run in rows["run"]}
    strips = sample_views.strips(rows, samples, "decode")
    run = rows["run"].iloc[0]
    own = samples[run].query("phase == 'decode' and not warmup")
    drawn = strips[strips["run"] == run]
    assert len(drawn) == len(own)
    assert sorted(drawn["value_ms"]) == sorted(own["value_ms"])
    assert drawn["share"].iloc[-1] == 1.0
    assert len(strips) <= sample_views.STRIPS


def test_many_samples_are_thinned_and_keep_their_ends(found):
    rows = rows_of(found).head(1)
    values = np.arange(1.0, 100_001.0)
    frame = pd.DataFrame({"phase": "decode", "warmup": False, "contended": False, "value_ms": values})
    strips = sample_views.strips(rows, {rows["run"].iloc[0]: frame}, "decode")
    assert len(strips) <= sample_views.STRIPS
    assert (strips["value_ms"].min(), strips["value_ms"].max()) == (1.0, 100_000.0)


def test_block_ratios_give_the_races_own_ratio(found, catalog):
    ratios = sample_views.block_ratios(catalog.frame(found.race.id, "blocks"))
    said = found.race.conditions["verdict"]
    clean = ratios[~ratios["contended"]]
    used = clean if len(clean) >= 8 else ratios
    assert len(used) == said["n_blocks"]
    assert np.exp(np.log(used["ratio"]).mean()) == pytest.approx(said["ratio"], rel=0.25)
    assert set(ratios["first"]) == {"a", "b"}


def test_by_hand_a_block_in_which_b_takes_half_the_time_runs_at_twice_the_speed():
    stretches = pd.DataFrame(
        {
            "block": [0] * 4,
            "side": list("abba"),
            "order": range(4),
            "value_ms": [4.0, 2.0, 2.0, 4.0],
            "contended": False,
        }
    )
    assert sample_views.block_ratios(stretches)["ratio"].tolist() == pytest.approx([2.0])


def test_two_looks_are_joined_by_path(found, catalog):
    first, second = (result_of(catalog, run.id) for run in found.looks)
    joined = where_views.joined(first, second, "decode")
    whole = joined[joined["module"] == "(whole model)"].iloc[0]
    raw = join_modules(first.frames["modules"], second.frames["modules"]).query(
        "phase == 'decode' and module == ''"
    )
    assert whole["difference_ms"] == raw["difference_ms"].iloc[0]
    assert joined["difference_ms"].abs().is_monotonic_decreasing
    parts = where_views.components({"a": first, "b": second}, "decode")
    own = first.frames["components"].query("phase == 'decode'")
    assert parts.query("model == 'a'")["self_ms"].tolist() == own["self_ms"].tolist()


def test_spans_lie_inside_the_step_and_are_limited(found, catalog, monkeypatch):
    look = result_of(catalog, found.looks[0].id)
    spans = where_views.spans(look, "decode")
    assert spans["start_ms"].min() >= 0
    assert (spans["end_ms"] >= spans["start_ms"]).all()
    monkeypatch.setattr(where_views, "SPANS", 20)
    longest = where_views.spans(look, "decode")
    assert len(longest) == 20
    assert longest["ms"].max() == spans["ms"].max()


# --- under the roofs: by hand --------------------------------------------------------------------------


def roofs() -> Roofs:
    rows = [
        ("read_bandwidth", "", 1, 1, 1e9, 1e9, 5, "bytes/s", ""),
        ("matrix_rate", "float32", 1, 1, 1e10, 1e10, 5, "FLOP/s", ""),
        ("layer_overhead", "", 1, 1, 1e-4, 1e-4, 5, "s", ""),
        ("step_overhead", "", 1, 1, 1e-4, 1e-4, 5, "s", ""),
    ]
    columns = ["quantity", "dtype", "size", "threads", "value", "median", "n", "unit", "kernel"]
    return Roofs("cpu", "", "2026-11-24T00:00", 0.0, (), pd.DataFrame(rows, columns=columns))


def shape() -> Shape:
    layers = tuple(Layer(kept=128, attends=128) for _ in range(3))
    return Shape(
        name="tiny", family="decoder", weight_bytes=2e6, read_bytes=1.8e6, parameters=5e5, read_parameters=4.5e5,
        head_parameters=6.5e4, layers=layers, d_model=128, d_ff=256, vocab_size=512, context_length=256, counted="stored",
    )  # fmt: skip


def test_only_counted_phases_of_this_machine_are_placed(found):
    variants, runs = (found.base, found.variant), runs_of(found)
    ids = [run.id for run in found.profiles]
    points, verdicts = where_views.under_roofs(
        variants, runs, {found.base.fingerprint: shape()}, ids, roofs()
    )
    assert set(points["variant"]) == {found.base.id}, "the variant's shape was not counted"
    assert len(points) == 4 * 2
    assert set(points["key"]) == set(verdicts)
    point = points.query("phase == 'decode' and run == @found.profiles[0].id").iloc[0]
    assert point["share_of_bandwidth"] == pytest.approx(point["bytes"] / point["seconds"] / 1e9)
    lines = where_views.roofs_for(points, roofs())
    assert lines["gflops"].max() <= 10.0 * 1.001
    assert lines["roof"].str.contains("10 GFLOP/s").all()


def test_runs_of_another_machine_are_not_placed(found):
    run = found.profiles[0]
    seen = {**run.conditions["environment"], "host": {"cpu": "another"}}
    elsewhere = replace(run, conditions={**run.conditions, "environment": seen})
    shapes = {found.base.fingerprint: shape()}
    points, _ = where_views.under_roofs(
        (found.base,), {found.base.id: [elsewhere]}, shapes, [run.id], roofs()
    )
    assert points.empty


# --- the grid -------------------------------------------------------------------------------------------


def test_cells_tell_what_is_measured_and_what_the_rest_takes(found, catalog):
    own = {"tier": ["rapid"], "new_tokens": ["4"]}
    grid = cells(catalog, [found.base.id], ("torch_eager",), threads=("1", "2"), prompts=("16",), others=own)
    table = cell_table(grid).set_index("Threads")
    assert table.loc["1", "state"][0] in ("measured", "flagged")
    assert table.loc["2", "state"] == ["to do"]
    assert table.loc["1", "takes"] == ""
    assert total_words(grid).startswith("2 cells, 1 measured here already, about")


# --- the page -------------------------------------------------------------------------------------------


def test_an_empty_catalog_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("SLIMSCOPE_HOME", str(tmp_path))
    monkeypatch.delenv("SLIMSCOPE_CATALOG", raising=False)
    assert any("No model yet" in text.value for text in open_page("profile").markdown)


def test_the_answer_stands_at_the_top_with_its_loss(found):
    app = open_page("profile", loss="1e-9")
    figures = {metric.label: metric for metric in app.metric}
    kept, fastest, *_ = profile_views.headlines(rows_of(found), 1e-9)
    assert figures["Fastest, KL ≤ 1e-09"].value == kept.value
    assert figures["Fastest at any loss"].value == fastest.value
    assert all(metric.delta.startswith("KL ") for metric in app.metric), "no speed without its loss"
    assert any("No verdict" in plain(caption.value) for caption in app.caption)
    spec = json.loads(app.get("vega_lite_chart")[0].proto.spec)
    assert "tick" in json.dumps(spec), "samples, not bars"
    table = next(element.value for element in app.dataframe if "badge" in element.value)
    assert table["rate"].tolist() == rows_of(found)["rate"].tolist()


def test_a_run_in_the_address_opens_its_drawer(found):
    run = found.profiles[1]
    app = open_page("profile", run=run.id, shape="ecdf")
    assert any("OpenVINO" in header.value for header in app.header)
    assert any(run.id in plain(caption.value) for caption in app.caption)
    assert any("energy unavailable" in text.value for text in app.markdown)
    app.button(key="clear_run").click().run()
    assert "run" not in checked(app).query_params


@pytest.mark.parametrize("run", ["nonsense", "<img src=x>"])
def test_an_unknown_run_is_nothing_picked(found, run):
    app = open_page("profile", run=run, a=run, b=run, race=run, phase=run, part=run, base=run)
    assert not any(button.key == "clear_run" for button in app.button)


def test_one_click_queues_the_cells_that_are_not_measured(found, catalog):
    app = open_page(
        "profile",
        part="measure",
        variants=found.variant.id,
        runtimes="torch_eager,llama_cpp",
        grid_tier="rapid",
    )
    assert "to measure 2" in " ".join(plain(text.value) for text in app.markdown)
    app.button(key="measure").click().run()
    checked(app)
    jobs = [job for job in Queue(catalog).jobs() if job.kind == "profile"]
    assert {job.spec["method"] for job in jobs} == {"torch_eager", "llama_cpp"}
    assert all(job.spec["model"] == f"variant:{found.variant.id}" for job in jobs)
    assert len({job.group_id for job in jobs}) == 1
    said = " ".join(plain(text.value) for text in app.markdown)
    assert f"{found.variant.name} in llama_cpp" in said, "the jobs are seen at once"
    for job in jobs:
        Queue(catalog).cancel(job.id)


def test_a_runtime_that_is_missing_is_greyed_with_its_install_line(found, monkeypatch):
    from core.profile.offers import Offer

    offer = Offer(
        "torch_eager", "Plain", False, ("zebra",), "pip install zebra==1.0", "", "striped", ("decoder",)
    )
    monkeypatch.setattr("app.measurements.runtimes", lambda: (offer,))
    app = open_page("profile", part="measure")
    assert app.checkbox(key="runtime_torch_eager").disabled
    assert any(code.value == "pip install zebra==1.0" for code in app.code)


def test_two_cells_are_raced_as_a_job_with_one_workload(found, catalog):
    a, b = found.profiles[0], found.profiles[1]
    app = open_page("profile", part="race", a=a.id, b=b.id)
    said = " ".join(plain(text.value) for text in (*app.markdown, *app.caption))
    assert found.race.conditions["verdict"]["sentence"] in said
    assert "badge A" in said
    assert "Badge B" in said, "what was not raced gives no verdict"
    app.button(key="race").click().run()
    checked(app)
    [job] = [job for job in Queue(catalog).jobs() if job.kind == "race"]
    assert (job.spec["a"], job.spec["runtime_b"]) == (found.base.id, "openvino")
    shared = ("tier", "prompt_tokens", "new_tokens", "batch", "depth", "seed")
    assert all(job.spec["settings_a"][name] == job.spec["settings_b"][name] for name in shared)
    Queue(catalog).cancel(job.id)


def test_where_the_time_goes_of_two_looks_side_by_side(found, catalog):
    first, second = (run.id for run in found.looks)
    app = open_page("profile", part="where", look=first, beside=second)
    assert any("Module by module" in header.value for header in app.header)
    table = next(element.value for element in app.dataframe if "difference_ms" in element.value)
    assert "(whole model)" in set(table["module"])
    app.button(key="look_now").click().run()
    [job] = [job for job in Queue(catalog).jobs() if job.kind == "where"]
    assert job.spec["method"] == "torch_eager"
    Queue(catalog).cancel(job.id)


def test_roofs_that_are_not_measured_are_one_job(found, catalog):
    app = open_page("profile", part="roofline")
    assert any("roofs of this machine are not measured" in text.value for text in app.markdown)
    app.button(key="roofs_now").click().run()
    [job] = [job for job in Queue(catalog).jobs() if job.kind == "machine"]
    assert job.spec["again"] is False
    Queue(catalog).cancel(job.id)


def test_the_bottleneck_and_its_next_action_are_said(found, monkeypatch):
    monkeypatch.setattr("app.components.roofline_panel.known_roofs", roofs)
    monkeypatch.setattr("app.measurements.shapes", lambda known: {v.fingerprint: shape() for v in known})
    key = f"{found.profiles[0].id}~decode"
    app = open_page("profile", part="roofline", phase_at=key)
    said = " ".join(plain(text.value) for text in app.markdown)
    assert "decode takes" in said
    assert "Next:" in said
    assert "modelled" in said
    table = next(element.value for element in app.dataframe if "share_of_roof" in element.value)
    assert len(table) == 10
    assert key in set(table["key"])


def test_a_finished_race_links_to_its_result(found, catalog):
    job = Queue(catalog).submit("race", {"model": f"variant:{found.variant.id}", "a": found.base.id, "b": found.variant.id,
                                         "runtime_a": "torch_eager", "runtime_b": "torch_eager"})  # fmt: skip
    with catalog.write("jobs_revision") as session:
        row = session.get(JobRow, job.id)
        row.state, row.result = "succeeded", {"run": found.race.id, "variant": found.variant.id}
    app = open_page("jobs", job=job.id)
    [link] = [link for link in app.get("page_link") if link.proto.label == "Open the result"]
    assert "part=race" in link.proto.query_string
    assert f"race={found.race.id}" in link.proto.query_string
    assert f"base={found.base.id}" in link.proto.query_string


@pytest.mark.slow
@pytest.mark.rotating
def test_the_page_draws_what_is_measured_now(tmp_path, monkeypatch):
    """Not the recording: a tiny model measured, raced and looked at by this version."""
    from tests.tiny import tiny_folder

    monkeypatch.setenv("SLIMSCOPE_HOME", str(tmp_path))
    monkeypatch.delenv("SLIMSCOPE_CATALOG", raising=False)
    made = measure(new_catalog(tmp_path), tiny_folder("llama", tmp_path), everything=False)
    app = open_page("profile")
    assert len(next(element.value for element in app.dataframe if "badge" in element.value)) == 2
    said = " ".join(plain(text.value) for text in open_page("profile", part="race").markdown)
    assert made.race.conditions["verdict"]["sentence"] in said
    assert any("by component" in header.value for header in open_page("profile", part="where").header)
