"""Teacher and student side by side, block by block: which blocks stay, which go, and whose output each learns to give.

A click, or Space, on a block of the teacher keeps or drops it where the recipe's step can be told which. All words reach
the page through ``textContent``.
"""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd
import streamlit as st

from app import format as fmt
from app.distil_views import Student
from core.models.sizes import ModelCard
from core.reshape.depth import evenly

_CSS = """
.map { font-family: var(--st-font); color: var(--st-text-color); font-size: 12px; padding: 2px; }
.row { display: grid; grid-template-columns: 124px repeat(var(--n), minmax(3px, 1fr)); gap: 0 2px; align-items: center; }
.who { font-weight: 600; }
.who small { display: block; font-weight: 400; opacity: 0.75; font-variant-numeric: tabular-nums; }
.cell { height: 34px; display: flex; align-items: center; justify-content: center; box-sizing: border-box; overflow: hidden;
  border-radius: 4px; border: 1px solid var(--st-border-color); font-size: 11px; font-variant-numeric: tabular-nums;
  background: var(--st-secondary-background-color); min-width: 0; padding: 0; }
.cell.outer { border-style: dotted; opacity: 0.85; }
.cell.gone { background: transparent; border: 1px dashed var(--st-gray-color); opacity: 0.6; text-decoration: line-through; }
.cell.mine { border-color: var(--st-primary-color); }
.cell.unknown { border-style: dashed; }
.cell.lit { outline: 2px solid var(--st-primary-color); outline-offset: -1px; }
.cell[role=checkbox] { cursor: pointer; }
.cell[role=checkbox]:hover { border-color: var(--st-gray-color); }
.cell:focus-visible { outline: 2px solid var(--st-primary-color); outline-offset: 1px; }
.lines { display: grid; grid-template-columns: 124px 1fr; gap: 0 2px; }
.lines svg { width: 100%; height: 46px; display: block; overflow: visible; }
.lines path { fill: none; vector-effect: non-scaling-stroke; }
.from { stroke: var(--st-gray-color); stroke-width: 1; opacity: 0.75; }
.learns { stroke: var(--st-primary-color); stroke-width: 1.5; stroke-dasharray: 5 3; }
.lines path.lit { stroke-width: 3; opacity: 1; }
.says { min-height: 18px; padding-top: 6px; font-variant-numeric: tabular-nums; opacity: 0.85; }
"""
_JS = """
const S = new WeakMap(), NS = "http://www.w3.org/2000/svg";
const make = (tag, name, text) => { const el = document.createElement(tag); el.className = name; if (text) el.textContent = text; return el; };
export default function ({ data, parentElement, setTriggerValue }) {
  let s = S.get(parentElement);
  if (!s) { s = { root: make("div", "map"), at: 0 }; parentElement.append(s.root); S.set(parentElement, s); }
  const look = JSON.stringify(data);
  if (s.look === look) return () => S.delete(parentElement);
  s.look = look;
  const focused = s.refocus; s.refocus = null;
  const n = data.teacher.length, map = s.root, cells = [[], []], lines = [];
  map.style.setProperty("--n", n); map.setAttribute("role", "group"); map.setAttribute("aria-label", data.label);
  const says = make("div", "says"); says.setAttribute("aria-live", "polite");
  const rest = () => { says.textContent = data.rest; [...cells[0], ...cells[1], ...lines].forEach((el) => el && el.classList.remove("lit")); };
  const light = (side, i) => {
    rest(); says.textContent = (side ? data.student : data.teacher)[i].says;
    cells[side][i].classList.add("lit");
    data.lines.forEach(([from, to], k) => {
      if ((side ? from : to) !== i) return;
      lines[k].classList.add("lit"); (side ? cells[0][to] : cells[1][from]).classList.add("lit");
    });
  };
  const row = (side, who, size, blocks) => {
    const el = make("div", "row"), name = make("div", "who", who);
    name.append(make("small", "", size)); el.append(name);
    blocks.forEach((block, i) => {
      const cell = make("div", `cell ${block.look}`, n <= 48 ? block.name : "");
      cell.style.gridColumn = block.column + 2; cell.style.gridRow = 1;
      if (block.height < 1) cell.style.height = `${Math.max(7, Math.round(34 * block.height))}px`;
      cell.onmouseenter = () => light(side, i); cell.onmouseleave = rest;
      cell.onfocus = () => { s.at = side ? s.at : i; light(side, i); }; cell.onblur = rest;
      if (side === 0 && block.toggles) {
        cell.setAttribute("role", "checkbox"); cell.setAttribute("aria-checked", String(block.look === ""));
        cell.setAttribute("aria-label", block.says); cell.tabIndex = i === s.at ? 0 : -1;
        cell.onclick = () => { s.at = i; s.refocus = i; setTriggerValue("toggle", [i, data.version]); };
        cell.onkeydown = (e) => {
          const by = { ArrowLeft: -1, ArrowRight: 1 }[e.key];
          if (by) { e.preventDefault(); cells[0][Math.max(0, Math.min(n - 1, i + by))].focus(); }
          else if (e.key === " " || e.key === "Enter") { e.preventDefault(); cell.click(); }
        };
      }
      cells[side].push(cell); el.append(cell);
    });
    return el;
  };
  const above = row(0, "Teacher", data.sizes[0], data.teacher), below = row(1, "Student", data.sizes[1], data.student);
  const middle = make("div", "lines"), svg = document.createElementNS(NS, "svg");
  svg.setAttribute("viewBox", `0 0 ${n} 10`); svg.setAttribute("preserveAspectRatio", "none"); svg.setAttribute("aria-hidden", "true");
  data.lines.forEach(([from, to, kind]) => {
    const path = document.createElementNS(NS, "path"), a = data.teacher[to].column + 0.5, b = data.student[from].column + 0.5;
    path.setAttribute("d", `M ${a} 0 C ${a} 5, ${b} 5, ${b} 10`); path.setAttribute("class", kind);
    lines.push(path); svg.append(path);
  });
  middle.append(make("div", ""), svg);
  map.replaceChildren(above, middle, below, says); rest();
  if (focused != null && cells[0][focused]) cells[0][focused].focus();
  return () => S.delete(parentElement);
}
"""
_mount = st.components.v2.component("slimscope_student_map", css=_CSS, js=_JS)


