"""Other programs' CPU is seen, our own and our children's is not taken for theirs."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from core.profile.contention import ContentionMeter, own_cpu_seconds, wait_until_quiet

BURN = "import time\nend = time.perf_counter() + {seconds}\nwhile time.perf_counter() < end: pass"


def burn(cpu_seconds: float) -> None:
    end = time.process_time() + cpu_seconds
    while time.process_time() < end:
        pass


def orphan(seconds: float) -> None:
    """Start a busy process that is no descendant of ours: its parent ends at once."""
    code = (
        f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {BURN.format(seconds=seconds)!r}])"
    )
    subprocess.run([sys.executable, "-c", code], check=True, start_new_session=True)


def test_a_busy_stranger_is_seen():
    orphan(3.0)
    time.sleep(0.3)
    meter = ContentionMeter()
    time.sleep(1.5)
    # One stranger keeps one processor of N busy (less where others compete with it for that processor).
    assert meter.share() >= 0.5 / len(os.sched_getaffinity(0))


def test_own_work_is_not_taken_for_a_strangers():
    before = own_cpu_seconds()
    burn(0.3)
    assert own_cpu_seconds() - before >= 0.3


def test_a_childs_work_counts_as_own_while_it_lives_and_after():
    before = own_cpu_seconds()
    with subprocess.Popen([sys.executable, "-c", BURN.format(seconds=1.0)]) as child:
        time.sleep(0.9)
        alive = own_cpu_seconds()
        child.wait()
    assert alive - before >= 0.1
    assert own_cpu_seconds() >= alive


def test_share_is_a_share():
    meter = ContentionMeter()
    burn(0.2)
    assert 0 <= meter.share() <= 1


def test_the_wait_for_quiet_is_bounded_and_says_what_it_waits_for():
    said: list[str] = []
    start = time.perf_counter()
    wait_until_quiet(-1.0, wait_s=0.5, notify=said.append, look_s=0.2)  # nothing is as quiet as that
    assert 0.5 <= time.perf_counter() - start < 3
    assert said
    assert all("waiting for a quiet moment" in words for words in said)


def test_no_wait_where_it_is_quiet_enough():
    said: list[str] = []
    assert wait_until_quiet(1.0, wait_s=60, notify=said.append, look_s=0.1) <= 1.0
    assert said == []


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs a processor to leave out")
def test_only_the_processors_we_may_use_are_looked_at():
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert ContentionMeter()._processors == [min(allowed)]
    finally:
        os.sched_setaffinity(0, allowed)
