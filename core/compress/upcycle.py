"""Sparse upcycling: a dense model becomes a mixture of experts that starts as the same function."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field

from core.compress._conversion import RoutedSettings, Source, converted_result
from core.lazy import torch
from core.models.loaded import LoadedModel
from core.registry import method
from core.routing._upcycling import GatedMlp, fused, redrawn
from core.routing._upcycling_build import (
    dense_mlps,
    moe_config,
    moe_tensors,
    output_gap,
    rebuilt,
    refuse_gap,
)
from core.types import Documents, Metric, Progress, Result

if TYPE_CHECKING:
    from torch import Generator

ROUTER_STD = 0.02
"""Standard deviation of fresh router weights, as transformers draws them (``initializer_range``)."""


class UpcycleSettings(RoutedSettings):
    """How many experts, and how much of each is new."""

    experts: int = Field(default=4, ge=2, le=256, description="Experts per layer, each a copy of the MLP")
    top_k: int = Field(default=2, ge=1, le=256, description="Experts each token is routed to")
    drop: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Share of each expert's neurons drawn anew (drop-upcycling); 0 keeps the function exactly",
    )
    seed: int = Field(
        default=0, ge=0, le=1_000_000, description="Seed of the routers and of what is drawn anew"
    )


@method(
    "compress",
    title="Upcycle to experts",
    needs=["decoder", "dense"],
    paper="https://arxiv.org/abs/2212.05055",
    left=lambda anatomy, settings: {"mlp": settings.experts},  # routers are small beside them
    group="convert",
)
def run(
    loaded: LoadedModel, calibration: Documents | None, progress: Progress, settings: UpcycleSettings
) -> Result:
    """Make a mixture of experts of a dense model: larger, ready to be trained, and at first the same function.

    Every layer's MLP is copied to all experts, and a router is drawn at random. The routing weights of a token sum to
    1, so Σ_e w_e f(x) = f(x): whatever is chosen, the output is the dense model's, to rounding. The model gets
    *larger*: its MLPs are stored once per expert, and each token runs ``top_k`` of them. It is a start for training,
    which lets the experts part. With ``drop`` above 0 they part from the start (drop-upcycling,
    arxiv.org/abs/2502.19261): that share of each expert's neurons, others in each, is drawn anew from a normal with
    the mean and deviation of the weights it replaces, which costs quality until the model is trained.

    The result is of an architecture that plain transformers loads: Llama and Mistral become Mixtral, Qwen2 becomes
    Qwen2-MoE (with a shared expert of zeros, as it must have one), Qwen3 becomes Qwen3-MoE.
    """
    source = Source.of(loaded)
    config = moe_config(loaded, n_experts=settings.experts, top_k=settings.top_k, width=loaded.anatomy.d_ff)
    dense = dense_mlps(loaded)
    generator = torch.Generator().manual_seed(settings.seed)
    # Outside inference mode, so that a later step may train the result.
    with torch.inference_mode(False), torch.no_grad():
        progress(0, 4, "copying the MLPs")
        copies = {index: [mlp] * settings.experts for index, mlp in dense.items()}
        model = rebuilt(loaded, config, moe_tensors(loaded, copies))
        for block in loaded.anatomy.blocks:
            router = model.get_submodule(f"{block.mlp}.gate").weight
            router.copy_(ROUTER_STD * torch.randn(router.shape, generator=generator))
        progress(1, 4, "comparing with the dense model")
        gap = moved = output_gap(loaded.model, model, loaded.anatomy)
        refuse_gap(loaded, model, gap)
        if settings.drop:
            progress(2, 4, "drawing neurons anew")
            for index, block in enumerate(loaded.anatomy.blocks):
                _drop(model.get_submodule(f"{block.mlp}.experts"), dense[index], settings.drop, generator)
            moved = output_gap(loaded.model, model, loaded.anatomy)
        progress(3, 4, "proving the anatomy of the mixture")
        loaded.become(model)
    return converted_result(
        source,
        loaded,
        settings,
        method="upcycle",
        exactness=(
            gap,
            "logits of the mixture of copies against the dense model's, largest relative difference",
        ),
        metrics=(Metric("relative_output_change", moved, "", "lower"),),
        notes=(_note(settings, moved),),
    )


def _drop(experts: Any, dense: GatedMlp, share: float, generator: Generator) -> None:
    """Draw a share of every expert's neurons anew, in place."""
    n = experts.gate_up_proj.shape[0]
    gate_up, down = fused([redrawn(dense, share, generator) for _ in range(n)])
    experts.gate_up_proj.copy_(gate_up)
    experts.down_proj.copy_(down)


def _note(settings: UpcycleSettings, moved: float) -> str:
    if not settings.drop:
        return (
            "Until it is trained it says what the dense model says, and its routing is random and means nothing: the "
            "experts are equal."
        )
    return (
        f"{settings.drop:.0%} of each expert's neurons are random now: outputs differ from the dense model's by up to "
        f"{moved:.2g} relative. Train it before it is judged."
    )
