"""One variant on the Trade-offs page: what it is beside the chart, and everything measured below the table."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

import pandas as pd
import streamlit as st

from app import budget, tradeoff_chart, tradeoff_views
from app import format as fmt
from app.components.variant_export import variant_export
from app.components.verdict_note import verdict_note
from app.text import esc
from core.catalog.queries import VariantDetail
from core.tradeoff import available
from core.types import Run, Variant

REDUNDANT = {"perplexity", "flips", "tpot_ms"}
"""Left out of the summary because a neighbour says the same; under Measurements like all others."""


def variant_summary(
    detail: VariantDetail,
    frame: pd.DataFrame,
    mark: pd.Series | None,
    *,
    said: Sequence[str],
    clear: Callable[[], None],
) -> None:
    """Name, standing, what must be said of it, headline numbers with intervals, the proof in a sentence, the error per layer."""
    variant = detail.variant
    with st.container(horizontal=True, vertical_alignment="center"):
        st.header(esc(variant.name), anchor=False, width="stretch")
        variant_export(variant)
        st.button("Clear", type="tertiary", icon=":material/close:", on_click=clear, key="clear_variant")
    with st.container(horizontal=True, gap="xsmall"):
        for text, color in _badges(variant, mark):
            st.markdown(f":{color}-badge[{text}]")
    verdict_note(said)
    st.table(_headline_table(frame, variant.id), border="horizontal")
    st.caption(_proof_sentence(variant, tradeoff_views.proof(detail.runs)))
    errors = tradeoff_views.error_by_layer(detail.layer_errors)
    if len(errors):
        st.caption("Relative weight error per layer")
        chart = tradeoff_chart.layer_errors(errors)
        st.altair_chart(chart, key="layer_errors", alt=f"Relative weight error per layer of {variant.id}")


def _badges(variant: Variant, mark: pd.Series | None) -> list[tuple[str, str]]:
    if variant.recipe is None:
        return [("base", "gray"), (esc(variant.format), "gray")]
    steps = json.loads(variant.recipe)["steps"]
    badges = [(esc(" + ".join(step["method"] for step in steps)), "blue")]
    if not variant.proven:
        return [*badges, ("no reload proof", "red")]
    if mark is None:
        return [*badges, ("not measured on these axes", "gray")]
    if not mark["feasible"]:
        badges.append(("breaks a limit", "orange"))
    elif mark["on_front"]:
        badges.append(("on the front", "green"))
    else:
        badges.append(("dominated", "gray"))
    if 0.005 < mark["probability"] < 0.995:
        badges.append((f"on the front in {mark['probability']:.0%} of draws", "gray"))
    if mark["state"] == "flagged":
        badges.append(("flagged run", "orange"))
    return badges


def _headline_table(frame: pd.DataFrame, variant_id: str) -> pd.DataFrame:
    """The measured objectives of one row, each with its interval."""
    row = frame[frame["variant"] == variant_id].iloc[0]
    shown = []
    for aim in available(frame):
        if pd.isna(row[aim.column]) or aim.column in REDUNDANT:
            continue
        ends = [row.get(f"{aim.column}_{end}", float("nan")) for end in ("low", "high")]
        spread = (
            "" if pd.isna(ends).any() else " … ".join(aim.show(end).removesuffix(aim.unit) for end in ends)
        )
        shown.append({"": aim.title, "Value": aim.show(row[aim.column]), "95 %": spread})
    return pd.DataFrame(shown).set_index("")


def _proof_sentence(variant: Variant, proof: Run | None) -> str:
    if variant.recipe is None:
        return "The base: every other variant is compared with it."
    if not variant.proven:
        return ":red[No passed reload proof: not usable.] Make it again on the Compress page."
    gaps = [m.value for m in (proof.measurements if proof else ()) if m.name == "max_logit_difference"]
    return "Reloaded in a fresh process" + (
        f", largest logit difference {fmt.number(gaps[0])}." if gaps else "."
    )


def variant_evidence(detail: VariantDetail, base: Variant, folder: str | None) -> None:
    """Tabs with all measurements, lineage and recipe, proof, layers and the way to get the same numbers."""
    names = ["Measurements", "Recipe and lineage", "Reload proof", "Layers", "Reproduce"]
    tabs = st.tabs(names, key="evidence", on_change="rerun", bind="query-params")
    draw = (_measurements, _recipe, _proof, _layers, _reproduce)
    for tab, part in zip(tabs, draw, strict=True):
        if tab.open:
            with tab:
                part(detail, base, folder)


def _measurements(detail: VariantDetail, _base: Variant, _folder: str | None) -> None:
    frame = tradeoff_views.measurements(detail.runs)
    if frame.empty:
        st.caption("Nothing is measured yet. Evaluate and profile it from the Compress page.")
        return
    st.caption(
        f"{len(frame)} measurements of {len(detail.runs)} runs, repeats included; "
        "intervals are 95 %, and nothing is ever overwritten."
    )
    st.dataframe(
        frame,
        hide_index=True,
        height=min(38 + 35 * len(frame), 420),
        key="measurements",
        alt=f"Every measurement of variant {detail.variant.id}",
        column_config={
            "measurement": st.column_config.TextColumn("Measurement", pinned=True),
            "value": "Value",
            "interval": "95 % interval",
            "n": st.column_config.NumberColumn("n", width=60),
            "kind": "Run",
            "status": "Status",
            "conditions": st.column_config.TextColumn("Conditions", width="large"),
            "interval_method": "Interval by",
            "protocol": "Protocol",
            "ended_at": st.column_config.DatetimeColumn("Measured", format="YYYY-MM-DD HH:mm"),
            "run": "Run id",
        },
    )


def _recipe(detail: VariantDetail, _base: Variant, _folder: str | None) -> None:
    chain = [*reversed(detail.lineage), detail.variant]
    facts = pd.DataFrame(
        {
            "name": [v.name for v in chain],
            "id": [v.id for v in chain],
            "made_from": [", ".join(v.parents) or v.source for v in chain],
            "format": [v.format for v in chain],
            "size": [fmt.size(v.bytes) for v in chain],
            "bits": [v.bits_per_weight for v in chain],
            "made": [v.created_at for v in chain],
        }
    )
    st.dataframe(
        facts,
        hide_index=True,
        key="lineage",
        alt="From the base to this variant",
        column_config={
            "name": "Variant",
            "id": "Id",
            "made_from": "Made from",
            "format": "Format",
            "size": "Size",
            "bits": st.column_config.NumberColumn("Bits per weight", format="%.2f"),
            "made": st.column_config.DatetimeColumn("Made", format="YYYY-MM-DD HH:mm"),
        },
    )
    if detail.variant.recipe is None:
        st.caption("A base has no recipe.")
        return
    st.code(json.dumps(json.loads(detail.variant.recipe), indent=2), language="json")
    query = {"recipe": detail.variant.recipe}
    st.page_link(
        "../pages/compress.py", label="Start from this recipe", icon=":material/edit:", query_params=query
    )


def _proof(detail: VariantDetail, _base: Variant, _folder: str | None) -> None:
    proof = tradeoff_views.proof(detail.runs)
    if proof is None:
        base = detail.variant.recipe is None
        st.caption(
            "A base is not rewritten, so there is nothing to prove." if base else "No proof is recorded."
        )
        return
    st.caption("The saved files, loaded by plain transformers in a fresh process that has none of our code.")
    facts = {fmt.label(m.name): fmt.number(m.value, m.unit) for m in proof.measurements}
    facts |= {fmt.label(key): str(value) for key, value in proof.conditions.items()}
    frame = pd.DataFrame({"fact": list(facts), "value": list(facts.values())})
    columns = {"fact": "Checked", "value": "Found"}
    st.dataframe(frame, hide_index=True, key="proof", column_config=columns, alt="What the reload found")


def _layers(detail: VariantDetail, _base: Variant, _folder: str | None) -> None:
    layers = detail.layer_errors
    if layers.empty:
        st.caption("No per-weight statistics are kept for this variant.")
        return
    stages = budget.stages_of(detail)
    if stages is not None:
        st.caption("Predicted against measured loss, as the parts were stored one after the other")
        unit = "nats/token" if detail.variant.family == "decoder" else "1 - cosine"
        chart = budget.predicted_chart(stages, unit)
        st.altair_chart(
            chart, key="predicted_loss", alt=f"Predicted against measured loss of {detail.variant.id}"
        )
    touched = layers.loc[layers["touched"].astype(bool), "parameters"].sum() / layers["parameters"].sum()
    st.caption(f"{len(layers)} weights; {touched:.1%} of their parameters were changed.")
    st.dataframe(
        layers,
        hide_index=True,
        height=360,
        key="layers",
        alt="What compression did to each weight",
        column_config={
            "module": st.column_config.TextColumn("Weight", pinned=True),
            "layer": "Layer",
            "component": "Component",
            "bits": st.column_config.NumberColumn("Bits", format="%.2f"),
            "parameters": st.column_config.NumberColumn("Parameters", format="localized"),
            "relative_error": st.column_config.ProgressColumn(
                "Relative error",
                format="%.4f",
                min_value=0,
                max_value=float(layers["relative_error"].max() or 1),
            ),
            "sqnr_db": st.column_config.NumberColumn("SQNR (dB)", format="%.1f"),
            "touched": "Changed",
        },
    )


def _reproduce(detail: VariantDetail, base: Variant, folder: str | None) -> None:
    left, right = st.columns(2, gap="medium")
    with left:
        st.caption("Load it in Python, without Slimscope")
        st.code(tradeoff_views.reproduce_python(detail.variant, base, folder), language="python")
    with right:
        st.caption("Make and measure it again")
        st.code(tradeoff_views.reproduce_cli(detail.variant, base), language="bash")