def student_map(
    card: ModelCard, student: Student, *, key: str, version: int, on_toggle: Callable[[int], None] | None
) -> None:
    """Draw both models; ``on_toggle`` is called with a teacher's block to keep or drop, if it can be told which.

    A click that was made on another ``version`` of the recipe is not reported.
    """

    def toggled() -> None:
        sent = (st.session_state.get(key) or {}).get("toggle")
        if isinstance(sent, list) and len(sent) == 2 and all(isinstance(i, int) for i in sent):
            block, drawn = sent
            if on_toggle is not None and drawn == version and 0 <= block < card.anatomy.n_layers:
                on_toggle(block)  # the browser is not trusted

    data = drawing(card, student, toggles=on_toggle is not None)
    _mount(key=key, data={**data, "version": version}, on_toggle_change=toggled)


def drawing(card: ModelCard, student: Student, *, toggles: bool) -> dict[str, object]:
    """What is drawn, as plain data: blocks of both with their places and words, and the lines between them.

    A line is (student block, teacher block, ``from`` or ``learns``): whose weights it begins with, whose output it is to give.
    """
    n = card.anatomy.n_layers
    kept, places = student.kept, student.kept or evenly(student.n_layers, n)
    sizes = _block_parameters(card)
    teacher = [
        {
            "name": str(layer),
            "column": layer,
            "height": 1.0,
            "look": "" if kept is None or layer in kept else "gone",
            "toggles": toggles,
            "says": f"Teacher block {layer}: {fmt.count(sizes[layer])} parameters, {_fate(layer, kept)}",
        }
        for layer in range(n)
    ]
    blocks = [
        {
            "name": str(number),
            "column": min(place, n - 1),
            "height": student.width,
            "look": "mine" if kept is not None else "mine unknown",
            "toggles": False,
            "says": _of_student(number, student, sizes),
        }
        for number, place in enumerate(places[:n])
    ]
    lines: list[tuple[int, int, str]] = [(s, t, "from") for s, t in enumerate(kept or ())]
    lines += [(s, t, "learns") for s, t in enumerate(student.targets or ()) if s < len(blocks)]
    left = None if student.parts is None else sum(student.parts.left.values())
    return {
        "teacher": teacher,
        "student": blocks,
        "lines": lines,
        "sizes": [
            f"{fmt.count(card.parameters)}, {n} blocks",
            f"{'size open' if left is None else fmt.count(left)}, {student.n_layers} blocks",
        ],
        "rest": _at_rest(student, toggles=toggles),
        "label": f"Teacher with {n} blocks, student with {student.n_layers}",
    }


def _block_parameters(card: ModelCard) -> list[int]:
    frame = card.components.dropna(subset=["layer"])
    by_layer = frame.groupby("layer")["parameters"].sum()
    return [int(by_layer.get(layer, 0)) for layer in range(card.anatomy.n_layers)]


def _fate(layer: int, kept: tuple[int, ...] | None) -> str:
    if kept is None:
        return "kept or dropped as the step finds on its text"
    return f"becomes student block {kept.index(layer)}" if layer in kept else "dropped"


def _of_student(number: int, student: Student, sizes: list[int]) -> str:
    begins = "" if student.kept is None else f", begins as teacher block {student.kept[number]}"
    size = ""
    if student.kept is not None and student.width < 1:
        size = f", about {fmt.count(sizes[student.kept[number]] * student.width)} parameters"
    bits = "" if student.bits is None else f", {student.bits:.2f} bits per number"
    learns = "" if student.targets is None else f", learns what block {student.targets[number]} gives"
    return f"Student block {number}{begins}{size}{bits}{learns}"


def _at_rest(student: Student, *, toggles: bool) -> str:
    made = " → ".join(student.changed) or "The teacher's own weights"
    lines = "grey: weights begin as" + (
        "" if student.targets is None else "; dashed: learns to give its output"
    )
    if student.kept is None:
        lines = "which blocks stay is found by the step, on its text"
    return f"{made} · {lines}" + (" · click a teacher's block to keep or drop it" if toggles else "")


def parts_table(frame: pd.DataFrame) -> None:
    """Sizes of every component in both, from ``app.distil_views.parts_frame``."""
    column = st.column_config
    st.dataframe(
        frame[["component", "teacher", "student", "student_mb", "share"]].assign(
            teacher=frame["teacher"].map(fmt.count),
            student=frame["student"].map(fmt.count),
            share=frame["share"] * 100,
        ),
        hide_index=True,
        height="content",
        key="student_parts",
        alt="Size of every component in teacher and student",
        column_config={
            "component": column.TextColumn("Part", width=90),
            "teacher": column.TextColumn("Teacher", help="Parameters, tied ones once", width=66),
            "student": column.TextColumn("Student", help="Parameters", width=66),
            "student_mb": column.NumberColumn(
                "MB", format="%.2f", help="Of the student, as it will be stored; predicted", width=56
            ),
            "share": column.NumberColumn(
                "Share", help="Its bytes as a share of those in the teacher's files", format="%.0f %%", width=56
            ),
        },
    )  # fmt: skip
