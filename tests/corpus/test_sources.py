"""Every kind of row from every kind of file, and each refusal in one sentence."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import datasets
import pytest

from core.corpus.leakage import as_rows as evaluation_rows
from core.corpus.leakage import leaks, refuse_leakage
from core.corpus.rows import Message
from core.corpus.sources import open_rows
from core.errors import BadInput
from core.text.documents import load_documents

LABELLED = [{"text": f'say "{n}",\tnow', "category": "even" if n % 2 == 0 else "odd"} for n in range(6)]
SUFFIXES = (".csv", ".jsonl", ".parquet")


def write(path: Path, table: list[dict]) -> str:
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(table).to_parquet(path)
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, table)))
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(table[0]))
            writer.writeheader()
            writer.writerows(table)
    return str(path)


def test_every_file_gives_the_same_rows(tmp_path):
    found = [open_rows(write(tmp_path / f"set{suffix}", LABELLED)) for suffix in SUFFIXES]
    assert {rows.kind for rows in found} == {"labelled"}
    assert [(row.text, row.label) for row in found[0].rows] == [tuple(row.values()) for row in LABELLED]
    assert len({rows.fingerprint for rows in found}) == 1


@pytest.mark.parametrize(
    ("table", "kind", "row"),
    [
        ({"Sentence1": "a", "sentence2": "b", "score": 2.5}, "pairs", ("a", "b", "", 2.5, ())),
        ({"premise": "a", "hypothesis": "b", "label": 1}, "labelled", ("a", "b", "1", 0.0, ())),
        ({"content": "long text", "url": "x"}, "text", ("long text", "", "", 0.0, ())),
        (
            {"instruction": "Add", "input": "1 1", "output": "2"},
            "instruction",
            ("", "", "", 0.0, (("user", "Add\n\n1 1"), ("assistant", "2"))),
        ),
        (
            {"question": "Why?", "answer": "So.", "system": "Be short."},
            "instruction",
            ("", "", "", 0.0, (("system", "Be short."), ("user", "Why?"), ("assistant", "So."))),
        ),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
            "instruction",
            ("", "", "", 0.0, (("user", "a"), ("assistant", "b"))),
        ),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
            "instruction",
            ("", "", "", 0.0, (("user", "a"), ("assistant", "b"))),
        ),
    ],
)
def test_the_columns_say_the_kind(tmp_path, table, kind, row):
    rows = open_rows(write(tmp_path / "set.jsonl", [table]))
    found = rows.rows[0]
    assert rows.kind == kind
    assert (found.text, found.second, found.label, found.score, found.messages) == row


def test_a_table_may_be_without_a_header(tmp_path):
    path = tmp_path / "set.tsv"
    path.write_text("a \"good' one\t1\nbad\t0\nfair\t1\n")
    assert next((row.text, row.label) for row in open_rows(str(path)).rows) == ("a \"good' one", "1")
    path.write_text("x\tgood one\ny\tbad\nx\tfair\n")
    assert open_rows(str(path)).classes == ("x", "y"), "the label's column has fewer different values"
    path.write_text("4.5\tone\ttwo\n0\tthree\tfour\n")
    assert open_rows(str(path)).rows[1].score == 0
    path.write_text("4.5\tone\ttwo\nzero\tthree\tfour\n")
    with pytest.raises(BadInput, match="has the columns 1, 2, 3, which are no rows; name them"):
        open_rows(str(path))


def test_the_kind_can_be_asked_for(tmp_path):
    path = write(tmp_path / "set.csv", [{"text": "a", "second": "b", "label": "1.5"}])
    assert open_rows(path).kind == "labelled"
    assert open_rows(path, kind="pairs").rows[0].score == 1.5
    assert open_rows(path, kind="text").rows[0].second == ""
    with pytest.raises(BadInput, match="are no instruction rows"):
        open_rows(path, kind="instruction")
    with pytest.raises(BadInput, match="has text rows, no labelled rows"):
        open_rows("pydoc", kind="labelled")


def test_a_data_set_laid_out_as_on_the_hub(tmp_path):
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
    )
    for name in ("train", "test"):
        table = {"text": [f"{name} {n}" for n in range(4)], "label": [0, 1, 1, 0]}
        data = datasets.Dataset.from_dict(table, features=features)
        data.to_parquet(tmp_path / "data" / f"{name}-00000-of-00001.parquet")
    train, test = open_rows(f"hub:{tmp_path}"), open_rows(f"hub:{tmp_path}:test")
    assert (train.kind, train.classes) == ("labelled", ("bad", "good")), "the name, not the number"
    assert [row.text for row in test.rows] == [f"test {n}" for n in range(4)]
    with pytest.raises(BadInput, match="no split 'dev'; there are: t"):
        open_rows(f"hub:{tmp_path}:dev")


def test_a_folder_is_its_texts_without_what_they_share(tmp_path):
    shared = "The same licence stands at the head of every file, and would be learned by heart. " * 10
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(shared + "\n")
    (tmp_path / "c.txt").write_text("another text " * 100)
    assert len(open_rows(str(tmp_path))) == 2


def test_builtin_rows_are_labelled():
    rows = open_rows("builtin:number")
    assert (rows.kind, rows.classes) == ("labelled", ("plural", "singular"))


@pytest.mark.parametrize("measured", ["pydoc", "domain:python", "domain:prose"])
def test_nothing_of_pythons_own_text_is_both_learned_and_measured(measured):
    for source in ("pydoc", "stdlib"):
        refuse_leakage(open_rows(source), load_documents(measured))
    whole = evaluation_rows(load_documents("pydoc"))
    assert len(leaks(whole, whole)) == len(whole), "and the check sees what is there"


def test_the_library_is_megabytes_of_whole_modules():
    rows = open_rows("stdlib")
    assert rows.n_bytes > 4e6
    assert any(row.text.startswith('"""') and "\n\n\ndef " in row.text for row in rows.rows)


