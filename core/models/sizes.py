"""How large a model is: parameters and bytes by component, its KV cache, and its predicted bytes per format.

Counting only; a tied tensor is counted once. What a format costs is ``core.numerics``' formula, which knows no models.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd

from core.models.anatomy import Anatomy, Block
from core.models.checkpoint import weight_files
from core.models.loaded import LoadedModel
from core.models.pace import Pace
from core.numerics.schemes import FloatScheme, IntegerScheme
from core.numerics.sizes import DTYPE_NAMES, Entry, bits_per_weight, entries_of, file_bytes
from core.registry import Need
from core.types import Family

Component = Literal[
    "embedding", "attention", "mlp", "router", "experts", "shared_expert", "norm", "head", "other"
]
FORMATS: dict[str, IntegerScheme | FloatScheme | None] = {
    "float32": None,
    "bfloat16": FloatScheme("bfloat16"),
    "float16": FloatScheme("float16"),
    "int8 channel": IntegerScheme(8, None, symmetric=True),
    "int8 g128": IntegerScheme(8, 128, symmetric=True),
    "int4 channel": IntegerScheme(4, None, symmetric=True),
    "int4 g128": IntegerScheme(4, 128, symmetric=True),
    "int4 g64": IntegerScheme(4, 64, symmetric=True),
    "int4 g32": IntegerScheme(4, 32, symmetric=True),
    "int3 g64": IntegerScheme(3, 64, symmetric=True),
    "int2 g32": IntegerScheme(2, 32, symmetric=True),
}
CACHE_CONTEXTS = (256, 1024, 4096, 16384, 65536)


@dataclass(frozen=True)
class ModelCard:
    """What the page Model shows of an open model: plain values and frames, no tensor."""

    source: str
    folder: str
    """Where its files are, for plain transformers to load."""
    anatomy: Anatomy
    family: Family
    fingerprint: str
    dtype: str
    device: str
    parameters: int
    """Tied tensors once."""
    active_parameters: int
    """What one token passes: all but the experts it does not choose."""
    bytes: int
    """In memory, in ``dtype``."""
    file_bytes: int
    """Of the weight files on disk."""
    offers: frozenset[Need]
    """What it can give to a method; a method whose needs go beyond it does not apply."""
    notes: tuple[str, ...]
    checks: dict[str, float]
    """Identity of the anatomy → its largest relative difference at load."""
    components: pd.DataFrame
    """``component_sizes``."""
    predicted: pd.DataFrame
    """``predicted_bytes``."""
    kv_cache: pd.DataFrame
    """Columns context, bytes, bytes_per_token; for this dtype, batch 1. Empty for a model that keeps no cache."""
    pace: Pace | None = None
    """How long a forward pass takes here; None where it was not measured."""


def model_card(loaded: LoadedModel) -> ModelCard:
    """Describe an open model without its tensors, so that it can cross to another process."""
    anatomy = loaded.anatomy
    return ModelCard(
        source=str(loaded.ref),
        folder=str(loaded.folder),
        anatomy=anatomy,
        family=loaded.family,
        fingerprint=loaded.fingerprint,
        dtype=loaded.dtype,
        device=loaded.device,
        parameters=sum(parameter.numel() for parameter in loaded.model.parameters()),
        active_parameters=active_parameters(loaded),
        bytes=loaded.nbytes,
        file_bytes=sum(file.stat().st_size for file in weight_files(loaded.folder)),
        offers=loaded.offers,
        notes=loaded.notes,
        checks=dict(loaded.checks),
        components=component_sizes(loaded),
        predicted=predicted_bytes(loaded),
        kv_cache=_kv_cache_frame(anatomy, loaded.model.dtype.itemsize),
    )


def active_parameters(loaded: LoadedModel) -> int:
    """Parameters that one token passes: all, less the routed experts it does not choose.

    Embedding and head count whole. Every expert of a model has the same shapes, so a token's choice does not matter.
    """
    anatomy = loaded.anatomy
    total = sum(int(parameter.numel()) for parameter in loaded.model.parameters())
    for block in anatomy.blocks:
        if block.experts is not None:
            of_experts = sum(int(p.numel()) for p in loaded.model.get_submodule(block.experts).parameters())
            total -= of_experts // anatomy.n_experts * (anatomy.n_experts - anatomy.experts_per_token)
    return total


def component_sizes(loaded: LoadedModel) -> pd.DataFrame:
    """Every module that owns parameters: component, module, layer, parameters, bytes, dtype, tied, share.

    ``tied`` is true where the tensor serves twice (embedding and unembedding); it is listed and counted once, as
    the embedding. ``share`` is of all bytes, 0–1.
    """
    rows: dict[str, dict[str, Any]] = {}
    anatomy = loaded.anatomy
    for name, parameter in loaded.model.named_parameters():
        module = name.rpartition(".")[0]
        block = block_of(anatomy, name)
        row = rows.setdefault(
            module,
            {
                "component": component_of(anatomy, name),
                "module": module,
                "layer": block.index if block else None,
                "parameters": 0,
                "bytes": 0,
                "dtype": str(parameter.dtype).removeprefix("torch."),
                "tied": anatomy.tied and module == anatomy.embedding,
            },
        )
        row["parameters"] += parameter.numel()
        row["bytes"] += parameter.numel() * parameter.element_size()
    frame = pd.DataFrame(list(rows.values())).astype({"layer": "Int64"})
    frame["share"] = frame["bytes"] / frame["bytes"].sum()
    return frame


def component_of(anatomy: Anatomy, parameter: str) -> Component:
    """The component a parameter belongs to, by its name in ``model.named_parameters()``."""
    block = block_of(anatomy, parameter)
    owner = parameter.rpartition(".")[0]
    if block is None:
        return _outer_component(anatomy, parameter, owner)
    if owner in (block.attention_norm, block.mlp_norm) or "norm" in owner.rpartition(".")[2].lower():
        return "norm"
    within: dict[Component, tuple[str | None, ...]] = {
        "router": (block.router, block.shared_gate),
        "experts": (block.experts,),
        "shared_expert": (block.shared_expert,),
        "attention": (block.attention, block.q, block.k, block.v, block.o),
        "mlp": (block.mlp, block.gate, block.up, block.down),
    }
    for component, paths in within.items():
        if any(path is not None and _inside(owner, path) for path in paths):
            return component
    return "other"


def _outer_component(anatomy: Anatomy, parameter: str, owner: str) -> Component:
    if owner in (anatomy.final_norm, anatomy.embedding_norm):
        return "norm"
    embeddings = (anatomy.embedding, anatomy.position_embedding, anatomy.token_type_embedding)
    if any(path is not None and _inside(parameter, path) for path in embeddings):
        return "embedding"
    heads = (anatomy.unembedding, anatomy.head_transform, anatomy.classifier, anatomy.pooler)
    return "head" if any(path is not None and _inside(owner, path) for path in heads) else "other"


def block_of(anatomy: Anatomy, parameter: str) -> Block | None:
    """The block a parameter is in, by its name; None outside the blocks."""
    return next((block for block in anatomy.blocks if _inside(parameter, block.path)), None)


def _inside(name: str, path: str) -> bool:
    return name == path or name.startswith(f"{path}.")


def kv_cache_bytes(anatomy: Anatomy, *, dtype_bytes: int, context: int) -> int:
    """Bytes of what layers keep of ``context`` positions, batch 1: Σ_layers 2 · G · K · min(context, window).

    G key/value heads, K the explicit head_dim. A latent attention keeps its latent per position instead, a Mamba layer
    one state of a fixed size. 0 for a model that does not decode.
    """
    if anatomy.family != "decoder":
        return 0
    numbers = 0
    for block, window in zip(anatomy.blocks, anatomy.windows, strict=True):
        if block.mixer == "mamba":
            numbers += block.state
        else:
            numbers += (block.latent or 2 * anatomy.n_kv_heads * anatomy.head_dim) * min(
                context, window or context
            )
    return numbers * dtype_bytes


def kv_cache_bytes_per_token(anatomy: Anatomy, *, dtype_bytes: int, context: int) -> int:
    """Bytes that one more token adds to a cache that holds ``context``: layers with a full window add none."""
    return kv_cache_bytes(anatomy, dtype_bytes=dtype_bytes, context=context + 1) - kv_cache_bytes(
        anatomy, dtype_bytes=dtype_bytes, context=context
    )


def _kv_cache_frame(anatomy: Anatomy, dtype_bytes: int) -> pd.DataFrame:
    limit = anatomy.context_length
    contexts = [*(c for c in CACHE_CONTEXTS if c < limit), limit] if anatomy.family == "decoder" else []
    rows = [
        {
            "context": context,
            "bytes": kv_cache_bytes(anatomy, dtype_bytes=dtype_bytes, context=context),
            "bytes_per_token": kv_cache_bytes_per_token(anatomy, dtype_bytes=dtype_bytes, context=context),
        }
        for context in contexts
    ]
    return pd.DataFrame(rows, columns=["context", "bytes", "bytes_per_token"])


def predicted_bytes(loaded: LoadedModel) -> pd.DataFrame:
    """Bytes of the weight file in each storage format: format, embedding_and_head, bytes, bits_per_weight, note.

    An integer format puts the layers' matrices and experts on the grid, in ``same`` rows the embedding and head
    too; in ``kept`` rows they stay as they are, like routers, norms and biases always do. Groups run along a
    matrix's last axis as it is stored (a Conv1D's outputs), as ``core.compress.rtn`` lays them. A format whose group
    size does not divide a matrix has no bytes and a note that says which.
    """
    rows = []
    for name, scheme in FORMATS.items():
        for outer in ("kept", "same") if isinstance(scheme, IntegerScheme) else ("same",):
            rows.append(_predicted_row(loaded, name, scheme, outer))
    return pd.DataFrame(rows).astype({"bytes": "Int64", "bits_per_weight": "Float64"})


def _predicted_row(
    loaded: LoadedModel, name: str, scheme: IntegerScheme | FloatScheme | None, outer: str
) -> dict[str, Any]:
    entries: dict[str, Entry] = {}
    parameters = 0
    row: dict[str, Any] = {
        "format": name,
        "embedding_and_head": outer,
        "bytes": None,
        "bits_per_weight": None,
    }
    for parameter, tensor in loaded.model.named_parameters():
        parameters += tensor.numel()
        shape = tuple(tensor.shape)
        if scheme is None or isinstance(scheme, FloatScheme):
            entries[parameter] = Entry(DTYPE_NAMES[scheme.dtype if scheme else "float32"], shape)
        elif not _on_grid(loaded, parameter, shape, outer):
            entries[parameter] = Entry(DTYPE_NAMES[loaded.dtype], shape)
        else:
            *lead, rows, columns = shape
            if scheme.group_size and columns % scheme.group_size:
                return {
                    **row,
                    "note": f"group size {scheme.group_size} does not divide {columns} of {parameter}",
                }
            for slice_ in range(lead[0] if lead else 1):
                for part, entry in entries_of(rows, columns, scheme).items():
                    entries[f"{parameter.removesuffix('.weight')}.{slice_}.{part}"] = entry
    size = file_bytes(entries)
    return {**row, "bytes": size, "bits_per_weight": bits_per_weight(size, parameters), "note": ""}


def _on_grid(loaded: LoadedModel, parameter: str, shape: tuple[int, ...], outer: str) -> bool:
    component = component_of(loaded.anatomy, parameter)
    owner = parameter.rpartition(".")[0]
    if component in ("embedding", "head"):
        return (
            outer == "same"
            and owner in (loaded.anatomy.embedding, loaded.anatomy.unembedding)
            and len(shape) == 2
        )
    return len(shape) >= 2 and component in ("attention", "mlp", "experts", "shared_expert")
