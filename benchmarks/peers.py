"""What other libraries make of a model folder: their real bytes on disk, and their weights as plain floats.

    PEERS_PYTHON benchmarks/peers.py LIBRARY BITS MODEL_FOLDER OUT_FOLDER CALIBRATION.json

Runs in an environment of its own and imports nothing of Slimscope. ``OUT_FOLDER`` receives a model that plain
transformers opens, whose weights are exactly what the library's file gives back, and ``peer.json``: library, version,
bytes of its own weight files, wall and processor seconds. Calibration is the token ids that our methods read: [[id, …], …].
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

GROUP = 32


def main() -> None:
    """Run one library and write what came out."""
    library, bits, folder, out, calibration = sys.argv[1:]
    with open(calibration, encoding="utf-8") as stream:
        ids = json.load(stream)
    model, stored, version, (seconds, cpu_seconds) = LIBRARIES[library](Path(folder), int(bits), ids)
    target = Path(out)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    dense = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    replaced = dense.load_state_dict(model, strict=False)
    if replaced.unexpected_keys:
        raise SystemExit(f"{library} left {replaced.unexpected_keys[:3]}, which the model has not")
    dense.save_pretrained(target)
    tokenizer.save_pretrained(target)
    facts = {
        "library": library, "version": version, "bytes": stored, "seconds": seconds, "cpu_seconds": cpu_seconds,
    }  # fmt: skip
    (target / "peer.json").write_text(json.dumps(facts), encoding="utf-8")


class Clock:
    """Wall and processor seconds since it was made."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def read(self) -> tuple[float, float]:
        """Both, so far."""
        return time.perf_counter() - self._wall, time.process_time() - self._cpu


Made = tuple[dict[str, torch.Tensor], int, str, tuple[float, float]]
"""Dense weights by parameter name, bytes of the library's files, its version, wall and processor seconds of quantizing."""


def quanto(folder: Path, bits: int, ids: list[list[int]]) -> Made:
    """optimum-quanto: its own loader and file; embedding and head as they are."""
    from importlib.metadata import version

    from optimum.quanto import QTensor, QuantizedModelForCausalLM, qint2, qint4, qint8

    del ids
    model = opened(folder, torch.bfloat16)
    clock = Clock()
    wrapped = QuantizedModelForCausalLM.quantize(
        model, weights={8: qint8, 4: qint4, 2: qint2}[bits], exclude="lm_head"
    )
    seconds = clock.read()
    with tempfile.TemporaryDirectory() as scratch:
        wrapped.save_pretrained(scratch)
        stored = weight_bytes(Path(scratch))
    inner = getattr(wrapped, "_wrapped", model)
    weights = {
        f"{name}.weight": module.weight.dequantize().float()  # the first call compiles quanto's C++ kernel
        for name, module in inner.named_modules()
        if isinstance(getattr(module, "weight", None), QTensor)
    }
    return weights, stored, version("optimum-quanto"), seconds


def bitsandbytes(folder: Path, bits: int, ids: list[list[int]]) -> Made:
    """bitsandbytes: NF4 with double quantization, or int8; saved before the first forward."""
    import bitsandbytes as library

    del ids
    settings = (
        transformers.BitsAndBytesConfig(load_in_8bit=True)
        if bits == 8
        else transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
    )
    clock = Clock()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=settings, dtype=torch.bfloat16
    )
    seconds = clock.read()
    with tempfile.TemporaryDirectory() as scratch:
        model.save_pretrained(scratch)
        stored = weight_bytes(Path(scratch))
    weights = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, library.nn.Params4bit):
            dense = library.functional.dequantize_4bit(weight.data, weight.quant_state)
            weights[f"{name}.weight"] = dense.float()
        elif isinstance(weight, library.nn.Int8Params):
            weights[f"{name}.weight"] = weight.data.float() * weight.SCB.view(-1, 1).float() / 127
    return weights, stored, library.__version__, seconds


def torchao(folder: Path, bits: int, ids: list[list[int]]) -> Made:
    """torchao: int8 weight-only; its 4-bit files take a byte per weight on the CPU."""
    from importlib.metadata import version

    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    del ids
    assert bits == 8, "torchao's integer files under 8 bits are not packed on the CPU"
    model = opened(folder, torch.bfloat16)
    clock = Clock()
    quantize_(model, Int8WeightOnlyConfig())
    seconds = clock.read()
    with tempfile.NamedTemporaryFile() as scratch:
        torch.save(model.state_dict(), scratch.name)
        stored = Path(scratch.name).stat().st_size
    weights = {
        f"{name}.weight": module.weight.dequantize().float()
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and type(module.weight.data) is not torch.Tensor
    }
    return weights, stored, version("torchao"), seconds


