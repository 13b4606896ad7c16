from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime

import pandas as pd
import pytest
from streamlit.testing.v1 import AppTest

from app import drafts, engine
from app.components.student_map import drawing
from app.distil_templates import fitting
from app.distil_views import misfit, student_of, toggled, work_share
from app.live_training import course, finished, headlines, loss_chart, running
from app.training_views import control_of, training_of
from core.distill.curve import NAME
from core.jobs.queue import Queue
from core.models.pace import Pace
from core.recipe import Recipe
from core.recording import record
from core.scratch import PREFIX
from core.types import Result
from tests.app.tradeoff_app import checked, new_catalog, open_page
from tests.tiny import tiny_folder

POINTS = [
    {"kind": "held_out", "tokens": 0, "values": {"kl": 0.5, "task": 6.0}, "best": True, "samples": [["![x](y)", "*b*"]]},
    {
        "kind": "update", "update": 1, "tokens": 1000, "loss": 0.4, "parts": {"kd": 0.4}, "gradient_norm": 1.5,
        "learning_rate": 1e-4, "tokens_per_s": 250.0, "seconds_left": 36.0,
    },
    {"kind": "held_out", "tokens": 1000, "values": {"kl": 0.3, "task": 5.9}, "best": True, "samples": [["![x](y)", "<b>c"]]},
]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    yield str(tiny_folder("llama", tmp_path_factory.mktemp("model")))
    engine.inspector().close()
    engine.inspector.clear()


@pytest.fixture(scope="module")
def card(model):
    """The tiny model's card, as if it read a thousand tokens a second."""
    known = engine.open_model(model).ticket.result(timeout=120)
    return replace(known, pace=Pace(0.0, 1e-3, 1))


@pytest.fixture
def queue(tmp_path, monkeypatch, model):
    monkeypatch.setenv("SLIMSCOPE_HOME", str(tmp_path))
    monkeypatch.delenv("SLIMSCOPE_CATALOG", raising=False)
    monkeypatch.setattr("app.engine.start_work", lambda: None)
    monkeypatch.setattr("app.components.waiting.INLINE_WAIT_S", 60.0)
    catalog = new_catalog(tmp_path)
    catalog.add_base(
        model, name="tiny", fingerprint="tiny", architecture="llama", family="decoder", parameters=1, nbytes=4,
        bits_per_weight=32.0, format="float32",
    )  # fmt: skip
    return Queue(catalog)


def recipe(*steps: tuple[str, dict]) -> Recipe:
    return Recipe.parse({"steps": [{"method": id_, "settings": settings} for id_, settings in steps]})


MIDDLE_OUT = ("drop_layers", {"criterion": "listed", "layers": "1", "count": 1})


def test_the_student_is_what_the_steps_leave(card):
    student = student_of(card, recipe(MIDDLE_OUT, ("distil", {"hidden_weight": 1.0})))
    assert student.kept == (0, 2)
    assert student.targets == (1, 2), "block 0 must do the work of the one behind it too"
    before, left = student.parts.before, student.parts.left
    assert left["mlp"] == pytest.approx(before["mlp"] * 2 / 3)
    assert left["embedding"] == before["embedding"]
    matrices = ("attention", "mlp", "head")
    expected = sum(left[c] for c in matrices) / sum(before[c] for c in matrices)
    assert work_share(card, student.parts) == pytest.approx(expected)


def test_where_text_decides_nothing_is_drawn_as_kept(card):
    student = student_of(card, recipe(("drop_layers", {"count": 1}), ("distil", {})))
    assert (student.kept, student.n_layers, student.targets) == (None, 2, None)
    drawn = drawing(card, student, toggles=False)
    assert drawn["lines"] == []
    assert "found by the step" in drawn["rest"]


