"""The fingerprint: stable, complete, and nothing private in it."""

from __future__ import annotations

import getpass
import json
import platform
from pathlib import Path

from core.profile.environment import environment
from core.types import content_hash


def test_same_machine_same_hash():
    assert environment("cpu")["hash"] == environment("cpu")["hash"]


def test_what_moves_a_number_is_in_it():
    found = environment("cpu")
    assert found["hash"] == content_hash({"host": found["host"], "software": found["software"]})
    assert found["host"]["physical_cores"] >= 1
    assert found["software"]["packages"]["torch"]
    assert found["software"]["packages"]["slimscope"]


def test_a_thread_variable_changes_it_and_the_count_of_threads_does_not(monkeypatch):
    before = environment("cpu")["hash"]
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert environment("cpu")["hash"] == before
    monkeypatch.setenv("KMP_BLOCKTIME", "0")
    assert environment("cpu")["hash"] != before


def test_nothing_private():
    text = json.dumps(environment("cpu"))
    assert platform.node() not in text
    assert str(Path.home()) not in text
    assert f'"{getpass.getuser()}"' not in text
