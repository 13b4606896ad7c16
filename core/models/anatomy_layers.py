"""Finding the parts of one transformer layer: its attention by the rows of ``anatomy_layouts.py``, then its MLP."""

from __future__ import annotations

from typing import Any

from core.errors import CannotOpen
from core.models.anatomy import Block
from core.models.anatomy_layouts import (
    ATTENTION,
    MLP,
    MOE_BLOCKS,
    ROUTERS,
    SCALED_INPUT_EXPERTS,
    SHARED_EXPERTS,
    SHARED_GATES,
    UNSUPPORTED_EXPERTS,
    AttentionLayout,
)
from core.models.module_paths import first_present, submodule


def refuse_experts(model: Any) -> None:
    """Refuse mixtures of experts that are known not to fit, by name and with the reason."""
    for path, module in model.named_modules():
        name = type(module).__name__
        if name in UNSUPPORTED_EXPERTS:
            raise CannotOpen(
                f"{path}: {name} {UNSUPPORTED_EXPERTS[name]}; this mixture of experts is not supported"
            )


def match_attention(layer: Any, path: str, architecture: str) -> AttentionLayout:
    """The first row of the layouts whose modules are all there; raises ``CannotOpen`` where none is."""
    for layout in ATTENTION:
        parts = (layout.attention, layout.q, layout.k, layout.v, layout.o, *layout.norms)
        if all(submodule(layer, part) is not None for part in parts):
            return layout
    children = ", ".join(name for name, _ in layer.named_children())
    raise CannotOpen(
        f"{architecture}: the layer {path} ({children}) has no attention and norms of a known layout; "
        "this architecture is not supported"
    )


def block_at(layer: Any, index: int, path: str, layout: AttentionLayout) -> Block:
    """One layer's paths; raises ``CannotOpen`` for an MLP or a mixture of experts of no known layout."""
    sandwich = layout.norm_place == "sandwich"
    mlp = _mlp_parts(layer, path)
    write = layout.norms[2] if sandwich else layout.write or layout.attention
    mlp_write = f"{path}.{layout.norms[3]}" if sandwich else mlp["mlp_write"]
    if layout.mlp_write:
        mlp_write = f"{path}.{layout.mlp_write}"
    return Block(
        index=index,
        path=path,
        attention=f"{path}.{layout.attention}",
        q=f"{path}.{layout.q}",
        k=f"{path}.{layout.k}",
        v=f"{path}.{layout.v}",
        o=f"{path}.{layout.o}",
        attention_norm=f"{path}.{layout.norms[0]}",
        mlp_norm=f"{path}.{layout.norms[1]}",
        attention_write=f"{path}.{write}",
        mixer="sink_heads" if hasattr(layer.get_submodule(layout.attention), "sinks") else layout.mixer,
        **_cache_facts(layer.get_submodule(layout.attention), layout),
        **{**mlp, "mlp_write": mlp_write},
    )


def _cache_facts(mixer: Any, layout: AttentionLayout) -> dict[str, Any]:
    """What a mixer without plain keys and values keeps for the next token, in numbers."""
    if layout.mixer == "latent":
        return {"latent": mixer.kv_lora_rank + mixer.qk_rope_head_dim}
    if layout.mixer == "mamba":
        width = mixer.ssm_state_size + mixer.conv_kernel_size
        return {"state": mixer.intermediate_size * width}
    return {}


def _mlp_parts(layer: Any, path: str) -> dict[str, Any]:
    """The MLP fields of a ``Block``: a mixture of experts if the layer has one, else a dense MLP."""
    place = next((name for name in MOE_BLOCKS if submodule(layer, f"{name}.experts") is not None), None)
    if place is not None:
        base = f"{path}.{place}"
        moe = layer.get_submodule(place)
        router = first_present(moe, "", ROUTERS)
        # Every fused experts module of transformers carries the activation hook of its shared contract.
        known = hasattr(moe.experts, "_apply_gate") or type(moe.experts).__name__ in SCALED_INPUT_EXPERTS
        if router is None or not known:
            raise CannotOpen(
                f"{base}: {type(moe.experts).__name__} is not a fused experts module with a router named "
                f"{' or '.join(ROUTERS)}; this mixture of experts is not supported"
            )
        shared = first_present(moe, "", SHARED_EXPERTS)
        gate = first_present(moe, "", SHARED_GATES)
        return {
            "mlp": base,
            "mlp_write": base,
            "gate": None,
            "up": None,
            "down": None,
            "router": f"{base}.{router}",
            "experts": f"{base}.experts",
            "shared_expert": f"{base}.{shared}" if shared else None,
            "shared_gate": f"{base}.{gate}" if gate else None,
        }
    for layout in MLP:
        parts = [part for part in (layout.module, layout.gate, layout.up, layout.down) if part]
        if all(submodule(layer, part) is not None for part in parts):
            return {
                "mlp": f"{path}.{layout.module}" if layout.module else None,
                "mlp_write": f"{path}.{layout.module or layout.down}",
                "gate": f"{path}.{layout.gate}" if layout.gate else None,
                "up": f"{path}.{layout.up}",
                "down": f"{path}.{layout.down}",
            }
    mlp = submodule(layer, "mlp") or layer
    children = ", ".join(name for name, _ in mlp.named_children())
    raise CannotOpen(f"{path}: the MLP ({children}) has no known layout; this architecture is not supported")