TALK = {"messages": [{"role": "user", "content": "a"}]}
BAD = {
    "no such file": ("gone.csv", None, "does not exist"),
    "parquet that is none": ("set.parquet", b"PAR1 no", "is not a parquet file"),
    "no rows": ("set.csv", b"text,label\n", "has no rows"),
    "no known column": ("set.jsonl", b'{"colour": "red"}', "has the columns colour, which are no rows"),
    "empty label": ("set.csv", b"text,label\na,x\nb,\n", "line 3 has no label"),
    "empty text": ("set.csv", b"text,label\na,x\n ,y\n", "line 3 has no text"),
    "text is a number": (
        "set.jsonl",
        b'{"text": 3}',
        "line 1 has no text; every row needs one, and it must be",
    ),
    "broken json": ("set.jsonl", b'{"text": "a"}\n{', "line 2 is not a JSON object"),
    "score is a word": ("set.csv", b"text,second,score\na,b,high\n", "has the score 'high'"),
    "no answer": ("set.jsonl", json.dumps(TALK).encode(), "has no answer"),
    "no turns": ("set.jsonl", b'{"messages": "hello"}', "is not a list of"),
    "half a character": ("set.jsonl", b'{"text": "a \\ud83d"}', "half of a character"),
    "short text": ("set.txt", b"short", "no document of at least"),
    "not utf-8": ("set.csv", "text,label\ncaf\u00e9,x".encode("latin-1"), "not UTF-8"),
    "unknown suffix": ("set.xlsx", b"x", "is not known; give pydoc, stdlib"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_data_is_refused(tmp_path, case):
    name, content, sentence = BAD[case]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput, match=sentence):
        open_rows(str(tmp_path / name))


def test_messages_are_named():
    assert Message("user", "a")._asdict() == {"role": "user", "content": "a"}
