"""Proving an anatomy: identities that hold only if every path and fact in it is right.

Run at load on a few seeded positions. One side of each identity is what the model's own modules gave, the other
plain tensor algebra from the anatomy's paths and facts. A post-norm encoder has no telescoping sum, as each
addition is normed: there every addition is checked with its norm instead, and the lens only where there is a head.

Legend: ``T`` batch · position, ``D`` d_model, ``H`` head, ``K`` head_dim, ``N`` neuron.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import TYPE_CHECKING, Any

from core.errors import AnatomyMismatch
from core.lazy import torch
from core.models.anatomy import Anatomy, Block
from core.models.anatomy_experts import activation_function, check_experts
from core.models.anatomy_trace import Check, Trace, trace_seeded
from core.models.readout import classify, unembed
from core.models.weights import neuron_weight, output_weight, split_heads, to_query_heads

if TYPE_CHECKING:
    from torch import Tensor

TOLERANCE = {"float64": 1e-6, "float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
"""Largest allowed ‖got − expected‖₂ / ‖expected‖₂ of any position: rounding of the same sums in another order.
RMS norms and routers work in float32 even in a float64 model."""


def verify_anatomy(model: Any, anatomy: Anatomy) -> dict[str, float]:
    """Check every identity on a seeded input; returns check → largest relative difference over all layers.

    Raises ``AnatomyMismatch`` naming the module, the check, and by how much it fails.
    """
    gaps: dict[str, float] = {}
    tolerance = TOLERANCE[str(model.dtype).removeprefix("torch.")]
    with torch.inference_mode(), eager_attention(model):
        trace = trace_seeded(model, anatomy)
        checks = [_check_embedding, _check_residual, _check_norms, _check_heads, _check_mlp, _check_lens]
        for check in chain.from_iterable(run(model, anatomy, trace) for run in checks):
            gap = _gap(check)
            if not gap <= (0.0 if check.exact else tolerance):
                raise AnatomyMismatch(
                    f"{anatomy.architecture}: {check.module} fails the check '{check.name}' "
                    f"(relative difference {gap:.2g}); this architecture is not understood, so it is not opened"
                )
            gaps[check.name] = max(gaps.get(check.name, 0.0), gap)
    return gaps


@contextmanager
def eager_attention(model: Any) -> Iterator[None]:
    """Run with the attention kernel that computes patterns, then put the model's own kernel back."""
    kernel = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(kernel)


def _check_embedding(model: Any, anatomy: Anatomy, trace: Trace) -> Iterator[Check]:
    """The stream starts as embedding rows · scale (+ position row) (normed, for BERT)."""
    module = model.get_submodule(anatomy.embedding)
    if anatomy.family == "vision":
        assert anatomy.position_embedding is not None
        owner = model.get_submodule(anatomy.position_embedding)
        patches = module(trace.inputs["pixel_values"])
        distillation = [owner.distillation_token] if hasattr(owner, "distillation_token") else []
        start = torch.cat([owner.cls_token, *distillation, patches], 1)
        start = start + owner.position_embeddings
        if hasattr(owner, "register_tokens"):  # registers have no place of their own
            start = torch.cat([start[:, :1], owner.register_tokens, start[:, 1:]], 1)
    else:
        ids = trace.inputs["input_ids"]
        start = module.weight[ids] * anatomy.embedding_scale
        if anatomy.position_embedding is not None:
            table = model.get_submodule(anatomy.position_embedding).weight
            start = start + table[anatomy.position_offset :][: ids.shape[1]]
        if anatomy.token_type_embedding is not None:
            start = start + model.get_submodule(anatomy.token_type_embedding).weight[0]
        if anatomy.embedding_norm is not None:
            start = model.get_submodule(anatomy.embedding_norm)(start)
    yield Check(
        "embedding starts the residual stream", anatomy.embedding, start, trace.fed[anatomy.blocks[0].path]
    )


def _check_residual(model: Any, anatomy: Anatomy, trace: Trace) -> Iterator[Check]:
    """Identity 3: every block adds its two writes to the stream, and their sum from the start is its end."""
    stream = trace.fed[anatomy.blocks[0].path]
    total = _wide(stream)
    for block in anatomy.blocks:
        # OPT's MLP works on flattened positions, so writes take the stream's shape.
        attention = trace.output[block.attention_write].view_as(stream) * anatomy.residual_scale
        mlp = trace.output[block.mlp_write].view_as(stream) * anatomy.residual_scale
        yield Check("blocks are chained", block.path, trace.fed[block.path], stream, exact=True)
        middle = stream + attention
        if anatomy.norm_place == "post":
            yield Check(
                "attention adds to the stream", block.attention_write, trace.fed[block.attention_norm], middle
            )
            stream = model.get_submodule(block.mlp_norm)(
                model.get_submodule(block.attention_norm)(middle) + mlp
            )
        else:
            read_by_mlp = stream if anatomy.parallel_residual else middle
            yield Check(
                "attention norm reads the stream",
                block.attention_norm,
                trace.fed[block.attention_norm],
                stream,
            )
            yield Check("MLP norm reads the stream", block.mlp_norm, trace.fed[block.mlp_norm], read_by_mlp)
            stream = middle + mlp
            total = total + attention + mlp
        yield Check("residual stream adds up", block.path, stream, trace.output[block.path])
        stream = trace.output[block.path]
    if anatomy.norm_place != "post":
        yield Check("residual stream telescopes", anatomy.blocks[-1].path, total, stream)


