"""What a saved variant of another structure must do: load plainly, say the same, and generate with its cache."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

from core.models.loaded import LoadedModel
from core.saving.fresh_load import output_of
from core.saving.proof import _probe_inputs, auto_class


def reloads(loaded: LoadedModel, folder: Path) -> None:
    """Fail unless plain transformers makes the same model of the files, with nothing missing, left over or renumbered."""
    auto = getattr(transformers, auto_class(loaded))
    model, report = auto.from_pretrained(folder, output_loading_info=True)
    tied = set(model.all_tied_weights_keys)
    pooler = {
        key for key in report["missing_keys"] if key.startswith("pooler.")
    }  # of an encoder opened without it
    assert not set(report["missing_keys"]) - tied - pooler
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    model.eval()
    inputs = _probe_inputs(loaded)
    assert torch.equal(output_of(model, inputs), output_of(loaded.model, inputs))
    if loaded.family != "decoder":
        return
    ids = inputs["input_ids"][:1, :20]
    options = {
        "max_new_tokens": 4,
        "do_sample": False,
        "attention_mask": torch.ones_like(ids),
        "pad_token_id": 0,
    }
    with torch.inference_mode():
        cached = model.generate(ids, use_cache=True, **options)
        assert torch.equal(cached, model.generate(ids, use_cache=False, **options))
