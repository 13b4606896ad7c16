"""Own student: a smaller model of the teacher's architecture, or another model, in the teacher's place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from core.distill.students import refuse_unfit
from core.errors import BadInput, CannotCompress
from core.lazy import torch
from core.models.anatomy_find import find_anatomy
from core.models.loaded import LoadedModel
from core.models.open import open_model
from core.models.quiet import quiet
from core.registry import Settings, method
from core.reshape.depth import evenly
from core.reshape.narrower import NEURON_KEYS, Part, cut_to, n_units, refuse_part
from core.reshape.rebuilt import built, edited_config, probe_output
from core.reshape.shallower import renumbered, without_blocks
from core.reshape.structure import Inventory, structural_result
from core.types import Documents, Metric, ModelRef, Progress, Result

if TYPE_CHECKING:
    from core.models.anatomy import Anatomy

NEVER_SEEN = "Its weights are random: it says nothing yet, and needs far more tokens than a student cut from its teacher."


class OwnStudentSettings(Settings):
    """How large the student is, and what its weights start from."""

    layers: int = Field(default=0, ge=0, le=512, description="Blocks; 0: half of the teacher's, rounded up")
    hidden: int = Field(
        default=0, ge=0, le=65_536, description="Dimensions of the residual stream; 0: as many as the teacher"
    )
    heads: int = Field(
        default=0, ge=0, le=1024, description="Query heads per block; 0: as many as the teacher"
    )
    ffn: int = Field(
        default=0, ge=0, le=524_288, description="Neurons of each MLP; 0: as many as the teacher"
    )
    weights: Literal["sliced", "random"] = Field(
        default="sliced",
        description="sliced: blocks, heads, neurons and dimensions of the teacher in equal steps; random: as transformers "
        "draws a new model",
    )
    model: str = Field(
        default="",
        max_length=1000,
        description="Instead of all that: an existing model with the same tokenizer, as demo:NAME, folder, .gguf or hub id",
    )
    seed: int = Field(default=0, ge=0, le=1_000_000, description="Seed of random weights")


def _sizes(anatomy: Anatomy, settings: OwnStudentSettings) -> dict[str, int]:
    """The student's sizes; raises ``BadInput`` for what is larger than the teacher's, or no whole groups of heads."""
    whole = {
        "layers": anatomy.n_layers, "hidden": anatomy.d_model, "heads": anatomy.n_heads, "ffn": anatomy.d_ff,
    }  # fmt: skip
    wanted = {**whole, "layers": -(-anatomy.n_layers // 2)}
    wanted |= {name: value for name in whole if (value := getattr(settings, name))}
    for name, size in wanted.items():
        if size > whole[name]:
            raise BadInput(f"{name}={size} is more than the teacher's {whole[name]}; choose at most as many")
    group = anatomy.n_heads // anatomy.n_kv_heads
    if wanted["heads"] % group:
        raise BadInput(
            f"heads={wanted['heads']}: {group} heads share a key and a value here, so choose a multiple of {group}"
        )
    return wanted


def _left(anatomy: Anatomy, settings: OwnStudentSettings) -> Mapping[str, float]:
    """Exact but for the final norm, biases, blocks of another kind, and heads that do not keep their size."""
    if settings.model:
        raise CannotCompress("how large another model is, is known when it is opened")
    sizes = _sizes(anatomy, settings)
    depth, hidden = sizes["layers"] / anatomy.n_layers, sizes["hidden"] / anatomy.d_model
    inside = dict.fromkeys(("router", "experts", "shared_expert", "norm"), depth * hidden)
    return {
        **inside, "embedding": hidden, "head": hidden,
        "attention": depth * hidden * sizes["heads"] / anatomy.n_heads,
        "mlp": depth * hidden * sizes["ffn"] / anatomy.d_ff,
    }  # fmt: skip


@method(
    "compress", title="Own student", left=_left, paper="https://arxiv.org/abs/2311.18823", group="convert"
)
def run(
    loaded: LoadedModel, calibration: Documents | None, progress: Progress, settings: OwnStudentSettings
) -> Result:
    """Put a student of any smaller size in the teacher's place, to be distilled by the next step of the recipe.

    The student has the teacher's architecture, tokenizer and ties. Its weights are taken from the teacher's in equal
    steps along every axis (weight selection, 2311.18823): a start that is no good model, and learns much faster than
    a random one. Steps that choose by importance start better still: drop_layers and prune_width. Or the student is an
    existing model with the same tokenizer. Unlike other steps, this one says nothing that its base says: judge it
    behind the distillation.
    """
    loaded.refuse_if_packed()
    before = Inventory.of(loaded)
    if settings.model:
        progress(0.0, 1.0, f"opening {settings.model}")
        other = _other_model(loaded, settings.model)
        loaded.become(other.model)
        note, inputs = f"{settings.model} took the place of its teacher.", {"model": other.fingerprint}
    else:
        sizes = _sizes(loaded.anatomy, settings)
        kept = evenly(sizes["layers"], loaded.anatomy.n_layers)
        gone = [layer for layer in range(loaded.anatomy.n_layers) if layer not in kept]
        before = before.moved(renumbered(loaded.anatomy, gone))
        progress(0.0, 1.0, "building the student")
        with loaded.lock, torch.no_grad():
            model = _own_size(loaded, sizes, gone, settings)
        loaded.become(model)
        said = ", ".join(f"{name} {size}" for name, size in sizes.items())
        note, inputs = f"The student: {said}; weights {settings.weights}.", {}
    progress(1.0, 1.0, "built")
    parameters = sum(int(parameter.numel()) for parameter in loaded.model.parameters())
    return structural_result(
        before,
        loaded,
        settings,
        method="own_student",
        metrics=(Metric("student_parameters", parameters, "", "lower"),),
        notes=(note, NEVER_SEEN if settings.weights == "random" and not settings.model else ""),
        inputs=inputs,
    )


def _own_size(
    loaded: LoadedModel, sizes: Mapping[str, int], gone: list[int], settings: OwnStudentSettings
) -> Any:
    model = without_blocks(loaded, gone)[0] if gone else loaded.model
    shorter = replace(loaded, model=model, anatomy=find_anatomy(model))
    if settings.weights == "random":
        return _drawn(shorter, loaded.anatomy, sizes, settings.seed)
    n_groups = sizes["heads"] * loaded.anatomy.n_kv_heads // loaded.anatomy.n_heads
    wanted: dict[Part, int] = {"ffn": sizes["ffn"], "kv_groups": n_groups, "hidden": sizes["hidden"]}
    for part, n in wanted.items():
        whole = n_units(loaded.anatomy, part)
        if n == whole:
            continue
        refuse_part(shorter, part)
        units = dict.fromkeys(range(shorter.anatomy.n_layers), evenly(n, whole))
        model = cut_to(shorter, part, units)
        probe_output(shorter, model)
        shorter = replace(shorter, model=model, anatomy=find_anatomy(model))
    return shorter.model


def _drawn(shorter: LoadedModel, whole: Anatomy, sizes: Mapping[str, int], seed: int) -> Any:
    """A new model of the architecture and depth of ``shorter`` as transformers draws one; ``whole``: the teacher's."""
    anatomy, config = shorter.anatomy, shorter.model.config.get_text_config()
    values: dict[str, Any] = {}
    if sizes["hidden"] != anatomy.d_model:
        values["hidden_size"] = sizes["hidden"]
    if sizes["heads"] != anatomy.n_heads:
        values["num_attention_heads"] = sizes["heads"]
        if hasattr(config, "num_key_value_heads"):
            values["num_key_value_heads"] = sizes["heads"] * anatomy.n_kv_heads // anatomy.n_heads
    if hasattr(config, "head_dim") and anatomy.has_heads and values:
        values["head_dim"] = anatomy.head_dim
    if sizes["ffn"] != whole.d_ff:
        refuse_part(shorter, "ffn")
        values[next(name for name in NEURON_KEYS if hasattr(config, name))] = sizes["ffn"]
    model = built(shorter, edited_config(shorter, values))
    with torch.inference_mode(False), quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.init_weights()
    model.to(shorter.device).eval().requires_grad_(False)
    model.generation_config = getattr(shorter.model, "generation_config", None)
    probe_output(shorter, model)
    return model


def _other_model(loaded: LoadedModel, text: str) -> LoadedModel:
    ref = ModelRef.parse(text, dtype=loaded.ref.dtype, device=loaded.ref.device)
    if ref.kind == "variant":
        raise BadInput(
            f"model={text}: to train a variant, start the recipe from it, and name its teacher in the step distil"
        )
    other = open_model(ref)
    refuse_unfit(other, loaded)
    if other.activations:
        raise CannotCompress(
            f"{text} rounds what its layers read (W8A8), which no step can train; choose another model"
        )
    if other.pooling != loaded.pooling:
        raise BadInput(
            f"{text} pools its tokens by {other.pooling} and the teacher by {loaded.pooling}; choose another student"
        )
    return other
