"""What an ONNX file holds, and how its block-quantized products compute: read and set without touching the weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

ACCURACY = {"float": 1, "int8": 4}
"""``MatMulNBits``' accuracy_level: what its activations are at least kept in (1 float32, 4 int8)."""
QUANTIZED = ("MatMulNBits", "GatherBlockQuantized", "MatMulInteger", "DynamicQuantizeMatMul")
Activations = Literal["int8", "float"]


def described(path: Path) -> dict[str, Any]:
    """Bytes of stored tensors by number format, and how often the operators occur that tell how it is computed."""
    import onnx

    graph = onnx.load(str(path), load_external_data=False).graph
    sizes: Counter[str] = Counter()
    for tensor in graph.initializer:
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        sizes[str(dtype)] += int(np.prod(tensor.dims, dtype=np.int64)) * dtype.itemsize
    operators = Counter(node.op_type for node in graph.node)
    told = (*QUANTIZED, "MatMul", "Gemm", "GroupQueryAttention", "MultiHeadAttention")
    return {
        "weight_bytes": dict(sizes),
        "operators": {name: operators[name] for name in told if operators[name]},
        "file_bytes": sum(each.stat().st_size for each in path.parent.glob(f"{path.name}*")),
    }


def bytes_of(made: Mapping[str, Any]) -> int:
    """Bytes of all stored tensors."""
    return sum(int(size) for size in made["weight_bytes"].values())


def set_activations(path: Path, activations: Activations) -> None:
    """Say to every ``MatMulNBits`` of a file what its activations are rounded to."""
    import onnx

    proto = onnx.load(str(path), load_external_data=False)
    for node in proto.graph.node:
        if node.op_type == "MatMulNBits":
            kept = [each for each in node.attribute if each.name != "accuracy_level"]
            del node.attribute[:]
            node.attribute.extend(
                [*kept, onnx.helper.make_attribute("accuracy_level", ACCURACY[activations])]
            )
    onnx.save(proto, str(path))
