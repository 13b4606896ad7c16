"""Stored integer weights as ONNX Runtime keeps them packed: ``MatMulNBits`` with the artifact's own codes and scales.

The weights of a traced graph are dense, and siblings (query, key and value) may stand in one matrix side by side, so a
matrix is taken apart by content. Legend: R rows (outputs), C columns (inputs), G groups of a row, K columns of a group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from core.profile.runtimes._onnx_file import ACCURACY
from core.profile.runtimes._own_grid import OwnGrid, key_of

BLOCKS = (256, 128, 64, 32, 16)
"""Columns of a group that the operator takes."""


def on_own_grid(model: Any, grids: Mapping[str, OwnGrid]) -> int:
    """Put stored codes where an ``onnx_ir`` model multiplies with the dense weights made of them; how many there were."""
    import onnx_ir

    found = 0
    for node in list(model.graph) if grids else ():
        weight = node.inputs[1].const_value if node.op_type == "MatMul" and node.inputs[1] else None
        if weight is None or len(weight.shape) != 2 or weight.dtype != onnx_ir.DataType.FLOAT:
            continue
        parts = _parts(np.ascontiguousarray(weight.numpy().T), grids)
        block = _block(parts)
        if not block:
            continue
        _replace(model, node, parts, block)
        found += len(parts)
    if found:
        model.graph.opset_imports.setdefault("com.microsoft", 1)
        _drop_unused(model)
    return found


def _parts(weight_RC: np.ndarray, grids: Mapping[str, OwnGrid]) -> list[OwnGrid]:
    """The stored weights that stand in a matrix one under another; empty if any of its rows is of none."""
    rows, columns = weight_RC.shape
    heights = sorted({g.codes_RGK.shape[0] for g in grids.values() if _columns(g) == columns}, reverse=True)
    parts: list[OwnGrid] = []
    start = 0
    while start < rows:
        keys = (key_of(weight_RC[start : start + h]) for h in heights if start + h <= rows)
        grid = next((grids[key] for key in keys if key in grids), None)
        if grid is None:
            return []
        parts.append(grid)
        start += grid.codes_RGK.shape[0]
    return parts


def _columns(grid: OwnGrid) -> int:
    return int(grid.codes_RGK.shape[1] * grid.codes_RGK.shape[2])


def _block(parts: Sequence[OwnGrid]) -> int:
    """Columns of a group that all parts can be written with (a scale may be repeated); 0 if there are none."""
    bits = {grid.bits for grid in parts}
    if not parts or len(bits) > 1 or not bits <= {4, 8}:
        return 0
    return next((b for b in BLOCKS if all(g.codes_RGK.shape[2] % b == 0 for g in parts)), 0)


def _replace(model: Any, node: Any, parts: Sequence[OwnGrid], block: int) -> None:
    import onnx_ir

    bits, columns = parts[0].bits, _columns(parts[0])
    middle = 1 << (bits - 1)
    codes, scales, zeros = [], [], []
    for grid in parts:
        rows, _, wide = grid.codes_RGK.shape
        codes.append((grid.codes_RGK.astype(np.int16) + middle).astype(np.uint8).reshape(rows, -1, block))
        scales.append(np.repeat(grid.scale_RG, wide // block, axis=1))
        zero_RG = np.zeros(grid.scale_RG.shape, np.int8) if grid.zero_RG is None else grid.zero_RG
        zeros.append(np.repeat((zero_RG.astype(np.int16) + middle).astype(np.uint8), wide // block, axis=1))
    name = node.inputs[1].name
    inputs = [
        node.inputs[0],
        constant(model, f"{name}.codes", _packed(np.concatenate(codes), bits)),
        constant(model, f"{name}.scales", np.concatenate(scales).astype(np.float32)),
    ]
    if any(grid.zero_RG is not None for grid in parts):
        inputs.append(constant(model, f"{name}.zeros", _packed(np.concatenate(zeros), bits)))
    attributes = {"K": columns, "N": sum(len(c) for c in codes), "bits": bits, "block_size": block,
                  "accuracy_level": ACCURACY["float"]}  # fmt: skip
    packed = onnx_ir.node("MatMulNBits", inputs, attributes, domain="com.microsoft")
    take_the_place(model, node, [packed])


def take_the_place(model: Any, node: Any, made: Sequence[Any]) -> None:
    """Put nodes where one was: the last one's output takes its name, shape and readers."""
    import onnx_ir

    old, new = node.outputs[0], made[-1].outputs[0]
    for each in made:
        each.outputs[0].shape, each.outputs[0].type = old.shape, old.type
    name = old.name
    model.graph.insert_before(node, list(made))
    onnx_ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    model.graph.remove(node, safe=True)
    new.name = name


def _packed(codes: np.ndarray, bits: int) -> np.ndarray:
    """Two codes of 4 bits in a byte along the last axis, the first one low; 8-bit codes as they are."""
    if bits == 8:
        return codes
    if codes.shape[-1] % 2:
        codes = np.concatenate([codes, np.zeros_like(codes[..., :1])], axis=-1)
    packed: np.ndarray = codes[..., 0::2] | (codes[..., 1::2] << 4)
    return packed


def constant(model: Any, name: str, array: np.ndarray) -> Any:
    """A stored tensor of the graph; the one of that name where there is one."""
    import onnx_ir

    known = model.graph.initializers.get(name)
    if known is not None:
        return known
    tensor = onnx_ir.tensor(np.ascontiguousarray(array), name=name)
    value = onnx_ir.Value(
        name=name, shape=onnx_ir.Shape(array.shape), type=onnx_ir.TensorType(tensor.dtype), const_value=tensor
    )
    model.graph.register_initializer(value)
    return value


def _drop_unused(model: Any) -> None:
    for name, value in list(model.graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del model.graph.initializers[name]
