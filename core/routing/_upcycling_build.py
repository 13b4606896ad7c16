"""The same model in another architecture of transformers: everything but its MLPs carried over, and proved to be.

An architecture is chosen so that plain ``AutoModelForCausalLM`` loads the result. Nothing is assumed to be the same
because the names are: every tensor must find its place, facts that a short input cannot show (attention windows,
rotary frequencies, ties) are compared, and the outputs of both models on a seeded input must agree. What an
architecture cannot hold is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from core.errors import CannotCompress
from core.lazy import torch, transformers
from core.models.anatomy import Anatomy
from core.models.anatomy_find import find_anatomy
from core.models.loaded import LoadedModel
from core.models.quiet import quiet
from core.routing._upcycling import GatedMlp, fused, padded

if TYPE_CHECKING:
    from torch import Tensor

MOE_OF = {"llama": "mixtral", "mistral": "mixtral", "qwen2": "qwen2_moe", "qwen3": "qwen3_moe"}
"""Dense model type → the mixture of experts that is otherwise built alike."""
DENSE_OF = {
    "mixtral": "mistral", "qwen2_moe": "qwen2", "qwen3_moe": "qwen3", "granitemoe": "granite",
    "deepseek_v3": "deepseek_v3", "olmoe": "olmoe",
}  # fmt: skip
"""And back. DeepSeek-V3 can have dense layers only. Nothing dense has OLMoE's norm over all query heads at once: it
becomes an OLMoE of one expert, whose routing weight is softmax over one number, 1."""
WHY_NOT = {
    "gpt_oss": "its experts have biases and a gate of their own kind",
    "llama4_text": "it scales what its experts read, not what they put out",
    "jamba": "its layers alternate with Mamba, and no relative has dense ones only",
    "gemma2": "its sandwich norms are found in no plain mixture of experts",
}
"""What is known to stand in the way of a family that has no relative."""
SHARED_WIDTH = 128
"""Qwen2-MoE always has a shared expert. Where it has nothing to do it is zeros, as narrow as the widest group that a
quantizing step can ask for."""
SAME_FACTS = (
    "windows", "tied", "n_heads", "n_kv_heads", "head_dim", "d_model", "vocab_size", "context_length", "activation",
    "embedding_scale", "norm_offset", "norm_place", "logit_scale", "logit_softcap", "attention_softcap",
)  # fmt: skip
PROBE_TOKENS = 48
TOLERANCE = {"float64": 1e-6, "float32": 1e-5, "float16": 1e-2, "bfloat16": 5e-2}
"""Largest relative difference of any position's logits that is taken for rounding: other kernels sum in other orders."""


def moe_config(loaded: LoadedModel, *, n_experts: int, top_k: int, width: int) -> Any:
    """The config of a mixture of ``n_experts`` experts of ``width`` neurons that is else ``loaded``.

    Its routing weights sum to 1. Raises ``CannotCompress`` for an architecture that has no such relative.
    """
    kind = _relative(loaded, MOE_OF, "a dense model", "mixture of experts")
    own: dict[str, Any] = {"num_experts_per_tok": top_k}
    if kind == "mixtral":
        own |= {"num_local_experts": n_experts, "intermediate_size": width}
    else:
        own |= {
            "num_experts": n_experts, "moe_intermediate_size": width, "norm_topk_prob": True,
            "decoder_sparse_step": 1, "mlp_only_layers": [],
        }  # fmt: skip
    if kind == "qwen2_moe":
        own["shared_expert_intermediate_size"] = SHARED_WIDTH
    return _carried(loaded, kind, own)


def dense_config(loaded: LoadedModel, *, width: int) -> Any:
    """The config of a dense model with MLPs of ``width`` neurons that is else ``loaded``."""
    kind = _relative(loaded, DENSE_OF, "a mixture of experts", "dense model")
    own: dict[str, Any] = {"intermediate_size": width}
    if kind == "deepseek_v3":
        own["first_k_dense_replace"] = loaded.anatomy.n_layers
    if kind == "olmoe":
        own |= {"num_experts": 1, "num_experts_per_tok": 1, "norm_topk_prob": True}
    return _carried(loaded, kind, own)


