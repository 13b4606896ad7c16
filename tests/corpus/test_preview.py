"""What is shown of a source before training: counts that can be checked by hand, and refusals as flags."""

from __future__ import annotations

import pytest

from core.corpus.preview import preview
from core.errors import BadInput
from core.types import Documents
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_model("bert").tokenizer


def metrics(result) -> dict[str, float]:
    return {metric.name: metric.value for metric in result.metrics}


def test_a_labelled_table_is_counted(tmp_path, tokenizer):
    path = tmp_path / "set.csv"
    lines = [f"{'one ' * (n % 5 + 1)}{n},{'yes' if n % 3 else 'no'}" for n in range(30)]
    path.write_text("\n".join(["text,label", *lines, "ONE 0,yes", "one 0,yes"]))
    shown = preview(str(path), tokenizer, window=7)
    found = metrics(shown)
    lengths = [len(tokenizer(line.split(",")[0])["input_ids"]) for line in [*lines, "ONE 0,", "one 0,"]]
    assert (found["rows"], found["classes"], found["duplicate_rows"]) == (32, 2, 2)
    assert found["tokens"] == sum(lengths)
    assert found["rows_over_window"] == pytest.approx(sum(n > 7 for n in lengths) / 32)
    labels = shown.frames["labels"].set_index("label")
    assert labels["rows"].to_dict() == {"no": 10, "yes": 22}
    assert (labels["training"] + labels["held_out"]).to_dict() == {"no": 10, "yes": 22}
    assert shown.frames["duplicates"].iloc[0].to_dict() == {
        "text": "one 0",
        "copies": 3,
        "answers": 2,
        "rows": "1, 31, 32",
    }
    assert shown.frames["lengths"]["rows"].sum() == 32
    assert len(shown.flags) == 1
    assert "rows are longer than the window of 7 tokens" in shown.flags[0]


def test_what_training_would_refuse_is_a_flag(tmp_path, tokenizer):
    path = tmp_path / "set.jsonl"
    path.write_text("\n".join(f'{{"text": "row {n}", "label": "x"}}' for n in range(40)))
    measured = Documents("doc", "evaluation", ("Row  3", "row 99"))
    shown = preview(str(path), tokenizer, against=measured)
    assert len(shown.flags) == 2
    assert "have the label 'x'" in shown.flags[0]
    assert "1 of 2 rows of doc (evaluation) are learned from in set.jsonl" in shown.flags[1]
    assert shown.frames["leaks"].iloc[0].to_dict() == {
        "text": "Row 3", "measured_row": 1, "training_row": 4, "whole": True
    }  # fmt: skip
    assert metrics(shown)["leaking_rows"] == 1


def test_a_large_source_is_sampled_and_says_so(tokenizer, monkeypatch):
    whole = metrics(preview("builtin:number", tokenizer))
    monkeypatch.setattr("core.corpus.preview.SAMPLE_ROWS", 60)
    shown = preview("builtin:number", tokenizer)
    assert shown.notes == ("Tokens are of 60 of 192 rows, chosen by hash; totals are estimated by bytes.",)
    assert metrics(shown)["tokens"] == pytest.approx(whole["tokens"], rel=0.05)


def test_without_a_tokenizer_there_are_no_tokens(tmp_path):
    shown = preview("pydoc")
    assert "lengths" not in shown.frames
    assert "tokens" not in metrics(shown)
    assert set(shown.frames["examples"]["side"]) <= {"training", "held out", ""}
    with pytest.raises(BadInput, match="does not exist"):
        preview(str(tmp_path / "gone.csv"))
