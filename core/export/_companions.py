"""Config, tokenizer and processor beside weights that are written anew."""

from __future__ import annotations

from pathlib import Path

from core.models.loaded import LoadedModel
from core.saving.store import copy_companions, write_json


def write_companions(loaded: LoadedModel, folder: Path, dtype: str) -> None:
    """Copy what lies beside the model's own weights; ``config.json`` says dense weights of this dtype."""
    copy_companions(loaded.folder, folder)
    config = {k: v for k, v in loaded.model.config.to_dict().items() if k != "quantization_config"}
    write_json(
        folder / "config.json", {**config, "architectures": [loaded.anatomy.architecture], "dtype": dtype}
    )