def dense_mlps(loaded: LoadedModel) -> dict[int, GatedMlp]:
    """The MLP of every block of a dense model, by block index, as it is and not copied.

    Raises ``CannotCompress`` for an MLP without gate or with biases: no known expert holds those.
    """
    found = {}
    for block in loaded.anatomy.blocks:
        linears = [loaded.model.get_submodule(path) for path in (block.gate, block.up, block.down) if path]
        biased = next((path for path in (block.gate, block.up, block.down) if _has_bias(loaded, path)), None)
        if len(linears) < 3 or biased:
            why = f"{biased} has a bias" if biased else f"{block.path} has an MLP without gate"
            raise CannotCompress(
                f"{why}, which experts of these architectures cannot hold; choose another model"
            )
        found[block.index] = GatedMlp(*(linear.weight.detach() for linear in linears))
    return found


def moe_tensors(loaded: LoadedModel, experts: Mapping[int, list[GatedMlp]]) -> dict[str, Tensor]:
    """Names and tensors of MoE blocks with these experts (block index → experts) and routers of zeros."""
    tensors = {}
    for block in loaded.anatomy.blocks:
        those, base = experts[block.index], block.mlp
        tensors[f"{base}.experts.gate_up_proj"], tensors[f"{base}.experts.down_proj"] = fused(those)
        like = those[0].gate_ID
        tensors[f"{base}.gate.weight"] = like.new_zeros(len(those), like.shape[1])
        if MOE_OF[loaded.anatomy.model_type] == "qwen2_moe":
            nothing = padded(GatedMlp(like[:0], like[:0], like[:0].T), SHARED_WIDTH)
            tensors |= _linears(f"{base}.shared_expert", nothing)
            tensors[f"{base}.shared_expert_gate.weight"] = like.new_zeros(1, like.shape[1])
    return tensors


def dense_tensors(loaded: LoadedModel, mlps: Mapping[int, GatedMlp]) -> dict[str, Tensor]:
    """Names and tensors of dense MLPs (block index → MLP), filled up to the widest of them."""
    tensors = {}
    width = max(mlp.width for mlp in mlps.values())
    for block in loaded.anatomy.blocks:
        base, mlp = f"{block.path}.mlp", padded(mlps[block.index], width)
        if loaded.anatomy.model_type == "olmoe":
            tensors[f"{base}.experts.gate_up_proj"], tensors[f"{base}.experts.down_proj"] = fused([mlp])
            tensors[f"{base}.gate.weight"] = mlp.gate_ID.new_zeros(1, mlp.gate_ID.shape[1])
        else:
            tensors |= _linears(base, mlp)
    return tensors


def rebuilt(loaded: LoadedModel, config: Any, mlps: Mapping[str, Tensor]) -> Any:
    """A model of ``config`` with ``mlps`` as its MLPs and all else shared with ``loaded``, which stays as it is.

    Raises ``CannotCompress`` naming the tensor that has no place, the one that is missing, or the fact that differs.
    """
    from transformers.initialization import no_init_weights

    old = loaded.model
    inside = tuple(f"{block.mlp}." for block in loaded.anatomy.blocks)
    tied = set(old.all_tied_weights_keys)
    carried = {
        name: tensor
        for name, tensor in old.state_dict().items()
        if not name.startswith(inside) and name not in tied
    }
    auto: Any = transformers.AutoModelForCausalLM
    with quiet(), no_init_weights():
        model = auto.from_config(config, dtype=old.dtype, attn_implementation=old.config._attn_implementation)
    try:
        report = model.load_state_dict({**carried, **mlps}, strict=False, assign=True)
    except RuntimeError as error:
        raise CannotCompress(_no_place(loaded, model, str(error).splitlines()[-1].strip())) from None
    model.tie_weights()
    missing = sorted(set(report.missing_keys) - set(model.all_tied_weights_keys))
    if report.unexpected_keys:
        raise CannotCompress(_no_place(loaded, model, f"{report.unexpected_keys[0]} has no place in it"))
    if missing:
        raise CannotCompress(
            _no_place(loaded, model, f"it needs {missing[0]}, which this model does not have")
        )
    model.to(loaded.device).eval().requires_grad_(False)
    model.generation_config = old.generation_config
    _refuse_other_facts(loaded, model)
    return model


