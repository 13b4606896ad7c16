"""Slow, obvious versions of rollout, relevance, patch occlusion and pair similarity: one number at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from core.models.loaded import LoadedModel


def patterns_of(loaded: LoadedModel, inputs: dict[str, Any]) -> list[np.ndarray]:
    """transformers' own ``output_attentions``: per layer [heads, queries, keys], float64."""
    kernel = loaded.model.config._attn_implementation
    loaded.model.set_attn_implementation("eager")
    try:
        with torch.inference_mode():
            output = loaded.model(**inputs, output_attentions=True)
    finally:
        loaded.model.set_attn_implementation(kernel)
    return [pattern[0].double().numpy() for pattern in output.attentions]


def rollout_by_hand(patterns: list[np.ndarray], residual_share: float) -> np.ndarray:
    """[n, n]: the sum over all paths through the layers of the product of their weights."""
    n = patterns[0].shape[-1]
    reached = np.eye(n)
    for pattern in patterns:
        after = np.zeros((n, n))
        for query in range(n):
            for key in range(n):
                weight = (1 - residual_share) * np.mean([head[query, key] for head in pattern])
                weight += residual_share * (query == key)
                for source in range(n):
                    after[query, source] += weight * reached[key, source]
        reached = after
    return reached


def relevance_by_differences(
    loaded: LoadedModel, inputs: dict[str, Any], target: int, *, step: float = 1e-4
) -> np.ndarray:
    """[n, n] relevance of a one-layer ViT in float64: every pattern entry's gradient by a central difference."""
    (pattern,) = patterns_of(loaded, inputs)
    attention = loaded.model.get_submodule(loaded.anatomy.blocks[0].attention)
    with torch.inference_mode():
        values: dict[str, Any] = {}
        hook = attention.v_proj.register_forward_hook(lambda module, args, output: values.update(v=output))
        loaded.model(**inputs)
        hook.remove()
        heads, n, _ = pattern.shape
        v_HKD = values["v"][0].view(n, heads, -1).transpose(0, 1)

        def logit(changed: np.ndarray) -> float:
            mixed = (torch.tensor(changed) @ v_HKD).transpose(0, 1).reshape(1, n, -1)
            replaced = attention.o_proj.register_forward_pre_hook(lambda module, args: (mixed,))
            answer = float(loaded.model(**inputs).logits[0, target])
            replaced.remove()
            return answer

        raised = np.zeros((n, n))
        for head in range(heads):
            for query in range(n):
                for key in range(n):
                    up, down = pattern.copy(), pattern.copy()
                    up[head, query, key] += step
                    down[head, query, key] -= step
                    gradient = (logit(up) - logit(down)) / (2 * step)
                    raised[query, key] += max(0.0, gradient * pattern[head, query, key]) / heads
    return np.eye(n) + raised


def occlusion_by_hand(
    loaded: LoadedModel, pixels: torch.Tensor, cover: torch.Tensor, target: int, patch: int
) -> list[float]:
    """What each patch's hiding costs the target's logit: one separate forward pass per patch, pixel by pixel."""
    height, width = pixels.shape[-2:]
    with torch.inference_mode():
        base = float(loaded.model(pixel_values=pixels).logits[0, target])
        costs = []
        for top in range(0, height, patch):
            for left in range(0, width, patch):
                hidden = pixels.clone()
                for y in range(top, top + patch):
                    for x in range(left, left + patch):
                        hidden[0, :, y, x] = cover[:, y, x]
                costs.append(base - float(loaded.model(pixel_values=hidden).logits[0, target]))
    return costs


def similarity_terms_by_hand(first: np.ndarray, second: np.ndarray) -> list[list[float]]:
    """Token vectors of two texts → each pair's term of the cosine of their means, by loops."""
    mean_a, mean_b = first.mean(0), second.mean(0)
    scale = float(np.sqrt((mean_a**2).sum()) * np.sqrt((mean_b**2).sum())) * len(first) * len(second)
    return [
        [sum(float(x) * float(y) for x, y in zip(a, b, strict=True)) / scale for b in second] for a in first
    ]
