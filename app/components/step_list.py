"""The steps of a recipe in order: a click or Enter opens one, dragging or Alt with an arrow moves it.

Titles and settings reach the page through ``textContent`` only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import streamlit as st

_CSS = """
.steps { display: flex; flex-direction: column; gap: 6px; font-family: var(--st-font); margin: 0; padding: 2px; }
.step { display: flex; align-items: center; gap: 10px; padding: 8px 10px; cursor: pointer;
  border: 1px solid var(--st-border-color); border-radius: var(--st-base-radius); color: var(--st-text-color);
  background: var(--st-background-color); }
.step:hover { border-color: var(--st-gray-color); }
.step:focus-visible { outline: 2px solid var(--st-primary-color); outline-offset: 1px; }
.step[aria-selected="true"] { border-color: var(--st-primary-color); box-shadow: inset 3px 0 0 var(--st-primary-color); }
.step.dragged { opacity: 0.4; }
.step.above { box-shadow: 0 -3px 0 var(--st-primary-color); }
.step.below { box-shadow: 0 3px 0 var(--st-primary-color); }
.grip { cursor: grab; font-size: 16px; line-height: 1; opacity: 0.55; user-select: none; }
.words { min-width: 0; }
.title { font-size: 14px; font-weight: 600; overflow-wrap: anywhere; }
.detail { font-size: 12px; opacity: 0.75; overflow-wrap: anywhere; }
"""
_JS = """
const S = new WeakMap();
export default function ({ data, parentElement, setTriggerValue }) {
  let s = S.get(parentElement);
  if (!s) {
    s = { root: document.createElement("div"), from: null, focus: null };
    s.root.className = "steps"; s.root.setAttribute("role", "listbox");
    parentElement.append(s.root); S.set(parentElement, s);
  }
  s.root.setAttribute("aria-label", data.label);
  const look = JSON.stringify(data.steps);
  if (s.look !== look) {
    s.look = look;
    s.rows = data.steps.map(([title, detail], i) => {
      const row = document.createElement("div"), grip = document.createElement("span");
      const words = document.createElement("div");
      row.className = "step"; row.dataset.i = i; row.draggable = data.steps.length > 1;
      row.setAttribute("role", "option"); row.setAttribute("aria-keyshortcuts", "Alt+ArrowUp Alt+ArrowDown");
      grip.className = "grip"; grip.setAttribute("aria-hidden", "true"); grip.textContent = "\\u2807";
      words.className = "words";
      for (const [name, text] of [["title", `${i + 1}. ${title}`], ["detail", detail]]) {
        const line = document.createElement("div"); line.className = name; line.textContent = text; words.append(line);
      }
      row.append(...(row.draggable ? [grip, words] : [words]));
      return row;
    });
    s.root.replaceChildren(...s.rows);
  }
  s.rows.forEach((row, i) => {
    row.setAttribute("aria-selected", String(i === data.selected));
    row.tabIndex = i === data.selected ? 0 : -1;
  });
  if (s.focus !== null && s.focus === data.selected) { s.rows[s.focus].focus(); s.focus = null; }
  const last = s.rows.length - 1;
  const move = (from, to) => {
    if (to < 0 || to > last || to === from) return;
    s.focus = to; setTriggerValue("move", [from, to, data.version]);
  };
  const clear = () => s.rows.forEach((row) => row.classList.remove("above", "below", "dragged"));
  // Where a row dropped at this height of another ends up, once it has been taken out of the list.
  const place = (row, y) => {
    const box = row.getBoundingClientRect(), below = y > box.top + box.height / 2, i = +row.dataset.i;
    return { below, to: i + (below ? 1 : 0) - (s.from < i + (below ? 1 : 0) ? 1 : 0) };
  };
  s.root.onclick = (e) => { const row = e.target.closest(".step"); if (row) setTriggerValue("pick", +row.dataset.i); };
  s.root.onkeydown = (e) => {
    const row = e.target.closest(".step"); if (!row) return;
    const i = +row.dataset.i, by = { ArrowUp: -1, ArrowDown: 1 }[e.key];
    if (by) {
      e.preventDefault();
      if (e.altKey) move(i, i + by); else s.rows[Math.max(0, Math.min(last, i + by))].focus();
    } else if (e.key === "Enter" || e.key === " ") { e.preventDefault(); s.focus = i; setTriggerValue("pick", i); }
  };
  s.root.ondragstart = (e) => {
    const row = e.target.closest(".step"); if (!row) return;
    s.from = +row.dataset.i; row.classList.add("dragged"); e.dataTransfer.effectAllowed = "move";
    e.dataTransfer.setData("text/plain", "");
  };
  s.root.ondragover = (e) => {
    const row = e.target.closest(".step"); if (!row || s.from === null) return;
    e.preventDefault(); s.rows.forEach((other) => other.classList.remove("above", "below"));
    row.classList.add(place(row, e.clientY).below ? "below" : "above");
  };
  s.root.ondrop = (e) => {
    const row = e.target.closest(".step"); if (!row || s.from === null) return;
    e.preventDefault(); const { to } = place(row, e.clientY), from = s.from;
    s.from = null; clear(); move(from, to);
  };
  s.root.ondragend = () => { s.from = null; clear(); };
  return () => S.delete(parentElement);
}
"""
_mount = st.components.v2.component("slimscope_step_list", css=_CSS, js=_JS)


def step_list(
    steps: Sequence[tuple[str, str]],
    *,
    key: str,
    selected: int,
    on_pick: Callable[[int], None],
    on_move: Callable[[int, int], None],
    version: int,
) -> None:
    """Draw steps as (title, detail); ``on_pick`` is called with the index of one, ``on_move`` with from and to.

    A move that was made in another ``version`` of the list is not reported.
    """

    def picked() -> None:
        index = (st.session_state.get(key) or {}).get("pick")
        if isinstance(index, int) and 0 <= index < len(steps):  # the browser is not trusted
            on_pick(index)

    def moved() -> None:
        ends = (st.session_state.get(key) or {}).get("move")
        if isinstance(ends, list) and len(ends) == 3 and all(isinstance(end, int) for end in ends):
            at, to, drawn = ends
            if drawn == version:
                on_move(at, to)

    _mount(
        key=key,
        data={
            "steps": list(map(list, steps)),
            "selected": selected,
            "version": version,
            "label": "Steps of the recipe, in order",
        },
        on_pick_change=picked,
        on_move_change=moved,
    )
