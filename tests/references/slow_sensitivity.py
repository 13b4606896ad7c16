"""What one changed group does to a decoder, the obvious way: two whole runs, and KL in float64 from its definition."""

from __future__ import annotations

import numpy as np
import torch

from core.models.loaded import LoadedModel


def kl_of_change(
    loaded: LoadedModel, ids_WP: torch.Tensor, names: list[str], new: dict[str, torch.Tensor]
) -> np.ndarray:
    """Mean KL(before ‖ after) per window with the named parameters replaced; they are put back."""
    with torch.inference_mode():
        before = loaded.model(input_ids=ids_WP).logits.double().log_softmax(-1)
        old = {name: loaded.model.get_parameter(name).data for name in names}
        for name in names:
            loaded.model.get_parameter(name).data = new[name]
        after = loaded.model(input_ids=ids_WP).logits.double().log_softmax(-1)
        for name in names:
            loaded.model.get_parameter(name).data = old[name]
    return (before.exp() * (before - after)).sum(-1).mean(-1).numpy()


def fisher_form(loaded: LoadedModel, ids_P: torch.Tensor, name: str, delta: torch.Tensor) -> float:
    """½ Σ_i F_ii ΔW_i² per token with the Fisher information's diagonal summed over the whole vocabulary, no sampling."""
    parameter = loaded.model.get_parameter(name)
    parameter.requires_grad_(True)
    total = 0.0
    try:
        with torch.enable_grad():
            log_p_PV = loaded.model(input_ids=ids_P[None]).logits[0, :-1].log_softmax(-1)
            for log_p_V in log_p_PV:
                for log_p in log_p_V:  # every token there is
                    (gradient,) = torch.autograd.grad(log_p, parameter, retain_graph=True)
                    total += float(log_p.detach().exp()) * float((gradient.square() * delta.square()).sum())
    finally:
        parameter.requires_grad_(False)
    return total / 2 / len(log_p_PV)
