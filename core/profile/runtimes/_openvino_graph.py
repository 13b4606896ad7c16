"""OpenVINO files of an artifact: decoders with their cache as the graph's own state, everything else as exported.

The CPU plugin fuses attention and cache where it finds ReadValue → Gather by ``beam_idx`` → Concat → attention → Assign,
the form that Intel's own converter leaves, so that is the form made here.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from core.errors import CannotMeasure
from core.libraries import without_telemetry
from core.models.loaded import LoadedModel
from core.models.open import open_model
from core.profile.runtimes._cached_graph import CachedGraph, cached_graph
from core.profile.runtimes._graph_facts import graph_facts
from core.profile.runtimes._own_grid import OwnGrid, key_of, own_grids
from core.types import ModelRef, Progress, part_of

GRAPH = "openvino_model.xml"


def write(
    folder: Path, target: Path, progress: Progress, *, weights: str, group_size: int
) -> Mapping[str, Any]:
    """Write the graph of the artifact in ``folder`` to ``target``; what was made, as plain data."""
    without_telemetry()
    loaded = open_model(ModelRef(str(folder), dtype="float32"), progress=part_of(progress, 0.0, 0.1))
    facts = graph_facts(loaded)
    if loaded.family != "decoder":
        facts |= _exported(loaded, target, part_of(progress, 0.1, 1.0), weights)
    else:
        facts |= _stateful(loaded, target, part_of(progress, 0.1, 1.0), weights, group_size)
    return facts | {"file_bytes": (target / GRAPH).with_suffix(".bin").stat().st_size}


def _exported(loaded: LoadedModel, target: Path, progress: Progress, weights: str) -> dict[str, Any]:
    """An encoder or a vision model: what our own export writes."""
    from core.export.openvino import OpenVinoSettings, run

    if weights == "int4":
        raise CannotMeasure(
            f"int4 weights are made for decoders; {loaded.anatomy.architecture} is none: set weights=int8"
        )
    run(
        loaded,
        target,
        progress,
        OpenVinoSettings.model_validate({"weights": "int8" if weights == "int8" else "float32"}),
    )
    return {"own_grid": 0, "exact": weights == "stored", "kv_width": []}


def _stateful(
    loaded: LoadedModel, target: Path, progress: Progress, weights: str, group_size: int
) -> dict[str, Any]:
    import openvino

    progress(0.0, 1.0, "tracing the model with its cache")
    traced = cached_graph(loaded, runtime="OpenVINO")
    progress(0.3, 1.0, "converting the graph")
    try:
        graph = openvino.convert_model(traced.program)
    except Exception as error:  # the converter has no error of its own
        said = next((line for line in str(error).splitlines() if "--" in line or "fail" in line.lower()), "")
        raise CannotMeasure(
            f"OpenVINO cannot convert {loaded.anatomy.architecture} ({said.strip()[:160]}); measure it in torch_eager"
        ) from error
    _name(graph, traced)
    _own_state(graph, traced)
    progress(0.7, 1.0, "storing its weights")
    facts: dict[str, Any] = {"own_grid": 0, "exact": weights == "stored"}
    kept: list[np.ndarray] = []  # constants point into these arrays until the file is written
    if weights == "stored":
        grids = own_grids(loaded)
        facts["own_grid"] = _on_own_grid(graph, grids, kept)
        facts["exact"] = all(grid.exact for grid in grids.values())
        facts["packed"] = len(grids)
    else:
        graph = _compressed(graph, weights, group_size, loaded)
    openvino.save_model(graph, str(target / GRAPH), compress_to_fp16=False)
    kept.clear()
    return facts | {"kv_width": [heads * width for heads, width in traced.cache_shapes]}


def _name(graph: Any, traced: CachedGraph) -> None:
    """Names for inputs and outputs, which the converter leaves to chance."""
    graph.inputs[0].get_tensor().set_names({"input_ids"})
    graph.outputs[0].get_tensor().set_names({"logits"})
    for index in range(len(traced.cache_shapes)):
        graph.inputs[1 + index].get_tensor().set_names({f"past_{index}"})
        graph.outputs[1 + index].get_tensor().set_names({f"present_{index}"})


def _own_state(graph: Any, traced: CachedGraph) -> None:
    """Make the cache the graph's own state, empty at the start of a text."""
    import openvino
    from openvino import opset13 as op
    from openvino._offline_transformations import apply_make_stateful_transformation

    beam = op.parameter(openvino.PartialShape([-1]), openvino.Type.i32, name="beam_idx")
    beam.output(0).get_tensor().set_names({"beam_idx"})
    for port in graph.inputs[1:]:
        readers = list(port.get_target_inputs())
        chosen = op.gather(port.get_node(), beam, op.constant(0))
        for reader in readers:
            reader.replace_source_output(chosen.output(0))
    graph.add_parameters([beam])
    graph.validate_nodes_and_infer_types()
    count = len(traced.cache_shapes)
    apply_make_stateful_transformation(graph, {f"past_{i}": f"present_{i}" for i in range(count)})
    ids = graph.input("input_ids").get_node()
    rows = op.gather(
        op.shape_of(ids, output_type="i64"), op.constant(np.array([0], np.int64)), op.constant(0)
    )
    for node in graph.get_ops():
        if node.get_type_name() == "ReadValue":
            shape = node.get_output_partial_shape(0)
            heads, width = _fixed(shape, traced)
            empty = op.concat([rows, op.constant(np.array([heads, 0, width], np.int64))], 0)
            node.set_arguments([op.broadcast(op.constant(np.float32(0)), empty)])
    graph.validate_nodes_and_infer_types()


