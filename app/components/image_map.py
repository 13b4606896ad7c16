"""A picture with weights of its patches laid over it: how much each counted, at an opacity the reader sets.

A patch is the more opaque the more it counted, so that the picture shows through where little did; one colour that
stands out on black and on white, and a second one below the midpoint where there is one. The picture travels as a data address, which the page's policy allows for images only. Patches are elements that a
click or Enter picks; opacity is changed in the browser, without asking the server.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Callable, Sequence

import numpy as np
import streamlit as st

from app.components._palette import BYTES_JS
from app.components._quantize import to_levels

_CSS = """
.image { position: relative; width: min(100%, var(--max)); }
.image img { width: 100%; display: block; image-rendering: pixelated; border-radius: 6px;
  border: 1px solid var(--st-border-color); box-sizing: border-box; }
.patch { position: absolute; cursor: pointer; opacity: var(--opacity); }
.patch:hover { outline: 1px solid var(--st-text-color); opacity: 1; }
.patch:focus-visible { outline: 2px solid var(--st-primary-color); }
.patch[aria-selected="true"] { outline: 2px solid #F08C00; z-index: 1; }
.below { display: flex; flex-wrap: wrap; align-items: center; gap: 8px; padding-top: 8px; font: 12px var(--st-font);
  color: var(--st-text-color); font-variant-numeric: tabular-nums; }
.bar { width: 140px; height: 8px; border-radius: 4px; border: 1px solid var(--st-border-color); }
.below label { display: flex; align-items: center; gap: 6px; margin-left: auto; }
.below input { width: 110px; accent-color: var(--st-primary-color); }
"""
_JS = (
    BYTES_JS
    + """
const MORE = "76 110 245", LESS = "232 89 12";
const S = new WeakMap();
const make = (tag, name) => { const el = document.createElement(tag); if (name) el.className = name; return el; };
const digits = (v) => (v === 0 ? "0" : Math.abs(v) >= 1e-3 && Math.abs(v) < 1e5 ? v.toPrecision(3) : v.toExponential(1));
export default function ({ data, parentElement, setTriggerValue }) {
  let s = S.get(parentElement);
  if (!s) { s = { root: make("div"), opacity: 0.75 }; parentElement.appendChild(s.root); S.set(parentElement, s); }
  if (s.look !== data.sig) {
    s.look = data.sig;
    const q = bytes(data.q), image = make("div", "image"), picture = make("img");
    picture.src = `data:image/png;base64,${data.picture}`; picture.alt = data.label;
    image.style.setProperty("--max", data.max_width + "px"); image.style.setProperty("--opacity", s.opacity);
    image.setAttribute("role", "listbox"); image.setAttribute("aria-label", data.label);
    s.patches = data.boxes.map(([left, top, width, height], i) => {
      const el = make("div", "patch"), part = data.diverging ? Math.abs(q[i] - 127.5) / 127.5 : q[i] / 255;
      el.style.cssText = `left:${left * 100}%;top:${top * 100}%;width:${width * 100}%;height:${height * 100}%`;
      el.style.background = `rgb(${data.diverging && q[i] < 127.5 ? LESS : MORE} / ${part})`;
      el.title = data.hover[i]; el.dataset.i = i; el.tabIndex = -1;
      el.setAttribute("role", "option"); el.setAttribute("aria-label", data.hover[i]);
      return el;
    });
    image.append(picture, ...s.patches);
    const below = make("div", "below"), bar = make("div", "bar"), low = make("span"), high = make("span");
    low.textContent = digits(data.low); high.textContent = `${digits(data.high)} ${data.unit}`;
    bar.style.background = `linear-gradient(90deg, ${data.diverging ? `rgb(${LESS}),` : ""} transparent, rgb(${MORE}))`;
    const label = make("label"), slider = make("input");
    Object.assign(slider, { type: "range", min: 0, max: 1, step: 0.05, value: s.opacity });
    slider.oninput = () => { s.opacity = +slider.value; image.style.setProperty("--opacity", s.opacity); };
    label.append("Opacity", slider); below.append(low, bar, high, label);
    s.root.replaceChildren(image, below);
  }
  s.patches.forEach((el, i) => {
    el.setAttribute("aria-selected", String(i === data.selected));
    el.tabIndex = i === (data.selected ?? 0) ? 0 : -1;
  });
  const pick = (el) => setTriggerValue("patch", +el.dataset.i);
  s.root.onclick = (e) => { const t = e.target.closest(".patch"); if (t) pick(t); };
  s.root.onkeydown = (e) => {
    const t = e.target.closest(".patch"); if (!t) return;
    const at = s.patches.indexOf(t), last = s.patches.length - 1;
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, ArrowDown: at + data.columns, ArrowUp: at - data.columns }[e.key];
    if (to !== undefined) { e.preventDefault(); s.patches[Math.max(0, Math.min(last, to))].focus(); }
    else if (e.key === "Enter" || e.key === " ") { e.preventDefault(); pick(t); }
  };
  return () => S.delete(parentElement);
}
"""
)
_mount = st.components.v2.component("slimscope_image_map", css=_CSS, js=_JS)


def image_map(
    picture: bytes,
    boxes: Sequence[tuple[float, float, float, float]],
    values: Sequence[float],
    *,
    key: str,
    label: str,
    hover: Sequence[str],
    unit: str,
    selected: int | None,
    on_pick: Callable[[int], None],
    midpoint: float | None = None,
    limits: tuple[float, float] | None = None,
    max_width: int = 420,
) -> None:
    """Draw a PNG under coloured ``boxes`` (left, top, width, height as shares of the picture), one per value.

    A click or Enter calls ``on_pick`` with the box's index.
    """
    levels = to_levels(np.asarray(values, dtype=np.float64), midpoint=midpoint, limits=limits)

    def picked() -> None:
        index = (st.session_state.get(key) or {}).get("patch")
        if isinstance(index, int) and 0 <= index < len(boxes):  # the browser is not trusted
            on_pick(index)

    _mount(
        key=key,
        data={
            "picture": base64.b64encode(picture).decode(),
            "boxes": [list(box) for box in boxes],
            "columns": len({round(box[0], 6) for box in boxes}),
            "q": levels.encoded,
            "low": levels.low,
            "high": levels.high,
            "hover": list(hover),
            "unit": unit,
            "label": label,
            "diverging": midpoint is not None,
            "max_width": max_width,
            "selected": selected,
            "sig": f"{levels.signature}-{levels.low}-{levels.high}-{zlib.crc32(picture)}",
        },
        on_patch_change=picked,
    )
