"""Heat maps on canvas: one or many maps of the same shape, a quarter of a million cells without effort.

A hover reads out row, column and value; a click, or Enter after the arrow keys, sends the cell back. Row and
column names may be model text: they are written with ``textContent``.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import streamlit as st
from numpy.typing import NDArray

from app.components._palette import PALETTE_JS
from app.components._quantize import to_levels

_CSS = """
.maps { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, var(--w)), 1fr)); gap: 12px;
  font: 12px var(--st-font); color: var(--st-text-color); }
.maps.one { grid-template-columns: minmax(0, var(--max)); }
.one .plot { margin: 0 2px 18px var(--gutter); }
.one .tick { position: absolute; font-size: 10px; line-height: 1; white-space: pre; overflow: hidden;
  text-overflow: ellipsis; font-variant-numeric: tabular-nums; opacity: 0.85; }
.one .side { right: calc(100% + 5px); max-width: calc(var(--gutter) - 6px); transform: translateY(-50%); }
.one .below { top: calc(100% + 4px); transform: translateX(-50%); }
figure { margin: 0; position: relative; }
figcaption { display: flex; justify-content: space-between; gap: 8px; padding-bottom: 3px; min-height: 16px;
  font-variant-numeric: tabular-nums; }
figcaption span { white-space: pre; overflow: hidden; text-overflow: ellipsis; }
.plot { position: relative; }
canvas { width: 100%; aspect-ratio: var(--ar); max-height: 460px; image-rendering: pixelated; border-radius: 4px; display: block;
  border: 1px solid var(--st-border-color); cursor: crosshair; box-sizing: border-box; }
canvas:focus-visible { outline: 2px solid var(--st-primary-color); }
.ring { position: absolute; border: 2px solid #F08C00; border-radius: 2px; pointer-events: none;
  box-sizing: border-box; min-width: 6px; min-height: 6px; }
.scale { display: flex; align-items: center; gap: 8px; grid-column: 1 / -1; font-variant-numeric: tabular-nums; }
.bar { width: 140px; height: 8px; border-radius: 4px; }
"""
_JS = (
    PALETTE_JS
    + """
