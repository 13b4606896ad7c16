"""Which kind of rows a table holds, by the names of its columns, and each of its rows as one of that kind.

Knows no file format.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from core.corpus.rows import Kind, Message, Row
from core.errors import BadInput
from core.text.tables import Record

NAMES: Mapping[str, tuple[str, ...]] = {
    "messages": ("messages", "conversation", "conversations", "dialog", "dialogue"),
    "prompt": ("prompt", "instruction", "question", "query", "input"),
    "context": ("context", "input"),
    "response": ("response", "completion", "output", "answer"),
    "system": ("system", "system_prompt"),
    "text": ("text", "sentence", "content", "document", "sentence1", "text_a", "premise", "code", "input"),
    "second": ("second", "sentence2", "text_b", "text2", "hypothesis"),
    "label": ("label", "class", "category", "intent", "target", "label_text"),
    "score": ("score", "similarity_score", "similarity", "gold"),
}
"""What is meant → the columns it may stand in, the first that is there."""
KNOWN = frozenset(name for names in NAMES.values() for name in names)
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
"""Other names of the two that talk."""
SHAPES: Mapping[Kind, tuple[tuple[str, ...], ...]] = {
    "instruction": (("messages",), ("prompt", "response")),
    "pairs": (("text", "second", "score"),),
    "labelled": (("text", "label"),),
    "text": (("text",),),
}
"""Kind → what it needs, one of them; the first kind whose needs are met is the table's."""
WANTED = "messages, or prompt and response; text and label; sentence1, sentence2 and score; or text alone"


def is_header(cells: Sequence[str]) -> bool:
    """Whether a table's first row names columns, at least one of which is known."""
    return any(cell in KNOWN for cell in cells)


def kind_of(records: Sequence[Record], *, name: str, kind: str) -> tuple[Kind, dict[str, str]]:
    """The kind of rows, and in which column each part of a row stands.

    A table without a header is text and label where it has two columns, score and two texts where it has three and
    the first is a number. Raises ``BadInput`` where no kind fits, or not the one that was asked for.
    """
    columns = list(dict.fromkeys(column for record in records for column in record.cells))
    if columns == ["1", "2"] and kind in ("auto", "labelled"):
        # The label's column is the one with fewer different values: some files have it first.
        first, second = (len({record.cells.get(column) for record in records}) for column in columns)
        return "labelled", {"text": "1", "label": "2"} if second <= first else {"text": "2", "label": "1"}
    numbered = columns == ["1", "2", "3"] and all(_is_number(record.cells["1"]) for record in records)
    if numbered and kind in ("auto", "pairs"):
        return "pairs", {"score": "1", "text": "2", "second": "3"}
    places = {role: next((c for c in names if c in columns), None) for role, names in NAMES.items()}
    found = {role: column for role, column in places.items() if column is not None}
    if kind == "pairs" and "score" not in found and "label" in found:
        found["score"] = found["label"]
    for each, shapes in SHAPES.items():
        if kind in ("auto", each) and any(all(role in found for role in shape) for shape in shapes):
            return each, found
    asked = "rows" if kind == "auto" else f"{kind} rows"
    raise BadInput(f"{name} has the columns {', '.join(columns)}, which are no {asked}; name them {WANTED}")


def as_rows(records: Iterable[Record], kind: Kind, columns: Mapping[str, str]) -> tuple[Row, ...]:
    """Each record as a row of this kind; raises ``BadInput`` naming the first that is not one."""
    read = _READERS[kind]
    return tuple(read(record, columns) for record in records)


def _text(record: Record, columns: Mapping[str, str]) -> Row:
    return Row(text=_string(record, columns["text"]))


def _labelled(record: Record, columns: Mapping[str, str]) -> Row:
    label = record.cells.get(columns["label"])
    if isinstance(label, list | dict) or label is None or not str(label).strip():
        raise BadInput(f"{record.place} has no label; every row needs one, a word or a number")
    text = _string(record, columns["text"]).strip()
    second = _string(record, columns["second"]).strip() if "second" in columns else ""
    return Row(text=text, second=second, label=str(label).strip())


def _pair(record: Record, columns: Mapping[str, str]) -> Row:
    score = record.cells.get(columns["score"])
    if not _is_number(score):
        raise BadInput(f"{record.place} has the score {score!r}; give a number")
    first, second = (_string(record, columns[side]).strip() for side in ("text", "second"))
    return Row(text=first, second=second, score=float(score))  # type: ignore[arg-type]


def _conversation(record: Record, columns: Mapping[str, str]) -> Row:
    if "messages" in columns:
        messages = _messages(record, columns["messages"])
    else:
        said = _string(record, columns["prompt"])
        context = record.cells.get(columns.get("context", ""), "")
        if context and columns["context"] != columns["prompt"]:
            said = f"{said}\n\n{context}"
        system = record.cells.get(columns.get("system", ""), "")
        opening = (Message("system", str(system)),) if system else ()
        messages = (
            *opening,
            Message("user", said),
            Message("assistant", _string(record, columns["response"])),
        )
    if not any(turn.role == "assistant" for turn in messages):
        raise BadInput(f"{record.place} has no answer; every conversation needs a message of role assistant")
    return Row(messages=messages)


def _messages(record: Record, column: str) -> tuple[Message, ...]:
    """Messages in either of the two spellings there are: role and content, or from and value."""
    turns = record.cells.get(column)
    try:
        found = tuple(
            Message(str(turn.get("role") or turn["from"]), str(turn.get("content") or turn["value"]))
            for turn in turns  # type: ignore[union-attr]
        )
    except (TypeError, KeyError, AttributeError):
        found = ()
    if not found:
        raise BadInput(
            f'{record.place}: {column} is not a list of {{"role": "user", "content": "…"}}; give one such object per '
            "turn, with something said in each"
        )
    return tuple(Message(ROLES.get(turn.role, turn.role), _writable(record, turn.content)) for turn in found)


def _string(record: Record, column: str) -> str:
    value = record.cells.get(column)
    if not isinstance(value, str) or not value.strip():
        raise BadInput(f"{record.place} has no {column}; every row needs one, and it must be text")
    return _writable(record, value)


def _writable(record: Record, text: str) -> str:
    """The text, if it can be written as UTF-8: JSON can escape half of a character."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadInput(
            f"{record.place} has half of a character ({text[error.start]!r}); write that text again"
        ) from None
    return text


def _is_number(value: Any) -> bool:
    try:
        return float(value) == float(value)
    except (TypeError, ValueError):
        return False


_READERS: Mapping[Kind, Callable[[Record, Mapping[str, str]], Row]] = {
    "text": _text,
    "labelled": _labelled,
    "pairs": _pair,
    "instruction": _conversation,
}
