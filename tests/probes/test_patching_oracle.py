"""The exact patch grid on the real SmolLM2 against TransformerLens."""

from __future__ import annotations

import pytest
import torch

from core.models.open import open_model
from core.registry import get
from core.types import ModelRef, silent


@pytest.mark.slow
def test_the_residual_grid_equals_transformer_lens() -> None:
    bridge_module = pytest.importorskip("transformer_lens.model_bridge")
    method = get("probe", "activation_patching")
    example = method.examples[0]
    settings = method.parse(dict(example.settings))
    ours = method.run(open_model(ModelRef("demo:smollm2")), example.prompt, silent, settings).frame
    theirs = open_model(ModelRef("demo:smollm2"))  # TransformerLens replaces modules of the model it is given
    bridge = bridge_module.TransformerBridge.boot_transformers(
        str(theirs.folder),
        hf_model=theirs.model,
        tokenizer=theirs.tokenizer,
        device="cpu",
        dtype=torch.float32,
    )
    clean, corrupted, (mary, john) = (
        theirs.tokenizer(text)["input_ids"]
        for text in (example.prompt.text, settings.corrupted, " Mary John")
    )
    with torch.inference_mode():
        _, cache = bridge.run_with_cache(torch.tensor([clean]))
        for layer in (0, 13, 29):
            name = f"blocks.{layer}.hook_resid_pre"

            def write(state: torch.Tensor, hook: object, name: str = name) -> torch.Tensor:
                state = state.clone()
                state[torch.arange(len(clean)), torch.arange(len(clean))] = cache[name][0]
                return state

            ids = torch.tensor([corrupted]).expand(len(clean), -1)
            logits = bridge.run_with_hooks(ids, fwd_hooks=[(name, write)])[:, -1]
            expected = (logits[:, mary] - logits[:, john]).tolist()
            found = ours.loc[ours["layer"] == layer, "metric"].tolist()
            assert found == pytest.approx(expected, abs=1e-4)
