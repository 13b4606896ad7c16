"""A line of clickable tokens coloured by a value; the prompt as the model sees it.

Model text reaches the page through ``textContent`` and ``setAttribute`` only, never as HTML or Markdown.
"""

from __future__ import annotations

import zlib
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
.plain { color: var(--st-text-color); border-bottom: 1px dashed var(--st-border-color); }
"""
_JS = (
    PALETTE_JS
    + """
const S = new WeakMap();
export default function ({ data, parentElement, setTriggerValue }) {
  let s = S.get(parentElement);
  if (!s) {
    s = { root: document.createElement("div"), toks: [] };
    s.root.className = "strip"; s.root.setAttribute("role", "listbox");
    parentElement.appendChild(s.root); S.set(parentElement, s);
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
        const c = colors.subarray(q[i] * 4, q[i] * 4 + 3);
        el.style.background = `rgb(${c.join()})`; el.style.color = ink(c);
      }
      el.textContent = text.replaceAll("\\n", "\\u23ce\\n");
      return el;
    });
    s.root.replaceChildren(...s.toks);
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
) -> None:
    """Draw ``tokens`` coloured by ``values`` (NaN: no colour); a click or Enter calls ``on_pick`` with the index.

    ``hover`` is the tooltip of each token, ``midpoint`` asks for the diverging ramp about that value.
    """
    numbers = np.asarray(values, dtype=np.float64)
    levels = to_levels(numbers, midpoint=midpoint, limits=limits)

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
            "missing": np.isnan(numbers).tolist(),
            "diverging": midpoint is not None,
            "label": label,
            "selected": selected,
            "sig": f"{levels.signature}-{levels.low}-{levels.high}-{zlib.crc32(repr(list(tokens)).encode())}",
        },
        on_token_change=picked,
    )
