"""The Inspect page: questions, examples, cost before a wait, stored runs, two models, pictures, trained artifacts."""

from __future__ import annotations

import json

import pytest

from core.bench import probe_model
from core.catalog.store import Catalog
from core.jobs.context import TaskContext
from core.jobs.queue import Queue
from core.jobs.tasks import TASKS
from core.registry import methods
from core.types import Prompt, silent

TEXT = "one two three one two"


def plain(text: str) -> str:
    return text.replace("\\", "")


def headers(app) -> list[str]:
    return [plain(header.value) for header in app.header]


def said(app) -> list[str]:
    return [plain(element.value) for element in [*app.caption, *app.markdown]]


def keys(app) -> set[str]:
    return {button.key for button in app.button}


@pytest.fixture
def no_supervisor(monkeypatch):
    monkeypatch.setattr("app.engine.start_work", lambda: None)


@pytest.fixture
def costly(monkeypatch):
    """Everything is expected to take longer than a page may wait."""
    monkeypatch.setattr("app.components.asking.AT_ONCE_S", 0.0)


def query(app, name: str) -> str | None:
    found = app.query_params.get(name)
    return found[0] if isinstance(found, list) and found else found or None


# --- questions and examples ---------------------------------------------------------------------------


def test_a_question_leads_to_its_first_probe(opened, tiny_llama):
    app = opened("inspect", model=str(tiny_llama), text=TEXT)
    group = app.button_group(key="question")
    other = next(option for option in group.options if option != group.value)
    app.button_group(key="question").set_value(other).run()
    assert not app.exception
    chosen = methods("probe")[app.selectbox(key="probe").value]
    assert chosen.answers == other


def test_an_example_fills_prompt_settings_and_address(opened, tiny_llama):
    probe = next(
        p
        for p in methods("probe").values()
        if p.examples
        and p.needs <= {"decoder", "text"}
        and p.examples[0].settings
        and p.examples[0].prompt.text
    )
    app = opened("inspect", model=str(tiny_llama), probe=probe.id, text=TEXT)
    app.button(key=f"{probe.id}_example0").click().run()
    assert not app.exception
    example = probe.examples[0]
    assert app.text_area(key="text").value == example.prompt.text
    for name, value in example.settings.items():
        assert app.session_state[f"{probe.id}_{name}"] == value


# --- cost ---------------------------------------------------------------------------------------------


def test_what_takes_long_says_so_and_waits_for_a_click(opened, tiny_llama, costly):
    app = opened("inspect", model=str(tiny_llama), text="one two four")
    assert any(header.startswith("≈") for header in headers(app))
    assert not app.metric
    app.button(key="probe_now").click().run()
    assert not app.exception
    assert app.metric, "it ran"
    again = opened("inspect", model=str(tiny_llama), text="one two four")
    assert again.metric, "what was asked is not asked about again"


def test_a_job_keeps_its_result_and_the_page_opens_it(opened, tiny_llama, costly, no_supervisor, tmp_path):
    app = opened("inspect", model=str(tiny_llama), text="one two five", probe="token_surprisal")
    app.button(key="probe_as_job").click().run()
    assert not app.exception
    queue = Queue(Catalog())
    job = queue.jobs(1)[0]
    assert (job.kind, job.state) == ("probe", "queued")
    assert f"probe_job_cancel_{job.id}" in keys(app), "its progress, and a way to stop it"

    result = TASKS["probe"](dict(job.spec), TaskContext(Catalog(), silent, job, tmp_path, lambda line: None))
    from core.jobs import ledger

    with queue.catalog.write("jobs_revision") as session:
        row = ledger.get(session, job.id)
        row.state = "running"
        ledger.end(session, row, "succeeded", result=result, exit_code=0)
    app = opened("inspect", model=str(tiny_llama), text="one two five", probe="token_surprisal")
    assert app.metric
    assert any("Computed by a job" in line for line in said(app))
    jobs = opened("jobs", job=job.id)
    assert any("Token surprisal" in str(row) for row in jobs.dataframe[0].value["subject"])


# --- stored runs --------------------------------------------------------------------------------------


def test_a_run_in_the_address_fills_the_page_until_something_changes(opened, tiny_llama):
    opened("inspect", model=str(tiny_llama), text=TEXT)  # makes the catalog
    run = probe_model(
        Catalog(), str(tiny_llama), "logit_lens", Prompt("four five six"), settings={"top_k": 3}
    )
    app = opened("inspect", run=run.id, cell="1~0")
    assert any(f"Stored run {run.id}" in line for line in said(app))
    assert app.text_area(key="text").value == "four five six"
    assert app.session_state["logit_lens_top_k"] == 3
    assert any(header.startswith("Layer 1, position 0") for header in headers(app))
    app.text_area(key="text").set_value("seven eight").run()
    assert not app.exception
    assert not any("Stored run" in line for line in said(app))


