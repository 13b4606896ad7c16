from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from app.components import job_card
from core.jobs.queue import Queue
from core.recipe import Recipe
from core.types import Job
from tests.app.tradeoff_app import checked, new_catalog, open_page

NOW = datetime(2026, 11, 1, 12, 0, tzinfo=UTC)
JOB = Job(
    id="j1", group_id="g1", kind="compress", spec={"model": "demo:smollm2", "recipe": {"steps": [{"method": "rtn"}]}},
    state="running", attempt=1, done=30, total=120, message="rounding layer 7", error="", log_path="", created_at=NOW,
    started_at=NOW - timedelta(seconds=20), ended_at=None, heartbeat_at=None, pid=None, exit_code=None,
    cancel_requested=False, depends_on=None, result={},
)  # fmt: skip


def test_time_left_is_the_time_so_far_scaled():
    assert job_card.time_left(JOB, NOW) == pytest.approx(60)
    assert job_card.progress_text(JOB, NOW) == "rounding layer 7 · about 1 min 00 s left"
    assert job_card.time_left(replace(JOB, done=0), NOW) is None, "no rate yet"
    assert job_card.time_left(replace(JOB, state="queued"), NOW) is None


def test_a_job_is_named_by_its_recipe():
    assert job_card.title(JOB) == "Compress · rtn bits=4"
    assert job_card.title(replace(JOB, kind="profile", spec={"recipe": None})) == "Profile · the base"
    unknown = replace(JOB, spec={"recipe": {"steps": [{"method": "magic"}]}})
    assert job_card.title(unknown) == "Compress · a recipe this version does not know"


def test_an_error_reaches_the_toast_escaped():
    failed = replace(JOB, state="failed", error="no ![x](http://evil.example/p.png)")
    assert job_card.ending(failed).startswith(r"Compress · rtn bits\=4: :red[failed]. no \!\[x\]")


@pytest.fixture
def queue(tmp_path, monkeypatch):
    monkeypatch.setenv("SLIMSCOPE_HOME", str(tmp_path))
    monkeypatch.delenv("SLIMSCOPE_CATALOG", raising=False)
    # A test starts no daemon: what the supervisor does with the queue has its own tests.
    monkeypatch.setattr("app.engine.start_work", lambda: None)
    return Queue(new_catalog(tmp_path))


def submit(queue: Queue) -> Job:
    recipe = Recipe.of("rtn", bits=8).model_dump(mode="json")
    return queue.submit("compress", {"model": "demo:smollm2", "recipe": recipe})


def test_an_empty_queue_says_what_to_do(queue):
    assert any("Nothing has run yet" in text.value for text in open_page("jobs").markdown)


def test_cancel_and_retry_go_through_the_queue(queue):
    job = submit(queue)
    app = open_page("jobs", job=job.id)
    assert app.dataframe[0].value["subject"].tolist() == ["rtn bits=8"]
    app.button(key=f"detail_cancel_{job.id}").click().run()
    checked(app)
    assert queue.job(job.id).state == "cancelled"
    app.button(key=f"detail_retry_{job.id}").click().run()
    checked(app)
    assert queue.job(job.id).state == "queued"


def test_the_log_is_shown_from_its_end_as_text(queue):
    job = submit(queue)
    queue.log_folder.mkdir(exist_ok=True)
    with open(job.log_path, "w") as file:
        file.writelines(f"line {i} ![x](http://evil.example/p.png)\n" for i in range(5000))
    shown = next(c.value for c in open_page("jobs", job=job.id).code if "line" in c.value)
    assert shown.splitlines()[-1].startswith("line 4999")
    assert "line 100 " not in shown


def test_an_unknown_job_in_the_address_shows_the_one_that_is_next(queue):
    job = submit(queue)
    assert any(job.id in caption.value for caption in open_page("jobs", job="nonsense").caption)
