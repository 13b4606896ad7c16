"""The queue's rules, without any process: SQLite and, when there is one, PostgreSQL."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from core.catalog.store import Catalog
from core.errors import BadInput
from core.jobs import ledger
from core.jobs.queue import Queue, device_token
from core.types import Job
from tests.databases import KINDS, fresh_url

CLAIM_ALL = """
import json, sys
from core.catalog.store import Catalog
from core.jobs import ledger
catalog, mine = Catalog(sys.argv[1]), []
while True:
    with catalog.write("jobs_revision") as session:
        row = ledger.claim(session, host="here", workers=1000)
        if row is None:
            break
        mine.append(row.id)
print(json.dumps(mine))
"""


@pytest.fixture(params=KINDS)
def catalog(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Catalog]:
    monkeypatch.setenv("SLIMSCOPE_HOME", str(tmp_path))
    with fresh_url(request.param, tmp_path) as url:
        opened = Catalog(url)
        yield opened
        opened.close()


@pytest.fixture
def queue(catalog: Catalog) -> Queue:
    return Queue(catalog)


def claim(catalog: Catalog, workers: int = 1, host: str = "here") -> str | None:
    with catalog.write("jobs_revision") as session:
        row = ledger.claim(session, host=host, workers=workers)
        return None if row is None else row.id


def end(catalog: Catalog, job: Job, state: str) -> None:
    with catalog.write("jobs_revision") as session:
        row = ledger.get(session, job.id)
        if state == "lost":
            ledger.lose(session, row, "killed", exit_code=-9)
        else:
            ledger.end(session, row, state)  # type: ignore[arg-type]


def test_jobs_are_claimed_one_at_a_time_in_their_order(catalog: Catalog, queue: Queue) -> None:
    first, second = queue.submit("a", {"x": 1}), queue.submit("b", {})
    assert queue.job(first.id) == first
    assert claim(catalog) == first.id
    assert claim(catalog) is None
    assert queue.job(first.id).attempt == 1
    end(catalog, first, "succeeded")
    assert claim(catalog) == second.id
    assert queue.active_count() == 1


def test_more_workers_claim_more(catalog: Catalog, queue: Queue) -> None:
    jobs = [queue.submit("a", {}) for _ in range(3)]
    assert [claim(catalog, workers=2) for _ in range(3)] == [jobs[0].id, jobs[1].id, None]
    assert claim(catalog, workers=2, host="another") == jobs[2].id


def test_two_claimers_never_get_the_same_job(catalog: Catalog, queue: Queue) -> None:
    jobs = {queue.submit("a", {}).id for _ in range(60)}
    processes = [
        subprocess.Popen([sys.executable, "-c", CLAIM_ALL, catalog.url], stdout=subprocess.PIPE)
        for _ in range(3)
    ]
    claimed = [id_ for process in processes for id_ in json.loads(process.communicate(timeout=120)[0])]
    assert len(claimed) == 60
    assert set(claimed) == jobs
    assert all(job.attempt == 1 for job in queue.jobs(100))


def test_a_token_is_exclusive_and_is_not_overtaken(catalog: Catalog, queue: Queue) -> None:
    before = queue.submit("a", {})
    alone = queue.submit("profile", {}, token=device_token())
    after = queue.submit("b", {})
    assert claim(catalog, workers=4) == before.id
    assert claim(catalog, workers=4) is None, "the profile waits for an idle host, and nothing overtakes it"
    end(catalog, before, "succeeded")
    assert claim(catalog, workers=4) == alone.id
    assert claim(catalog, workers=4) is None, "nothing starts beside the profile"
    assert claim(catalog, workers=4, host="another") == after.id
    end(catalog, alone, "succeeded")
    assert claim(catalog, workers=4) is None


def test_a_job_waits_for_its_predecessor_and_shares_its_group(catalog: Catalog, queue: Queue) -> None:
    first = queue.submit("compress", {})
    second = queue.submit("evaluate", {}, depends_on=first.id)
    assert second.group_id == first.group_id
    assert claim(catalog, workers=4) == first.id
    assert claim(catalog, workers=4) is None
    end(catalog, first, "succeeded")
    assert claim(catalog, workers=4) == second.id


@pytest.mark.parametrize(
    ("state", "told"), [("failed", "has failed"), ("cancelled", "was cancelled"), ("lost", "was lost")]
)
def test_dependants_end_with_their_predecessor_and_come_back_with_it(
    catalog: Catalog, queue: Queue, state: str, told: str
) -> None:
    first = queue.submit("compress", {})
    second = queue.submit("evaluate", {}, depends_on=first.id)
    third = queue.submit("profile", {}, depends_on=second.id)
    own_wish = queue.submit("profile", {}, depends_on=first.id)
    queue.cancel(own_wish.id)
    for _ in range(2):  # a lost job is tried twice
        if queue.job(first.id).state == "queued":
            assert claim(catalog) == first.id
            end(catalog, first, state)
    assert queue.job(first.id).state == state
    found = queue.job(second.id)
    assert found.state == "cancelled"
    assert found.error == f"not started: it waits for job {first.id} (compress), which {told}; retry that job"
    assert second.id in queue.job(third.id).error
    with pytest.raises(BadInput, match=f"waits for job {first.id}"):
        queue.retry(second.id)
    with pytest.raises(BadInput, match="retry it first"):
        queue.submit("late", {}, depends_on=first.id)
    assert queue.retry(first.id).state == "queued"
    assert [queue.job(job.id).state for job in (second, third)] == ["queued", "queued"]
    assert queue.job(second.id).error == ""
    assert queue.job(own_wish.id).state == "cancelled", "the user's own wish is not undone"


def test_a_lost_job_is_tried_again_then_stays_lost_and_can_be_retried(catalog: Catalog, queue: Queue) -> None:
    job = queue.submit("a", {})
    claim(catalog)
    end(catalog, job, "lost")
    assert queue.job(job.id).state == "queued"
    assert queue.job(job.id).message == "trying again: killed"
    claim(catalog)
    end(catalog, job, "lost")
    found = queue.job(job.id)
    assert (found.state, found.attempt, found.exit_code, found.error) == ("lost", 2, -9, "killed")
    queue.retry(job.id)
    assert claim(catalog) == job.id
    states = [line.split()[2] for line in queue.events(job.id)]
    assert states == ["queued", "running", "lost", "queued", "running", "lost", "queued", "running"]


def test_cancel(catalog: Catalog, queue: Queue) -> None:
    waiting, running = queue.submit("a", {}), queue.submit("b", {})
    assert queue.cancel(waiting.id).state == "cancelled"
    claim(catalog)
    assert queue.cancel(running.id).state == "running"
    assert queue.job(running.id).cancel_requested
    end(catalog, running, "lost")  # it died of the signal
    assert queue.job(running.id).state == "cancelled"
    assert queue.cancel(running.id).state == "cancelled"
    assert not queue.retry(running.id).cancel_requested


def test_only_an_ended_job_is_retried(catalog: Catalog, queue: Queue) -> None:
    job = queue.submit("a", {})
    with pytest.raises(BadInput, match="is queued"):
        queue.retry(job.id)
    claim(catalog)
    end(catalog, job, "succeeded")
    with pytest.raises(BadInput, match="is succeeded"):
        queue.retry(job.id)
    with pytest.raises(BadInput, match="no job is called"):
        queue.cancel("nobody")


def test_pages_of_jobs_meet_without_gap(queue: Queue) -> None:
    jobs = [queue.submit("a", {}) for _ in range(7)]
    first = queue.jobs(3)
    second = queue.jobs(10, before=first[-1])
    assert [job.id for job in first + second] == [job.id for job in reversed(jobs)]
    assert queue.jobs(group_id=jobs[2].group_id) == [jobs[2]]


def test_a_worker_of_an_earlier_attempt_may_not_write(catalog: Catalog, queue: Queue) -> None:
    job = queue.submit("a", {})
    claim(catalog)
    with catalog.write() as session:
        assert ledger.attach(session, job.id, 1, pid=10, created=1.0)
        assert not ledger.attach(session, job.id, 1, pid=11, created=2.0), "it has its worker already"
        assert ledger.beat(session, job.id, 1, {"done": 1.0}) == "go on"
        assert ledger.beat(session, job.id, 0, {"done": 9.0}) is None
    assert queue.job(job.id).done == 1.0


def test_wait_gives_up(queue: Queue) -> None:
    with pytest.raises(TimeoutError, match="still queued"):
        queue.wait(queue.submit("a", {}).id, timeout_s=0.1)


def test_pause_puts_aside_and_resume_queues_again(catalog: Catalog, queue: Queue) -> None:
    first = queue.submit("a", {})
    second = queue.submit("b", {}, depends_on=first.id)
    assert queue.pause(first.id).state == "paused"
    assert claim(catalog) is None, "what waits for a paused job waits on"
    assert queue.job(second.id).state == "queued"
    with pytest.raises(BadInput, match="is paused; only one that has failed"):
        queue.retry(first.id)
    assert queue.resume(first.id).state == "queued"
    with pytest.raises(BadInput, match="is queued; only a paused one"):
        queue.resume(first.id)
    assert claim(catalog) == first.id
    assert queue.pause(first.id).pause_requested
    end(catalog, first, "lost")  # its worker died before it could stop
    found = queue.job(first.id)
    assert (found.state, found.pause_requested) == ("paused", False)
    assert queue.cancel(first.id).state == "cancelled"
    assert queue.job(second.id).state == "cancelled"
    with pytest.raises(BadInput, match="was cancelled; only one that waits or runs"):
        queue.pause(first.id)
