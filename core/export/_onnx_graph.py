"""Changes of an ONNX graph before it is quantized: by node and initializer, in memory, for models of any size.

Works on ``onnx_ir`` objects and knows nothing of transformers.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def strip(model: Any) -> None:
    """Remove what the tracer noted on every node: stack traces with this machine's paths, a tenth of a small model."""
    for graph in model.graphs():
        graph.metadata_props.clear()
        graph.doc_string = None
        for node in graph:
            node.metadata_props.clear()
            node.doc_string = None
            for value in node.outputs:
                value.metadata_props.clear()
        for value in (*graph.inputs, *graph.initializers.values()):
            value.metadata_props.clear()
    model.metadata_props.clear()


def fold_transposes(model: Any) -> None:
    """Turn ``Transpose(weight)`` into a weight, which quantizers look for: a tied head is written so."""
    import onnx_ir

    for node in list(model.graph):
        if node.op_type == "Transpose" and node.inputs[0].is_initializer():
            source = node.inputs[0]
            axes = node.attributes["perm"].as_ints() if "perm" in node.attributes else None
            turned = np.ascontiguousarray(np.transpose(source.const_value.numpy(), axes))
            folded = _initializer(model, f"{source.name}.transposed", turned)
            onnx_ir.convenience.replace_all_uses_with(node.outputs[0], folded)
            model.graph.remove(node, safe=True)
    _drop_unused(model)


def int8_tables(model: Any) -> list[str]:
    """Store every gathered table of floats [rows, columns] as int8 codes with one scale per row; the tables' names.

    ``Gather(table, ids)`` becomes ``Cast(Gather(codes, ids)) · Gather(scales, ids)``, in standard operators.
    """
    import onnx_ir

    found = []
    for node in list(model.graph):
        table = node.inputs[0] if node.op_type == "Gather" else None
        if table is None or not table.is_initializer() or table.const_value.numpy().ndim != 2:
            continue
        weight = table.const_value.numpy()
        if weight.dtype != np.float32:
            continue
        scale = np.maximum(np.abs(weight).max(axis=1, keepdims=True) / 127, np.finfo(np.float32).tiny)
        codes = np.clip(np.rint(weight / scale), -127, 127).astype(np.int8)
        ids = node.inputs[1]
        rows = onnx_ir.node("Gather", [_initializer(model, f"{table.name}.codes", codes), ids], {"axis": 0})
        cast = onnx_ir.node("Cast", [rows.outputs[0]], {"to": int(onnx_ir.DataType.FLOAT)})
        scales = _initializer(model, f"{table.name}.scale", scale.astype(np.float32))
        factor = onnx_ir.node("Gather", [scales, ids], {"axis": 0})
        product = onnx_ir.node("Mul", [cast.outputs[0], factor.outputs[0]])
        old, new = node.outputs[0], product.outputs[0]
        new.shape, new.type = old.shape, old.type
        model.graph.insert_before(node, [rows, cast, factor, product])
        onnx_ir.convenience.replace_all_uses_with(old, new)
        model.graph.remove(node, safe=True)
        found.append(table.name)
    _drop_unused(model)
    return found


def _initializer(model: Any, name: str, array: Any) -> Any:
    import onnx_ir

    known = model.graph.initializers.get(name)
    if known is not None:
        return known
    tensor = onnx_ir.tensor(array, name=name)
    value = onnx_ir.Value(
        name=name, shape=onnx_ir.Shape(array.shape), type=onnx_ir.TensorType(tensor.dtype), const_value=tensor
    )
    model.graph.register_initializer(value)
    return value


def _drop_unused(model: Any) -> None:
    outputs = {value.name for value in model.graph.outputs}
    for name, value in list(model.graph.initializers.items()):
        if not value.uses() and name not in outputs:
            del model.graph.initializers[name]
