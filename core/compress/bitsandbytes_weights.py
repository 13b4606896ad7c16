"""bitsandbytes: NF4 with double quantization, or LLM.int8."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from core.compress._library import by_transformers, quantized_by
from core.lazy import transformers
from core.libraries import needed
from core.models.loaded import LoadedModel
from core.registry import Settings, method
from core.types import Documents, Progress, Result


class BitsAndBytesSettings(Settings):
    """Which of the library's formats."""

    format: Literal["nf4", "int8"] = Field(
        default="nf4",
        description="nf4: 16 levels of a normal distribution, blocks of 64 whose scales are quantized too (4.1 bits); int8: "
        "LLM.int8, one scale per row, and activations rounded to 8 bits while it runs",
    )


@method(
    "compress",
    title="NF4 or int8 by bitsandbytes 0.50",
    group="quantize",
    paper="https://arxiv.org/abs/2305.14314",
)
def run(
    loaded: LoadedModel, calibration: Documents | None, progress: Progress, settings: BitsAndBytesSettings
) -> Result:
    """Quantize every linear layer by the bitsandbytes library: NF4 or LLM.int8.

    Loads with ``AutoModel.from_pretrained`` where bitsandbytes is installed, and runs the library's kernels there. Double
    quantization is always on, and the files are written before the model has run once: 0.50.2 repacks NF4 weights at the
    first forward pass on processors with AVX512-BF16, and without it what is saved afterwards is wrong. Embedding, head
    and norms stay; put cast first to hold them in 16 bits. Quality is measured on the dense weights, without LLM.int8's
    rounding of activations; speed on the library's kernels.
    """
    version = needed("bitsandbytes", by="bitsandbytes_weights")["bitsandbytes"]
    nf4 = settings.format == "nf4"

    def config() -> object:
        made: Any = transformers.BitsAndBytesConfig
        compute = loaded.model.dtype
        if not nf4:
            return made(load_in_8bit=True)
        return made(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute,
        )

    return quantized_by(
        loaded,
        lambda folder, auto: by_transformers(
            folder, auto, config(), library="bitsandbytes", version=version, label=f"bitsandbytes {settings.format}"
        ),
        progress, settings, method="bitsandbytes_weights", bits=4 if nf4 else 8,
    )  # fmt: skip