def test_a_click_keeps_or_drops_a_block(card):
    half = recipe(("drop_layers", {"count": 1, "criterion": "even"}), ("distil", {}))
    assert student_of(card, half).kept == (0, 2)
    again = toggled(half, card, 2)
    assert student_of(card, again).kept == (0,)
    assert student_of(card, toggled(again, card, 1)).kept == (0, 1)
    assert toggled(again, card, 0) is None, "a model has a block"
    assert toggled(recipe(("distil", {})), card, 0) is None, "no step drops any"
    assert drawing(card, student_of(card, again), toggles=True)["lines"] == [(0, 0, "from")]


def test_time_is_counted_in_passes_at_the_models_pace(card):
    told = {"max_tokens": 10_000, "evaluate_every": 0, "held_out_tokens": 256}
    plain = training_of(card, recipe(("fine_tune", told)))
    assert plain.tokens_per_s == pytest.approx(1000 / 3), "forward and backward"
    assert plain.seconds == pytest.approx(30 + 2 * 0.256)
    live = training_of(card, recipe(("distil", {**told, "top_k": 0})))
    assert live.tokens_per_s == pytest.approx(1000 / 4)
    assert (live.teacher_s, live.cache_bytes) == (0, 0)
    kept = training_of(card, recipe(("distil", told)), n_tokens=2_500)
    assert kept.teacher_s == pytest.approx(2.5), "the teacher reads a token once, the student four times"
    assert kept.cache_bytes == 2_500 * (64 * 4 + 2)
    assert training_of(replace(card, pace=None), recipe(("distil", told))) is None


def test_the_control_learns_as_long_without_a_teacher(card):
    student = recipe(MIDDLE_OUT, ("distil", {"hidden_weight": 1.0}))
    control = control_of(student)
    told = control.steps[1].settings
    assert (told["kd_weight"], told["hidden_weight"], told["task_weight"]) == (0, 0, 1)
    assert control.steps[0] == student.steps[0]
    assert control_of(control) is None


def test_templates_end_with_a_training_and_fit_the_model(card):
    offered = {template.id: template.recipe(card.anatomy.n_layers) for template in fitting(card)}
    assert {"half", "narrow", "recover", "task"} <= set(offered)
    assert "dense" not in offered, "it has no experts"
    assert {made.steps[-1].method for made in offered.values()} == {"distil", "fine_tune"}
    assert all(student_of(card, made).parts is not None for made in offered.values())


def test_one_click_queues_the_student_and_its_controls(queue, model):
    app = open_page("distil", model=model)
    assert app.title[0].value == r"What small model should learn what from whom?"
    app.toggle(key="control_plain").set_value(True).run()
    app.toggle(key="control_quantized").set_value(True).run()
    app.button(key="train").click().run()
    checked(app)
    made = [job.spec["recipe"]["steps"] for job in queue.jobs()[::-1] if job.kind == "compress"]
    assert [[step["method"] for step in steps] for steps in made] == [
        ["drop_layers", "distil"], ["drop_layers", "distil"], ["mixed_precision"],
    ]  # fmt: skip
    assert [steps[-1]["settings"].get("kd_weight") for steps in made] == [1.0, 0.0, None]
    assert len({job.group_id for job in queue.jobs()}) == 1


def test_a_template_and_its_settings_are_a_link(queue, model):
    app = open_page("distil", model=model)
    app.button(key="choose_recover").click().run()
    app.number_input(key="train1_max_tokens").set_value(5000).run()
    checked(app)
    steps = json.loads(
        app.query_params["recipe"][0]
        if isinstance(app.query_params["recipe"], list)
        else app.query_params["recipe"]
    )["steps"]
    assert [step["method"] for step in steps] == ["gptq", "distil"]
    assert (steps[1]["settings"]["train"], steps[1]["settings"]["max_tokens"]) == ("scales_and_norms", 5000)
    assert any("2 bits" not in text.value and "5,000 tokens at most" in text.value for text in app.caption)


