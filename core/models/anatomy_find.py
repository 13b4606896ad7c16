"""Finding a model's anatomy from its modules, their shapes and its config.

Layers are recognised in ``anatomy_layers.py``; what fits no known layout is refused. The result is a claim, which
``anatomy_verify.py`` proves by running the model.
"""

from __future__ import annotations

from typing import Any

from core.errors import AnatomyMismatch, CannotOpen
from core.models.anatomy import Anatomy, Block, Fusion
from core.models.anatomy_layers import block_at, match_attention, refuse_experts
from core.models.anatomy_layouts import FINAL_NORMS, POSITIONS, AttentionLayout
from core.models.module_paths import first_present, join, path_of, path_or_none, submodule
from core.models.patch_grid import patch_grid
from core.types import Family


def find_anatomy(model: Any) -> Anatomy:
    """Locate everything in a Hugging Face model; raises ``CannotOpen`` saying what has no known place.

    The result is a claim: prove it with ``verify_anatomy``.
    """
    config = model.config.get_text_config()
    architecture = type(model).__name__
    refuse_experts(model)
    _refuse_unsupported(config, architecture)
    stack_path, layers = _find_stack(model, config.num_hidden_layers)
    paths = [f"{stack_path}.{index}" for index in range(len(layers))]
    layouts = [match_attention(layer, path, architecture) for layer, path in zip(layers, paths, strict=True)]
    # Jamba's layers differ in their mixer; all else is the same in every layer.
    with_heads = next((index for index, layout in enumerate(layouts) if layout.mixer == "heads"), 0)
    attention = layouts[with_heads]
    blocks = tuple(
        block_at(layer, index, path, layout)
        for index, (layer, path, layout) in enumerate(zip(layers, paths, layouts, strict=True))
    )
    family = _family(model, attention)
    base = stack_path.rpartition(".")[0]
    around = base.rpartition(".")[0]
    position_embedding = _position_path(model, base, around, family)
    embedding = _embedding(model, architecture)
    head = _head(model)
    classifier = _classifier(model) if family == "classifier" else None
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
        position_offset=int(getattr(submodule(model, position_embedding), "offset", 0)),
        token_type_embedding=path_or_none(model, join(around, "embeddings.token_type_embeddings")),
        embedding_norm=path_or_none(model, join(around, "embeddings.LayerNorm")),
        blocks=blocks,
        final_norm=_final_norm(model, base, around, attention),
        head_transform=path_or_none(model, "cls.predictions.transform"),
        unembedding=head,
        classifier=classifier,
        pooler=None if classifier is None else path_or_none(model, join(around, "pooler")),
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
        context_length=_context_length(config, family) - _positions_left_out(model, position_embedding),
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


def _family(model: Any, layout: AttentionLayout) -> Family:
    if model.main_input_name == "pixel_values":
        return "vision"
    if type(model).__name__.endswith("ForSequenceClassification"):
        return "classifier"
    return "encoder" if layout.norm_place == "post" else "decoder"


def _embedding(model: Any, architecture: str) -> str:
    path = path_of(model, model.get_input_embeddings())
    if path is None:
        raise CannotOpen(f"{architecture} has no input embedding module; this architecture is not supported")
    return path


def _head(model: Any) -> str | None:
    """The unembedding or classifier, if it reads one position's residual: DINOv2's also reads the patches' mean."""
    if type(model).__name__.endswith("ForSequenceClassification"):
        return None
    head = model.get_output_embeddings() or getattr(model, "classifier", None)
    if getattr(head, "in_features", None) not in (None, model.config.get_text_config().hidden_size):
        return None
    return path_of(model, head)


def _classifier(model: Any) -> str:
    """The head of a text classifier: ``score`` reads the last token of a decoder, ``classifier`` an encoder's text."""
    found = first_present(model, "", ("score", "classifier"))
    if found is None:
        raise CannotOpen(
            f"{type(model).__name__} has no module named score or classifier, so what answers is not known; this "
            "architecture is not supported"
        )
    return found


def _final_norm(model: Any, base: str, around: str, layout: AttentionLayout) -> str | None:
    """None for a post-norm encoder, whose last block already norms; DINOv2's stands around its encoder."""
    if layout.norm_place == "post":
        return None
    found = first_present(model, base, FINAL_NORMS) or first_present(model, around, FINAL_NORMS)
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
        return first_present(model, base, ("embeddings",)) or path_or_none(model, join(around, "embeddings"))
    return first_present(model, base, POSITIONS) or first_present(model, around, POSITIONS)


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


def _positions_left_out(model: Any, path: str | None) -> int:
    """Rows of a position table that no token gets: RoBERTa counts from behind the number of its padding token."""
    padding = None if path is None else getattr(submodule(model, path), "padding_idx", None)
    return 0 if padding is None else int(padding) + 1


def _activation(config: Any) -> str:
    names = ("hidden_activation", "hidden_act", "activation_function")
    found: str = next(value for name in names if (value := getattr(config, name, None)))
    return found
