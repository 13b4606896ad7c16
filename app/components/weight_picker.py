"""Choosing one of the opened model's weight matrices by its name, where a probe looks at one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import streamlit as st

from app import state
from core.models.sizes import ModelCard
from core.registry import Method

KIND = "weight"
"""What a settings field says in ``chosen_from`` to be drawn as a choice among weights."""
MATRICES = ("embedding", "attention", "mlp", "shared_expert", "experts", "head")
"""Components whose matrices are read."""
BY_LAYER = "by_layer"


def weight_pickers(probe: Method, card: ModelCard) -> dict[str, Callable[[], str]]:
    """A widget for every field of the probe that names a weight."""
    return {
        name: partial(_pick, f"{probe.id}_{name}", info.description or "", card)
        for name, info in probe.settings.model_fields.items()
        if isinstance(info.json_schema_extra, dict) and info.json_schema_extra.get("chosen_from") == KIND
    }


def names_of(card: ModelCard) -> list[str]:
    """The modules that hold a matrix; of fused experts both of theirs, as transformers names them."""
    rows = card.components
    fused = {block.experts for block in card.anatomy.blocks}
    names = []
    for name in rows.loc[rows["component"].isin(MATRICES), "module"]:
        names += [f"{name}.gate_up_proj", f"{name}.down_proj"] if name in fused else [name]
    return names


def _pick(key: str, help_: str, card: ModelCard) -> str:
    """The name of a weight; empty for the one that the layer says. What a link names otherwise is an option too."""
    names = names_of(card)
    linked = st.query_params.get(key) or st.session_state.get(key)
    if linked and linked not in (BY_LAYER, *names):
        names.append(linked)
    titles = {BY_LAYER: "the last of the layer", **{name: name for name in names}}
    chosen = state.choice(st.selectbox, "Weight", titles, key=key, default=BY_LAYER, help=help_)
    return "" if chosen == BY_LAYER else chosen
