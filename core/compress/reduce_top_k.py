"""Route each token to fewer experts: less to compute and to read per token, the same bytes on disk."""

from __future__ import annotations

from pydantic import Field

from core.models.loaded import LoadedModel
from core.models.sizes import component_sizes
from core.registry import Settings, method
from core.reshape.structure import Inventory, structural_result
from core.routing.surgery import experts_of, set_top_k
from core.types import Documents, Metric, Progress, Result


class ReduceTopKSettings(Settings):
    """How many experts a token gets."""

    top_k: int = Field(
        default=1, ge=1, le=256, description="Experts per token in every layer; it may also be raised"
    )


@method(
    "compress",
    title="Fewer experts per token",
    needs=["moe"],
    paper="https://arxiv.org/abs/2509.02753",
    left=lambda anatomy, settings: {},  # all parameters stay
)
def run(
    loaded: LoadedModel, calibration: Documents | None, progress: Progress, settings: ReduceTopKSettings
) -> Result:
    """Change how many experts each token is routed to, in every layer; no weight changes.

    This is what makes a mixture faster: one token reads and multiplies fewer experts. Removing experts does not, as
    each token still gets its k. The routing weights of those that stay are normalised as the router always does it: a
    router that divides by their sum gives them all the weight, one that does not (OLMoE, Qwen2-MoE) gives less in sum,
    so that the layer writes less.
    """
    before, layers = Inventory.of(loaded), experts_of(loaded)
    old, renormalised = layers[0].top_k, layers[0].rule.endswith("renorm") or layers[0].rule == "topk_softmax"
    set_top_k(loaded, settings.top_k)
    sizes = component_sizes(loaded)
    experts = int(sizes.loc[sizes["component"] == "experts", "parameters"].sum())
    each = experts // layers[0].n_experts
    whole = int(sizes["parameters"].sum())
    active_before, active = whole - experts + old * each, whole - experts + settings.top_k * each
    note = (
        f"{old} → {settings.top_k} experts per token: {active / active_before:.1%} of the parameters that a token used "
        "before. The files have the same bytes."
    )
    unnormalised = (
        "This router does not divide its weights by their sum, so with fewer experts each layer writes less."
        if not renormalised
        else ""
    )
    metrics = (
        Metric("top_k", settings.top_k, "", "lower"),
        Metric("active_parameters", active, "", "lower"),
        Metric("active_parameters_before", active_before, "", "neither"),
    )
    progress(1, 1, "routing to fewer experts")
    return structural_result(
        before, loaded, settings, method="reduce_top_k", metrics=metrics, notes=[note, unnormalised]
    )
