"""torchao: int8 weights."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from core.compress._library import by_transformers, quantized_by
from core.errors import CannotCompress
from core.lazy import transformers
from core.libraries import needed
from core.models.loaded import LoadedModel
from core.registry import Settings, method
from core.types import Documents, Progress, Result


class TorchAoSettings(Settings):
    """Which of the library's formats."""

    format: Literal["int8", "int4"] = Field(
        default="int8",
        description="int8: one scale per row, activations untouched; int4 is refused: the CPU layout of 0.18 stores a byte "
        "per weight, so its file is larger than int8's",
    )


@method("compress", title="Int8 by torchao 0.18", group="quantize", paper="https://github.com/pytorch/ao")
def run(
    loaded: LoadedModel, calibration: Documents | None, progress: Progress, settings: TorchAoSettings
) -> Result:
    """Quantize every linear layer to int8 by the torchao library, weights only.

    Loads with ``AutoModel.from_pretrained`` where torchao is installed; its checkpoints name the version of their
    config, and another torchao may not read them. Embedding, head and norms stay; put cast first to hold them in 16 bits.
    """
    version = needed("torchao", by="torchao_weights")["torchao"]
    if settings.format == "int4":
        raise CannotCompress(
            "torchao 0.18 stores int4 weights as one byte each on the CPU, so the file would be larger than int8's; "
            "use format=int8 here, or 4 bits by rtn, gptq, quanto_weights or bitsandbytes_weights"
        )

    def config() -> object:
        from torchao.quantization import Int8WeightOnlyConfig

        return transformers.TorchAoConfig(Int8WeightOnlyConfig())

    return quantized_by(
        loaded,
        lambda folder, auto: by_transformers(
            folder, auto, config(), library="torchao", version=version, label="torchao int8"
        ),
        progress, settings, method="torchao_weights", bits=8,
    )  # fmt: skip