def output_gap(before: Any, after: Any, anatomy: Anatomy) -> float:
    """Largest relative difference ‖after − before‖₂ / ‖before‖₂ of any position's logits on a seeded input."""
    length = min(PROBE_TOKENS, anatomy.context_length)
    ids = (torch.arange(2 * length) * 7919 + 13) % anatomy.vocab_size
    ids = ids.reshape(2, length).to(before.device)
    with torch.no_grad():
        one, other = (model(input_ids=ids, use_cache=False).logits.float() for model in (before, after))
    return float(((other - one).norm(dim=-1) / one.norm(dim=-1)).max().nan_to_num(nan=float("inf")))


def refuse_gap(loaded: LoadedModel, model: Any, gap: float) -> None:
    """Raise ``CannotCompress`` when the rebuilt model gives other outputs than it must."""
    if not gap <= TOLERANCE[loaded.dtype]:
        raise CannotCompress(
            _no_place(
                loaded,
                model,
                f"its outputs would differ by {gap:.2g}, so something in it is computed otherwise",
            )
        )


def _relative(loaded: LoadedModel, table: Mapping[str, str], what: str, wanted: str) -> str:
    kind = loaded.anatomy.model_type
    if kind not in table:
        why = f": {WHY_NOT[kind]}" if kind in WHY_NOT else ""
        raise CannotCompress(
            f"transformers has no {wanted} known to be built like {loaded.anatomy.architecture}{why}, so the result could "
            f"not be loaded; choose {what} of type {', '.join(table)}"
        )
    return table[kind]


def _carried(loaded: LoadedModel, kind: str, own: dict[str, Any]) -> Any:
    """A config of ``kind``: its ``own`` values, and every other value that both architectures know."""
    config_class: Any = transformers.CONFIG_MAPPING[kind]
    known = {*config_class().to_dict()} - {
        "model_type",
        "architectures",
        "transformers_version",
        "_name_or_path",
    }
    values = {name: value for name, value in loaded.model.config.to_dict().items() if name in known}
    head_dim = getattr(loaded.model.config, "head_dim", None)
    if head_dim is not None:  # read by all of them, declared by some
        values["head_dim"] = head_dim
    if "layer_types" in known:
        kinds = {True: "sliding_attention", False: "full_attention"}
        values["layer_types"] = [kinds[window is not None] for window in loaded.anatomy.windows]
    return config_class(**{**values, **own})


def _has_bias(loaded: LoadedModel, path: str | None) -> bool:
    return path is not None and loaded.model.get_submodule(path).bias is not None


def _linears(base: str, mlp: GatedMlp) -> dict[str, Tensor]:
    names = ("gate_proj", "up_proj", "down_proj")
    return {f"{base}.{name}.weight": weight for name, weight in zip(names, mlp, strict=True)}


def _refuse_other_facts(loaded: LoadedModel, model: Any) -> None:
    before, after = loaded.anatomy, find_anatomy(model)
    for name in SAME_FACTS:
        if getattr(before, name) != getattr(after, name):
            said = f"its {name} would be {getattr(after, name)} and must be {getattr(before, name)}"
            raise CannotCompress(_no_place(loaded, model, said))
    one, other = loaded.model.model.rotary_emb, model.model.rotary_emb
    same = one.attention_scaling == other.attention_scaling and one.rope_type == other.rope_type
    if not same or not torch.equal(one.inv_freq, other.inv_freq):
        raise CannotCompress(_no_place(loaded, model, "its rotary positions would be scaled otherwise"))


def _no_place(loaded: LoadedModel, model: Any, why: str) -> str:
    return f"{loaded.ref} cannot become a {type(model).__name__}: {why}; choose another model, this one is unchanged"
