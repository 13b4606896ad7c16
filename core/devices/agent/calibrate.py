"""Roofs of a device in about five seconds, without any library: libc's own loops, called outside Python's lock.

Read bandwidth: ``memchr`` for a byte that is not there, over a buffer much larger than the caches, one slice per thread.
Copy: ``memmove``, counted as read and written once each. Matrix rate: numpy's float32 product, where numpy is there.
"""

from __future__ import annotations

import ctypes
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable  # noqa: UP035 - one that can be subscripted in Python 3.8

from . import look

REPEATS = 5
LARGEST = 256 << 20
SIZE_OF_PRODUCT = 768


def roofs() -> list[dict[str, Any]]:
    """One row per roof: quantity, threads, median, lowest and highest of five, unit."""
    libc = ctypes.CDLL(None)
    libc.memchr.argtypes, libc.memchr.restype = (
        (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t),
        ctypes.c_void_p,
    )
    libc.memmove.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
    size = min(LARGEST, (look.memory()[1] or LARGEST) // 8) // 4096 * 4096
    buffer = ctypes.create_string_buffer(size)
    start = ctypes.addressof(buffer)
    ctypes.memset(start, 2, size)  # touched, so that every page is memory of its own
    most = look.cores()
    rows = [_read(libc, start, size, threads) for threads in sorted({1, 2, most} & set(range(1, most + 1)))]
    half = size // 2
    rows.append(_row("copy", 1, "B/s", 2 * half, lambda: libc.memmove(start, start + half, half)))
    rows.append(_overhead(libc))
    return rows + _product()


def _read(libc: Any, start: int, size: int, threads: int) -> dict[str, Any]:
    slice_ = size // threads
    with ThreadPoolExecutor(threads) as pool:

        def once() -> None:
            found = list(pool.map(lambda i: libc.memchr(start + i * slice_, 1, slice_), range(threads)))
            assert found == [None] * threads, "the byte is nowhere"

        return _row("read", threads, "B/s", slice_ * threads, once)


def _overhead(libc: Any) -> dict[str, Any]:
    """Seconds of one call that does nothing, from Python."""
    buffer = ctypes.create_string_buffer(1)
    place, calls = ctypes.addressof(buffer), 10000

    def once() -> None:
        for _ in range(calls):
            libc.memchr(place, 1, 0)

    row = _row("call", 1, "s", calls, once)
    row["value"], row["low"], row["high"] = 1 / row["value"], 1 / row["high"], 1 / row["low"]
    return row


def _product() -> list[dict[str, Any]]:
    try:
        import numpy
    except ImportError:
        return []
    a = numpy.ones((SIZE_OF_PRODUCT, SIZE_OF_PRODUCT), numpy.float32)
    return [_row("product_float32", 0, "FLOP/s", 2 * SIZE_OF_PRODUCT**3, lambda: a @ a)]


def _row(quantity: str, threads: int, unit: str, amount: float, once: Callable[[], Any]) -> dict[str, Any]:
    once()
    rates = []
    for _ in range(REPEATS):
        begun = time.perf_counter()
        once()
        rates.append(amount / (time.perf_counter() - begun))
    rates.sort()
    return {
        "quantity": quantity,
        "threads": threads,
        "value": rates[REPEATS // 2],
        "low": rates[0],
        "high": rates[-1],
        "unit": unit,
        "n": REPEATS,
    }
