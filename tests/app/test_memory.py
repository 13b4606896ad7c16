"""Memory is given back, and what is needed again comes back by itself."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import ctypes, psutil
import pandas as pd
from app.memory import MADV_DONTNEED, code_mappings
process = psutil.Process()
frame = pd.DataFrame({"a": [1, 1, 2]})
before = process.memory_info().rss
libc = ctypes.CDLL(None)
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
mappings = code_mappings()
assert mappings and all(libc.madvise(start, size, MADV_DONTNEED) == 0 for start, size in mappings)
after = process.memory_info().rss
assert after < before - 10e6, (before, after)
assert frame.groupby("a").size().tolist() == [2, 1]
"""


def test_code_that_was_let_go_runs_again() -> None:
    subprocess.run([sys.executable, "-c", SCRIPT], check=True)
