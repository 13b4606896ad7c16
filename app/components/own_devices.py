"""Devices of one's own by SSH or adb: check the connection, pin the key, measure the roofs or a variant, a file to run there.

Everything that talks to a device is a job, so that a dead link never holds a page.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import pandas as pd
import streamlit as st

from app import engine, state
from app import format as fmt
from app.components.empty_state import empty_state
from app.components.error_card import error_card
from app.components.job_card import live_jobs
from app.text import esc
from core.devices.job import Engine
from core.devices.registry import Device, devices
from core.errors import SlimscopeError
from core.jobs.device_plan import Action, submit_device
from core.jobs.states import ACTIVE
from core.profile.protocol import EFFORTS
from core.types import Job

REFUSED = "device_refused"
DOWNLOAD_BYTES = 64_000_000
"""A larger file is named, not sent through the browser."""


def own_devices() -> None:
    """Choose one of the reachable devices and act on it."""
    try:
        known = {slug: each for slug, each in devices().items() if each.own}
    except SlimscopeError as error:
        error_card(error, key="own_error")
        return
    if not known:
        empty_state(
            "No device of yours yet. Add it under Registry: a name, transport ssh or adb, and an address.",
            icon="developer_board",
            page="devices",
            action="Open the registry",
            query={"part": "registry"},
        )
        return
    titles = {slug: each.name for slug, each in known.items()}
    slug = state.choice(st.selectbox, "Device", titles, key="device", default=next(iter(titles)))
    device = known[slug]
    if refusal := st.session_state.pop(REFUSED, None):
        error_card(refusal, key="device_refusal")
    jobs = [job for job in engine.queue().jobs(200) if job.kind == "device" and job.spec.get("slug") == slug]
    left, right = st.columns(2, gap="small")
    with left.container(border=True, height="stretch"):
        _connection(device, jobs)
    with right.container(border=True, height="stretch"):
        _measuring(device, jobs)


def _act(slug: str, action: Action, **more: Any) -> None:
    try:
        submit_device(engine.queue(), slug, action, **more)
        engine.start_work()
    except SlimscopeError as error:
        st.session_state[REFUSED] = error


def _button(
    label: str, icon: str, slug: str, action: Action, *, off: bool = False, told: str = "", **more: Any
) -> None:
    st.button(
        label, icon=f":material/{icon}:", on_click=_act, args=(slug, action), kwargs=more, key=f"device_{action}", disabled=off,
        help=told or None,
    )  # fmt: skip


# --- the connection -------------------------------------------------------------------------------------


def _connection(device: Device, jobs: list[Job]) -> None:
    st.header(esc(f"{device.name}: the connection"), anchor=False)
    if device.transport not in ("ssh", "adb"):
        st.caption("It has no transport, so it is only predicted for; a file to run there can still be made.")
        return
    st.caption(esc(f"Reached by {device.transport}, {device.address}; nothing is stored but this name."))
    with st.container(horizontal=True, gap="small"):
        _button(
            "Check",
            "cable",
            device.slug,
            "check",
            told="Connects and asks what it is and which engines it has",
        )
        if device.transport == "ssh":
            _button(
                "Show its key",
                "key",
                device.slug,
                "key",
                told="The host key's fingerprint, before anything is trusted",
            )
        _button(
            "Measure its roofs",
            "roofing",
            device.slug,
            "calibrate",
            told="Read bandwidth and matrix rate, some seconds",
        )
        _button("Clean", "mop", device.slug, "clean", told="Removes everything of ours from it")
    latest = next(
        (job for job in jobs if job.spec["action"] in ("check", "key", "trust", "calibrate", "clean")), None
    )
    if latest is not None:
        live_jobs([latest], prefix="connection")
        if latest.state == "succeeded":
            _answer(device, latest.result)


def _answer(device: Device, result: Mapping[str, Any]) -> None:
    """What the device said last."""
    if "probed" in result:
        _probed(result["probed"])
    if "fingerprint" in result:
        st.code(result["fingerprint"], language=None)
        st.caption("Compare it with what `ssh-keygen -lf` says on the device itself, then pin it.")
        _button("Pin this key", "verified_user", device.slug, "trust", fingerprint=result["fingerprint"])
    if "pinned" in result:
        st.caption("The key is pinned: a device that shows another one is refused.")
    if "roofs" in result:
        frame = pd.DataFrame(result["roofs"])
        st.dataframe(frame, hide_index=True, key="device_roofs", alt="What the device can do at best")
    if "freed_bytes" in result:
        st.caption(f"{fmt.size(result['freed_bytes'])} freed.")


def _probed(said: Mapping[str, Any]) -> None:
    facts = {**said["host"], **said["state"]}
    rows = [
        (fmt.label(name), _told(name, value)) for name, value in facts.items() if value not in (None, "", [])
    ]
    for warning in said["warnings"]:
        st.markdown(f":orange[:material/warning: {esc(warning)}]")
    st.dataframe(
        pd.DataFrame(rows, columns=["What", "Said"]),
        hide_index=True,
        height=240,
        key="probed",
        alt="What the device says of itself",
    )
    engines = pd.DataFrame(said["engines"])
    st.dataframe(
        engines, hide_index=True, key="probed_engines", alt="The engines on the device and what adds them"
    )


def _told(name: str, value: object) -> str:
    if isinstance(value, (int, float)) and name.endswith("bytes"):
        return fmt.size(float(value))
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


# --- measuring ------------------------------------------------------------------------------------------


def _measuring(device: Device, jobs: list[Job]) -> None:
    st.header("Measure on it", anchor=False)
    newest = engine.newest_models(engine.revision())
    titles = {str(row["id"]): f"{row['name']} ({fmt.size(row['bytes'])})" for _, row in newest.iterrows()}
    if not titles:
        st.caption("No model in the catalog yet: open one first.")
        return
    variant = state.choice(st.selectbox, "Variant", titles, key="variant", default=next(iter(titles)))
    with st.container(horizontal=True, vertical_alignment="bottom", gap="small"):
        engines = {"first": "The first that is there", **{name: name for name in get_args(Engine)}}
        engine_ = state.choice(st.selectbox, "Engine", engines, key="engine", default="first")
        tiers: dict[str, str] = {name: name for name in EFFORTS}
        tier = state.choice(st.segmented_control, "Tier", tiers, key="tier", default="quick", required=True)
    chosen: dict[str, Any] = {
        "variant": variant,
        "engine": None if engine_ == "first" else engine_,
        "settings": {"tier": tier},
    }
    with st.container(horizontal=True, gap="small"):
        unreachable = device.transport not in ("ssh", "adb")
        _button(
            "Measure",
            "speed",
            device.slug,
            "profile",
            off=unreachable,
            told="Uploads the files, measures there, brings every sample back",
            **chosen,
        )
        _button(
            "Make a file to run there",
            "description",
            device.slug,
            "script",
            told="For a machine that nothing reaches; import its result",
            **chosen,
        )
    running = [job for job in jobs if job.spec["action"] in ("profile", "script")]
    shown = [job for job in running if job.state in ACTIVE] or running[:1]
    if shown:
        live_jobs(shown, prefix="on_device")
    done = next((job for job in running if job.state == "succeeded"), None)
    if done is not None and "file" in done.result:
        _file(Path(done.result["file"]), int(done.result["bytes"]))
    elif done is not None:
        st.page_link(
            "../pages/tradeoffs.py", label="Show the variant", icon=":material/scatter_plot:",
            query_params={"variant": str(done.result["variant"])},
        )  # fmt: skip


def _file(path: Path, nbytes: int) -> None:
    st.caption(f"Run it there, then bring its lines back under Import ({fmt.size(nbytes)})")
    st.code(f"python3 {path.name}", language="bash")
    if nbytes > DOWNLOAD_BYTES or not path.is_file():
        st.caption(esc(f"It lies at {path}"))
        return
    st.download_button(
        "Download", path.read_bytes, path.name, "application/octet-stream", icon=":material/download:", key="script_file", on_click="ignore"
    )  # fmt: skip
