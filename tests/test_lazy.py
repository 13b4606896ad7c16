"""Threads wait asleep in our processes, and as torch has it where speed is measured; the user's choice stands."""

from __future__ import annotations

import os
import subprocess
import sys

from core.lazy import WAIT_POLICY, WAITING, plain_threads

ASK = f"from core.lazy import torch; torch.ones(1); import os; print(os.environ.get({WAIT_POLICY!r}))"


def asked(**environ: str) -> str:
    """What a fresh process has after torch was used through ``core.lazy``."""
    base = {k: v for k, v in os.environ.items() if k not in (WAIT_POLICY, WAITING)}
    done = subprocess.run(
        [sys.executable, "-c", ASK], env={**base, **environ}, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_threads_wait_asleep_unless_the_user_says_otherwise() -> None:
    assert asked() == "PASSIVE"
    assert asked(**{WAIT_POLICY: "ACTIVE"}) == "ACTIVE"


def test_a_measuring_process_keeps_torchs_own_way() -> None:
    ours = {WAIT_POLICY: "PASSIVE", WAITING: "ours", "PATH": os.environ["PATH"]}
    assert WAIT_POLICY not in plain_threads(ours)
    assert asked(**{k: v for k, v in plain_threads(ours).items() if k != "PATH"}) == "None"
    users = plain_threads({WAIT_POLICY: "ACTIVE"})
    assert users[WAIT_POLICY] == "ACTIVE"
