"""Lower rank where the architecture can hold it, and a refusal with the reason everywhere else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from core.errors import BadInput, CannotCompress
from core.models.loaded import LoadedModel
from core.registry import get
from core.reshape.value_rank import truncated
from core.types import Documents, Result, silent
from tests.compress.making import own_model, save
from tests.compress.reloading import reloads
from tests.tiny import CORPUS, tiny_model

TEXT = Documents("corpus", "calibration", CORPUS * 4)
SMALL: dict[str, Any] = {"samples": 8, "sample_tokens": 32}
IDS = torch.randint(512, (2, 24), generator=torch.Generator().manual_seed(5))


def lowered(loaded: LoadedModel, **settings: Any) -> Result:
    chosen = get("compress", "low_rank")
    result: Result = chosen.run(loaded, TEXT, silent, None, chosen.parse({**SMALL, **settings}))
    return result


def test_no_pair_of_that_rank_is_closer() -> None:
    """The error is the tail of the singular values of what is written, O Z, or of the product O V itself."""
    generator = torch.Generator().manual_seed(0)
    output = torch.randn(40, 12, generator=generator)
    value = torch.randn(12, 20, generator=generator)
    latents = torch.randn(300, 20, generator=generator) * torch.linspace(0.1, 3, 20)
    z = latents @ value.T
    for gram, whole in ((z.T @ z, output @ z.T), (None, output @ value)):
        sizes = np.linalg.svd(whole.double().numpy(), compute_uv=False)
        for rank in (3, 9, 12):
            new_output, new_value, error = truncated(output, value, gram, rank)
            assert (new_output[:, rank:] == 0).all()
            assert (new_value[rank:] == 0).all()
            written = new_output @ new_value @ latents.T if gram is not None else new_output @ new_value
            best = (sizes[rank:] ** 2).sum() ** 0.5 / (sizes**2).sum() ** 0.5
            assert error == pytest.approx(best, abs=2e-3)
            assert float((written - whole).norm() / whole.norm()) == pytest.approx(best, abs=2e-3)


@pytest.mark.parametrize("weighting", ["outputs", "weights"])
def test_values_that_are_not_used_are_cut_for_free_and_the_rest_reloads(
    weighting: str, tmp_path: Path
) -> None:
    loaded = own_model("deepseek_v3", tmp_path)
    for block in loaded.anatomy.blocks:
        weight = loaded.model.get_submodule(block.o).weight.data.view(128, 4, 32)
        mix = torch.randn(4, 16, 32, generator=torch.Generator().manual_seed(block.index))
        weight.copy_(torch.einsum("dhk,hkv->dhv", weight[..., :16], mix) / 4)  # of rank 16
    with torch.inference_mode():
        before = loaded.model(IDS).logits
        n_before = sum(p.numel() for p in loaded.model.parameters())
        result = lowered(loaded, share=0.5, weighting=weighting)
        after = loaded.model(IDS).logits
    assert loaded.model.config.v_head_dim == 16
    # 3 layers of o_proj and of the values' rows of kv_b_proj, 4 heads of 16 dimensions
    assert n_before - sum(p.numel() for p in loaded.model.parameters()) == 3 * 4 * 16 * (128 + 64)
    assert float((after - before).norm() / before.norm()) < 2e-3
    save(loaded, result, tmp_path / "variant")
    reloads(loaded, tmp_path / "variant")


def test_what_cannot_hold_it_is_refused() -> None:
    for family in ("llama", "gpt2", "jamba"):
        with pytest.raises(CannotCompress, match="saves nothing"):
            lowered(tiny_model(family))
    with pytest.raises(BadInput, match="a multiple of 8 from 8 to 24"):
        lowered(tiny_model("deepseek_v3"), share=0.05)
