"""Finding a model's anatomy from its modules, their shapes and its config.

Layers are recognised by the rows of ``anatomy_layouts.py``; what fits no row is refused here. The result is a claim,
which ``anatomy_verify.py`` proves by running the model.
"""

from __future__ import annotations

from typing import Any

from core.errors import AnatomyMismatch, CannotOpen
from core.models.anatomy import Anatomy, Block, Fusion
from core.models.anatomy_layouts import (
    ATTENTION,
    FINAL_NORMS,
    MLP,
    MOE_BLOCKS,
    POSITIONS,
    ROUTERS,
    SCALED_INPUT_EXPERTS,
    SHARED_EXPERTS,
    UNSUPPORTED_EXPERTS,
    AttentionLayout,
)
from core.models.patch_grid import patch_grid
from core.types import Family


def find_anatomy(model: Any) -> Anatomy:
    """Locate everything in a Hugging Face model; raises ``CannotOpen`` saying what has no known place.

    The result is a claim: prove it with ``verify_anatomy``.
    """
    config = model.config.get_text_config()
    architecture = type(model).__name__
    _refuse_unsupported(config, architecture)
    _refuse_experts(model)
    stack_path, layers = _find_stack(model, config.num_hidden_layers)
    paths = [f"{stack_path}.{index}" for index in range(len(layers))]
    layouts = [_match_attention(layer, path, architecture) for layer, path in zip(layers, paths, strict=True)]
    # Jamba's layers differ in their mixer; all else is the same in every layer.
    with_heads = next((index for index, layout in enumerate(layouts) if layout.mixer == "heads"), 0)
    attention = layouts[with_heads]
    blocks = tuple(
        _block(layer, index, path, layout)
        for index, (layer, path, layout) in enumerate(zip(layers, paths, layouts, strict=True))
    )
    family = _family(model, attention)
    base = stack_path.rpartition(".")[0]
    around = base.rpartition(".")[0]
    position_embedding = _position_path(model, base, around, family)
    embedding = _embedding(model, architecture)
    head = _head(model)
    n_heads = config.num_attention_heads
    n_kv_heads = getattr(config, "num_key_value_heads", None) or n_heads
    head_dim = _head_dim(model, blocks[with_heads], attention.fusion, n_heads, n_kv_heads)
    divisor = float(getattr(config, "logits_scaling", None) or 1.0)
    n_experts, experts_per_token = _moe_facts(model, config, blocks)
    embedding_module = model.get_submodule(embedding)
    return Anatomy(
        model_type=config.model_type,
        architecture=architecture,
        family=family,
        embedding=embedding,
        embedding_scale=float(
            getattr(embedding_module, "scalar_embed_scale", getattr(config, "embedding_multiplier", 1.0))
        ),
        position_embedding=position_embedding,
        position_offset=int(getattr(_submodule(model, position_embedding), "offset", 0)),
        token_type_embedding=_path_or_none(model, _join(around, "embeddings.token_type_embeddings")),
        embedding_norm=_path_or_none(model, _join(around, "embeddings.LayerNorm")),
        blocks=blocks,
        final_norm=_final_norm(model, base, around, attention),
        head_transform=_path_or_none(model, "cls.predictions.transform"),
        unembedding=head,
        tied=head is not None
        and getattr(model.get_submodule(head), "weight", None) is getattr(embedding_module, "weight", ()),
        norm_place=attention.norm_place,
        norm_offset=1.0 if "Gemma" in architecture else 0.0,
        fusion=attention.fusion,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        d_model=config.hidden_size,
        d_ff=_d_ff(model, blocks),
        activation=_activation(config),
        vocab_size=config.num_labels if family == "vision" else embedding_module.weight.shape[0],
        context_length=_context_length(config, family),
        windows=_windows(config, len(blocks)),
        n_experts=n_experts,
        experts_per_token=experts_per_token,
        parallel_residual=bool(getattr(config, "use_parallel_residual", False)),
        residual_scale=float(getattr(config, "residual_multiplier", 1.0)),
        logit_scale=float(getattr(config, "logit_scale", None) or 1.0) / divisor,
        logit_divisor=divisor,
        logit_softcap=getattr(config, "final_logit_softcapping", None),
        attention_softcap=getattr(config, "attn_logit_softcapping", None),
    )


