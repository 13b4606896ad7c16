"""A line of clickable tokens coloured by a value; the prompt as the model sees it.

Model text reaches the page through ``textContent`` and ``setAttribute`` only, never as HTML or Markdown.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import streamlit as st

from app.components._palette import PALETTE_JS
from app.components._quantize import to_levels

_CSS = """
.strip { font-family: var(--st-code-font); font-size: 13px; line-height: 2; white-space: pre-wrap;
  overflow-wrap: anywhere; }
.tok { padding: 2px 1px; border-radius: 3px; cursor: pointer; }
.tok:hover { outline: 1px solid var(--st-gray-color); }
.tok:focus-visible { outline: 2px solid var(--st-primary-color); }
.tok[aria-selected="true"] { outline: 2px solid #F08C00; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 12px; padding-top: 8px; font: 12px var(--st-font);
  color: var(--st-text-color); font-variant-numeric: tabular-nums; }
.chip { display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin-right: 4px; }
.plain { color: var(--st-text-color); border-bottom: 1px dashed var(--st-border-color); }
"""
_JS = (
    PALETTE_JS
    + """
const S = new WeakMap();
// Neighbouring numbers are a golden angle apart, so that sixteen experts are told apart and 128 still mostly.
const hue = (i) => {
  const h = ((i * 137.508 + 215) % 360) / 60, light = [0.62, 0.46, 0.74][i % 3], a = 0.62 * Math.min(light, 1 - light);
  const part = (n) => { const k = (n + h * 2) % 12; return Math.round(255 * (light - a * Math.max(-1, Math.min(k - 3, 9 - k, 1)))); };
  return [part(0), part(8), part(4)];
};
export default function ({ data, parentElement, setTriggerValue }) {
  let s = S.get(parentElement);
  if (!s) {
    s = { root: document.createElement("div"), legend: document.createElement("div"), toks: [] };
    s.root.className = "strip"; s.root.setAttribute("role", "listbox"); s.legend.className = "legend";
    parentElement.append(s.root, s.legend); S.set(parentElement, s);
  }
  const stops = ramp(parentElement.host ?? s.root, data.diverging), look = data.sig + stops.join();
  s.root.setAttribute("aria-label", data.label);
  if (s.look !== look) {
    s.look = look;
    const colors = lut(stops), q = bytes(data.q);
    s.toks = data.tokens.map((text, i) => {
      const el = document.createElement("span");
      el.className = "tok"; el.dataset.i = i; el.tabIndex = -1; el.title = data.hover[i];
      el.setAttribute("role", "option");
      if (data.missing[i]) el.classList.add("plain");
      else {
        const c = data.groups ? hue(data.groups[i]) : colors.subarray(q[i] * 4, q[i] * 4 + 3);
        el.style.background = `rgb(${c.join()})`; el.style.color = ink(c);
      }
      el.textContent = text.replaceAll("\\n", "\\u23ce\\n");
      return el;
    });
    s.root.replaceChildren(...s.toks);
    s.legend.replaceChildren(...(data.legend ?? []).map(([group, text]) => {
      const item = document.createElement("span"), chip = document.createElement("span");
      chip.className = "chip"; chip.style.background = `rgb(${hue(group).join()})`; item.append(chip, text);
      return item;
    }));
  }
  s.toks.forEach((el, i) => {
    el.setAttribute("aria-selected", String(i === data.selected));
    el.tabIndex = i === (data.selected ?? 0) ? 0 : -1;
  });
  s.root.onclick = (e) => { const t = e.target.closest(".tok"); if (t) setTriggerValue("token", +t.dataset.i); };
  s.root.onkeydown = (e) => {
    const at = s.toks.indexOf(e.target.closest(".tok")); if (at < 0) return;
    const last = s.toks.length - 1;
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: last }[e.key];
    if (to !== undefined) { e.preventDefault(); s.toks[Math.max(0, Math.min(last, to))].focus(); }
    else if (e.key === "Enter" || e.key === " ") { e.preventDefault(); setTriggerValue("token", at); }
  };
  return () => S.delete(parentElement);
}
"""
)
LEGEND = 12
"""Groups named beneath a nominal strip: the most frequent ones."""
_mount = st.components.v2.component("slimscope_token_strip", css=_CSS, js=_JS)


def token_strip(
    tokens: Sequence[str],
    values: Sequence[float],
    *,
    key: str,
    label: str,
    hover: Sequence[str],
    selected: int | None,
    on_pick: Callable[[int], None],
    midpoint: float | None = None,
    limits: tuple[float, float] | None = None,
    nominal: str = "",
) -> None:
    """Draw ``tokens`` coloured by ``values`` (NaN: no colour); a click or Enter calls ``on_pick`` with the index.

    ``hover`` is the tooltip of each token, ``midpoint`` asks for the diverging ramp about that value. ``nominal`` is the
    word for what the values number, e.g. expert: each number then has a hue of its own, and the frequent ones a legend.
    """
    numbers = np.asarray(values, dtype=np.float64)
    missing = np.isnan(numbers)
    levels = to_levels(numbers, midpoint=midpoint, limits=limits)
    groups = np.where(missing, 0, numbers).astype(int).tolist() if nominal else None
    legend = [
        (group, f"{nominal} {group}: {times}")
        for group, times in Counter(numbers[~missing].astype(int).tolist()).most_common(LEGEND)
    ]

    def picked() -> None:
        index = (st.session_state.get(key) or {}).get("token")
        if isinstance(index, int) and 0 <= index < len(tokens):  # the browser is not trusted
            on_pick(index)

    _mount(
        key=key,
        data={
            "tokens": list(tokens),
            "hover": list(hover),
            "q": levels.encoded,
            "missing": missing.tolist(),
            "groups": groups,
            "legend": legend if nominal else None,
            "diverging": midpoint is not None,
            "label": label,
            "selected": selected,
            "sig": f"{levels.signature}-{levels.low}-{levels.high}-{zlib.crc32(repr(list(tokens)).encode())}",
        },
        on_token_change=picked,
    )