def auto_round(folder: Path, bits: int, ids: list[list[int]]) -> Made:
    """auto-round: learned rounding on the same windows, affine groups of 32, its default 200 iterations."""
    from importlib.metadata import version

    from auto_round import AutoRound

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    data = [torch.tensor(row)[None] for row in ids]
    rounder = AutoRound(
        str(folder), tokenizer, bits=bits, group_size=GROUP, sym=False, nsamples=len(ids), seqlen=len(ids[0]),
        dataset=data, batch_size=8, low_gpu_mem_usage=False, enable_torch_compile=False,
    )  # fmt: skip
    clock = Clock()
    with tempfile.TemporaryDirectory() as scratch:
        rounder.quantize_and_save(scratch, format="auto_round")
        seconds = clock.read()
        stored = weight_bytes(Path(scratch))
        dense = {n: p.detach().float() for n, p in unpacked(Path(scratch), bits)}
    return dense, stored, version("auto-round"), seconds


def unpacked(folder: Path, bits: int) -> Any:
    """The dense weights of auto-round's own file: packed codes and zeros along the input, scales by group."""
    from safetensors.torch import load_file

    tensors: dict[str, torch.Tensor] = {}
    for file in folder.rglob("*.safetensors"):
        tensors.update(load_file(file))
    for name in [n for n in tensors if n.endswith(".qweight")]:
        module = name.removesuffix(".qweight")
        codes_IO = _unpack_rows(tensors[name], bits)
        zeros_GO = _unpack_rows(tensors[f"{module}.qzeros"].T.contiguous(), bits).T
        scales_GO = tensors[f"{module}.scales"].float()
        zeros_GO = zeros_GO[:, : scales_GO.shape[1]]
        groups = torch.arange(codes_IO.shape[0]) * len(scales_GO) // codes_IO.shape[0]
        yield f"{module}.weight", ((codes_IO - zeros_GO[groups]) * scales_GO[groups]).T.contiguous()


def _unpack_rows(words_WO: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes packed down the rows of int32 words, lowest bits first; a code may straddle two words."""
    stream = words_WO.T.contiguous().view(torch.uint8).reshape(words_WO.shape[1], -1)
    as_bits = (stream.unsqueeze(-1) >> torch.arange(8)) & 1
    as_bits = as_bits.reshape(stream.shape[0], -1)
    n = as_bits.shape[1] // bits
    codes = (as_bits[:, : n * bits].reshape(-1, n, bits).int() << torch.arange(bits)).sum(-1)
    return codes.T


def llm_compressor(folder: Path, bits: int, ids: list[list[int]]) -> Made:
    """llm-compressor: GPTQ on the same windows, affine groups of 32."""
    from importlib.metadata import version

    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier

    model = opened(folder, torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    data = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]})
    weights = {
        "num_bits": bits, "type": "int", "symmetric": False, "strategy": "group", "group_size": GROUP,
    }  # fmt: skip
    modifier = GPTQModifier(
        config_groups={"all": {"targets": ["Linear"], "weights": weights}}, ignore=["lm_head"]
    )
    clock = Clock()
    oneshot(
        model=model, processor=tokenizer, dataset=data, recipe=modifier, num_calibration_samples=len(ids),
        max_seq_length=len(ids[0]),
    )  # fmt: skip
    seconds = clock.read()
    dense = {n: p.detach().float().clone() for n, p in model.named_parameters() if n.endswith("proj.weight")}
    with tempfile.TemporaryDirectory() as scratch:
        model.save_pretrained(scratch, save_compressed=True)
        stored = weight_bytes(Path(scratch))
    return dense, stored, version("llmcompressor"), seconds


def opened(folder: Path, dtype: torch.dtype) -> Any:
    """The model as everyone opens it."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def weight_bytes(folder: Path) -> int:
    """Bytes of the weight files that a library wrote."""
    return sum(
        file.stat().st_size for kind in ("*.safetensors", "*.bin", "*.pt") for file in folder.rglob(kind)
    )


LIBRARIES: dict[str, Callable[[Path, int, list[list[int]]], Made]] = {
    "quanto": quanto,
    "bitsandbytes": bitsandbytes,
    "torchao": torchao,
    "auto_round": auto_round,
    "llm_compressor": llm_compressor,
}

if __name__ == "__main__":
    main()
