"""GGUF: one file with weights, tokenizer and settings, for llama.cpp, Ollama and LM Studio."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from core.errors import CannotExport
from core.export._gguf_tokenizer import write_tokenizer
from core.export._parity import TEXT, as_runtime, compare
from core.export._report import exported
from core.lazy import torch, transformers
from core.models.loaded import LoadedModel
from core.models.quiet import quiet
from core.models.sizes import component_of
from core.registry import Settings, method
from core.types import Progress, Result, part_of

if TYPE_CHECKING:
    from torch import Tensor

FILE = "model.gguf"
ARCHITECTURES = {"llama": "LLAMA", "qwen2": "QWEN2"}
"""transformers' model type → gguf's; others need a mapping of their own that was checked."""
BLOCK = 32
"""Values that share a scale in every one of these types."""
FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9}
"""llama.cpp's ``general.file_type``."""


class GgufSettings(Settings):
    """What the matrices are stored as."""

    type: Literal["F32", "F16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0"] = Field(
        default="Q8_0",
        description="Type of every matrix: 32, 16, 8.5, 6, 5.5, 5 or 4.5 bits per weight; groups of 32 share a scale (_1: "
        "and a minimum). Norms and biases stay float32",
    )
    embedding_type: Literal["same", "F16", "Q8_0"] = Field(
        default="Q8_0", description="Type of the token table and the head; same: as the matrices"
    )


@method(
    "export",
    title="GGUF",
    needs=["decoder"],
    paper="https://github.com/ggml-org/ggml/blob/master/docs/gguf.md",
)
def run(loaded: LoadedModel, folder: Path, progress: Progress, settings: GgufSettings) -> Result:
    """Write one GGUF file by gguf's own quantizers, readable by llama.cpp and by transformers.

    Architectures and tokenizers are mapped where the mapping is exact, and refused by name otherwise: Llama (with its
    query and key rows in llama.cpp's order) and Qwen2, with byte-level BPE. Rows whose length 32 does not divide stay
    F16. The file is read back by transformers and its outputs are held against the model's; llama.cpp itself is not run.
    """
    started = time.monotonic()
    import gguf

    _refuse(loaded)
    writer = gguf.GGUFWriter(folder / FILE, ARCHITECTURES[loaded.anatomy.model_type].lower())
    _write_facts(writer, loaded, settings)
    unlike = write_tokenizer(writer, loaded.tokenizer, loaded.anatomy.vocab_size)
    names = gguf.get_tensor_name_map(
        getattr(gguf.MODEL_ARCH, ARCHITECTURES[loaded.anatomy.model_type]), loaded.anatomy.n_layers
    )
    rows = []
    parameters = dict(loaded.model.named_parameters())
    for done, (name, values) in enumerate(_in_file_order(loaded, parameters)):
        part_of(progress, 0.05, 0.5)(done, len(parameters), f"writing {name}")
        there = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if there is None:
            raise CannotExport(
                f"GGUF has no name for {name} in {loaded.anatomy.model_type}; export safetensors instead"
            )
        kind = _kind(gguf, loaded, name, values, settings)
        stored = gguf.quants.quantize(values, kind)
        writer.add_tensor(there, stored, raw_dtype=kind)
        rows.append(
            _row(loaded, name, values, gguf.quants.dequantize(stored, kind), kind.name, stored.nbytes)
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    progress(0.6, 1.0, "reading it back with transformers")
    model = read_back(folder)
    parity = compare(loaded, as_runtime(model))
    parity.refuse_if_broken(f"the GGUF {settings.type} file", exact=False)
    _refuse_other_tokens(loaded, folder)
    return exported(
        loaded, "gguf", settings, rows, folder, parity, started=started, format_=f"GGUF {settings.type}",
        runtime=f"transformers {transformers.__version__}, which unpacks GGUF to float32", files=(FILE,),
        notes=(unlike, *_notes(rows, settings)),
    )  # fmt: skip


def read_back(folder: Path) -> Any:
    """The file as transformers reads it: dense float32."""
    with quiet():
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=FILE, dtype=torch.float32, local_files_only=True
        )
    return model.eval()


