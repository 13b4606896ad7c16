"""The cache on a model: a decoded trace is the model's own routing, and misses, bytes and times add up."""

from __future__ import annotations

import numpy as np
import pytest

from core.errors import BadInput
from core.probes._routed_decoding import decode_sessions
from core.probes._routed_text import find_texts
from core.probes.expert_cache import ExpertCacheSettings, expert_cache
from core.routing.traffic import Traffic
from core.types import Prompt, silent
from tests.references import slow_cache, slow_rerouting
from tests.tiny import MOE, n_hooks, tiny_model

PROMPT = Prompt("The capital of France is Paris, and Mary")


@pytest.mark.parametrize("family", MOE)
def test_decoding_token_by_token_asks_for_the_experts_of_the_text_read_at_once(family: str) -> None:
    loaded = tiny_model(family)
    before = n_hooks(loaded.model)
    texts = find_texts(loaded, PROMPT, "")
    (session,) = decode_sessions(loaded, texts, silent, sessions=1, prompt_tokens=64, new_tokens=6)
    assert n_hooks(loaded.model) == before
    ids = list(loaded.tokenizer(PROMPT.text)["input_ids"])
    for _ in range(6):
        ids.append(int(slow_rerouting.logits(loaded, ids)[-1].argmax()))
    for layer, (experts_TK, _) in slow_rerouting.decisions(loaded, ids).items():
        found_TK = np.concatenate([session.prefill[layer], session.decode[layer]])
        assert np.sort(found_TK, 1).tolist() == np.sort(experts_TK.numpy(), 1).tolist(), layer
    assert session.written == loaded.tokenizer.decode(ids[-6:])


def test_hits_misses_bytes_and_times_add_up() -> None:
    loaded = tiny_model("olmoe")
    settings = ExpertCacheSettings(text="", new_tokens=10, chunk=4, fast_gb_per_s=10, slow_gb_per_s=1)
    result = expert_cache(loaded, PROMPT, silent, settings)
    assert result.provenance.exactness_gap == 0
    texts = find_texts(loaded, PROMPT, "")
    (session,) = decode_sessions(loaded, texts, silent, sessions=1, prompt_tokens=64, new_tokens=10)
    traffic = Traffic.of(loaded, bits=16)
    expert_bytes = 3 * 128 * 256 * 2
    assert traffic.expert_bytes_L().tolist() == [expert_bytes] * 3
    main = result.frames["main"].set_index(["phase", "policy", "slots"])
    for slots in range(5):
        misses, asked = np.zeros(10), np.zeros(10)
        for layer, decoded_TK in session.decode.items():
            read_TK = session.prefill[layer]
            prompt_steps = [sorted(set(read_TK[low : low + 4].ravel())) for low in range(0, len(read_TK), 4)]
            steps = [*prompt_steps, *(sorted(set(row)) for row in decoded_TK)]
            flat = [int(expert) for step in steps for expert in step]
            step_of = [number for number, step in enumerate(steps) for _ in step]
            for at, hit in zip(step_of, slow_cache.hits("lru", flat, slots), strict=True):
                if at >= len(prompt_steps):
                    asked[at - len(prompt_steps)] += 1
                    misses[at - len(prompt_steps)] += not hit
        row = main.loc[("decode", "lru", slots)]
        assert row["hit_rate"] == pytest.approx(1 - misses.sum() / asked.sum())
        assert row["misses_p95"] == pytest.approx(np.quantile(misses, 0.95))
        dense = traffic.dense_parameters * 2
        seconds = (dense + asked * expert_bytes) / 10e9 + misses * expert_bytes / 1e9
        assert row["ms_per_token"] == pytest.approx(1e3 * seconds.mean())
    held = main.loc[("decode", "lru", 4)]["memory_gb"] - main.loc[("decode", "lru", 0)]["memory_gb"]
    assert held == pytest.approx(3 * 4 * expert_bytes / 1e9)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_no_policy_beats_belady_and_room_for_all_is_the_same_for_all(phase: str) -> None:
    settings = ExpertCacheSettings(sessions=3, prompt_tokens=24, new_tokens=16)
    main = expert_cache(tiny_model("deepseek_v3"), PROMPT, silent, settings).frames["main"]
    rates = main[main["phase"] == phase].pivot_table(index="slots", columns="policy", values="misses_mean")
    both = main.pivot_table(index="slots", columns="policy", values="hit_rate")
    assert (both.diff().dropna() >= -1e-12).all(axis=None), "more slots never hit less"
    assert rates.loc[rates.index.max()].nunique() == 1


def test_a_context_without_room_for_a_prompt_is_refused() -> None:
    with pytest.raises(BadInput, match="leaves no room for a prompt"):
        expert_cache(tiny_model("olmoe"), PROMPT, silent, ExpertCacheSettings(text="", new_tokens=256))
