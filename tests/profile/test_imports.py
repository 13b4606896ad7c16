"""Other programs' reports: their numbers come in as they are, once, apart from our own, and wrong files are refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from core.catalog.store import Catalog
from core.cli import main
from core.errors import BadInput
from core.importing import import_report
from core.loop import register
from core.profile.comparability import tier_of
from tests.tiny import tiny_folder

REPORTS = Path(__file__).parents[1] / "fixtures" / "reports"


@pytest.fixture
def catalog(tmp_path, monkeypatch) -> Catalog:
    monkeypatch.setenv("SLIMSCOPE_HOME", str(tmp_path / "home"))
    return Catalog(f"sqlite:///{tmp_path / 'catalog.sqlite'}")


def numbers(runs):
    return {m.name: (m.value, m.unit, m.n) for run in runs for m in run.measurements}


@pytest.mark.parametrize("form", ["json", "jsonl"])
def test_llama_bench(catalog, form):
    prefill, decode = import_report(catalog, REPORTS / f"llama_bench.{form}")
    assert numbers([prefill, decode]) == {
        "prefill_tokens_per_s": (1000.0, "tokens/s", 5),
        "decode_tokens_per_s": (103.0, "tokens/s", 9),
    }
    assert (prefill.measurements[0].low, prefill.measurements[0].high) == (None, None), (
        "five give no interval"
    )
    assert (decode.measurements[0].low, decode.measurements[0].high) == (100.0, 106.0), (
        "ranks 2 and 8 of nine"
    )
    assert decode.conditions["device_model"] == "Example CPU"
    assert "somebody" not in json.dumps(dict(decode.conditions))


def test_optimum_benchmark(catalog):
    runs = import_report(catalog, REPORTS / "optimum_benchmark.json")
    assert numbers(runs) == {
        "load_ms": (11500.0, "ms", 1),
        "ttft_ms": (pytest.approx(32.0), "ms", 7),
        "decode_tokens_per_s": (43.0, "tokens/s", None),
        "tpot_ms": (pytest.approx(25.0), "ms", 3),
        "host_peak_memory_bytes": (2.5e9, "bytes", None),
        "device_peak_memory_bytes": (7e8, "bytes", None),
    }


def test_ai_hub(catalog):
    phone, laptop = import_report(catalog, REPORTS / "ai_hub.yaml")
    assert numbers([phone]) == {
        "latency_ms": (12.5, "ms", None),
        "peak_memory_bytes": (100 * 2**20, "bytes", None),
    }
    assert numbers([laptop]) == {
        "decode_tokens_per_s": (9.5, "tokens/s", None),
        "ttft_ms": (238.5, "ms", None),
    }
    assert [run.conditions["device_model"] for run in (phone, laptop)] == ["Example Phone", "Example Laptop"]


def test_onnx_runtime_profile(catalog):
    (run,) = import_report(catalog, REPORTS / "onnx_runtime.json")
    assert numbers([run]) == {
        "latency_ms": (pytest.approx(0.1045), "ms", 8),
        "first_forward_ms": (0.5, "ms", None),
        "load_ms": (12.0, "ms", None),
    }
    operators = catalog.frame(run.id, "operators")
    assert operators.to_dict("list") == {
        "operator": ["MatMul", "Relu"],
        "provider": ["CPUExecutionProvider"] * 2,
        "calls": [1.0, 1.0],
        "ms": [pytest.approx(0.06), pytest.approx(0.02)],
    }


def test_a_profile_that_onnx_runtime_wrote_here(catalog, tmp_path):
    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 4]) for name in "xy"]
    weight = onnx.numpy_helper.from_array(np.eye(4, dtype=np.float32), "w")
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", "w"], ["y"])], "g", ends[:1], ends[1:], [weight]
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9)
    options = onnxruntime.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / "own")
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    for _ in range(7):
        session.run(None, {"x": np.ones((1, 4), np.float32)})
    (run,) = import_report(catalog, Path(session.end_profiling()))
    assert [(m.name, m.n) for m in run.measurements] == [
        ("latency_ms", 6),
        ("first_forward_ms", None),
        ("load_ms", None),
    ]
    assert catalog.frame(run.id, "operators")["operator"].tolist() == ["MatMul"]


def test_imported_numbers_stay_apart_and_come_in_once(catalog, tmp_path):
    id_ = register(catalog, str(tiny_folder("llama", tmp_path / "m"))).id
    first = import_report(catalog, REPORTS / "llama_bench.json", variant=id_)
    again = import_report(catalog, REPORTS / "llama_bench.json", variant=id_)
    assert [run.id for run in again] == [run.id for run in first]
    assert len(catalog.runs(id_)) == 2
    assert {run.kind for run in catalog.runs(id_)} == {"import"}, "none passes for a profile"
    assert {run.environment for run in first} == {""}, "not this machine's"
    assert tier_of(*first).letter == "D"
    import_report(catalog, REPORTS / "llama_bench.json", name="other")
    assert [variant.id for variant in catalog.variants()] == [id_]
    (hidden,) = [variant for variant in catalog.variants(hidden=True) if variant.id != id_]
    assert hidden.source == "external:other"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe\x00",
        b"[]",
        b"{}",
        b"[{",
        b'[{"n_prompt": 1}]',
        b"a: [",
        b"[" * 100_000,
        b"plain text",
        b"null",
    ],
)
def test_wrong_files_are_refused_with_what_was_expected(catalog, tmp_path, content):
    file = tmp_path / "report.json"
    file.write_bytes(content)
    with pytest.raises(BadInput, match="expected one of: llama-bench"):
        import_report(catalog, file)
    assert catalog.variants(hidden=True) == []


@pytest.mark.parametrize("rate", ["NaN", "-1", "null", '"fast"', "Infinity", "true"])
def test_numbers_that_are_none_are_refused_whole(catalog, tmp_path, rate):
    file = tmp_path / "report.json"
    good = '{"n_prompt": 8, "n_gen": 0, "avg_ts": 5.0}'
    file.write_text(f'[{good}, {{"n_prompt": 0, "n_gen": 8, "avg_ts": {rate}}}]')
    with pytest.raises(BadInput, match="no measured number"):
        import_report(catalog, file)
    assert catalog.variants(hidden=True) == []


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SLIMSCOPE_HOME", str(tmp_path / "home"))
    where = ["--catalog", str(tmp_path / "cli.sqlite")]
    assert main(["import", str(REPORTS / "ai_hub.yaml"), "--json", *where]) == 0
    assert [run["protocol"] for run in json.loads(capsys.readouterr().out)] == ["imported AI Hub perf"] * 2
    assert main(["import", str(REPORTS / "make.py"), *where]) == 1
    assert "expected one of" in capsys.readouterr().err
