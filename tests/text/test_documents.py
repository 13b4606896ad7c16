"""Documents: halves that share nothing, an order fixed by content, and one clear sentence for bad text."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from core.errors import BadInput
from core.text.documents import CHUNK_BYTES, MIN_BYTES, MIN_SHARED, half, load_documents, paragraphs


def _long_paragraphs(texts: tuple[str, ...]) -> list[str]:
    flat = [" ".join(paragraph.split()) for text in texts for paragraph in paragraphs(text)]
    return [paragraph for paragraph in flat if len(paragraph) >= MIN_SHARED]


def _prose(n_paragraphs: int, *, words: int = 60) -> str:
    return "\n\n".join(
        " ".join(f"w{paragraph}x{word}" for word in range(words)) for paragraph in range(n_paragraphs)
    )


class TestPydoc:
    def test_no_long_paragraph_stands_in_both_halves_or_twice_in_one(self):
        both = [load_documents("pydoc", split=s) for s in ("evaluation", "calibration")]
        found = _long_paragraphs(both[0].texts + both[1].texts)
        owners = {
            p: [i for i, t in enumerate(both[0].texts + both[1].texts) if p in " ".join(t.split())]
            for p in found
        }
        assert len(found) > 500
        assert all(len(set(where)) == 1 for where in owners.values())

    def test_topic_names_alone_would_not_be_disjoint(self):
        """The reason for the rule: CPython repeats whole topics inside collections of them."""
        from pydoc_data.topics import topics

        together = [" ".join(text.split()) for text in topics.values()]
        long = set(_long_paragraphs(tuple(topics.values())))
        assert sum(sum(p in text for text in together) > 1 for p in long) > 50

    def test_gives_enough_text_in_a_fixed_order(self):
        documents = load_documents("pydoc")
        assert documents.texts == load_documents("pydoc").texts
        assert len(documents.texts) >= 24
        assert min(len(text.encode()) for text in documents.texts) >= MIN_BYTES
        assert load_documents("pydoc", limit=3).texts == documents.texts[:3]
        assert documents.fingerprint != load_documents("pydoc", split="calibration").fingerprint
        assert "Python 3." in documents.name


class TestFiles:
    def test_text_is_cut_between_paragraphs_and_each_lands_once(self, tmp_path: Path):
        text = _prose(80)
        (tmp_path / "a.txt").write_text(text)
        halves = [load_documents(str(tmp_path / "a.txt"), split=s) for s in ("evaluation", "calibration")]
        chunks = halves[0].texts + halves[1].texts
        assert sorted(_long_paragraphs(chunks)) == sorted(_long_paragraphs((text,)))
        assert all(len(chunk.encode()) < 2 * CHUNK_BYTES for chunk in chunks)
        assert all(chunk.strip() in text for chunk in chunks), "a document is a running piece of the file"

    def test_a_repeated_paragraph_cannot_reach_both_halves(self, tmp_path: Path):
        licence = "LICENCE " * 20
        (tmp_path / "a.txt").write_text(
            "\n\n".join(f"{licence}\n\n{part}" for part in _prose(80).split("\n\n"))
        )
        halves = [
            load_documents(str(tmp_path / "a.txt"), split=s).texts for s in ("evaluation", "calibration")
        ]
        assert sum(text.count(licence.strip()) for text in halves[0] + halves[1]) == 1

    def test_adding_text_moves_no_document(self, tmp_path: Path):
        parts = _prose(320).split("\n\n")
        (tmp_path / "a.txt").write_text("\n\n".join(parts[:300]))
        (tmp_path / "b.txt").write_text("\n\n".join(parts))
        for split in ("evaluation", "calibration"):
            before, after = (
                load_documents(str(tmp_path / f"{name}.txt"), split=split).texts for name in "ab"
            )
            # the last piece of the shorter file may have grown
            assert len(set(before) - set(after)) <= 1
            assert len(before) > 2

    def test_json_lines(self, tmp_path: Path):
        texts = [_prose(4) + f" number {i}" for i in range(3)]
        texts += [" ".join(f"only{i}word{j}" for j in range(90)) for i in range(40)]
        path = tmp_path / "a.jsonl"
        path.write_text("\n".join(json.dumps({"text": text, "id": 1}) for text in texts) + "\n\n")
        both = [load_documents(str(path), split=s).texts for s in ("evaluation", "calibration")]
        # the first three share their paragraphs: one of them stays
        assert len(both[0]) + len(both[1]) == 41
        assert set(both[0]).isdisjoint(both[1])

    def test_windows_line_ends_and_byte_order_mark(self, tmp_path: Path):
        text = _prose(80)
        (tmp_path / "a.txt").write_bytes(text.encode())
        (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
        assert load_documents(str(tmp_path / "a.txt")).texts == load_documents(str(tmp_path / "b.txt")).texts


class TestHub:
    def test_a_local_folder_serves_as_a_data_set(self, tmp_path: Path):
        for split in ("train", "test"):
            rows = [{"text": " ".join(f"{split}{i}word{j}" for j in range(90))} for i in range(30)]
            (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        test = load_documents(f"hub:{tmp_path}:test")
        assert all(text.startswith("test") for text in test.texts)
        assert set(test.texts).isdisjoint(load_documents(f"hub:{tmp_path}:test", split="calibration").texts)
        with pytest.raises(BadInput, match=r"no split 'dev'; there are: .*train"):
            load_documents(f"hub:{tmp_path}:dev")

    def test_no_text_column(self, tmp_path: Path):
        (tmp_path / "train.jsonl").write_text('{"body": "x"}\n')
        with pytest.raises(BadInput, match="no text column named 'text'; its columns are: body"):
            load_documents(f"hub:{tmp_path}")

    def test_an_empty_folder_is_one_sentence(self, tmp_path: Path):
        with pytest.raises(BadInput, match=r"cannot be read .* or give a local .txt or .jsonl file"):
            load_documents(f"hub:{tmp_path}")

    @pytest.mark.slow
    def test_a_hub_out_of_reach_is_refused_at_once(self, tmp_path: Path):
        code = "from core.text.documents import load_documents; load_documents('hub:tests/no-such-data')"
        env = {**os.environ, "HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9"}
        done = subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False
        )
        assert "BadInput: hub:tests/no-such-data" in done.stderr.splitlines()[-1]
        assert "the hub cannot be reached" in done.stderr
        assert "Retrying" not in done.stderr


BAD = {
    "missing": ("gone.txt", None, "does not exist; check the path"),
    "empty": ("a.txt", b"", "is empty"),
    "blank": ("a.txt", b" \n\n\t", "is empty"),
    "not UTF-8": ("a.txt", b"good text \xff more", "not UTF-8: byte 0xff at offset 10"),
    "not UTF-8 after a mark": ("a.txt", b"\xef\xbb\xbfab\xff", "byte 0xff at offset 5"),
    "too short": ("a.txt", b"a few words", f"no document of at least {MIN_BYTES} bytes"),
    "not JSON": ("a.jsonl", b'{"text": "a"}\nnonsense', "line 2 is not"),
    "no text": ("a.jsonl", b'{"words": "a"}', "line 1 is not"),
    "text is a number": ("a.jsonl", b'{"text": 3}', "line 1 is not"),
    "other suffix": ("a.csv", b"a,b", r"give pydoc, domains, domain:NAME, a .txt or .jsonl file, or hub:ID"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_one_clear_sentence(case: str, tmp_path: Path):
    name, content, sentence = BAD[case]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput, match=sentence) as caught:
        load_documents(str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_other_bad_sources(tmp_path: Path):
    with pytest.raises(BadInput, match="is a folder"):
        load_documents(str(tmp_path))
    with pytest.raises(BadInput, match="split 'test' is not known"):
        load_documents("pydoc", split="test")  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="limit 0"):
        load_documents("pydoc", limit=0)
    with pytest.raises(BadInput, match="hub:ID:CONFIG:SPLIT"):
        load_documents("hub:a:b:c:d")


def test_a_file_all_in_one_half_says_so(tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_text(_prose(3))
    split = half(_prose(3) + "\n")
    other = "calibration" if split == "evaluation" else "evaluation"
    assert len(load_documents(str(path), split=split).texts) == 1
    with pytest.raises(BadInput, match=f"no text for {other}"):
        load_documents(str(path), split=other)
