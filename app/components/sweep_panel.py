"""Sweeping a setting or two of one step: the variants that means, what is made already, one click for the rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, get_args, get_origin

import pandas as pd
import streamlit as st

from app import engine
from app import format as fmt
from app.text import esc
from core.errors import BadInput
from core.models.sizes import ModelCard
from core.recipe import Recipe
from core.registry import Method, get
from core.sweep import combinations, planned, values_of

NONE = "none"


def sweep_panel(
    recipe: Recipe, at: int, card: ModelCard, *, submit: Callable[[Sequence[Recipe]], None]
) -> None:
    """Draw the sweep over settings of the recipe's step number ``at``; ``submit`` queues the recipes to be made."""
    method = get("compress", recipe.steps[at].method)
    over = _over(method)
    if not over:
        st.caption(
            "Choose a setting and the values it should take; each combination becomes a variant of its own."
        )
        return
    try:
        recipes = combinations(recipe, over, step=at)
    except BadInput as error:
        st.markdown(f":red[{esc(error)}]")
        return
    plan = planned(engine.catalog(), card, recipes)
    made = plan["made"].astype(bool)
    todo = [recipe for recipe, done in zip(recipes, made, strict=True) if not done]
    st.dataframe(
        _shown(plan, card),
        hide_index=True,
        height="content" if len(plan) <= 8 else 318,
        key="sweep_plan",
        alt="The variants of the sweep, their predicted size, and which are made already",
        column_config={
            "name": st.column_config.TextColumn("Variant", pinned=True, width="medium"),
            "size": "Predicted size",
            "share": st.column_config.ProgressColumn(
                "Of float32", format="percent", min_value=0.0, max_value=1.0
            ),
            "state": "State",
        },
    )
    with st.container(horizontal=True, vertical_alignment="center"):
        st.caption(_summary(len(recipes), int(made.sum())), width="stretch")
        if made.any():
            ids = ",".join(plan.loc[made, "variant"])
            st.page_link(
                "../pages/tradeoffs.py",
                label="Ladder of those made",
                icon=":material/scatter_plot:",
                query_params={"among": ids},
            )
        st.button(
            f"Make {len(todo)} variant{'s' * (len(todo) != 1)}",
            icon=":material/add:",
            disabled=not todo,
            on_click=submit,
            args=(todo,),
            key="make_sweep",
        )


def _over(method: Method) -> dict[str, list[str]]:
    """The settings and their values as they are chosen, the first changing slowest."""
    fields = list(method.settings.model_fields)
    over = {}
    grid = st.grid(2, min_column_width=260)
    for number, title in enumerate(("Setting", "And setting")):
        with grid.container(gap="xsmall"):
            free = [name for name in fields if name not in over]
            options = free if number == 0 else [NONE, *free]
            name = st.selectbox(
                title,
                options,
                format_func=lambda n: n if n == NONE else fmt.label(n),
                key=f"sweep_{method.id}_{number}",
            )
            if name != NONE and (values := _values(method, name)):
                over[name] = values
    return over


def _values(method: Method, name: str) -> list[str]:
    """Values of one setting: picked where it has a few, typed with commas where it is a number."""
    info = method.settings.model_fields[name]
    key = f"sweep_{method.id}_{name}_values"
    if get_origin(info.annotation) is Literal or info.annotation is bool:
        options = ["false", "true"] if info.annotation is bool else list(map(str, get_args(info.annotation)))
        return list(st.pills("Values", options, selection_mode="multi", key=key, help=info.description) or [])
    return values_of(st.text_input("Values", key=key, placeholder="0.25, 0.5, 0.75", help=info.description))


def _shown(plan: pd.DataFrame, card: ModelCard) -> pd.DataFrame:
    nbytes = pd.to_numeric(plan["predicted_bytes"])
    return pd.DataFrame(
        {
            "name": plan["name"],
            "size": nbytes.map(fmt.size),
            "share": nbytes / (card.parameters * 4),
            "state": plan["made"].map({True: "made and proven", False: "to be made"}),
        }
    )


def _summary(n: int, made: int) -> str:
    known = f", {made} of them made and proven already" if made else ""
    return f"{n} variant{'s' * (n != 1)}{known}. Each is proved, evaluated and profiled; the jobs run one after another."
