"""Calibration report: repeats, ranks and broken characters that were put into the text are found, and nothing else."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from core.probes._input_rank import FULL, POOR, SHORT, UNREAD, judged
from core.probes._text_health import broken_ids, duplicates, kind_of, repeated, scripts
from core.registry import get
from core.text.domains import documents_by_domain
from core.types import Prompt, Result, silent
from tests.tiny import CORPUS, tiny_model

WORDS = " ".join(CORPUS).split()


def prose(seed: int, n_words: int = 300) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=n_words))


def report(family: str, texts: list[str], folder: Path, **settings: object) -> Result:
    path = folder / "text.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    probe = get("probe", "calibration_report")
    small = {"text": str(path), "samples": 8, "sample_tokens": 64, "read_tokens": 256, **settings}
    result: Result = probe.run(tiny_model(family), Prompt(), silent, probe.parse(small))
    return result


def check(result: Result, name: str) -> dict[str, str]:
    return result.frame.set_index("check").loc[name].to_dict()


def test_a_copy_is_exact_a_copy_with_a_changed_end_is_near_and_others_are_not() -> None:
    first, other = prose(0), prose(1)
    nearly = " ".join([*first.split()[:285], *prose(2).split()[:15]])
    found = duplicates([first, other, first.upper() + "\n", nearly], near=0.8)
    assert set(found) == {2, 3}
    assert found[2] == (0, 1.0)
    assert found[3][0] == 0
    assert 0.8 <= found[3][1] < 1


def test_a_window_that_repeats_another_is_all_repeated_and_the_first_is_not() -> None:
    ids = np.arange(200).reshape(4, 50)
    windows_BP = np.stack([ids[0], ids[1], ids[0], np.concatenate([ids[2][:25], ids[1][:25]])])
    # The last has 18 of its 43 runs of 8 from the second.
    assert repeated(windows_BP) == pytest.approx([0, 0, 1, 18 / 43])


def test_rank_is_that_of_the_directions_taken() -> None:
    generator = torch.Generator().manual_seed(0)
    x_TI = torch.randn(64, 32, generator=generator)
    flat_TI = x_TI @ torch.diag(torch.tensor([1.0] * 20 + [0.0] * 12))
    assert judged(x_TI.T @ x_TI, 64, 64)["verdict"] == FULL
    poor = judged(flat_TI.T @ flat_TI, 64, 64)
    assert (poor["rank"], poor["verdict"]) == (20, POOR)
    few_TI = x_TI[:12]
    short = judged(few_TI.T @ few_TI, 12, 12)
    assert (short["rank"], short["verdict"]) == (12, SHORT)
    assert judged(few_TI.T @ few_TI, 12, 64)["verdict"] == UNREAD


def test_the_condition_of_equal_directions_is_one() -> None:
    assert judged(3 * torch.eye(8), 64, 64)["condition"] == pytest.approx(1)


def test_kinds_of_text_are_told_apart_on_text_they_were_not_made_of() -> None:
    texts = {name: found.texts for name, found in documents_by_domain(split="calibration").items()}
    right = [kind_of(text) == name for name, each in texts.items() for text in each[:8]]
    assert np.mean(right) > 0.9
    assert kind_of("Все счастливые семьи похожи друг на друга, каждая несчастлива по своему.") == "Cyrillic"


def test_pieces_of_characters_are_found_and_whole_ones_are_not() -> None:
    tokenizer = tiny_model("llama").tokenizer
    pieces, unknown = broken_ids(tokenizer, np.array(tokenizer("one two")["input_ids"]))
    assert not pieces | unknown
    foreign = np.array(tokenizer("семьи", add_special_tokens=False)["input_ids"])
    pieces, unknown = broken_ids(tokenizer, foreign)
    assert set(foreign.tolist()) <= pieces | unknown
    assert scripts("aб 1c")["LATIN"] == 2


def test_text_that_repeats_itself_loses_its_effective_tokens(tmp_path: Path) -> None:
    once = [prose(seed) for seed in range(12)]
    nearly = [f"{text} {text}" for text in once]
    fresh, stale = (report("llama", texts, tmp_path, samples=64) for texts in (once, nearly))
    share = {
        name: {m.name: m.value for m in r.metrics}["repeated_share"]
        for name, r in (("f", fresh), ("s", stale))
    }
    assert share["s"] > share["f"] + 0.2
    assert check(stale, "Effective tokens")["verdict"] == "look"
    assert fresh.provenance.exactness_gap == stale.provenance.exactness_gap == 0


def test_tokens_read_bound_the_rank_and_it_is_said(tmp_path: Path) -> None:
    texts = [prose(seed) for seed in range(12)]
    result = report("llama", texts, tmp_path, samples=2, read_tokens=64, sample_tokens=32)
    ranks = result.frames["ranks"]
    assert set(ranks["verdict"]) == {SHORT}
    assert (ranks["rank"] <= 64).all()
    assert check(result, "Rank of inputs")["verdict"] == "look"
    assert "ranks" not in report("llama", texts, tmp_path, read_tokens=0).frames


def test_experts_are_counted_where_there_are_any(tmp_path: Path) -> None:
    result = report("olmoe", [prose(seed) for seed in range(12)], tmp_path)
    loaded = tiny_model("olmoe")
    assert len(result.frames["experts"]) == loaded.anatomy.n_layers * loaded.anatomy.n_experts
    assert set(result.frames["ranks"]["input"]) == {"self_attn.q_proj", "self_attn.o_proj"}
