"""Seeded generators of structured text: sums, JSON, SQL and dates, of more forms and values than can be memorised.

Each takes a seed and about how many bytes to write; the same seed always writes the same text. Sums and weekdays are
right. Knows nothing about splits or models.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import date, datetime, timedelta
from random import Random
from typing import Any


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_ONSETS = (
    "b",
    "br",
    "c",
    "ch",
    "d",
    "dr",
    "f",
    "g",
    "h",
    "j",
    "k",
    "l",
    "m",
    "n",
    "p",
    "qu",
    "r",
    "s",
    "st",
    "t",
    "v",
)
_VOWELS = ("a", "e", "i", "o", "u", "ea", "oo", "ai")
_ENDS = ("", "n", "r", "l", "s", "t", "m", "nd", "ck", "x")
_THINGS = _words(
    "order customer product invoice shipment account payment supplier employee department city country region sensor "
    "device reading user session message comment article author book library course student teacher grade flight "
    "airport ticket passenger recipe ingredient review rating project task team budget vehicle route station"
)
_FIELDS = _words(
    "id name title status price amount quantity weight height width score count total email phone street zip state "
    "category kind color size level priority created_at updated_at due_date started ended active visible verified "
    "latitude longitude version language currency discount tax notes tags"
)
_VALUES = _words(
    "red green blue black white small medium large open closed pending shipped returned active paused high low urgent "
    "north south east west paper metal wood glass cotton daily weekly monthly admin guest editor en fr de es it"
)
_MONTHS = _words("January February March April May June July August September October November December")
_DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
_EVENTS = _words(
    "meeting delivery dentist lecture concert deadline review inspection holiday launch interview rehearsal maintenance "
    "backup flight check-in payday harvest opening exam"
)


def _fill(rng: Random, n_bytes: int, write: Callable[[Random], str], between: str) -> str:
    pieces: list[str] = []
    room = n_bytes
    while room > 0:
        pieces.append(write(rng))
        room -= len(pieces[-1]) + len(between)
    return between.join(pieces) + "\n"


def _name(rng: Random) -> str:
    syllables = rng.randint(1, 3)
    word = "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(syllables)) + rng.choice(_ENDS)
    return word.capitalize()


def arithmetic(seed: str, n_bytes: int) -> str:
    """Sums, products, quotients, comparisons, sequences and short chains, all right; one style per seed mostly."""
    rng = Random(seed)
    digits = rng.randint(1, 5)
    tight = rng.random() < 0.3
    text = _fill(rng, n_bytes, lambda r: _sum(r, digits if r.random() < 0.7 else r.randint(1, 6)), "\n")
    return text.replace(" ", "") if tight else text


def _sum(rng: Random, digits: int) -> str:
    low, high = 10 ** (digits - 1) - (digits == 1), 10**digits - 1
    a, b, c = (rng.randint(low, high) for _ in range(3))
    form = rng.randrange(9)
    if form == 0:
        return f"{a} + {b} = {a + b}"
    if form == 1:
        return f"{a} - {b} = {a - b}"
    if form == 2:
        return f"{a % 1000} * {b % 1000} = {(a % 1000) * (b % 1000)}"
    if form == 3:
        divisor = b % 90 + 2
        return f"{a} / {divisor} = {a // divisor} rest {a % divisor}"
    if form == 4:
        return f"({a} + {b}) - {c} = {a + b} - {c} = {a + b - c}"
    if form == 5:
        return f"{a} {'<' if a < b else '>' if a > b else '='} {b}"
    if form == 6:
        step = b % 25 + 1
        return ", ".join(str(a + step * i) for i in range(rng.randint(4, 9)))
    if form == 7:
        return f"{a}.{b % 100:02d} + {c}.{a % 100:02d} = {(a * 100 + b % 100 + c * 100 + a % 100) / 100:.2f}"
    return f"{a % 50}^2 + {b % 50}^2 = {(a % 50) ** 2} + {(b % 50) ** 2} = {(a % 50) ** 2 + (b % 50) ** 2}"


def json_records(seed: str, n_bytes: int) -> str:
    """Objects of a random shape, one shape per seed, written in one of three styles."""
    rng = Random(seed)
    shape = _shape(rng, depth=2)
    indent = rng.choice((None, None, 1, 2, 4))
    separators = (",", ":") if indent is None and rng.random() < 0.5 else None
    return _fill(
        rng, n_bytes, lambda r: json.dumps(_value(r, shape), indent=indent, separators=separators), "\n"
    )


def _shape(rng: Random, *, depth: int) -> dict[str, Any]:
    """Field → "text", "number", … or a shape inside it."""
    kinds = ["text", "word", "integer", "number", "flag", "date", "words", "null"]
    shape: dict[str, Any] = {}
    for field in rng.sample(_FIELDS, rng.randint(3, 7)):
        shape[field] = rng.choice(kinds)
    if depth:
        for thing in rng.sample(_THINGS, rng.randint(0, 2)):
            inner = _shape(rng, depth=depth - 1)
            shape[thing if rng.random() < 0.5 else f"{thing}s"] = inner if rng.random() < 0.6 else [inner]
    return shape


def _value(rng: Random, shape: Any) -> Any:
    if isinstance(shape, dict):
        return {field: _value(rng, inner) for field, inner in shape.items()}
    if isinstance(shape, list):
        return [_value(rng, shape[0]) for _ in range(rng.randint(0, 3))]
    choices: dict[str, Callable[[], Any]] = {
        "text": lambda: f"{_name(rng)} {_name(rng)}",
        "word": lambda: rng.choice(_VALUES),
        "integer": lambda: rng.randint(0, 10 ** rng.randint(1, 6)),
        "number": lambda: round(rng.uniform(-100, 1000), rng.randint(1, 4)),
        "flag": lambda: rng.random() < 0.5,
        "date": lambda: _moment(rng).date().isoformat(),
        "words": lambda: rng.sample(_VALUES, rng.randint(0, 4)),
        "null": lambda: None if rng.random() < 0.5 else _name(rng),
    }
    return choices[shape]()


def sql(seed: str, n_bytes: int) -> str:
    """A small schema per seed, and statements that fit it."""
    rng = Random(seed)
    tables = {
        (thing if rng.random() < 0.5 else f"{thing}s"): rng.sample(_FIELDS[1:], rng.randint(3, 7))
        for thing in rng.sample(_THINGS, rng.randint(2, 4))
    }
    lower = rng.random() < 0.3
    made = "\n".join(_create(rng, table, fields) for table, fields in tables.items())
    said = made + "\n" + _fill(rng, max(n_bytes - len(made), 1), lambda r: _statement(r, tables), "\n")
    return said.lower() if lower else said


def _create(rng: Random, table: str, fields: list[str]) -> str:
    types = (
        "INTEGER",
        "TEXT",
        "TEXT NOT NULL",
        "REAL",
        "NUMERIC(10, 2)",
        "VARCHAR(64)",
        "BOOLEAN",
        "TIMESTAMP",
        "DATE",
    )
    columns = ",\n".join(f"    {field} {rng.choice(types)}" for field in fields)
    return f"CREATE TABLE {table} (\n    id INTEGER PRIMARY KEY,\n{columns}\n);"


def _literal(rng: Random) -> str:
    kind = rng.randrange(5)
    if kind == 0:
        return str(rng.randint(0, 10 ** rng.randint(1, 5)))
    if kind == 1:
        return f"{rng.uniform(0, 500):.2f}"
    if kind == 2:
        return f"'{_name(rng)}'"
    return f"'{rng.choice(_VALUES)}'" if kind == 3 else f"'{_moment(rng).date().isoformat()}'"


def _condition(rng: Random, fields: list[str]) -> str:
    field = rng.choice(fields)
    form = rng.randrange(5)
    if form == 0:
        return f"{field} IN ({', '.join(_literal(rng) for _ in range(rng.randint(2, 4)))})"
    if form == 1:
        return f"{field} IS {'NOT ' if rng.random() < 0.5 else ''}NULL"
    if form == 2:
        return f"{field} LIKE '%{_name(rng).lower()}%'"
    return f"{field} {rng.choice(('=', '<', '>', '<=', '>=', '<>'))} {_literal(rng)}"


def _statement(rng: Random, tables: dict[str, list[str]]) -> str:
    table, fields = rng.choice(list(tables.items()))
    where = " AND ".join(_condition(rng, fields) for _ in range(rng.randint(1, 2)))
    some = rng.sample(fields, rng.randint(1, min(4, len(fields))))
    form = rng.randrange(6)
    if form == 0:
        values = ", ".join(_literal(rng) for _ in some)
        return f"INSERT INTO {table} ({', '.join(some)}) VALUES ({values});"
    if form == 1:
        changes = ", ".join(f"{field} = {_literal(rng)}" for field in some)
        return f"UPDATE {table} SET {changes} WHERE {where};"
    if form == 2:
        return f"DELETE FROM {table} WHERE {where};"
    if form == 3:
        other = rng.choice([name for name in tables if name != table])
        return (
            f"SELECT a.{some[0]}, b.id\nFROM {table} AS a\n{rng.choice(('JOIN', 'LEFT JOIN'))} {other} AS b "
            f"ON a.{other}_id = b.id\nWHERE a.{_condition(rng, fields)};"
        )
    if form == 4:
        function = rng.choice(("COUNT", "SUM", "AVG", "MIN", "MAX"))
        return (
            f"SELECT {some[0]}, {function}({rng.choice(fields)}) FROM {table} WHERE {where} GROUP BY {some[0]} "
            f"HAVING COUNT(*) > {rng.randint(1, 50)};"
        )
    order = f" ORDER BY {rng.choice(fields)}{rng.choice((' DESC', ''))}" if rng.random() < 0.6 else ""
    limit = f" LIMIT {rng.randint(1, 200)}" if rng.random() < 0.5 else ""
    return f"SELECT {', '.join(some)} FROM {table} WHERE {where}{order}{limit};"


def dates(seed: str, n_bytes: int) -> str:
    """Calendars, diaries, log stamps and intervals; weekdays and differences are right."""
    rng = Random(seed)
    forms = rng.sample((_diary, _stamp, _interval, _weekday, _hours), rng.randint(1, 3))
    return _fill(rng, n_bytes, lambda r: r.choice(forms)(r), "\n")


def _moment(rng: Random) -> datetime:
    return datetime(1950, 1, 1) + timedelta(seconds=rng.randrange(100 * 366 * 86_400))


def _long_date(day: date) -> str:
    return f"{_DAYS[day.weekday()]}, {day.day} {_MONTHS[day.month - 1]} {day.year}"


def _diary(rng: Random) -> str:
    moment = _moment(rng)
    return f"{_long_date(moment)}, {moment:%H:%M}: {rng.choice(_EVENTS)} with {_name(rng)} in {_name(rng)}"


def _stamp(rng: Random) -> str:
    moment = _moment(rng)
    form = rng.choice(
        ("%Y-%m-%dT%H:%M:%SZ", "%d/%m/%Y %H:%M", "%Y%m%d-%H%M%S", "%d.%m.%y %H.%M", "%m/%d/%Y %I:%M")
    )
    return f"{moment.strftime(form)} = {_long_date(moment)}"


def _interval(rng: Random) -> str:
    first = _moment(rng).date()
    days = rng.randint(1, 400)
    last = first + timedelta(days=days)
    return (
        f"from {first.isoformat()} to {last.isoformat()}: {days} days, {days // 7} weeks and {days % 7} days"
    )


def _weekday(rng: Random) -> str:
    day = _moment(rng).date()
    after = day + timedelta(days=7)
    return f"{_MONTHS[day.month - 1]} {day.day}, {day.year} was a {_DAYS[day.weekday()]}; one week later: {after.isoformat()}"


def _hours(rng: Random) -> str:
    start = rng.randrange(0, 1200)
    minutes = rng.randrange(5, 240)
    end = start + minutes
    days = "-".join(sorted((rng.choice(_DAYS)[:3] for _ in range(2)), key=[d[:3] for d in _DAYS].index))
    said = f"{start // 60:02d}:{start % 60:02d} - {end // 60:02d}:{end % 60:02d}"
    return f"{days} {said} ({minutes // 60} h {minutes % 60} min) {rng.choice(_EVENTS)}"


GENERATED: dict[str, Callable[[str, int], str]] = {
    "arithmetic": arithmetic,
    "json": json_records,
    "sql": sql,
    "dates": dates,
}
"""Seed and bytes to text, by domain."""