def test_an_unknown_run_is_one_sentence(opened, tiny_llama):
    app = opened("inspect", model=str(tiny_llama), run="nonsense")
    assert any("no run is called" in line for line in said(app))


# --- two models ---------------------------------------------------------------------------------------


def test_two_models_stand_side_by_side(opened, tiny_llama, tiny_other):
    app = opened("inspect", model=str(tiny_llama), compare=str(tiny_other), text=TEXT)
    assert "What changed" in headers(app)
    assert any(header.startswith("Difference: ") for header in headers(app))
    assert any("minus" in line for line in said(app))


def test_other_tokens_are_said_and_not_subtracted(opened, tiny_llama, tmp_path_factory):
    from tests.tiny import tiny_folder

    gpt2 = tiny_folder("gpt2", tmp_path_factory.mktemp("tiny"))
    tokenizer = gpt2 / "tokenizer.json"
    document = json.loads(tokenizer.read_text())
    document["model"]["merges"] = document["model"]["merges"][:20]  # fewer merges: more tokens
    tokenizer.write_text(json.dumps(document))
    app = opened("inspect", model=str(tiny_llama), compare=str(gpt2), text="The capital of France is Paris")
    assert any("different tokens" in line for line in said(app)), said(app)
    assert not any(header.startswith("Difference: ") for header in headers(app))


def test_a_model_that_cannot_answer_says_why_beside_the_answer(opened, tiny_llama, tiny_bert):
    app = opened("inspect", model=str(tiny_llama), compare=str(tiny_bert), text=TEXT)
    assert any("needs decoder" in line for line in said(app))
    assert app.metric, "the first model's answer stays"


def test_a_comparing_probe_asks_for_its_original(opened, tiny_llama, tiny_other):
    probe = next((p for p in methods("probe").values() if p.takes_reference), None)
    if probe is None:
        pytest.skip("no probe of this version compares two models")
    app = opened("inspect", model=str(tiny_llama), probe=probe.id, text=TEXT)
    assert any("compressed copy beside its original" in line for line in said(app))
    app = opened("inspect", model=str(tiny_llama), probe=probe.id, text=TEXT, reference=str(tiny_other))
    if "probe_now" in keys(app):
        app.button(key="probe_now").click().run()
    assert not app.exception
    assert any("float32" in line for line in said(app)), said(app)


# --- pictures -----------------------------------------------------------------------------------------


def test_a_vision_model_is_asked_about_a_picture(opened, tiny_vit):
    app = opened("inspect", model=str(tiny_vit), image="digits:3")
    assert app.number_input(key="digit").value == 3
    assert not any(area.key == "text" for area in app.text_area)
    app = opened("inspect", model=str(tiny_vit), image="../../etc/passwd")
    assert any("there is no image" in line for line in said(app))


# --- trained artifacts --------------------------------------------------------------------------------


def test_a_probe_of_something_trained_offers_to_train_it(opened, tiny_llama, no_supervisor):
    probe = next((p for p in methods("probe").values() if "artifact" in p.settings.model_fields), None)
    if probe is None:
        pytest.skip("no probe of this version needs something trained")
    app = opened("inspect", model=str(tiny_llama), probe=probe.id, text=TEXT)
    app.button(key="train_start").click().run()
    assert not app.exception
    job = Queue(Catalog()).jobs(1)[0]
    assert job.kind == "train"
    assert job.spec["model"] == str(tiny_llama)
    assert job.spec["documents"] == {"source": "pydoc"}


def test_what_was_trained_is_found_and_used(opened, tiny_llama):
    from core.bench import train_on

    opened("inspect", model=str(tiny_llama), text=TEXT)  # makes the catalog
    trainer = methods("train")["sparse_autoencoder"]
    small = {
        name: value
        for name, value in {
            "max_tokens": 3000,
            "features": 64,
            "layer": 1,
            "k": 4,
            "steps": 20,
            "epochs": 1,
        }.items()
        if name in trainer.settings.model_fields
    }
    run = train_on(Catalog(), str(tiny_llama), trainer.id, settings=small)
    app = opened("inspect", model=str(tiny_llama), probe="sae_features", text=TEXT)
    assert app.session_state["sae_features_artifact"] == run.conditions["artifact"]
    if "probe_now" in keys(app):
        app.button(key="probe_now").click().run()
    assert not app.exception
    assert any("float32" in line for line in said(app)), said(app)
    page = opened("inspect", run=run.id)
    assert plain(page.title[0].value).startswith(trainer.title)
    assert any(run.conditions["artifact"] in line for line in said(page))
