"""The parts of the page Routing: what a mixture of experts is made of, what can be done about it, or that it is none."""

from __future__ import annotations

import streamlit as st

from app import format, state
from app.components.heading import About, heading
from app.compress_views import fitting
from app.text import esc
from core.models.sizes import ModelCard
from core.recipe import Recipe
from core.registry import Need

DEMO = "demo:moe"
ABOUT = About(
    "In a mixture of experts each token passes through a few MLPs of many, chosen anew in every layer by a small "
    "linear map, the router. What is shown is the decision itself, read from the arguments of the experts' module "
    "while the model ran; nothing is recomputed from the router's logits.",
    paper="https://arxiv.org/abs/1701.06538",
)


def facts(card: ModelCard) -> None:
    """The headline: experts, how many of the parameters one token uses, where the bytes are, and how to have fewer."""
    anatomy, components = card.anatomy, card.components
    layers = sum(block.is_moe for block in anatomy.blocks)
    experts = components[components["component"] == "experts"]
    routed_bytes = int(experts["bytes"].sum())
    idle = 1 - anatomy.experts_per_token / anatomy.n_experts
    active, read = card.active_parameters, card.bytes - routed_bytes * idle
    cards = [
        (
            "Experts",
            f"{anatomy.n_experts} × {layers}",
            f"{anatomy.experts_per_token} per token, {layers} of {anatomy.n_layers} layers route",
        ),
        (
            "Active parameters",
            format.count(active),
            f"of {format.count(card.parameters)} ({active / card.parameters:.0%})",
        ),
        (
            "In experts",
            format.size(routed_bytes),
            f"{routed_bytes / card.bytes:.0%} of the model's bytes",
        ),
        ("Read per token", format.size(round(read)), f"{card.dtype}, when one token is decoded"),
    ]
    grid = st.grid(4, min_column_width=200)
    for label, value, beneath in cards:
        grid.metric(
            label, value, delta=beneath, delta_color="off", delta_arrow="off", border=True, height="stretch"
        )
    _next_steps(card)


def _next_steps(card: ModelCard) -> None:
    """What can be made of it by its routing."""
    with st.container(horizontal=True, gap="small", vertical_alignment="center"):
        st.caption("Compress by routing", width="content")
        _recipe_links(card, "moe", icon="compress")


def _recipe_links(card: ModelCard, need: Need, *, icon: str) -> None:
    """A link to every compression method that asks for ``need`` and fits the model, its default recipe ready to be changed."""
    for id_, method in fitting(card.offers).items():
        if need in method.needs:
            st.page_link(
                "../pages/compress.py",
                label=esc(method.title),
                icon=f":material/{icon}:",
                help=esc(method.summary),
                query_params={"recipe": Recipe.of(id_).canonical()},
            )


def dense(source: str, card: ModelCard) -> None:
    """A model without experts: why there is nothing to see, and the two ways on."""
    name = state.model_name(source)
    heading(f"{name} is dense", about=ABOUT)
    with st.container(border=True):
        st.markdown(
            f"{esc(name)} has no experts: each token passes through all of its {format.count(card.parameters)} "
            "parameters, so there is no routing to look at."
        )
        with st.container(horizontal=True, gap="small"):
            st.button(
                "Open a mixture of experts",
                icon=":material/alt_route:",
                key="open_demo_moe",
                on_click=state.choose_model,
                args=(DEMO,),
            )
            _recipe_links(card, "dense", icon="call_split")
