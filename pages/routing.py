"""Mixture of experts: who routes what where, what it rests on, and what would change if it routed otherwise."""

from __future__ import annotations

import streamlit as st

from app import questions
from app.components import moe_parts as parts
from app.components.desk import desk
from app.components.opening import opened

top = st.container()
seen = opened("routing", top)
with top:
    if not seen.card.anatomy.n_experts:
        parts.dense(seen.source, seen.card)
        st.stop()
    desk(
        questions.of_page("routing"),
        seen.source,
        seen.card,
        seen.run,
        first=questions.FIRST["routing"],
        facts=parts.facts,
    )
