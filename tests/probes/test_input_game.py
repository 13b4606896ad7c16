"""Occlusion and Shapley values against brute force, their axioms, and the check of a ranking."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from core.errors import BadInput, Cancelled
from core.models.loaded import LoadedModel
from core.probes import _input_game
from core.probes import shapley_values as shapley_module
from core.probes._input_game import InputSettings, build_game, group_words
from core.probes._input_report import check_ranking
from core.probes.occlusion import OcclusionSettings, occlusion
from core.probes.shapley_values import ShapleyValuesSettings, shapley_values
from core.types import Prompt, Result, silent
from tests.induction import induction_model, repeated_prompt
from tests.references.slow_attribution import shapley_by_permutations
from tests.tiny import DECODERS, tiny_model

SHORT = Prompt("The capital of France is")
LONG = Prompt("When Mary and John went to the store, John gave a drink to")
OCCLUSIONS = ["remove", "mean_embedding", "token"]


def by_hand(
    loaded: LoadedModel, prompt: Prompt, occlude_with: str, target: int
) -> Callable[[frozenset[int]], float]:
    """log p(target) of one coalition, by one separate forward pass."""
    ids = loaded.tokenizer(prompt.text)["input_ids"]
    embedding = loaded.model.get_submodule(loaded.anatomy.embedding)

    def value(present: frozenset[int]) -> float:
        with torch.inference_mode():
            if occlude_with == "remove":
                kept = [ids[p] for p in sorted(present)] or [loaded.tokenizer.bos_token_id]
                logits = loaded.model(torch.tensor([kept])).logits[0, -1]
            else:
                rows = embedding(torch.tensor(ids)).clone()
                neutral = embedding(torch.tensor(loaded.tokenizer.pad_token_id))
                if occlude_with == "mean_embedding":
                    neutral = torch.stack(
                        [embedding(torch.tensor(t)) for t in range(loaded.anatomy.vocab_size)]
                    ).mean(0)
                for p in set(range(len(ids))) - present:
                    rows[p] = neutral
                logits = loaded.model(inputs_embeds=rows[None]).logits[0, -1]
        return float(logits.double().log_softmax(-1)[target])

    return value


def run(
    method: Any, settings: type[InputSettings], loaded: LoadedModel, prompt: Prompt, **given: Any
) -> Result:
    return method(loaded, prompt, silent, settings(**{"quality_orders": 0, **given}))


def shapley(loaded: LoadedModel, prompt: Prompt, **given: Any) -> Result:
    return run(shapley_values, ShapleyValuesSettings, loaded, prompt, **given)


def scores(result: Result) -> list[float]:
    return result.frames["tokens"]["score"].tolist()


@pytest.mark.parametrize("occlude_with", OCCLUSIONS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mixtral"])
def test_occlusion_and_shapley_equal_brute_force(family: str, occlude_with: str) -> None:
    loaded = tiny_model(family)
    prompt = Prompt("of France is the")
    n = len(loaded.tokenizer(prompt.text)["input_ids"])
    assert 3 <= n <= 6
    given = {"target": " the", "occlude_with": occlude_with}
    target = loaded.tokenizer(" the")["input_ids"][0]
    value = by_hand(loaded, prompt, occlude_with, target)
    everyone = frozenset(range(n))
    left_out = [value(everyone) - value(everyone - {p}) for p in range(n)]
    assert scores(run(occlusion, OcclusionSettings, loaded, prompt, **given)) == pytest.approx(
        left_out, abs=2e-5
    )
    known: dict[frozenset[int], float] = {}
    expected = shapley_by_permutations(n, lambda s: known.setdefault(s, value(s)))
    assert scores(shapley(loaded, prompt, **given)) == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize("family", DECODERS)
def test_shares_add_up_exactly_on_every_family(family: str) -> None:
    loaded = tiny_model(family)
    for prompt in (SHORT, LONG):
        result = shapley(loaded, prompt, orders=4, metric="logit")
        values = {metric.name: metric.value for metric in result.metrics}
        total = values["value_of_prompt"] - values["value_of_nothing"]
        assert sum(scores(result)) == pytest.approx(total, abs=1e-9)
        assert result.provenance.exactness_gap is not None
        assert result.provenance.exactness_gap < 1e-9
    plain = run(occlusion, OcclusionSettings, loaded, LONG)
    assert plain.provenance.exactness_gap < 1e-5


def test_sampling_comes_to_the_exact_values_within_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = tiny_model("llama")
    exact = shapley(loaded, Prompt("of France is the"))
    assert "standard_error" not in exact.frame
    monkeypatch.setattr(shapley_module, "EXACT_PLAYERS", 0)
    sampled = shapley(loaded, Prompt("of France is the"), orders=400)
    frame = sampled.frames["tokens"]
    off = np.abs(frame["score"] - exact.frames["tokens"]["score"])
    assert (frame["standard_error"] > 0).all()
    assert (off < 4 * frame["standard_error"]).all()
    few = shapley(loaded, Prompt("of France is the"), orders=20)
    assert few.frame["standard_error"].mean() > 2 * frame["standard_error"].mean(), "error falls as 1/√orders"


class _Known:
    """A game with a formula for its value."""

    def __init__(self, n: int, value: Callable[[np.ndarray], float]) -> None:
        self.n, self._value = n, value

    def values(self, coalitions_BN: np.ndarray, progress: Any = silent) -> np.ndarray:
        return np.array([self._value(row) for row in coalitions_BN])


def test_axioms_hold_on_a_game_with_known_shares() -> None:
    """Dummy 0 gets nothing, symmetric 1 and 2 share their product, 3 is additive, the triple is split in three."""
    game: Any = _Known(7, lambda s: 4.0 * s[1] * s[2] + 2.0 * s[3] + 6.0 * s[4] * s[5] * s[6] - 1)
    expected = [0, 2, 2, 2, 2, 2, 2]
    assert shapley_module._exact(game, silent).value_N == pytest.approx(expected)
    found = shapley_module._sampled(game, ShapleyValuesSettings(orders=2000), silent)
    assert found.value_N.sum() == pytest.approx(12, abs=1e-9)
    assert found.value_N == pytest.approx(expected, abs=0.15)
    assert found.error_N is not None
    assert found.error_N[0] == found.error_N[3] == 0
    assert (np.abs(found.value_N - expected) <= 4 * found.error_N + 1e-12).all()


def test_pairs_of_an_order_and_its_reverse_are_exact_for_two_by_two() -> None:
    """A product of two players is a half each in every antithetic pair: no variance at all."""
    game: Any = _Known(9, lambda s: float(s[0] & s[1]))
    found = shapley_module._sampled(game, ShapleyValuesSettings(orders=4), silent)
    assert found.value_N.tolist() == [0.5, 0.5] + [0.0] * 7
    assert found.error_N is not None
    assert found.error_N.max() == 0


def test_the_check_knows_a_good_ranking_from_a_bad_one() -> None:
    weights = np.array([5.0, 3.0, 0.0, -2.0])
    game: Any = _Known(4, lambda s: float(weights @ s))
    good = check_ranking(game, weights, 8, silent)
    assert good.insertion == pytest.approx((0 / 2 + 5 + 8 + 8 + 6 / 2) / 4)
    assert good.deletion == pytest.approx((6 / 2 + 1 - 2 - 2 + 0) / 4)
    assert good.random == pytest.approx(3), "an order and its reverse are a straight line together"
    bad = check_ranking(game, -weights, 8, silent)
    assert bad.insertion < bad.random < bad.deletion
    assert set(good.curves["curve"]) == {"insertion", "deletion", "random order"}


def test_induction_prompt_is_decided_by_the_copied_token() -> None:
    """In ``@ a b c a b`` the next token c is known from the one c: taking it out costs most."""
    loaded = induction_model(40.0)
    prompt = repeated_prompt(4)
    first = prompt.text.split()[1]
    result = run(occlusion, OcclusionSettings, loaded, prompt, position=4, metric="logit", target=first)
    assert result.provenance.exactness_gap < 1e-5
    half = run(
        occlusion,
        OcclusionSettings,
        loaded,
        Prompt("@ a b c d a b"),
        target="c",
        metric="logit",
        occlude_with="token",
        neutral_token="p",
    )
    top = half.frame.iloc[:3]
    assert set(top["position"]) == {2, 3, 6}, "c is copied because b came before it and b is here again"
    rest = half.frame.iloc[3:]
    assert (rest["score"].abs() < 1e-4).all()


def test_words_are_whole_and_taken_out_at_once() -> None:
    loaded = tiny_model("llama")
    tokens = shapley(loaded, LONG, orders=4)
    words = tokens.frames["words"]
    assert "".join(words["word"]) == LONG.text
    assert words["word"].tolist()[1] == " Mary"
    assert words["score"].sum() == pytest.approx(tokens.frame["score"].sum())
    by_word = shapley(loaded, LONG, orders=4, unit="word")
    assert by_word.frames["tokens"]["token"].tolist() == words["word"].tolist()
    assert "words" not in by_word.frames
    assert group_words(["a", "b", " c", "\n", "d", ","], range(6)) == ((0, 1), (2,), (3,), (4, 5))


def test_an_earlier_position_ignores_what_comes_after() -> None:
    loaded = tiny_model("llama")
    n = len(loaded.tokenizer(SHORT.text)["input_ids"])
    whole = run(occlusion, OcclusionSettings, loaded, SHORT, target=" the")
    longer = run(
        occlusion, OcclusionSettings, loaded, Prompt(SHORT.text + " Paris and"), target=" the", position=n - 1
    )
    assert scores(longer) == pytest.approx(scores(whole), abs=1e-5)


def test_batches_do_not_change_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = tiny_model("llama")
    whole = shapley(loaded, SHORT)
    monkeypatch.setattr(_input_game, "BATCH_BYTES", 1)
    assert scores(shapley(loaded, SHORT)) == pytest.approx(scores(whole), abs=1e-5)


def test_each_variation_is_run_once() -> None:
    loaded = tiny_model("llama")
    result = run(occlusion, OcclusionSettings, loaded, SHORT, quality_orders=4)
    n = result.provenance.conditions["players"]
    assert result.provenance.conditions["prompt_variations"] <= n + 2 + 6 * (n - 1)
    assert any("Quality check" in note for note in result.notes)


def test_cancelling_leaves_no_hook_and_no_lock() -> None:
    loaded = tiny_model("llama")

    def cancel(done: float, total: float, message: str) -> None:
        raise Cancelled("stopped")

    with pytest.raises(Cancelled):
        occlusion(loaded, SHORT, cancel, OcclusionSettings())
    assert loaded.lock.acquire(blocking=False)
    loaded.lock.release()


def test_too_many_variations_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapley_module, "MAX_VARIATIONS", 100)
    with pytest.raises(BadInput, match="more than 100; set orders to at most"):
        shapley(tiny_model("llama"), LONG)


def test_a_neutral_token_must_be_one_token() -> None:
    with pytest.raises(BadInput, match="a neutral_token is one"):
        run(
            occlusion,
            OcclusionSettings,
            tiny_model("llama"),
            SHORT,
            occlude_with="token",
            neutral_token="zebra",
        )


def test_a_distractor_is_a_logit_difference() -> None:
    loaded = tiny_model("llama")
    with torch.inference_mode():
        game = build_game(loaded, SHORT, InputSettings(target=" the", distractor=" and"))
        assert game.unit == "logits"
        expected = game.logits_V[game.target.id] - game.logits_V[game.distractor.id]
        assert game.ends()[0] == pytest.approx(float(expected), abs=1e-5)
