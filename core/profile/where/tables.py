"""The three tables that say where the time goes, made from the spans of repeated steps, and two models side by side.

Pure: spans go in, frames come out, whatever runtime they came from.

``modules`` has one row per phase and module:

- phase: ``prefill``, ``decode`` or ``forward``; module: its path, empty for the whole model; layer (Int64); component
  (``core.models.sizes.Component``); kind: its class; depth: 0 for the whole model
- calls: per step; total_ms: median over the steps, with what it calls, between total_low_ms and total_high_ms (95 %
  order statistics; NaN where the steps are too few); self_ms: without what it calls; share: of the step, self, 0–1

``operators`` has one row per phase, module and operator:

- phase, module, layer, component as above; module is empty where the runtime does not say which part asked for it
- operator: the runtime's name, e.g. ``aten::addmm`` or ``MatMulNBits``; calls: per step; traced_ms: per step, itself
  only, with a profiler looking on and so not a timing; share: of all operators of the phase, 0–1

``events`` has one row per span of one step of each phase:

- phase, name, category (``module`` or ``operator``), module, start_us and duration_us since the phase's start, depth,
  thread; ``trace.chrome_trace(events)`` makes them a file for Perfetto

``joined`` (``join_modules(a, b)``) has one row per phase and module of two models, by path:

- phase, module, layer, component, kind_a, kind_b, depth; total and self of both in ms; difference_ms: self, b − a;
  ratio: total, b / a; only_in: ``a``, ``b`` or empty
"""

from __future__ import annotations

MODULES = (
    *("phase", "module", "layer", "component", "kind", "depth", "calls"),
    *("total_ms", "total_low_ms", "total_high_ms", "self_ms", "share"),
)
OPERATORS = ("phase", "module", "layer", "component", "operator", "calls", "traced_ms", "share")
EVENTS = ("phase", "name", "category", "module", "start_us", "duration_us", "depth", "thread")
JOINED = (
    *("phase", "module", "layer", "component", "kind_a", "kind_b", "depth"),
    *("total_a_ms", "total_b_ms", "self_a_ms", "self_b_ms", "difference_ms", "ratio", "only_in"),
)
