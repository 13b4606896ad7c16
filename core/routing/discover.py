"""Where a model's mixtures of experts are, and by which rule each of them routes.

Found from the modules themselves: since transformers 5 nearly all families call one fused module with
``experts(hidden, chosen experts, routing weights)``, which is recognised by its shared contract and not by a list of
families. What does not keep that contract has a shim (``_shims.py``) or is refused by name. This file reads no
weights and runs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from core.errors import CannotOpen
from core.models.anatomy import Path
from core.models.anatomy_layers import refuse_experts
from core.models.anatomy_layouts import (
    ROUTERS,
    SCALED_INPUT_EXPERTS,
    SHARED_EXPERTS,
    SHARED_GATES,
)
from core.routing.rules import Rule, rule_of

EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
"""What configs call the number of routed experts."""


@dataclass(frozen=True)
class MoeLayer:
    """One mixture of experts. Paths are absolute."""

    layer: int
    """Index of the block it is in."""
    block: Path
    mlp: Path
    """The module that holds router and experts; the block itself where they sit directly in it."""
    router: Path
    experts: Path
    shared: Path | None
    """The expert every token passes, if there is one."""
    shared_gate: Path | None
    """The linear whose sigmoid scales the shared expert's output (Qwen2-MoE)."""
    n_experts: int
    top_k: int
    n_groups: int
    """Neighbouring experts form groups of n_experts / n_groups; 1 where routing knows no groups."""
    top_groups: int
    """Groups a token may choose from."""
    rule: Rule
    shim: bool
    """Whether the decision must be read by a shim and not from the experts' arguments."""
    scale: float
    """Factor on the routing weights (DeepSeek's ``routed_scaling_factor``), 1 for most."""
    router_class: str


def moe_layers(model: Any) -> tuple[MoeLayer, ...]:
    """Every mixture of experts of a Hugging Face model or ``LoadedModel``, in order; () for a dense model.

    Raises ``CannotOpen`` naming the module whose experts or router are of no known family.
    """
    model = getattr(model, "model", model) if hasattr(model, "anatomy") else model
    refuse_experts(model)
    found = [
        _layer(model, path, module) for path, module in model.named_modules() if _is_experts(path, module)
    ]
    count = next((n for name in EXPERT_COUNTS if (n := getattr(_text_config(model), name, None))), 0)
    if not found and isinstance(count, int) and count > 1:
        raise CannotOpen(
            f"{type(model).__name__}: its config names {count} experts, but no module of it is a known experts module; "
            "this mixture of experts is not supported"
        )
    return tuple(found)


def neutral_when_unused(layer: MoeLayer) -> bool:
    """Whether removing an expert that no token chose leaves the output of these tokens as it was.

    It does where the weights of the chosen do not depend on the others. A softmax over all E that is not divided by
    the sum of the chosen does: its weights grow by 1 / (1 − p_removed). So may a choice of groups, whose ranking
    counts experts that are not chosen in the end. An unknown rule is not promised to be neutral.
    """
    return layer.top_groups == layer.n_groups and layer.rule in (
        "softmax_topk_renorm",
        "topk_softmax",
        "topk_sigmoid",
        "sigmoid_bias",
        "sigmoid_bias_renorm",
    )


def _text_config(model: Any) -> Any:
    return model.config.get_text_config()


def _is_experts(path: str, module: Any) -> bool:
    """Whether a module is fused experts; refuses what is called ``experts`` and keeps no known contract."""
    name = type(module).__name__
    if hasattr(module, "_apply_gate") or name in SCALED_INPUT_EXPERTS:
        return True
    if path.rpartition(".")[2] == "experts":
        raise CannotOpen(
            f"{path}: {name} is not a fused experts module called with chosen experts and routing weights; "
            "this mixture of experts is not supported"
        )
    return False


def _layer(model: Any, path: str, experts: Any) -> MoeLayer:
    mlp_path = path.rpartition(".")[0]
    mlp = model.get_submodule(mlp_path)
    router_name = _child(mlp, ROUTERS)
    if router_name is None:
        raise CannotOpen(
            f"{mlp_path}: {type(mlp).__name__} holds experts but no router named {' or '.join(ROUTERS)}; "
            "this mixture of experts is not supported"
        )
    router = getattr(mlp, router_name)
    shared, gate = _child(mlp, SHARED_EXPERTS), _child(mlp, SHARED_GATES)
    block, layer = _block(mlp_path)
    rule = rule_of(router)
    # DeepSeek-V2's routers carry a group count that its greedy method never reads.
    n_groups = 1 if rule == "softmax_topk" else int(_first(router, ("num_group", "n_group"), 1) or 1)
    return MoeLayer(
        layer=layer,
        block=block,
        mlp=mlp_path,
        router=f"{mlp_path}.{router_name}",
        experts=path,
        shared=f"{mlp_path}.{shared}" if shared else None,
        shared_gate=f"{mlp_path}.{gate}" if gate else None,
        n_experts=int(experts.num_experts),
        top_k=_top_k(model, mlp, router),
        n_groups=n_groups,
        top_groups=min(int(_first(router, ("topk_group",), n_groups) or n_groups), n_groups),
        rule=rule,
        shim=not hasattr(experts, "_apply_gate"),
        scale=float(_first(router, ("routed_scaling_factor",), 1.0)),
        router_class=type(router).__name__,
    )


def _top_k(model: Any, mlp: Any, router: Any) -> int:
    of_config = _text_config(model).num_experts_per_tok
    return int(_first(router, ("top_k",), None) or _first(mlp, ("top_k",), of_config))


def _first(module: Any, names: tuple[str, ...], otherwise: Any) -> Any:
    return next((getattr(module, name) for name in names if hasattr(module, name)), otherwise)


def _child(module: Any, names: tuple[str, ...]) -> str | None:
    children = dict(module.named_children())
    return next((name for name in names if children.get(name) is not None), None)


def _block(mlp: str) -> tuple[Path, int]:
    """The block around an MLP and its index: its path up to and with the first number."""
    parts = mlp.split(".")
    at = next(i for i, part in enumerate(parts) if part.isdigit())
    return ".".join(parts[: at + 1]), int(parts[at])