def _refuse(loaded: LoadedModel) -> None:
    """Refuse what has no exact mapping, before anything is written."""
    config, kind = loaded.model.config, loaded.anatomy.model_type
    if kind not in ARCHITECTURES:
        raise CannotExport(
            f"{loaded.anatomy.architecture} is not mapped to GGUF here; {', '.join(ARCHITECTURES)} are. "
            "Export safetensors, ONNX or OpenVINO instead"
        )
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    odd = {
        "inputs that are rounded (W8A8)": bool(loaded.activations),
        f"rotary positions of type {rope}": rope != "default",
        "biases in its projections": kind == "llama" and (config.attention_bias or config.mlp_bias),
        "a head size other than hidden size / heads": loaded.anatomy.head_dim * loaded.anatomy.n_heads
        != config.hidden_size,
        "sliding windows": any(window is not None for window in loaded.anatomy.windows),
        f"the activation {config.hidden_act}": config.hidden_act != "silu",
    }
    for what, found in odd.items():
        if found:
            raise CannotExport(
                f"{loaded.anatomy.architecture} with {what} is not mapped to GGUF here; export safetensors instead"
            )


def _write_facts(writer: Any, loaded: LoadedModel, settings: GgufSettings) -> None:
    config, anatomy = loaded.model.config, loaded.anatomy
    writer.add_name(f"{anatomy.model_type} of {sum(p.numel() for p in loaded.model.parameters())} parameters")
    writer.add_block_count(anatomy.n_layers)
    writer.add_context_length(anatomy.context_length)
    writer.add_embedding_length(anatomy.d_model)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(anatomy.n_heads)
    writer.add_head_count_kv(anatomy.n_kv_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(anatomy.head_dim)
    writer.add_vocab_size(anatomy.vocab_size)
    writer.add_file_type(FILE_TYPES[settings.type])
    writer.add_quantization_version(2)


def _in_file_order(
    loaded: LoadedModel, parameters: dict[str, Tensor]
) -> Iterator[tuple[str, np.ndarray[Any, np.dtype[np.float32]]]]:
    """Every parameter as float32; Llama's query and key rows with each head's halves interleaved, as llama.cpp turns them."""
    anatomy = loaded.anatomy
    heads = {f"{block.q}.weight": anatomy.n_heads for block in anatomy.blocks}
    heads |= {f"{block.k}.weight": anatomy.n_kv_heads for block in anatomy.blocks}
    for name, parameter in parameters.items():
        values = parameter.detach().float().cpu().numpy()
        if anatomy.model_type == "llama" and name in heads:
            n = heads[name]
            halves = values.reshape(n, 2, values.shape[0] // n // 2, -1)
            values = np.ascontiguousarray(halves.swapaxes(1, 2).reshape(values.shape))
        yield name, values


def _kind(gguf: Any, loaded: LoadedModel, name: str, values: Any, settings: GgufSettings) -> Any:
    """The type a parameter is stored as."""
    if values.ndim < 2:
        return gguf.GGMLQuantizationType.F32
    table = component_of(loaded.anatomy, name) in ("embedding", "head")
    chosen = settings.type if not table or settings.embedding_type == "same" else settings.embedding_type
    fits = chosen == "F32" or values.shape[-1] % BLOCK == 0
    return gguf.GGMLQuantizationType[chosen if fits else "F16"]


def _row(loaded: LoadedModel, name: str, values: Any, read: Any, kind: str, nbytes: int) -> dict[str, Any]:
    gap = read.astype(np.float64) - values
    return {
        "component": component_of(loaded.anatomy, name),
        "format": kind,
        "parameters": values.size,
        "bytes": nbytes,
        "noise": float((gap**2).sum()),
        "signal": float((values.astype(np.float64) ** 2).sum()),
    }


def _refuse_other_tokens(loaded: LoadedModel, folder: Path) -> None:
    """The tokenizer in the file must cut text as the model's own does."""
    with quiet():
        read = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=FILE, local_files_only=True)
    assert loaded.tokenizer is not None
    if (
        read(TEXT, add_special_tokens=False)["input_ids"]
        != loaded.tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    ):
        raise CannotExport(
            "read back from the GGUF file, the tokenizer cuts a text into other tokens than the model's own; nothing was "
            "kept. Export safetensors instead"
        )


def _notes(rows: list[dict[str, Any]], settings: GgufSettings) -> tuple[str, ...]:
    wide = sum(row["format"] == "F16" for row in rows)
    note = (
        f"{wide} matrices stay F16: 32 does not divide their rows." if wide and settings.type != "F16" else ""
    )
    return (
        note,
        "Checked through transformers' GGUF reader; llama.cpp rounds activations too and was not run.",
    )
