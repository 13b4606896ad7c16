"""A model with fewer blocks, as transformers builds it from a config that says which kinds of block are left.

Which blocks go is decided elsewhere. A pattern of kinds that no config key can say (every second layer is one of Mamba,
say) is kept by dropping whole periods of it, or the cut is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from core.errors import CannotCompress
from core.models.anatomy import Anatomy
from core.models.loaded import LoadedModel
from core.reshape.depth import skipped
from core.reshape.rebuilt import (
    built,
    edited_config,
    filled,
    plain_facts,
    probe_output,
    refuse_gap,
    stored,
)

PER_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers", "attention_layers", "layers_block_type")
"""Config keys with one entry per layer."""
INDEX_LISTS = ("mlp_only_layers", "moe_layers")
"""Config keys that list layers by their index."""


def without_blocks(loaded: LoadedModel, gone: Sequence[int]) -> tuple[Any, float]:
    """A model of the same class without these blocks, sharing all its tensors, and how far its output is from skipping.

    ``loaded`` stays as it is. Raises ``CannotCompress`` where the config cannot say which blocks are left.
    """
    anatomy = loaded.anatomy
    kept = [layer for layer in range(anatomy.n_layers) if layer not in gone]
    config = edited_config(loaded, _config_values(loaded, kept))
    model = built(loaded, config)
    leaving = tuple(f"{anatomy.blocks[layer].path}." for layer in gone)
    new_name = renumbered(anatomy, gone)
    tensors = {
        new_name(name): tensor for name, tensor in stored(loaded).items() if not name.startswith(leaving)
    }
    try:
        filled(loaded, model, tensors)
    except CannotCompress as error:
        raise CannotCompress(
            f"{error}: the config of {anatomy.architecture} fixes which layers are of which kind, so drop whole periods of "
            "that pattern (criterion listed)"
        ) from None
    for new, old in enumerate(kept):
        _refuse_other_kind(loaded, model, anatomy.blocks[new].path, anatomy.blocks[old].path)
    with skipped(loaded, gone):
        expected = probe_output(loaded, loaded.model)
    return model, refuse_gap(loaded, expected, probe_output(loaded, model))


def renumbered(anatomy: Anatomy, gone: Sequence[int]) -> Callable[[str], str]:
    """What a parameter is called when these blocks are gone: those that stay move up, those that go take the last places."""
    stack = anatomy.blocks[0].path.rpartition(".")[0]
    place = re.compile(rf"^{re.escape(stack)}\.(\d+)(?=\.)")
    order = [layer for layer in range(anatomy.n_layers) if layer not in gone] + sorted(gone)
    return lambda name: place.sub(lambda found: f"{stack}.{order.index(int(found[1]))}", name)


def _config_values(loaded: LoadedModel, kept: Sequence[int]) -> dict[str, Any]:
    """What the config says of single layers, for those that are kept: lists with an entry per layer, and lists of layers."""
    config, n = loaded.model.config.get_text_config(), loaded.anatomy.n_layers
    values: dict[str, Any] = {"num_hidden_layers": len(kept)}
    for name, value in vars(config).items():
        if name.startswith("_") or not isinstance(value, (list, tuple)):
            continue
        if name in INDEX_LISTS:
            values[name] = [kept.index(layer) for layer in value if layer in kept]
        elif len(value) == n and name in PER_LAYER:
            values[name] = [value[layer] for layer in kept]
    dense = [layer for layer in range(n) if not loaded.anatomy.blocks[layer].is_moe]
    if getattr(config, "decoder_sparse_step", None) is not None:
        values |= {
            "decoder_sparse_step": 1,
            "mlp_only_layers": [kept.index(layer) for layer in dense if layer in kept],
        }
    if getattr(config, "first_k_dense_replace", None) is not None:
        values["first_k_dense_replace"] = sum(layer in kept for layer in dense)
    return values


def _refuse_other_kind(loaded: LoadedModel, model: Any, new: str, old: str) -> None:
    """A block that transformers builds otherwise at its new place, such as with another attention window."""
    now, was = plain_facts(model.get_submodule(new)), plain_facts(loaded.model.get_submodule(old))
    wrong = next((name for name in sorted({*now, *was}) if now.get(name) != was.get(name)), None)
    if wrong is not None:
        raise CannotCompress(
            f"{old} would become {new}, where {loaded.anatomy.architecture} has {wrong.strip('.')}={now.get(wrong)} instead "
            f"of {was.get(wrong)}, and no config key says otherwise; drop blocks in whole periods of that pattern (criterion "
            "listed)"
        )
