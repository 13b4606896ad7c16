"""A decoder as an ONNX graph with its cache, fused for ONNX Runtime's CPU kernels.

transformers' own exporter traces and fuses it. For one sequence its attention becomes ``GroupQueryAttention``, which can
write into a cache that has room to grow; the graph is told how much of it is filled (``past_length``). Otherwise every
step joins the old cache and the new tokens into a new one.
"""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

import numpy as np

from core.errors import CannotExport, CannotMeasure
from core.export._onnx_graph import strip
from core.export._trace import traced
from core.lazy import torch, transformers
from core.models.loaded import LoadedModel
from core.profile.runtimes._cached_graph import small_cache
from core.profile.runtimes._onnx_own_grid import constant, take_the_place

PAST, PRESENT = "input.past_key_values", "output.past_key_values"
"""How the exporter's names of cached tensors begin."""


def decoder_graph(loaded: LoadedModel, *, sequences: int) -> Any:
    """An ``onnx_ir`` model: tokens and positions [sequences, P] and the cache to the last position's logits and the cache.

    Raises ``CannotMeasure`` where the model keeps another kind of cache or does not trace.
    """
    cache = small_cache(loaded, "ONNX Runtime", sequences=sequences)
    for fusions in ("cpu", None):  # a fusion may trip over an architecture that is traced well without
        try:
            export = partial(_export_with, cache=cache, fusions=fusions)
            graph = traced(loaded, export, "ONNX")
        except CannotExport as error:
            refused = error
            continue
        strip(graph)
        return graph
    raise CannotMeasure(
        f"{str(refused).split(';', 1)[0]}; measure it in torch_eager or llama_cpp"
    ) from refused


def _export_with(
    model: Any, _given: dict[str, Any], _config: dict[str, Any], *, cache: Any, fusions: str | None
) -> Any:
    exporters: Any = importlib.import_module("transformers.exporters")
    cache = _growing(cache)
    rows, _, length, _ = cache.layers[0].keys.shape
    free = torch.export.Dim.AUTO
    read = 3
    inputs = {
        "input_ids": torch.zeros(rows, read, dtype=torch.long),
        "position_ids": torch.arange(length, length + read).repeat(rows, 1),
        "past_key_values": cache,
        "use_cache": True,
        "logits_to_keep": 1,
    }
    shapes = {
        "input_ids": {1: free},
        "position_ids": {1: free},
        "past_key_values": [{2: free}] * (2 * len(cache.layers)),
        "logits_to_keep": None,
    }
    config = exporters.OnnxConfig(dynamic_shapes=shapes, ort_fusions=fusions)
    return exporters.OnnxExporter().export(model, inputs, config).program


def _growing(cache: Any) -> Any:
    """The same keys and values where every layer keeps all of them: a window is the attention mask's affair alone."""
    layers: Any = transformers.cache_utils
    grown = layers.DynamicCache()
    for layer in cache.layers:
        kept = layers.DynamicLayer()
        kept.lazy_initialization(layer.keys, layer.values)
        kept.keys, kept.values = layer.keys, layer.values
        grown.layers.append(kept)
    return grown


def plain_products(model: Any) -> None:
    """Write products with stored weights as ``MatMul`` of a matrix [in, out], which is what quantizers look for."""
    import onnx_ir

    for node in list(model.graph):
        stored = len(node.inputs) > 1 and node.inputs[1] is not None and node.inputs[1].is_initializer()
        if node.op_type not in ("FusedMatMul", "Gemm") or not stored:
            continue
        asked = {name: attribute.value for name, attribute in node.attributes.items()}
        turned = bool(asked.pop("transB", 0))
        if any(value != (1.0 if name in ("alpha", "beta") else 0) for name, value in asked.items()):
            continue
        weight = node.inputs[1]
        if turned:
            weight = _turned(model, weight)
        product = onnx_ir.node("MatMul", [node.inputs[0], weight])
        made = [product]
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            made.append(onnx_ir.node("Add", [product.outputs[0], node.inputs[2]]))
        take_the_place(model, node, made)


def _turned(model: Any, weight: Any) -> Any:
    """The transpose of a stored matrix, stored once."""
    name = f"{weight.name}.turned"
    known = model.graph.initializers.get(name)
    return known or constant(model, name, np.ascontiguousarray(weight.const_value.numpy().T))


def with_room(model: Any) -> bool:
    """Let the cache have room to grow, where every layer's attention writes into it; whether that is so.

    What the graph reads off the cache's length becomes an input, ``past_length`` [1].
    """
    import onnx_ir

    past = [value for value in model.graph.inputs if value.name.startswith(PAST)]
    readers = [(use.node, use.idx) for value in past for use in value.uses()]
    lengths = {node for node, _ in readers if node.op_type == "Shape"}
    if any(node.op_type not in ("GroupQueryAttention", "Shape") for node, _ in readers):
        return False
    if any(
        (node.attributes.get_int("start", 0), node.attributes.get_int("end", 4)) != (2, 3) for node in lengths
    ):
        return False
    given = onnx_ir.Value(
        name="past_length", shape=onnx_ir.Shape([1]), type=onnx_ir.TensorType(onnx_ir.DataType.INT64)
    )
    model.graph.inputs.append(given)
    for node in lengths:
        onnx_ir.convenience.replace_all_uses_with(node.outputs[0], given)
        model.graph.remove(node, safe=True)
    for value in (*past, *(v for v in model.graph.outputs if v.name.startswith(PRESENT))):
        value.shape = onnx_ir.Shape([value.shape[0], value.shape[1], "room", value.shape[3]])
    return True
