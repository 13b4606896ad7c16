"""Slow, obvious versions of what is said about heads: one head, one token at a time, whole V × V matrices."""

from __future__ import annotations

import torch

from core.models.anatomy import Block
from core.models.loaded import LoadedModel


def value_of(loaded: LoadedModel, block: Block, read_XD: torch.Tensor, head: int) -> torch.Tensor:
    """The value vector of a head for rows that it reads (already normed), by the module itself, in float64."""
    return cut_value(loaded, loaded.model.get_submodule(block.v)(read_XD), head).double()


def cut_value(loaded: LoadedModel, output: torch.Tensor, head: int) -> torch.Tensor:
    """A head's share of what the value projection puts out."""
    anatomy = loaded.anatomy
    group = head // (anatomy.n_heads // anatomy.n_kv_heads)
    start = {
        "separate": group * anatomy.head_dim,
        "concatenated": (anatomy.n_heads + anatomy.n_kv_heads + group) * anatomy.head_dim,
        "per_head": (3 * head + 2) * anatomy.head_dim,
    }[anatomy.fusion]
    return output[..., start : start + anatomy.head_dim]


def write_of(loaded: LoadedModel, block: Block, z_XK: torch.Tensor, head: int) -> torch.Tensor:
    """What a head's z adds to the stream, before any norm behind it: the output projection fed with this head only."""
    anatomy = loaded.anatomy
    module = loaded.model.get_submodule(block.o)
    fed = torch.zeros(*z_XK.shape[:-1], anatomy.n_heads * anatomy.head_dim)
    fed[..., head * anatomy.head_dim : (head + 1) * anatomy.head_dim] = z_XK
    scale = getattr(loaded.model.config, "residual_multiplier", 1.0)  # Granite
    return (module(fed) - module(torch.zeros_like(fed))).double() * scale


def gain(loaded: LoadedModel, path: str) -> torch.Tensor:
    """A norm's factor per dimension."""
    return loaded.model.get_submodule(path).weight.double() + loaded.anatomy.norm_offset


def unembedding_directions(loaded: LoadedModel) -> torch.Tensor:
    """[V, D]: the unembedding's rows with the final norm's gain, minus their mean where that norm subtracts one."""
    anatomy = loaded.anatomy
    rows = loaded.model.get_submodule(anatomy.unembedding).weight.double() * gain(loaded, anatomy.final_norm)
    centred = isinstance(loaded.model.get_submodule(anatomy.final_norm), torch.nn.LayerNorm)
    return rows - rows.mean(-1, keepdim=True) if centred else rows


def ov_copying_by_hand(loaded: LoadedModel, layer: int, head: int) -> float:
    """Σλ / Σ|λ| of the whole V × V matrix."""
    model, anatomy = loaded.model, loaded.anatomy
    block = anatomy.blocks[layer]
    norm = model.get_submodule(block.attention_norm)
    with torch.inference_mode():
        rows = (
            model.get_submodule(anatomy.embedding).weight * 1000
        )  # large, so that the norm's epsilon is nothing
        read = norm(rows) - (norm.bias if getattr(norm, "bias", None) is not None else 0)
        value = value_of(loaded, block, read, head) - value_of(loaded, block, read * 0, head)
        written = write_of(loaded, block, value.float(), head)
        if anatomy.norm_place == "sandwich":
            written = written * gain(loaded, block.attention_write)
        full = written @ unembedding_directions(loaded).T
        values = torch.linalg.eigvals(full)
    return float(values.real.sum() / values.abs().sum())


def value_norms_by_hand(loaded: LoadedModel, ids: list[int], layer: int, head: int) -> list[float]:
    """‖v · W_O‖ of one head at each position."""
    block = loaded.anatomy.blocks[layer]
    seen: list[torch.Tensor] = []
    hook = loaded.model.get_submodule(block.v).register_forward_hook(
        lambda m, args, output: seen.append(output)
    )
    with torch.inference_mode():
        loaded.model(torch.tensor([ids]))
        hook.remove()
        written = write_of(loaded, block, cut_value(loaded, seen[0], head), head)[0]
    return [sum(x * x for x in row) ** 0.5 for row in written.tolist()]


def weights_by_hand(loaded: LoadedModel, layer: int, head: int) -> dict[str, torch.Tensor]:
    """A head's q, k, v [D, K] and o [K, D] with the norms' gains, read off the modules with unit vectors."""
    model, anatomy = loaded.model, loaded.anatomy
    block = anatomy.blocks[layer]
    unit = torch.eye(anatomy.d_model)
    centre = torch.eye(anatomy.d_model, dtype=torch.float64)
    if isinstance(model.get_submodule(block.attention_norm), torch.nn.LayerNorm):
        centre = centre - 1 / anatomy.d_model
    size = anatomy.head_dim
    group = head // (anatomy.n_heads // anatomy.n_kv_heads)
    found = {}
    with torch.inference_mode():
        for index, (part, path) in enumerate((("q", block.q), ("k", block.k), ("v", block.v))):
            start = {
                "separate": (head if part == "q" else group) * size,
                "concatenated": (index * anatomy.n_heads + head) * size,
                "per_head": (3 * head + index) * size,
            }[anatomy.fusion]
            module = model.get_submodule(path)
            rows = (module(unit) - module(unit * 0)).double()[:, start : start + size]
            found[part] = centre @ (gain(loaded, block.attention_norm)[:, None] * rows)
        found["o"] = write_of(loaded, block, torch.eye(size), head)
        if anatomy.norm_place == "sandwich":
            found["o"] = found["o"] * gain(loaded, block.attention_write)
    return found


def composition_by_hand(
    loaded: LoadedModel, earlier: tuple[int, int], later: tuple[int, int]
) -> dict[str, float]:
    """‖W_OV · W_1‖ / (‖W_OV‖ ‖W_1‖) with whole D × D matrices, per way of reading."""
    first, second = weights_by_hand(loaded, *earlier), weights_by_hand(loaded, *later)
    written = first["v"] @ first["o"]
    read_by = {
        "q": second["q"] @ second["k"].T,
        "k": second["k"] @ second["q"].T,
        "v": second["v"] @ second["o"],
    }
    return {
        part: float((written @ matrix).norm() / (written.norm() * matrix.norm()))
        for part, matrix in read_by.items()
    }
