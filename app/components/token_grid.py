"""A heat map with a word in each cell (layers down, tokens across): what a lens reads at every place.

It scrolls inside itself with both headers in sight, so thirty layers by sixty-four positions stay readable.
Cells are DOM elements filled by ``textContent``; above ``MARK_LIMIT`` cells use ``heat_canvas`` instead.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence

import numpy as np
import streamlit as st
from numpy.typing import NDArray

from app.charts import MARK_LIMIT
from app.components._palette import PALETTE_JS
from app.components._quantize import to_levels
from app.components.heat_canvas import Cell

_CSS = """
.frame { overflow: auto; max-height: 560px; border: 1px solid var(--st-border-color); border-radius: 6px; }
.frame:focus-visible { outline: 2px solid var(--st-primary-color); }
.grid { display: grid; grid-auto-rows: 21px; font: 11px var(--st-code-font); }
.row { display: contents; }
.cell, .head { padding: 3px 5px; white-space: pre; overflow: hidden; text-overflow: ellipsis; line-height: 1.35; }
.cell { cursor: pointer; contain: strict; }
.cell:hover { outline: 1px solid var(--st-gray-color); outline-offset: -1px; }
.cell:focus-visible { outline: 2px solid var(--st-primary-color); outline-offset: -2px; }
.cell[aria-selected="true"] { outline: 2px solid #F08C00; outline-offset: -2px; }
.centred .cell { text-align: center; }
.head { background: var(--st-secondary-background-color); color: var(--st-text-color); position: sticky; }
.top { top: 0; z-index: 1; border-bottom: 1px solid var(--st-border-color); }
.side { left: 0; z-index: 1; text-align: right; border-right: 1px solid var(--st-border-color);
  font-variant-numeric: tabular-nums; }
.corner { left: 0; top: 0; z-index: 2; font-family: var(--st-font); }
.scale { display: flex; align-items: center; gap: 8px; padding: 6px 2px 0; font: 12px var(--st-font);
  color: var(--st-text-color); font-variant-numeric: tabular-nums; }
.bar { width: 140px; height: 8px; border-radius: 4px; }
"""
_JS = (
    PALETTE_JS
    + """
const S = new WeakMap();
const make = (tag, name, role) => { const el = document.createElement(tag); el.className = name; if (role) el.setAttribute("role", role); return el; };
const digits = (v) => (v === 0 ? "0" : Math.abs(v) >= 1e-3 && Math.abs(v) < 1e5 ? v.toPrecision(3) : v.toExponential(1));
export default function ({ data, parentElement, setTriggerValue }) {
  let s = S.get(parentElement);
  if (!s) {
    s = { frame: make("div", "frame"), grid: make("div", "grid", "grid"), scale: make("div", "scale") };
    s.frame.append(s.grid); parentElement.append(s.frame, s.scale); S.set(parentElement, s);
  }
  const [R, C] = data.shape, stops = ramp(parentElement.host ?? s.grid, data.diverging), look = data.sig + stops.join();
  s.grid.setAttribute("aria-label", data.label); s.grid.classList.toggle("centred", data.centred);
  if (s.look !== look) {
    s.look = look;
    // A definite width and height of every track, so that no cell has to be measured to lay out the others.
    s.grid.style.gridTemplateColumns = `${data.head_width}px repeat(${C}, minmax(${data.cell_width}px, 1fr))`;
    s.grid.style.minWidth = `${data.head_width + C * data.cell_width}px`;
    const q = bytes(data.q), colors = lut(stops);
    const head = (text, name, role) => { const el = make("div", `head ${name}`, role); el.textContent = text; el.title = text; return el; };
    const top = make("div", "row", "row");
    top.append(head(data.corner, "corner", "columnheader"), ...data.cols.map((text) => head(text, "top", "columnheader")));
    s.cells = [];
    const rows = data.rows.map((name, r) => {
      const row = make("div", "row", "row");
      row.append(head(name, "side", "rowheader"), ...data.cols.map((col, c) => {
        const i = r * C + c, el = make("div", "cell", "gridcell"), k = colors.subarray(q[i] * 4, q[i] * 4 + 3);
        el.textContent = data.words[i]; el.title = data.hover[i]; el.dataset.i = i; el.tabIndex = -1;
        el.style.background = `rgb(${k.join()})`; el.style.color = ink(k);
        s.cells.push(el);
        return el;
      }));
      return row;
    });
    s.grid.replaceChildren(top, ...rows);
    const bar = make("div", "bar"), low = make("span", ""), high = make("span", "");
    low.textContent = digits(data.low); high.textContent = `${digits(data.high)}  ${data.unit}`;
    bar.style.background = `linear-gradient(90deg, ${stops.join()})`;
    s.scale.replaceChildren(low, bar, high);
    s.selected = null;
  }
  const chosen = data.selected ? data.selected.row * C + data.selected.col : null;
  if (s.selected !== null && s.cells[s.selected]) { s.cells[s.selected].setAttribute("aria-selected", "false"); s.cells[s.selected].tabIndex = -1; }
  s.cells[chosen ?? 0].tabIndex = 0;
  if (chosen !== null) s.cells[chosen].setAttribute("aria-selected", "true");
  s.selected = chosen ?? 0;
  const pick = (i) => setTriggerValue("cell", { row: Math.floor(i / C), col: i % C });
  s.grid.onclick = (e) => { const t = e.target.closest(".cell"); if (t) pick(+t.dataset.i); };
  s.grid.onkeydown = (e) => {
    const t = e.target.closest(".cell"); if (!t) return;
    const at = +t.dataset.i, to = { ArrowRight: at + 1, ArrowLeft: at - 1, ArrowDown: at + C, ArrowUp: at - C }[e.key];
    if (to !== undefined) { e.preventDefault(); if (s.cells[to]) s.cells[to].focus(); }
    else if (e.key === "Enter" || e.key === " ") { e.preventDefault(); pick(at); }
  };
  return () => S.delete(parentElement);
}
"""
)
_mount = st.components.v2.component("slimscope_token_grid", css=_CSS, js=_JS)


def token_grid(
    words: Sequence[Sequence[str]],
    values_RC: NDArray[np.floating],
    *,
    key: str,
    label: str,
    corner: str,
    rows: Sequence[str],
    cols: Sequence[str],
    hover: Sequence[Sequence[str]],
    unit: str,
    selected: Cell | None,
    on_pick: Callable[[Cell], None],
    midpoint: float | None = None,
    log: bool = False,
    limits: tuple[float, float] | None = None,
    centred: bool = False,
) -> None:
    """Draw R rows by C columns of ``words`` coloured by ``values_RC``; a click calls ``on_pick`` with the cell.

    ``corner`` names rows and columns, ``hover`` is each cell's tooltip, ``unit`` ends the colour scale,
    which is even, or with ``log`` even in the logarithm. Words that are marks look best ``centred``.
    """
    n_rows, n_cols = values_RC.shape
    assert n_rows * n_cols <= MARK_LIMIT, "too many cells for the DOM; draw them with heat_canvas"
    levels = to_levels(values_RC, midpoint=midpoint, log=log, limits=limits)
    flat_words = [word for row in words for word in row]

    def picked() -> None:
        cell = (st.session_state.get(key) or {}).get("cell") or {}
        row, col = cell.get("row"), cell.get("col")
        if isinstance(row, int) and isinstance(col, int) and 0 <= row < n_rows and 0 <= col < n_cols:
            on_pick(Cell(row, col))

    _mount(
        key=key,
        data={
            "q": levels.encoded,
            "shape": [n_rows, n_cols],
            "low": levels.low,
            "high": levels.high,
            "words": flat_words,
            "hover": [text for row in hover for text in row],
            "rows": list(rows),
            "cols": list(cols),
            "corner": corner,
            "unit": unit,
            "label": label,
            "cell_width": 58,
            "head_width": 14 + 7 * max(map(len, [corner, *rows])),
            "centred": centred,
            "diverging": midpoint is not None,
            "selected": {"row": selected.row, "col": selected.col} if selected else None,
            "sig": f"{levels.signature}-{levels.low}-{levels.high}-{zlib.crc32(repr((flat_words, list(cols))).encode())}",
        },
        on_cell_change=picked,
    )
