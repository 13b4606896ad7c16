"""What a model computes on one prompt: choose a probe, and every number of it is in the address."""

from __future__ import annotations

import streamlit as st

from app import engine, state
from app.components.error_card import error_card
from app.components.heading import About, Reproduction, heading
from app.components.result_panel import result_panel
from app.components.waiting import settled
from app.forms import settings_form
from app.reproduce import probe_command, probe_script
from app.text import esc
from core.errors import SlimscopeError
from core.registry import methods
from core.types import Prompt

PROMPT = "When Mary and John went to the store, John gave a drink to Mary. When Mary and John went home, John gave a"

source = state.model()
top = st.container()
with st.container(border=True):
    left, right = st.columns([3, 5], gap="medium")
    with left:
        chooser = st.container()
    with right:
        text = st.text_area("Prompt", PROMPT, key="text", bind="query-params", height=82, max_chars=20_000)

try:
    opening = engine.open_model(source)
except SlimscopeError as error:
    top.title("Inspect", anchor=False)
    error_card(error, key="inspect_source")
    st.stop()
card = settled(opening, key="open")
if card is None:
    top.title(esc(f"Opening {source}"), anchor=False)
    st.stop()

probes = methods("probe")
usable = {id_: probe for id_, probe in probes.items() if probe.needs <= card.offers}
with chooser:
    id_ = state.choice(
        st.selectbox,
        "Probe",
        {id_: probe.title for id_, probe in usable.items()},
        key="probe",
        default="logit_lens" if "logit_lens" in usable else next(iter(usable)),
    )
probe = usable[id_]
chooser.caption(esc(probe.summary))
for id_ in sorted(probes.keys() - usable.keys()):
    missing = " and ".join(sorted(probes[id_].needs - card.offers))
    chooser.caption(esc(f"Not for this model: {probes[id_].title}, which needs {missing}."))
with left.popover("Settings", icon=":material/tune:"):
    settings = settings_form(probe, columns=2)
if settings is None:
    st.stop()

prompt = Prompt(text)
with top:
    heading(
        f"{probe.title} of {state.model_name(source)}",
        about=About.of(probe),
        reproduce=Reproduction(
            probe_script(probe, source, card.folder, text, settings),
            probe_command(probe, source, text, settings),
        ),
    )
run = engine.probe(source, probe, prompt, settings)
result = settled(run, key="probe")
if result is not None:
    result_panel(result, name=probe.id, settings=settings)
