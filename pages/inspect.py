"""What a model computes on one input: a question, the probe that answers it, and every number of it in the address."""

from __future__ import annotations

import streamlit as st

from app import questions, stored
from app.components.desk import desk
from app.components.opening import opened

top = st.container()
seen = opened("inspect", top)
if seen.run is not None and seen.run.kind == "train":
    stored.training(seen.run)
    st.stop()
with top:
    desk(questions.of_page("inspect"), seen.source, seen.card, seen.run, first=questions.FIRST["inspect"])