const S = new WeakMap();
const make = (tag, name) => { const el = document.createElement(tag); if (name) el.className = name; return el; };
const digits = (v) => (v === 0 ? "0" : Math.abs(v) >= 1e-3 && Math.abs(v) < 1e5 ? v.toPrecision(3) : v.toExponential(1));
export default function ({ data, parentElement, setTriggerValue }) {
  let s = S.get(parentElement);
  if (!s) { s = { root: make("div", "maps") }; parentElement.appendChild(s.root); S.set(parentElement, s); }
  s.fire = (cell) => setTriggerValue("cell", cell);
  const stops = ramp(parentElement.host ?? s.root, data.diverging), look = data.sig + stops.join();
  const [M, R, C] = data.shape;
  if (s.look !== look) {
    s.look = look;
    s.root.style.setProperty("--w", data.min_width + "px"); s.root.style.setProperty("--ar", `${C} / ${R}`);
    s.root.style.setProperty("--max", data.max_width + "px");
    const q = bytes(data.q), colors = lut(stops), level = (m, r, c) => q[(m * R + r) * C + c] / 255,
      value = (m, r, c) => data.log ? data.low * (data.high / data.low) ** level(m, r, c) : data.low + level(m, r, c) * (data.high - data.low);
    const scale = make("div", "scale"), bar = make("div", "bar"), lo = make("span"), hi = make("span");
    lo.textContent = digits(data.low); hi.textContent = `${digits(data.high)} ${data.unit}`;
    bar.style.background = `linear-gradient(90deg, ${stops.join()})`; scale.append(lo, bar, hi);
    const ticks = () => [
      ...data.row_ticks.map(([i, text]) => tick("side", "top", (i + 0.5) / R, text)),
      ...data.col_ticks.map(([i, text]) => tick("below", "left", (i + 0.5) / C, text)),
    ];
    const tick = (name, edge, at, text) => {
      const el = make("span", `tick ${name}`); el.textContent = text; el.style[edge] = `${at * 100}%`; return el;
    };
    s.root.className = M === 1 ? "maps one" : "maps";
    s.root.style.setProperty("--gutter", data.gutter + "px");
    s.rings = [];
    const maps = data.titles.map((title, m) => {
      const figure = make("figure"), caption = make("figcaption"), name = make("span"), read = make("span");
      const plot = make("div", "plot"), canvas = make("canvas"), ring = make("div", "ring");
      name.textContent = title; caption.append(name, read);
      canvas.width = C; canvas.height = R; canvas.tabIndex = 0;
      canvas.setAttribute("role", "img"); canvas.setAttribute("aria-label", `${data.label}, ${title}`);
      const image = new ImageData(C, R);
      for (let i = 0; i < R * C; i++) { const k = q[m * R * C + i] * 4; image.data.set(colors.subarray(k, k + 4), i * 4); }
      canvas.getContext("2d").putImageData(image, 0, 0);
      const at = (e) => {
        const b = canvas.getBoundingClientRect(), clip = (v, n) => Math.min(n - 1, Math.max(0, Math.floor(v * n)));
        return [clip((e.clientY - b.top) / b.height, R), clip((e.clientX - b.left) / b.width, C)];
      };
      const say = (r, c) => { read.textContent = `${data.rows[r]} \\u2192 ${data.cols[c]}  ${digits(value(m, r, c))}`; };
      let cursor = [0, 0];
      canvas.onmousemove = (e) => say(...at(e));
      canvas.onmouseleave = () => { read.textContent = ""; };
      canvas.onclick = (e) => { const [row, col] = at(e); s.fire({ map: m, row, col }); };
      canvas.onkeydown = (e) => {
        const step = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] }[e.key];
        if (step) {
          e.preventDefault();
          cursor = [Math.min(R - 1, Math.max(0, cursor[0] + step[0])), Math.min(C - 1, Math.max(0, cursor[1] + step[1]))];
          say(...cursor);
        } else if (e.key === "Enter") s.fire({ map: m, row: cursor[0], col: cursor[1] });
      };
      plot.append(canvas, ring, ...(M === 1 ? ticks() : [])); figure.append(caption, plot); s.rings.push(ring);
      return figure;
    });
    s.root.replaceChildren(...maps, scale);
  }
  s.rings.forEach((ring, m) => {
    const on = data.selected && data.selected.map === m;
    ring.hidden = !on; ring.style.display = on ? "block" : "none";
    if (on) Object.assign(ring.style, { left: `${(data.selected.col / C) * 100}%`, top: `${(data.selected.row / R) * 100}%`,
      width: `${100 / C}%`, height: `${100 / R}%` });
  });
  return () => S.delete(parentElement);
}
"""
)
_mount = st.components.v2.component("slimscope_heat_canvas", css=_CSS, js=_JS)
LETTER = 6
"""Pixels of a letter below the map."""


@dataclass(frozen=True)
class Cell:
    """One cell of one map, by index."""

    row: int
    col: int
    map: int = 0


def _ticks(names: Sequence[object], most: int) -> list[tuple[int, str]]:
    """At most ``most`` evenly spaced names with their index."""
    return [(i, str(names[i])) for i in range(0, len(names), -(-len(names) // most))]


def _fit(names: Sequence[str], width: int) -> bool:
    """Whether names stand side by side below their columns; numbers of up to three digits are thinned until they do."""
    longest = max(map(len, names))
    return longest <= 3 or longest * LETTER <= width / len(names)


def heat_canvas(
    values_MRC: NDArray[np.floating],
    *,
    key: str,
    label: str,
    titles: Sequence[str],
    axes: tuple[str, str],
    rows: Sequence[str],
    cols: Sequence[str],
    unit: str = "",
    midpoint: float | None = None,
    log: bool = False,
    limits: tuple[float, float] | None = None,
    selected: Cell | None = None,
    on_pick: Callable[[Cell], None] | None = None,
    min_width: int = 150,
    max_width: int = 640,
) -> None:
    """Draw M maps of R rows by C columns under ``titles``; ``on_pick`` is called with the clicked cell.

    ``axes`` names rows and columns. A map alone has its axes labelled; many are read by hovering. All maps share one colour scale, drawn beneath them with its limits and ``unit``; ``log`` makes
    it even in the logarithm.
    """
    n_maps, n_rows, n_cols = values_MRC.shape
    assert (len(titles), len(rows), len(cols)) == (n_maps, n_rows, n_cols)
    levels = to_levels(values_MRC, midpoint=midpoint, log=log, limits=limits)

    def picked() -> None:
        cell = (st.session_state.get(key) or {}).get("cell") or {}
        at = cell.get("map"), cell.get("row"), cell.get("col")
        inside = all(isinstance(i, int) and 0 <= i < n for i, n in zip(at, values_MRC.shape, strict=True))
        if on_pick is not None and inside:  # the browser is not trusted
            on_pick(Cell(cell["row"], cell["col"], cell["map"]))

    names = repr((list(titles), list(rows), list(cols))).encode()
    _mount(
        key=key,
        data={
            "q": levels.encoded,
            "shape": [n_maps, n_rows, n_cols],
            "low": levels.low,
            "high": levels.high,
            "titles": list(titles),
            "axes": list(axes),
            "rows": list(rows),
            "cols": list(cols),
            "unit": unit,
            "label": label,
            "diverging": midpoint is not None,
            "log": log,
            "min_width": min_width,
            "max_width": max_width,
            "row_ticks": _ticks(rows, 48),
            "col_ticks": _ticks(cols if _fit(cols, max_width) else range(n_cols), 16),
            "gutter": min(110, 10 + 6 * max(map(len, rows))),
            "selected": vars(selected) if selected else None,
            "sig": f"{levels.signature}-{levels.low}-{levels.high}-{zlib.crc32(names)}",
        },
        on_cell_change=picked,
    )
