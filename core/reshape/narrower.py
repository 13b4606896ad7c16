"""A model with fewer neurons, heads or residual dimensions, the same number in every layer, as its config must say.

Which units go is decided elsewhere. transformers builds the model from the edited config, and every axis that became
shorter is cut; a class that computes head_dim from the number of heads cannot lose any, and is refused.

Legend: ``L`` blocks, ``U`` units of a block, ``O`` outputs, ``I`` inputs of a projection.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from core.errors import CannotCompress
from core.lazy import torch
from core.models.anatomy_find import find_anatomy
from core.models.loaded import LoadedModel
from core.models.sizes import block_of
from core.reshape.rebuilt import built, edited_config, filled, probe_output, refuse_gap, sliced

if TYPE_CHECKING:
    from torch import Tensor

    from core.models.anatomy import Anatomy, Block

Part = Literal["ffn", "heads", "kv_groups", "hidden"]
Units = Mapping[int, Sequence[int]]
"""Block → units that stay, ascending. Of heads, those that stay in every key/value group are equally many."""
NEURON_KEYS = ("intermediate_size", "n_inner", "ffn_dim")
"""What configs call the neurons of a dense MLP."""


def n_units(anatomy: Anatomy, part: Part) -> int:
    """Units of one block."""
    sizes = {
        "ffn": anatomy.d_ff, "heads": anatomy.n_heads, "kv_groups": anatomy.n_kv_heads, "hidden": anatomy.d_model,
    }  # fmt: skip
    return sizes[part]


def refuse_part(loaded: LoadedModel, part: Part) -> None:
    """Raise ``CannotCompress`` for a model that has no such units."""
    anatomy = loaded.anatomy
    if part == "ffn" and anatomy.n_experts:
        raise CannotCompress(
            f"{anatomy.architecture} has experts, and their neurons are not cut here; remove whole experts (prune_experts) "
            "or store them in fewer bits (expert_bits)"
        )
    if part in ("heads", "kv_groups") and not anatomy.has_heads:
        raise CannotCompress(
            f"{anatomy.architecture} has layers without plain attention heads; cut ffn or drop layers"
        )


def writer(block: Block, part: Part) -> str:
    """The projection that reads the units of a block: its columns are theirs."""
    path = block.down if part == "ffn" else block.o
    assert path is not None, "experts are refused"
    return path


def columns_of(anatomy: Anatomy, part: Part, units: Sequence[int]) -> Tensor:
    """The inputs of ``writer`` that belong to these units, in their order."""
    width = {"ffn": 1, "heads": anatomy.head_dim, "kv_groups": anatomy.head_dim * _group(anatomy)}[part]
    return (torch.tensor(list(units))[:, None] * width + torch.arange(width)).flatten()


def narrowed(loaded: LoadedModel, part: Part, kept: Units) -> tuple[Any, float | None]:
    """The model cut to these units, and how far its output is from that of ``loaded``, where the rest writes nothing.

    The columns that ``writer`` has for the other units must be zeros, and ``loaded`` stays as it is. For the hidden
    dimension there is no such identity, since norms count the dimensions: None. Raises ``CannotCompress`` where this
    architecture cannot have that size.
    """
    model = cut_to(loaded, part, kept)
    got = probe_output(loaded, model)
    if part == "hidden":
        return model, None
    return model, refuse_gap(loaded, probe_output(loaded, loaded.model), got)


def check_size(loaded: LoadedModel, part: Part, kept: Units) -> None:
    """Raise ``CannotCompress`` unless a model of that size can be built, filled and run."""
    probe_output(loaded, cut_to(loaded, part, kept))


def cut_to(loaded: LoadedModel, part: Part, kept: Units) -> Any:
    """The model cut to these units, whatever the others wrote; ``loaded`` stays as it is. Raises ``CannotCompress``."""
    anatomy = loaded.anatomy
    n_kept = len(next(iter(kept.values())))
    config = edited_config(loaded, _config_values(loaded, part, n_kept))
    model = built(loaded, config)

    def index(name: str, axis: int, before: int, after: int) -> Tensor:
        block = block_of(anatomy, name)
        of_block = kept[block.index if block is not None else 0]
        choices = _axes(anatomy, part, of_block)
        if before not in choices or len(choices[before]) != after:
            raise CannotCompress(
                f"{anatomy.architecture} with {n_kept} of {n_units(anatomy, part)} {part} would change axis {axis} of {name} "
                f"from {before} to {after}, which is no count of them; this architecture cannot be cut so"
            )
        return choices[before]

    filled(loaded, model, sliced(loaded, model, index))
    found = find_anatomy(model)
    if found.head_dim != anatomy.head_dim or n_units(found, part) != n_kept:
        raise CannotCompress(
            f"{anatomy.architecture} computes the size of a head from hidden_size / heads, so plain transformers cannot "
            f"load it with {n_kept} of {n_units(anatomy, part)} {part}; cut ffn, or drop layers"
        )
    if found.embedding_scale != anatomy.embedding_scale:
        raise CannotCompress(
            f"{anatomy.architecture} multiplies its embedding by √hidden_size, which a tied head does not see, so the cut "
            "would change what is kept; cut ffn or heads, or drop layers"
        )
    return model


def _axes(anatomy: Anatomy, part: Part, units: Sequence[int]) -> dict[int, Tensor]:
    """Length of an axis → the indices that stay on it."""
    if part in ("ffn", "hidden"):
        return {n_units(anatomy, part): torch.tensor(list(units))}
    heads = list(units)
    if part == "kv_groups":
        heads = [g * _group(anatomy) + h for g in units for h in range(_group(anatomy))]
    axes = {
        anatomy.n_heads: torch.tensor(heads),  # learned sinks
        anatomy.n_heads * anatomy.head_dim: columns_of(anatomy, "heads", heads),
    }
    if part == "kv_groups":
        groups = torch.tensor(list(units))[:, None] * anatomy.head_dim + torch.arange(anatomy.head_dim)
        axes[anatomy.n_kv_heads * anatomy.head_dim] = groups.flatten()
    return axes


def _config_values(loaded: LoadedModel, part: Part, n_kept: int) -> dict[str, Any]:
    anatomy, config = loaded.anatomy, loaded.model.config.get_text_config()
    if part == "ffn":
        key = next((name for name in NEURON_KEYS if hasattr(config, name)), None)
        if key is None:
            raise CannotCompress(
                f"the config of {anatomy.architecture} has no number of neurons ({', '.join(NEURON_KEYS)}); drop layers instead"
            )
        return {key: n_kept}
    values: dict[str, Any] = {"head_dim": anatomy.head_dim} if hasattr(config, "num_key_value_heads") else {}
    if part == "hidden":
        return {**values, "hidden_size": n_kept}
    if part == "kv_groups":
        values["num_attention_heads"] = n_kept * _group(anatomy)
        if hasattr(config, "num_key_value_heads"):
            values["num_key_value_heads"] = n_kept
        return values
    return {**values, "num_attention_heads": n_kept}


def _group(anatomy: Anatomy) -> int:
    """Query heads that read one key/value head."""
    return anatomy.n_heads // anatomy.n_kv_heads
