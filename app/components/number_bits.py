"""The bits of a number, format beneath format: sign, exponent and mantissa in colours, what is read back, how far off.

A row is an option that a click or Enter picks. Colours are the theme's; each has the ink that is readable on it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import streamlit as st

from app.components._palette import PALETTE_JS
from core.numerics.catalogue import Field

_CSS = """
.grid { display: grid; grid-template-columns: max-content minmax(0, 1fr) max-content max-content; align-items: center;
  font: 12.5px var(--st-font); color: var(--st-text-color); font-variant-numeric: tabular-nums; }
.head { padding: 0 6px 4px; font-size: 11.5px; opacity: 0.75; white-space: nowrap; }
.head.num, .value { text-align: right; }
.row { display: grid; grid-column: 1 / -1; grid-template-columns: subgrid; align-items: center; cursor: pointer;
  border-radius: 6px; min-height: 25px; }
.row > * { padding: 0 6px; }
.row:hover { background: color-mix(in srgb, var(--st-text-color) 6%, transparent); }
.row:focus-visible { outline: 2px solid var(--st-primary-color); }
.row[aria-selected="true"] { background: color-mix(in srgb, #F08C00 15%, transparent); box-shadow: inset 2px 0 0 #F08C00; }
.row.first { margin-top: 7px; }
.name { white-space: nowrap; }
.bits { display: flex; gap: 3px; overflow: hidden; }
.field { display: flex; border-radius: 3px; overflow: hidden; flex: none; }
.bit { width: 9.8px; text-align: center; font: 11px/17px var(--st-code-font); }
.value { white-space: nowrap; }
.table { container-type: inline-size; }
@container (max-width: 600px) { .bit { width: 7px; } .bits { gap: 2px; } }
@container (max-width: 420px) { .bits { overflow-x: auto; scrollbar-width: none; } .track { display: none; } }
.off { display: flex; align-items: center; gap: 6px; font-size: 11.5px; white-space: nowrap; }
.track { width: 36px; flex: none; } .track i { display: block; height: 4px; border-radius: 2px; min-width: 1px; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 14px; padding: 8px 8px 0; font: 12px var(--st-font); color: var(--st-text-color); }
.chip { display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin-right: 5px; }
.wide .grid { display: block; }
.wide .bit { width: 22px; line-height: 30px; font: 600 16px/30px var(--st-code-font); }
.wide .field { border-radius: 5px; } .wide .bits { gap: 6px; flex-wrap: wrap; overflow: visible; }
.wide.long .bit { width: 11.5px; line-height: 22px; font: 600 12px/22px var(--st-code-font); }
.wide .under { font: 11.5px var(--st-font); text-align: center; opacity: 0.85; padding-top: 3px; font-variant-numeric: tabular-nums; }
"""
_JS = (
    PALETTE_JS
    + """
const S = new WeakMap();
const make = (tag, name, text) => {
  const el = document.createElement(tag); if (name) el.className = name; if (text !== undefined) el.textContent = text; return el;
};
const NAMES = { sign: "sign", exponent: "exponent", mantissa: "mantissa", code: "integer or codebook code" };
const hues = (el) => {
  const named = getComputedStyle(el).getPropertyValue("--st-chart-categorical-colors").split(",").map((s) => s.trim());
  const pick = (i, other) => (/^#[0-9a-f]{6}$/i.test(named[i] ?? "") ? named[i] : other);
  return { sign: pick(2, "#D9730D"), exponent: pick(0, "#3B5BDB"), mantissa: pick(1, "#0F9D77"), code: pick(3, "#9C36B5") };
};
export default function ({ data, parentElement, setTriggerValue }) {
  let s = S.get(parentElement);
  if (!s) { s = { root: make("div") }; parentElement.appendChild(s.root); S.set(parentElement, s); }
  const colors = hues(parentElement.host ?? s.root);
  const fields = (parts) => {
    const bits = make("div", "bits");
    parts.forEach(({ kind, bits: text, says }) => {
      if (!text) return;
      const holder = make("div"), field = make("div", "field");
      field.style.background = colors[kind]; field.style.color = ink(rgb(colors[kind]));
      [...text].forEach((bit) => field.append(make("span", "bit", bit)));
      holder.append(field); if (data.large && says) holder.append(make("div", "under", says));
      bits.append(holder);
    });
    return bits;
  };
  if (data.large) {
    const bits = fields(data.rows[0].parts), n = data.rows[0].parts.reduce((sum, p) => sum + p.bits.length, 0);
    s.root.className = n > 16 ? "wide long" : "wide"; bits.setAttribute("role", "img"); bits.setAttribute("aria-label", data.label);
    s.root.replaceChildren(bits);
    return () => S.delete(parentElement);
  }
  const grid = make("div", "grid"), kinds = new Set();
  ["Format", "Bits", "Reads back", "Off by"].forEach((text, i) => grid.append(make("div", i === 2 ? "head num" : "head", text)));
  const list = make("div"); list.style.display = "contents"; list.setAttribute("role", "listbox"); list.setAttribute("aria-label", data.label);
  const rows = data.rows.map((row, i) => {
    const el = make("div", i && row.width !== data.rows[i - 1].width ? "row first" : "row"), off = make("div", "off"), track = make("div", "track"), bar = make("i");
    el.setAttribute("role", "option"); el.setAttribute("aria-selected", String(i === data.selected)); el.dataset.i = i;
    el.tabIndex = i === data.selected ? 0 : -1;
    bar.style.width = `${100 * row.error}%`; bar.style.background = row.clipped ? "var(--st-red-color)" : "#F08C00";
    if (row.error > 0) track.append(bar);
    off.append(track, make("span", "", row.off));
    row.parts.forEach((part) => kinds.add(part.kind));
    el.append(make("div", "name", row.title), fields(row.parts), make("div", "value", row.value), off);
    return el;
  });
  list.append(...rows); grid.append(list);
  const legend = make("div", "legend");
  Object.keys(NAMES).filter((kind) => kinds.has(kind)).forEach((kind) => {
    const item = make("span"), chip = make("span", "chip"); chip.style.background = colors[kind]; item.append(chip, NAMES[kind]); legend.append(item);
  });
  s.root.className = "table"; s.root.replaceChildren(grid, legend);
  const pick = (el) => setTriggerValue("row", +el.dataset.i);
  list.onclick = (e) => { const t = e.target.closest(".row"); if (t) pick(t); };
  list.onkeydown = (e) => {
    const t = e.target.closest(".row"); if (!t) return;
    const at = +t.dataset.i, to = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: rows.length - 1 }[e.key];
    if (to !== undefined) { e.preventDefault(); rows[Math.max(0, Math.min(rows.length - 1, to))].focus(); }
    else if (e.key === "Enter" || e.key === " ") { e.preventDefault(); pick(t); }
  };
  return () => S.delete(parentElement);
}
"""
)
_mount = st.components.v2.component("slimscope_number_bits", css=_CSS, js=_JS)


@dataclass(frozen=True)
class Part:
    """A field of a stored number."""

    kind: Field
    bits: str
    says: str = ""
    """What it means, shown beneath it where it is drawn large."""


@dataclass(frozen=True)
class BitRow:
    """One format's line."""

    title: str
    width: int
    """Bits of a value; a change of it leaves a gap."""
    parts: tuple[Part, ...]
    value: str
    off: str
    error: float
    """Length of the error's bar, 0 … 1."""
    clipped: bool


def bit_table(
    rows: Sequence[BitRow], *, key: str, label: str, selected: int, on_pick: Callable[[int], None]
) -> None:
    """Draw one line per format; a click or Enter calls ``on_pick`` with the line's index."""

    def picked() -> None:
        index = (st.session_state.get(key) or {}).get("row")
        if isinstance(index, int) and 0 <= index < len(rows):  # the browser is not trusted
            on_pick(index)

    _mount(
        key=key,
        data={"rows": [asdict(row) for row in rows], "selected": selected, "label": label, "large": False},
        on_row_change=picked,
    )


def bit_strip(parts: Sequence[Part], *, key: str, label: str) -> None:
    """Draw the bits of one number large, with what each field means beneath it."""
    row = BitRow("", 0, tuple(parts), "", "", 0.0, False)
    _mount(key=key, data={"rows": [asdict(row)], "selected": 0, "label": label, "large": True})
