"""A method's settings class, drawn as widgets; every field is in the address.

Bounds in the browser are a courtesy: what comes back is validated again by the settings class, and what it
refuses is said beneath the field that caused it.
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import asdict
from functools import partial
from typing import Any, Literal, Union, get_args, get_origin

import streamlit as st
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from app.format import label
from app.text import esc
from core.registry import Method, Settings

_SEGMENTS = 5
"""Up to so many choices are shown side by side; more become a select box."""


def settings_form(
    method: Method,
    *,
    prefix: str | None = None,
    columns: int = 3,
    inputs: Any | None = None,
    own: Mapping[str, Callable[[], Any]] | None = None,
    start: Mapping[str, Any] | None = None,
    bind: bool = True,
    sections: Mapping[str, Sequence[str]] | None = None,
) -> Settings | None:
    """Draw the settings of ``method`` in a grid; return them validated, or None after saying what is wrong.

    Widget keys, which are also the query parameters, are ``{prefix}_{field}``; the prefix defaults to the id. Texts to
    type are inputs rather than settings: they go into the container ``inputs`` where there is one. ``own`` draws
    fields that have a widget of their own. ``start`` has values that a fresh form begins with instead of the defaults;
    without ``bind`` the fields are not in the address, because the page puts them there another way. ``sections`` names
    fields by title, each folded away but the one without a title.
    """
    fields = method.settings.model_fields
    prefix = prefix or method.id
    own = own or {}
    typed = [name for name in fields if inputs is not None and (name in own or is_text(fields[name]))]
    slots, values = {}, {}
    parts: list[tuple[Sequence[str], Callable[[], Any]]] = [(typed, lambda: inputs)] if typed else []
    rest = [name for name in fields if name not in typed]
    for title, chosen in (sections or {"": rest}).items():
        names = [name for name in chosen if name in rest]
        if names:
            parts.append(
                (names, partial(st.expander, title, key=f"{prefix}_in_{title}") if title else lambda: st)
            )
    for group, made in parts:
        grid = made().grid(columns, min_column_width=180)
        for name in group:
            slots[name] = grid.container(gap=None)
            with slots[name]:
                key = f"{prefix}_{name}"
                draw = own.get(
                    name, partial(_widget, name, _started(name, fields[name], start), key, bind=bind)
                )
                values[name] = draw()
    settings, problems = validated(method.settings, values)
    for name, sentence in problems.items():
        slots.get(name, st).markdown(f":red[{esc(sentence)}]")
    return settings


def validated(settings: type[Settings], values: Mapping[str, Any]) -> tuple[Settings | None, dict[str, str]]:
    """The settings, or None and one sentence per wrong field; a rule over several fields has the key ``""``."""
    try:
        return settings.model_validate(values), {}
    except ValidationError as error:
        problems = {}
        for problem in error.errors():
            said = problem["msg"].removeprefix("Value error, ")
            problems[".".join(map(str, problem["loc"]))] = said[:1].upper() + said[1:]
        return None, problems


def is_text(info: FieldInfo) -> bool:
    """Whether a field is a text to type, such as a target token or a second prompt."""
    return _unwrapped(info.annotation)[0] is str


def default_settings(method: Method) -> dict[str, Any]:
    """The values a freshly drawn form of ``method`` stands for."""
    return method.parse({}).model_dump(mode="json")


def _started(name: str, info: FieldInfo, start: Mapping[str, Any] | None) -> FieldInfo:
    """The field with the value that its widget begins with as its default."""
    if start is None or name not in start:
        return info
    begun = copy(info)
    begun.default = start[name]
    return begun


def _widget(name: str, info: FieldInfo, key: str, *, bind: bool) -> Any:
    """One widget for one field. Raises ``TypeError`` for a type that no widget stands for: our own bug."""
    kind, optional = _unwrapped(info.annotation)
    common: dict[str, Any] = {"key": key, "help": info.description}
    if bind:
        common["bind"] = "query-params"
    title = info.title or label(name)
    if get_origin(kind) is Literal:
        return _choice(title, list(get_args(kind)), info.default, optional, common)
    if kind is bool:
        return st.toggle(title, value=info.default, **common)
    if kind in (int, float):
        return _number(title, kind, info, common, optional)
    if kind is str:
        typed = st.text_input(title, value=info.default or "", **common)
        return None if optional and not typed else typed
    raise TypeError(f"{name}: no widget for {kind}; use bool, int, float, str or Literal in settings")


def _unwrapped(annotation: Any) -> tuple[Any, bool]:
    """``X | None`` as ``(X, True)``, anything else as ``(annotation, False)``."""
    if get_origin(annotation) in (Union, types.UnionType):
        inner = [arm for arm in get_args(annotation) if arm is not type(None)]
        if len(inner) == 1:
            return inner[0], True
    return annotation, False


def _choice(title: str, options: list[Any], default: Any, optional: bool, common: dict[str, Any]) -> Any:
    if optional:
        options = [None, *options]

    def name(option: Any) -> str:
        return "none" if option is None else str(option)

    if len(options) <= _SEGMENTS:
        return st.segmented_control(
            title, options, default=default, required=True, format_func=name, **common
        )
    return st.selectbox(title, options, index=options.index(default), format_func=name, **common)


def _number(
    title: str, kind: Callable[[float], float], info: FieldInfo, common: dict[str, Any], optional: bool
) -> Any:
    """A number input with the field's bounds; an optional one may be left empty."""
    rules = [rule for rule in info.metadata if hasattr(rule, "__dataclass_fields__")]
    bounds = {name: value for rule in rules for name, value in asdict(rule).items()}
    low, high = bounds.get("ge", bounds.get("gt")), bounds.get("le", bounds.get("lt"))
    options: dict[str, Any] = {
        "min_value": None if low is None else kind(low),
        "max_value": None if high is None else kind(high),
        "value": None if info.default is None else kind(info.default),
    }
    if kind is float:
        options |= {"format": "%g", "step": 10.0 ** _step_exponent(info.default)}
    if optional:
        options["placeholder"] = "not set"
    return st.number_input(title, **options, **common)


def _step_exponent(value: float | None) -> int:
    """The power of ten by which a float setting is stepped: one below its own size."""
    return math.floor(math.log10(abs(value))) - 1 if value else -1