def _check_norms(model: Any, anatomy: Anatomy, trace: Trace) -> Iterator[Check]:
    """A norm is (x − mean) / σ, or x / rms, times (γ + offset), plus β."""
    final = trace.output[anatomy.blocks[-1].path]
    for block in anatomy.blocks:
        norm = model.get_submodule(block.mlp_norm)
        expected = _normed(norm, trace.fed[block.mlp_norm], anatomy.norm_offset)
        yield Check("norm weight and offset", block.mlp_norm, trace.output[block.mlp_norm], expected)
    if anatomy.final_norm is not None:
        norm = model.get_submodule(anatomy.final_norm)
        yield Check(
            "norm weight and offset",
            anatomy.final_norm,
            norm(final),
            _normed(norm, final, anatomy.norm_offset),
        )


def _normed(norm: Any, stream: Tensor, offset: float) -> Tensor:
    wide: Tensor = _wide(stream)
    if isinstance(norm, torch.nn.LayerNorm):
        wide = wide - wide.mean(-1, keepdim=True)
    eps = next(getattr(norm, name) for name in ("eps", "variance_epsilon") if hasattr(norm, name))
    wide = wide / (wide.pow(2).mean(-1, keepdim=True) + eps).sqrt() * (norm.weight + offset)
    bias = getattr(norm, "bias", None)
    return wide if bias is None else wide + bias


def _check_heads(model: Any, anatomy: Anatomy, trace: Trace) -> Iterator[Check]:
    """Identity 4: Σ_h A_h V_h W_O^h + b_O is what attention gives. Latents and Mamba layers claim nothing of it."""
    for block in (block for block in anatomy.blocks if block.has_pattern):
        values = to_query_heads(anatomy, split_heads(anatomy, trace.output[block.v], "v"))
        mixed = torch.einsum("bhqp,bphk->bqhk", trace.pattern[block.attention], values)
        summed = torch.einsum("bqhk,hkd->bqd", mixed, output_weight(model, anatomy, block))
        yield Check(
            "heads sum to attention output",
            block.attention,
            _biased(model, block.o, summed),
            trace.output[block.o],
        )


def _check_mlp(model: Any, anatomy: Anatomy, trace: Trace) -> Iterator[Check]:
    """Identity 6 for a dense MLP, 19 for a mixture of experts."""
    for block in anatomy.blocks:
        yield from (check_experts if block.is_moe else _check_neurons)(model, anatomy, block, trace)


def _check_neurons(model: Any, anatomy: Anatomy, block: Block, trace: Trace) -> Iterator[Check]:
    assert block.up is not None
    assert block.down is not None
    read = trace.fed[block.up]
    neurons = model.get_submodule(block.up)(read)
    activation = activation_function(anatomy.activation)
    if block.gate is None:
        neurons = activation(neurons)
    else:
        neurons = activation(model.get_submodule(block.gate)(read)) * neurons
    yield Check("neurons are act(gate) ⊙ up", block.up, neurons, trace.fed[block.down])
    summed = _biased(model, block.down, trace.fed[block.down] @ neuron_weight(model, block))
    yield Check("neurons sum to MLP output", block.down, summed, trace.output[block.mlp or block.down])


def _check_lens(model: Any, anatomy: Anatomy, trace: Trace) -> Iterator[Check]:
    """Identity 2: the lens at the last layer, or the classifier on it, is the model's own logits, bit for bit."""
    if anatomy.classifier is not None:
        ids_BP = trace.inputs["input_ids"]
        logits = classify(model, anatomy, trace.output[anatomy.blocks[-1].path], ids_BP)
        assert trace.logits is not None
        yield Check(
            "classifier on the last layer gives the logits",
            anatomy.classifier,
            logits,
            trace.logits,
            exact=True,
        )
    if anatomy.unembedding is None or trace.logits is None:
        return
    final = trace.output[anatomy.blocks[-1].path]
    logits = unembed(model, anatomy, final[:, 0] if anatomy.family == "vision" else final)
    yield Check(
        "lens at the last layer gives the logits", anatomy.unembedding, logits, trace.logits, exact=True
    )


def _biased(model: Any, path: str, product: Tensor) -> Tensor:
    bias = model.get_submodule(path).bias
    return product if bias is None else product + bias


def _gap(check: Check) -> float:
    """Largest relative L2 difference of any row; shapes that differ, or NaN, can never pass."""
    if check.got.shape[-1] != check.expected.shape[-1] or check.got.numel() != check.expected.numel():
        return float("inf")
    width = check.expected.shape[-1]
    expected = _wide(check.expected.reshape(-1, width))
    rows = (_wide(check.got.reshape(-1, width)) - expected).norm(dim=-1)
    return float((rows / expected.norm(dim=-1).clamp_min(1e-12)).max())


def _wide(tensor: Tensor) -> Tensor:
    """At least float32, so that comparing adds no rounding of its own."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