def _fixed(shape: Any, traced: CachedGraph) -> tuple[int, int]:
    """Heads and width of a state; the converter may have left the heads open."""
    width = shape[3].get_length()
    if not shape[1].is_dynamic:
        return int(shape[1].get_length()), int(width)
    heads = {h for h, w in traced.cache_shapes if w == width}
    if len(heads) != 1:
        raise CannotMeasure(
            "this model's layers keep different numbers of key/value heads, which this graph cannot tell apart; "
            "measure it in torch_eager"
        )
    return heads.pop(), int(width)


def _compressed(graph: Any, weights: str, group_size: int, loaded: LoadedModel) -> Any:
    import nncf

    nncf.set_log_level(logging.ERROR)
    modes = nncf.CompressWeightsMode
    if weights == "int8":
        return nncf.compress_weights(graph, mode=modes.INT8_SYM)
    if loaded.anatomy.d_model % group_size:
        raise CannotMeasure(
            f"groups of {group_size} do not divide this model's width of {loaded.anatomy.d_model}; set group_size=32"
        )
    return nncf.compress_weights(graph, mode=modes.INT4_ASYM, group_size=group_size, ratio=1.0)


def _on_own_grid(graph: Any, grids: Mapping[str, OwnGrid], kept: list[np.ndarray]) -> int:
    """Put stored codes and scales where the graph has the dense weights made of them; how many there were."""
    count = 0
    for node in graph.get_ops() if grids else ():
        if node.get_type_name() != "Constant" or len(node.get_output_shape(0)) != 2:
            continue
        if node.get_output_element_type(0).get_type_name() != "f32":
            continue
        grid = grids.get(key_of(node.data))
        if grid is None:
            continue
        readers = list(node.output(0).get_target_inputs())
        weight = _constant(grid, kept)
        for reader in readers:
            reader.replace_source_output(weight.output(0))
        count += 1
    graph.validate_nodes_and_infer_types()
    return count


def _constant(grid: OwnGrid, kept: list[np.ndarray]) -> Any:
    """Codes → float32 → less the zero point → times the scale → [R, C]: what the plugin keeps packed."""
    from openvino import opset13 as op

    rows, groups, columns = grid.codes_RGK.shape
    narrow = grid.bits <= 4
    whole = groups == 1
    shape = (rows, columns) if whole else (rows, groups, columns)
    small = (rows, 1) if whole else (rows, groups, 1)
    offset = (8 if narrow else 128) if grid.zero_RG is not None else 0
    value = op.convert(_packed(grid.codes_RGK.reshape(shape), narrow, offset, kept), "f32")
    if grid.zero_RG is not None:
        zero = op.convert(_packed(grid.zero_RG.reshape(small), narrow, offset, kept), "f32")
        value = op.subtract(value, zero)
    scale = np.ascontiguousarray(grid.scale_RG.reshape(small))
    kept.append(scale)
    value = op.multiply(value, op.constant(scale))
    if not whole:
        value = op.reshape(value, op.constant(np.array([rows, groups * columns], np.int64)), False)
    return value


def _packed(codes: np.ndarray, narrow: bool, offset: int, kept: list[np.ndarray]) -> Any:
    """Integer codes as a constant of 4 or 8 bits, unsigned where ``offset`` moves them up."""
    import openvino
    from openvino import opset13 as op

    moved = codes.astype(np.int16) + offset
    if not narrow:
        array = np.ascontiguousarray(moved.astype(np.uint8 if offset else np.int8))
        kept.append(array)
        return op.constant(array)
    flat = (moved.reshape(-1) & 0xF).astype(np.uint8)
    if flat.size % 2:
        flat = np.append(flat, np.uint8(0))
    array = np.ascontiguousarray(flat[0::2] | (flat[1::2] << 4))
    kept.append(array)
    tensor = openvino.Tensor(
        array, openvino.Shape(list(codes.shape)), openvino.Type.u4 if offset else openvino.Type.i4
    )
    return op.constant(tensor)
