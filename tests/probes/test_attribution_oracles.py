"""Direct logit attribution on the real SmolLM2 against TransformerLens' own activations and weights."""

from __future__ import annotations

import pytest
import torch

from core.models.open import open_model
from core.probes.direct_logit_attribution import (
    DirectLogitAttributionSettings,
    direct_logit_attribution,
)
from core.types import ModelRef, Prompt, silent

TEXT = "The capital of France is"


@pytest.mark.slow
def test_direct_logit_attribution_equals_transformer_lens() -> None:
    bridge_module = pytest.importorskip("transformer_lens.model_bridge")
    loaded = open_model(ModelRef("demo:smollm2"))
    ours = direct_logit_attribution(
        loaded, Prompt(TEXT), silent, DirectLogitAttributionSettings(target=" Paris", distractor=" London")
    )
    found = dict(zip(ours.frame["component"], ours.frame["contribution"], strict=True))
    bridge = bridge_module.TransformerBridge.boot_transformers(
        str(loaded.folder),
        hf_model=loaded.model,
        tokenizer=loaded.tokenizer,
        device="cpu",
        dtype=torch.float32,
    )
    ids = torch.tensor([loaded.tokenizer(TEXT)["input_ids"]])
    with torch.inference_mode():
        logits, cache = bridge.run_with_cache(ids)
    paris, london = (loaded.tokenizer(word)["input_ids"][0] for word in (" Paris", " London"))
    norm = loaded.model.model.norm
    final = cache[f"blocks.{loaded.anatomy.n_layers - 1}.hook_resid_post"][0, -1].double()
    scale = (final.square().mean() + norm.variance_epsilon).sqrt()
    weight = loaded.model.lm_head.weight.double()
    direction = (weight[paris] - weight[london]) * norm.weight.double() / scale
    theirs = {"token embedding": cache["hook_embed"][0, -1].double() @ direction}
    for layer in range(loaded.anatomy.n_layers):
        theirs[f"MLP {layer}"] = cache[f"blocks.{layer}.hook_mlp_out"][0, -1].double() @ direction
        z = cache[f"blocks.{layer}.attn.hook_z"][0, -1].view(loaded.anatomy.n_heads, -1).double()
        written = loaded.model.model.layers[layer].self_attn.o_proj.weight.T.double()
        for head, row in enumerate(written.view(loaded.anatomy.n_heads, -1, loaded.anatomy.d_model)):
            theirs[f"L{layer}H{head}"] = z[head] @ row @ direction
    assert found.keys() == theirs.keys()
    assert max(abs(found[name] - float(value)) for name, value in theirs.items()) < 1e-4
    assert sum(found.values()) == pytest.approx(float(logits[0, -1, paris] - logits[0, -1, london]), abs=1e-4)