def _refuse_unsupported(config: Any, architecture: str) -> None:
    if getattr(config, "is_encoder_decoder", False):
        raise CannotOpen(
            f"{architecture} is an encoder–decoder; open a decoder, an encoder or a ViT classifier"
        )
    width = getattr(config, "word_embed_proj_dim", config.hidden_size)
    if width != config.hidden_size or not getattr(config, "do_layer_norm_before", True):
        raise CannotOpen(
            f"{architecture}: project_in/project_out and norms after the sublayer (OPT-350m) are not supported; "
            "open another size of OPT"
        )


def _refuse_experts(model: Any) -> None:
    """Refuse mixtures of experts that are known not to fit, by name and with the reason."""
    for path, module in model.named_modules():
        name = type(module).__name__
        if name in UNSUPPORTED_EXPERTS:
            raise CannotOpen(
                f"{path}: {name} {UNSUPPORTED_EXPERTS[name]}; this mixture of experts is not supported"
            )


def _find_stack(model: Any, n_layers: int) -> tuple[str, Any]:
    """The one outermost list of layers whose length is the config's."""
    from torch import nn

    lists = [(p, m) for p, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    outer = [(p, m) for p, m in lists if not any(p.startswith(f"{q}.") for q, _ in lists)]
    found = [(path, module) for path, module in outer if len(module) == n_layers]
    if len(found) != 1:
        raise CannotOpen(
            f"{type(model).__name__}: expected one list of {n_layers} transformer layers, "
            f"found {[(path, len(module)) for path, module in outer]}; this architecture is not supported"
        )
    return found[0]


def _match_attention(layer: Any, path: str, architecture: str) -> AttentionLayout:
    for layout in ATTENTION:
        parts = (layout.attention, layout.q, layout.k, layout.v, layout.o, *layout.norms)
        if all(_submodule(layer, part) is not None for part in parts):
            return layout
    children = ", ".join(name for name, _ in layer.named_children())
    raise CannotOpen(
        f"{architecture}: the layer {path} ({children}) has no attention and norms of a known layout; "
        "this architecture is not supported"
    )


def _block(layer: Any, index: int, path: str, layout: AttentionLayout) -> Block:
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
    place = next((name for name in MOE_BLOCKS if _submodule(layer, f"{name}.experts") is not None), None)
    if place is not None:
        base = f"{path}.{place}"
        moe = layer.get_submodule(place)
        router = _first_present(moe, "", ROUTERS)
        # Every fused experts module of transformers carries the activation hook of its shared contract.
        known = hasattr(moe.experts, "_apply_gate") or type(moe.experts).__name__ in SCALED_INPUT_EXPERTS
        if router is None or not known:
            raise CannotOpen(
                f"{base}: {type(moe.experts).__name__} is not a fused experts module with a router named "
                f"{' or '.join(ROUTERS)}; this mixture of experts is not supported"
            )
        shared = _first_present(moe, "", SHARED_EXPERTS)
        return {
            "mlp": base,
            "mlp_write": base,
            "gate": None,
            "up": None,
            "down": None,
            "router": f"{base}.{router}",
            "experts": f"{base}.experts",
            "shared_expert": f"{base}.{shared}" if shared else None,
        }
    for layout in MLP:
        parts = [part for part in (layout.module, layout.gate, layout.up, layout.down) if part]
        if all(_submodule(layer, part) is not None for part in parts):
            return {
                "mlp": f"{path}.{layout.module}" if layout.module else None,
                "mlp_write": f"{path}.{layout.module or layout.down}",
                "gate": f"{path}.{layout.gate}" if layout.gate else None,
                "up": f"{path}.{layout.up}",
                "down": f"{path}.{layout.down}",
            }
    mlp = _submodule(layer, "mlp") or layer
    children = ", ".join(name for name, _ in mlp.named_children())
    raise CannotOpen(f"{path}: the MLP ({children}) has no known layout; this architecture is not supported")


def _family(model: Any, layout: AttentionLayout) -> Family:
    if model.main_input_name == "pixel_values":
        return "vision"
    return "encoder" if layout.norm_place == "post" else "decoder"


def _embedding(model: Any, architecture: str) -> str:
    path = _path_of(model, model.get_input_embeddings())
    if path is None:
        raise CannotOpen(f"{architecture} has no input embedding module; this architecture is not supported")
    return path


def _head(model: Any) -> str | None:
    """The unembedding or classifier, if it reads one position's residual: DINOv2's also reads the patches' mean."""
    head = model.get_output_embeddings() or getattr(model, "classifier", None)
    if getattr(head, "in_features", None) not in (None, model.config.get_text_config().hidden_size):
        return None
    return _path_of(model, head)


def _final_norm(model: Any, base: str, around: str, layout: AttentionLayout) -> str | None:
    """None for a post-norm encoder, whose last block already norms; DINOv2's stands around its encoder."""
    if layout.norm_place == "post":
        return None
    found = _first_present(model, base, FINAL_NORMS) or _first_present(model, around, FINAL_NORMS)
    if found is None:
        raise CannotOpen(
            f"{type(model).__name__}: no final norm among {', '.join(FINAL_NORMS)} in {base or 'the model'}"
        )
    return found


def _head_dim(model: Any, block: Block, fusion: Fusion, n_heads: int, n_kv_heads: int) -> int:
    """Read the head size off the projection's rows; refuse rows that do not divide into the config's heads.

    Latent attention has queries of another size: there it is what o reads of each head.
    """
    if not block.has_pattern:
        return int(model.get_submodule(block.o).in_features) // n_heads
    rows = _out_features(model.get_submodule(block.q))
    parts = n_heads if fusion == "separate" else n_heads + 2 * n_kv_heads
    if rows % parts:
        raise AnatomyMismatch(f"{block.q}: {rows} outputs do not divide into {parts} heads")
    head_dim = rows // parts
    if fusion == "separate" and _out_features(model.get_submodule(block.v)) != n_kv_heads * head_dim:
        raise AnatomyMismatch(f"{block.v}: outputs are not {n_kv_heads} key/value heads of {head_dim}")
    return head_dim


def _out_features(linear: Any) -> int:
    """Linear stores [out, in]; GPT-2's Conv1D stores [in, out] and calls out ``nf``."""
    return int(getattr(linear, "nf", None) or linear.out_features)


def _d_ff(model: Any, blocks: tuple[Block, ...]) -> int:
    for block in blocks:
        if block.up is not None:
            return _out_features(model.get_submodule(block.up))
    experts = model.get_submodule(blocks[0].experts)
    return int(getattr(experts, "intermediate_dim", 0) or experts.intermediate_size)


def _moe_facts(model: Any, config: Any, blocks: tuple[Block, ...]) -> tuple[int, int]:
    moe = [block for block in blocks if block.is_moe]
    if not moe:
        return 0, 0
    experts = model.get_submodule(moe[0].experts)
    return int(experts.num_experts), int(config.num_experts_per_tok)


def _position_path(model: Any, base: str, around: str, family: Family) -> str | None:
    if family == "vision":
        return _first_present(model, base, ("embeddings",)) or _path_or_none(
            model, _join(around, "embeddings")
        )
    return _first_present(model, base, POSITIONS) or _first_present(model, around, POSITIONS)


def _windows(config: Any, n_layers: int) -> tuple[int | None, ...]:
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    if types is None:
        return (window,) * n_layers
    looks_back = {
        "sliding_attention": window,
        "chunked_attention": getattr(config, "attention_chunk_size", None),
    }
    return tuple(looks_back.get(kind) for kind in types)


def _context_length(config: Any, family: Family) -> int:
    if family == "vision":
        return patch_grid(config).n_tokens
    return int(config.max_position_embeddings)


def _activation(config: Any) -> str:
    names = ("hidden_activation", "hidden_act", "activation_function")
    found: str = next(value for name in names if (value := getattr(config, name, None)))
    return found


def _submodule(module: Any, path: str | None) -> Any | None:
    if not path:
        return None
    try:
        return module.get_submodule(path)
    except AttributeError:
        return None


def _path_or_none(model: Any, path: str) -> str | None:
    return path if _submodule(model, path) is not None else None


def _first_present(model: Any, base: str, names: tuple[str, ...]) -> str | None:
    paths = (_join(base, name) for name in names)
    return next((path for path in paths if _submodule(model, path) is not None), None)


def _path_of(model: Any, module: Any | None) -> str | None:
    paths = (str(path) for path, candidate in model.named_modules() if candidate is module)
    return next(paths, None)


def _join(base: str, name: str) -> str:
    return f"{base}.{name}" if base else name
