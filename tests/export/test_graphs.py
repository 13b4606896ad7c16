"""ONNX and OpenVINO: the graph rewrites on a graph of four nodes, and one traced export of each."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from core.export import _onnx_graph
from core.registry import get
from core.types import Result, silent
from tests.tiny import tiny_model

TABLE = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32)


def tied_graph() -> onnx_ir.Model:
    """ids → Gather(table) → MatMul(Transpose(table)): an embedding tied to its head."""
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["rows"]),
        helper.make_node("Transpose", ["table"], ["turned"], perm=[1, 0]),
        helper.make_node("MatMul", ["rows", "turned"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes, "tied", [helper.make_tensor_value_info("ids", TensorProto.INT64, ["n"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 7])],
        [numpy_helper.from_array(TABLE, "table")],
    )  # fmt: skip
    return onnx_ir.from_proto(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    )


def run(model: onnx_ir.Model, ids: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(onnx_ir.to_proto(model).SerializeToString())
    return session.run(None, {"ids": ids})[0]


def test_a_table_of_int8_rows_is_off_by_half_a_step_at_most():
    ids = np.arange(7)
    model = tied_graph()
    _onnx_graph.fold_transposes(model)
    assert np.array_equal(run(model, ids), run(tied_graph(), ids))
    assert _onnx_graph.int8_tables(model) == ["table"]
    assert set(model.graph.initializers) == {"table.codes", "table.scale", "table.transposed"}
    scale = np.abs(TABLE).max(axis=1) / 127
    rows = run(model, ids) @ np.linalg.pinv(TABLE.T)
    assert (np.abs(rows - TABLE).max(axis=1) <= 0.5001 * scale).all()


def export(format_: str, family: str, folder: Path, **settings: str) -> Result:
    method = get("export", format_)
    result: Result = method.run(tiny_model(family), folder, silent, method.parse(settings))
    return result


def test_onnx_int8_holds_integers_and_no_path_of_this_machine(tmp_path: Path):
    result = export("onnx", "smollm", tmp_path)
    measured = {m.name: m.value for m in result.metrics}
    graph = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    assert measured["quantized_products"] == 22 == sum(n.op_type == "MatMulInteger" for n in graph.graph.node)
    assert 0 < measured["relative_rms_difference"] < 0.15
    assert list(result.frames["parity"]["tokens"]) == [17, 64]
    assert result.frame["bytes"].sum() == sum(p.stat().st_size for p in tmp_path.iterdir())
    assert measured["exported_bytes"] < 0.35 * 4 * 508_800
    assert b".py" not in (tmp_path / "model.onnx").read_bytes()


def test_openvino_int8_keeps_its_codes(tmp_path: Path):
    result = export("openvino", "bert", tmp_path)
    measured = {m.name: m.value for m in result.metrics}
    assert measured["quantized_tensors"] >= 18
    assert 0 < measured["relative_rms_difference"] < 0.1
    assert result.frame["bytes"].sum() == pytest.approx(sum(p.stat().st_size for p in tmp_path.iterdir()))
