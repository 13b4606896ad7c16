"""llama-bench's JSON (``-o json``: a list) and JSONL (``-o jsonl``): one test per row, rates of each repetition in ``samples_ts``.

A row reads a prompt (``n_gen`` 0), writes tokens (``n_prompt`` 0), or does both in one figure. Fields:
llama.cpp, tools/llama-bench/README.md.
"""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any

from core.profile.imports._found import Found, of_samples, stated

TITLE = "llama-bench"
EXPECTED = "llama-bench: rows with n_prompt, n_gen and avg_ts (-o json or -o jsonl)"
_KEPT = (
    *(
        "build_commit",
        "backends",
        "model_type",
        "model_size",
        "model_n_params",
        "n_batch",
        "n_ubatch",
        "n_threads",
    ),
    *("type_k", "type_v", "n_gpu_layers", "flash_attn", "n_prompt", "n_gen", "n_depth", "test_time"),
)


def matches(data: Any) -> bool:
    """Whether this is such a report; one row alone is the first line of a JSONL file."""
    rows = data if isinstance(data, list) else [data]
    return bool(rows) and all(
        isinstance(row, dict) and {"n_prompt", "n_gen", "avg_ts"} <= row.keys() for row in rows
    )


def read(data: Any) -> list[Found]:
    """One per row. The model's file is kept by its last part: folders are nobody's business."""
    return [_row(row) for row in (data if isinstance(data, list) else [data])]


def _row(row: dict[str, Any]) -> Found:
    if not row["n_gen"]:
        name = "prefill_tokens_per_s"
    else:
        name = "decode_tokens_per_s" if not row["n_prompt"] else "prefill_and_decode_tokens_per_s"
    samples = row.get("samples_ts")
    metric = (
        of_samples(name, samples, "tokens/s", "higher")
        if samples
        else stated(name, row["avg_ts"], "tokens/s", "higher")
    )
    said = {key: row[key] for key in _KEPT if key in row}
    file = PurePosixPath(str(row.get("model_filename", "")).replace("\\", "/")).name
    on_gpu = bool(row.get("n_gpu_layers")) and bool(row.get("gpu_info"))
    device = row.get("gpu_info") if on_gpu else row.get("cpu_info")
    return Found((metric,), {"report": said, "model_file": file, "device_model": device or None})
