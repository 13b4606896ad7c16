"""What is to be measured: variants × runtimes × workloads as cells, which are measured already, how long the rest takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
import streamlit as st

from app import engine, measurements
from app import format as fmt
from app.components.error_card import error_card
from app.profile_views import runtime_title
from app.text import esc
from core.errors import SlimscopeError
from core.jobs.profile_plan import submit_profiles
from core.profile.grid import Cell, differing
from core.profile.offers import Offer
from core.profile.protocol import EFFORTS
from core.profile.runtimes._base import PLAIN
from core.types import Variant

AXES = {
    "threads": ("Threads", "1, 2", "CPU threads; 0 takes all physical cores"),
    "batch": ("Batch", "1, 4", "Sequences at a time"),
    "prompt_tokens": ("Prompt", "64, 256", "Tokens per prompt"),
    "depth": ("Depth", "0, 1024", "Tokens in the cache when decoding is timed; 0 takes the prompt's"),
}
"""Setting → title, example and help of the axes that every runtime has."""
REFUSED = "grid_refused"
VARIANTS = "grid_variants"


def profile_grid(known: Sequence[Variant]) -> None:
    """Draw the whole choice, its cells and the button that queues what is not measured yet."""
    chosen = _variants(known)
    ticked = _runtimes(measurements.runtimes())
    axes, others = _workload(ticked)
    if not chosen or not ticked:
        st.caption("Pick at least one variant and one runtime; each combination becomes a cell.")
        return
    try:
        cells = measurements.cells(chosen, ticked, axes, others, engine.revision())
    except SlimscopeError as error:
        st.markdown(f":red[{esc(error)}]")
        return
    _cells(cells)


def _variants(known: Sequence[Variant]) -> tuple[str, ...]:
    """A table whose ticked rows are in the address; the base where the address says nothing."""
    ids = [variant.id for variant in known]
    asked = st.query_params.get("variants", ids[0]).split(",")
    rows = [ids.index(id_) for id_ in dict.fromkeys(asked) if id_ in ids]
    if (st.session_state.get(VARIANTS) or {}).get("selection", {}).get("rows") != rows:
        st.session_state[VARIANTS] = {"selection": {"rows": rows}}

    def follow() -> None:
        ticked = st.session_state[VARIANTS]["selection"]["rows"]
        st.query_params["variants"] = ",".join(ids[row] for row in ticked)

    st.dataframe(
        pd.DataFrame(
            {
                "name": [variant.name for variant in known],
                "size": [fmt.size(variant.bytes) for variant in known],
                "bits": [variant.bits_per_weight for variant in known],
            }
        ),
        hide_index=True,
        height="content" if len(known) <= 6 else 250,
        key=VARIANTS,
        on_select=follow,
        selection_mode="multi-row",
        alt="The base and everything made from it; ticked rows are measured",
        column_config={
            "name": st.column_config.TextColumn("Variants", pinned=True, width="large"),
            "size": "Size",
            "bits": st.column_config.NumberColumn("Bits per weight", format="%.2f"),
        },
    )
    return tuple(ids[row] for row in rows)


def _runtimes(offered: Sequence[Offer]) -> tuple[str, ...]:
    """A box for every runtime; those that cannot run here are greyed, with what would add them."""
    asked = {id_ for id_ in st.query_params.get("runtimes", PLAIN).split(",") if id_}

    def follow() -> None:
        ticked = [offer.id for offer in offered if st.session_state.get(f"runtime_{offer.id}")]
        st.query_params["runtimes"] = ",".join(ticked)

    st.caption("Runtimes")
    found = []
    grid = st.grid(4, min_column_width=190, gap="small")
    for offer in offered:
        with grid.container(gap=None, key=f"offer_{offer.id}"):
            ticked = st.checkbox(
                offer.title,
                value=offer.available and offer.id in asked,
                key=f"runtime_{offer.id}",
                disabled=not offer.available,
                help=esc(offer.summary),
                on_change=follow,
            )
            if offer.available:
                found += [offer.id] if ticked else []
            elif offer.install:
                st.code(offer.install, language=None, wrap_lines=True)
            else:
                st.caption(esc(offer.reason))
    return tuple(found)


def _workload(ticked: Sequence[str]) -> tuple[dict[str, tuple[str, ...]], dict[str, tuple[str, ...]]]:
    """Values of the axes, comma-separated, and of the other settings: the tier and the form of the weights."""
    axes = {}
    with st.grid(len(AXES) + 1, min_column_width=130):
        for name, (title, example, told) in AXES.items():
            typed = st.text_input(
                title,
                key=f"grid_{name}",
                bind="query-params",
                placeholder=f"e.g. {example}",
                help=f"{told}; several with commas, nothing for the default",
            )
            if values := tuple(part.strip() for part in typed.split(",") if part.strip()):
                axes[name] = values
        tier = st.segmented_control(
            "Tier",
            list(EFFORTS),
            default="quick",
            required=True,
            key="grid_tier",
            bind="query-params",
            help="How long each phase is measured: rapid half a minute, quick 1 to 2 minutes, full minutes",
        )
    others: dict[str, tuple[str, ...]] = {"tier": (tier,)}
    forms = list(dict.fromkeys(form for id_ in ticked for form in measurements.forms_of(id_)))
    if len(forms) > 1:
        picked = st.pills(
            "Weights kept as",
            forms,
            default=["stored"] if "stored" in forms else None,
            selection_mode="multi",
            key="grid_weights",
            help="stored: as the variant's files have them; the others are rounded once more by the runtime itself",
        )
        if picked:
            others["weights"] = tuple(picked)
    return axes, others


def _cells(cells: Sequence[Cell]) -> None:
    to_do = [cell for cell in cells if cell.to_do]
    seconds = sum(cell.seconds for cell in to_do)
    st.dataframe(
        cell_table(cells),
        hide_index=True,
        height="content" if len(cells) <= 10 else 388,
        key="grid_cells",
        alt="The cells of the grid, which are measured already, and what each would take",
        column_config={
            "name": st.column_config.TextColumn("Variant", pinned=True, width="medium"),
            "runtime": "Runtime",
            "state": st.column_config.MultiselectColumn(
                "State",
                options=["measured", "flagged", "to do", "refused"],
                color=["green", "orange", "blue", "gray"],
            ),
            "takes": "Would take",
            "why": st.column_config.TextColumn("Told by", width="medium"),
        },
    )
    with st.container(horizontal=True, vertical_alignment="center"):
        st.markdown(f":gray[{esc(total_words(cells))}]", width="stretch")
        st.button(
            f"Measure {len(to_do)} cell{'s' * (len(to_do) != 1)} · {fmt.seconds(seconds)}"
            if to_do
            else "All measured",
            icon=":material/speed:",
            disabled=not to_do,
            on_click=_submit,
            args=(tuple(cells),),
            key="measure",
        )
    if refusal := st.session_state.pop(REFUSED, None):
        error_card(refusal, key="grid_refusal")


def cell_table(cells: Sequence[Cell]) -> pd.DataFrame:
    """One row per cell: where it is, whether it is measured, what it would take."""
    rows: list[dict[str, Any]] = []
    for cell in cells:
        state = (
            "refused" if cell.refused else "to do" if cell.to_do else "flagged" if cell.flags else "measured"
        )
        rows.append(
            {
                "name": cell.name,
                "runtime": runtime_title(cell.runtime),
                **{fmt.label(name): str(cell.settings.get(name, "–")) for name in differing(cells)},
                "state": [state],
                "takes": fmt.seconds(cell.seconds) if cell.to_do else "",
                "why": cell.refused or (" ".join(cell.flags) if cell.measured_run else cell.basis),
            }
        )
    return pd.DataFrame(rows)


def total_words(cells: Sequence[Cell]) -> str:
    """How many cells there are, how many are measured, and what the rest takes."""
    to_do = [cell for cell in cells if cell.to_do]
    measured = sum(cell.measured_run is not None for cell in cells)
    parts = [f"{len(cells)} cell{'s' * (len(cells) != 1)}"]
    parts += [f"{measured} measured here already"] if measured else []
    refused = sum(bool(cell.refused) for cell in cells)
    parts += [f"{refused} refused"] if refused else []
    if to_do:
        guessed = any(cell.basis == "guess by size" for cell in to_do)
        parts.append(
            f"about {fmt.seconds(sum(cell.seconds for cell in to_do))} to measure {len(to_do)}, alone on this machine"
        )
        parts += ["guessed by size where nothing was measured yet"] if guessed else []
    return ", ".join(parts)


def _submit(cells: Sequence[Cell]) -> None:
    try:
        submit_profiles(engine.queue(), cells)
        engine.start_work()
    except SlimscopeError as error:
        st.session_state[REFUSED] = error