def test_a_recipe_being_written_elsewhere_is_not_lost(queue, model):
    written = recipe(("rtn", {"bits": 3})).canonical()
    app = open_page("distil", model=model, recipe=written)
    kept = app.session_state[drafts._KEY]
    assert [step.method for step in kept.steps] == ["rtn"]


def test_a_running_training_is_read_from_its_file(queue, model):
    trained = recipe(MIDDLE_OUT, ("distil", {}))
    job = queue.submit("compress", {"model": model, "recipe": trained.model_dump(mode="json")})
    assert running(job) is None
    folder = queue.catalog.folder / "scratch" / f"{PREFIX}{trained.variant_id('tiny')}" / "step_1"
    folder.mkdir(parents=True)
    (folder / NAME).write_text("".join(json.dumps(point) + "\n" for point in POINTS) + '{"kind": "upd')
    shown = running(job)
    assert (len(shown.updates), shown.seconds_left) == (1, 36.0)
    figures = {label: (value, told) for label, value, told in headlines(shown)}
    assert figures["KL to teacher, held out"] == ("0.300 nats", "0.500 nats before")
    assert figures["Pace"] == ("250 tok/s", "36 s left, 1,000 read")


def test_the_samples_of_a_profile_are_not_taken_for_generated_text(queue):
    """A training that generated nothing keeps no samples; its profile keeps times under that name."""
    (base,) = queue.catalog.variants()
    made = course(POINTS)
    trained = Result({"curve": made.updates, "held_out": made.held_out}, ())
    timed = Result({"samples": pd.DataFrame({"value_ms": [1.0, 2.0]})}, ())
    for kind, result in (("compress", trained), ("profile", timed)):
        record(queue.catalog, kind, base.id, result, datetime.now(UTC))
    shown = finished(base.id, engine.revision())
    assert shown.samples.empty
    assert len(shown.updates) == len(made.updates)


def test_what_a_model_writes_stays_text():
    app = AppTest.from_function(_drawn)
    app.session_state["points"] = POINTS
    app.run()
    checked(app)
    assert [text.value for text in app.text] == ["![x](y) ❘ <b>c", "![x](y) ❘ *b*"]


def _drawn() -> None:
    import streamlit as st

    from app.components.loss_curve import loss_curve
    from app.live_training import course

    loss_curve(course(st.session_state["points"]), key="curve")


def test_the_chart_shows_the_kl_beside_the_training_loss():
    spec = loss_chart(course(POINTS)).to_dict()
    domain = spec["layer"][0]["encoding"]["color"]["scale"]["domain"]
    assert domain == ["Training loss", "KL to teacher, held out"]


def test_pause_and_resume_go_through_the_queue(queue, model):
    job = queue.submit("compress", {"model": model, "recipe": recipe(("distil", {})).model_dump(mode="json")})
    app = open_page("jobs", job=job.id)
    app.button(key=f"detail_pause_{job.id}").click().run()
    checked(app)
    assert queue.job(job.id).state == "paused"
    app.button(key=f"detail_resume_{job.id}").click().run()
    checked(app)
    assert queue.job(job.id).state == "queued"


def test_rows_that_cannot_teach_a_family_are_refused_before_the_click(card):
    def distil(**settings):
        return Recipe.of("distil", **settings)

    encoder, classifier = replace(card, family="encoder"), replace(card, family="classifier")
    assert misfit(card, distil(data="pydoc")) is None
    assert "two texts and a score" in str(misfit(encoder, distil(data="pydoc")))
    assert "text and a label" in str(misfit(classifier, distil(data="stdlib")))
    assert misfit(encoder, distil(data="pairs.tsv")) is None  # only the file can tell
    assert "teacher of a task" in str(misfit(encoder, distil(data="builtin:language")))
    assert misfit(encoder, Recipe.of("fine_tune", data="builtin:language")) is None
    assert misfit(encoder, distil(data="builtin:language", teacher="variant:taught")) is None
    assert misfit(classifier, distil(data="builtin:language")) is None
