"""Language modelling: known answers, the naive reference, exact bytes, restarts, and what is refused."""

from __future__ import annotations

import shutil
from math import exp, log
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from core.errors import BadInput, Cancelled, CannotMeasure
from core.evaluate._token_scores import compare_logits
from core.evaluate.language_modelling import (
    LanguageModellingSettings,
    run,
)
from core.journal import Journal
from core.models.loaded import LoadedModel
from core.models.open import open_model
from core.text.windows import encode_document
from core.types import Documents, ModelRef, Result, silent
from tests.references.language_modelling import naive_scores
from tests.tiny import CORPUS, DECODERS, tiny_folder, tiny_model

TEXT = Documents("test text", "evaluation", tuple(f"{a} ☃ {b}" for a in CORPUS for b in CORPUS[:3]))
EXACT = {"fp32_path": "exact", "bootstrap_draws": 500}


def _settings(**changed: Any) -> LanguageModellingSettings:
    return LanguageModellingSettings.model_validate(EXACT | changed)


def _opened(folder: Path) -> LoadedModel:
    return open_model(ModelRef(str(folder)))


def _values(result: Result) -> dict[str, float]:
    return {metric.name: metric.value for metric in result.metrics}


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """A second llama: the first one's weights, shaken, saved and opened again."""
    folder = tiny_folder("llama", tmp_path_factory.mktemp("other"))
    loaded = _opened(folder)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            parameter.add_(0.1 * parameter.std() * torch.randn(parameter.shape, generator=generator))
    loaded.model.save_pretrained(folder)
    return _opened(folder)


class TestIdentity:
    def test_the_base_itself_is_exactly_equal_after_one_forward_per_window(self):
        base = tiny_model("llama")
        forwards: list[Any] = []
        handle = base.model.register_forward_hook(lambda *_: forwards.append(1))
        try:
            result = run(base, base, TEXT, Journal(), silent, _settings(window=64, stride=32))
        finally:
            handle.remove()
        told: list[float] = []
        run(
            base,
            base,
            TEXT,
            Journal(),
            lambda done, total, _: told.append(total),
            _settings(window=64, stride=32),
        )
        assert len(forwards) == told[0]
        found = {metric.name: (metric.value, metric.low, metric.high) for metric in result.metrics}
        for name in ("kl", "flips", "delta_bits_per_byte", "kl_p99"):
            assert found[name] == (0.0, 0.0, 0.0)
        assert found["top1_agreement"] == (1.0, 1.0, 1.0)
        assert found["perplexity"][1] < found["perplexity"][0] < found["perplexity"][2]
        assert result.frames["positions"].empty

    @pytest.mark.parametrize("family", ["smollm", "gpt2", "olmoe"])
    def test_a_second_copy_is_equal_too(self, family: str, tmp_path: Path):
        result = run(
            tiny_model(family),
            _opened(tiny_folder(family, tmp_path)),
            TEXT,
            Journal(),
            silent,
            _settings(window=64, stride=32),
        )
        values = _values(result)
        assert (values["kl"], values["kl_p99"], values["top1_agreement"], values["flips"]) == (0, 0, 1, 0)
        flips = next(metric for metric in result.metrics if metric.name == "flips")
        assert flips.high > 0, "no flip seen does not prove there are none"
        assert "Wilson" in flips.interval

    def test_swapping_the_models(self, other: LoadedModel):
        base = tiny_model("llama")
        there = _values(run(base, other, TEXT, Journal(), silent, _settings()))
        back = _values(run(other, base, TEXT, Journal(), silent, _settings()))
        assert there["kl"] > 0.01
        assert there["flips"] > 0
        assert there["top1_agreement"] == back["top1_agreement"]
        assert there["flips"] == back["flips"]
        assert there["delta_bits_per_byte"] == pytest.approx(-back["delta_bits_per_byte"], abs=1e-12)


class TestReference:
    @pytest.mark.parametrize("family", DECODERS)
    @pytest.mark.parametrize("window", [24, 256])
    def test_windows_equal_one_forward_per_token(self, family: str, window: int, tmp_path: Path):
        base, variant = tiny_model(family), _opened(tiny_folder(family, tmp_path, seed=1))
        stride = 8
        texts = TEXT.texts[:2]
        result = run(
            base,
            variant,
            Documents("two", "evaluation", texts),
            Journal(),
            silent,
            _settings(window=window, stride=stride, max_document_tokens=60),
        )
        documents = result.frames["documents"]
        for index, text in enumerate(texts):
            encoded = encode_document(base.tokenizer, text, max_tokens=60)
            n = len(encoded.ids)

            def begin(position: int, n: int = n) -> int:
                # The protocol in words: the first window ends at `window`, each later one `stride` further.
                later = max(0, -(-(position + 1 - window) // stride))
                return max(0, min(n, window + later * stride) - window)

            slow = naive_scores(
                base.model, variant.model, encoded.ids.tolist(), encoded.first_scored, begin=begin
            )
            row = documents.iloc[index]
            truth = encoded.ids[encoded.first_scored :].tolist()
            assert row["tokens"] == len(slow["kl"])
            assert row["nats_base"] == pytest.approx(sum(slow["nats_base"]), rel=1e-5)
            assert row["nats_variant"] == pytest.approx(sum(slow["nats_variant"]), rel=1e-5)
            assert row["kl"] == pytest.approx(np.mean(slow["kl"]), rel=1e-4)
            assert row["agreements"] == sum(
                a == b for a, b in zip(slow["top_base"], slow["top_variant"], strict=True)
            )
            right = [
                (a == t, b == t) for a, b, t in zip(slow["top_base"], slow["top_variant"], truth, strict=True)
            ]
            assert row["lost"] == sum(a and not b for a, b in right)
            assert row["gained"] == sum(b and not a for a, b in right)

    def test_headline_numbers_are_sums_over_documents(self, other: LoadedModel):
        base = tiny_model("llama")
        result = run(base, other, TEXT, Journal(), silent, _settings(max_document_tokens=40))
        encoded = [encode_document(base.tokenizer, text, max_tokens=40) for text in TEXT.texts]
        scored_bytes = sum(
            len(base.tokenizer.decode(e.ids[e.first_scored :].tolist()).encode()) for e in encoded
        )
        documents, values = result.frames["documents"], _values(result)
        nats, tokens = documents["nats_variant"].sum(), documents["tokens"].sum()
        assert documents["bytes"].sum() == scored_bytes
        assert values["bits_per_byte"] == pytest.approx(nats / log(2) / scored_bytes)
        assert values["perplexity"] == pytest.approx(exp(nats / tokens))
        for metric in result.metrics:
            assert metric.n == tokens
            assert metric.low <= metric.value <= metric.high
        assert result.provenance.conditions["bytes"] == scored_bytes

    def test_positions_are_the_worst_with_their_own_text(self, other: LoadedModel):
        result = run(tiny_model("llama"), other, TEXT, Journal(), silent, _settings())
        positions = result.frames["positions"]
        assert len(positions) == 200
        assert positions["kl"].is_monotonic_decreasing
        assert positions["kl"].iloc[0] == pytest.approx(result.frames["tail"]["kl"].iloc[0])
        for row in positions.head(20).itertuples():
            assert (row.before + row.token) in TEXT.texts[row.document]


class TestKl:
    base = torch.randn(40, 5000, generator=torch.Generator().manual_seed(0)) * 3
    noise = torch.randn(40, 5000, generator=torch.Generator().manual_seed(1))
    targets = torch.arange(40)

    def _exact(self, variant: torch.Tensor) -> np.ndarray:
        p_log, q_log = (logits.double().log_softmax(-1) for logits in (self.base, variant))
        kl = torch.nn.functional.kl_div(q_log, p_log, reduction="none", log_target=True)
        return kl.sum(-1).numpy()

    @pytest.mark.parametrize("size", [1.0, 1e-1, 1e-2, 1e-3])
    def test_equals_float64(self, size: float):
        variant = self.base + size * self.noise
        found = compare_logits(self.base, variant, self.targets).kl
        assert found == pytest.approx(self._exact(variant), rel=1e-6, abs=8e-8)
        assert (found >= 0).all()

    def test_the_plain_formula_is_several_times_worse(self):
        variant = self.base + 1e-3 * self.noise
        p_log, q_log = (logits.log_softmax(-1) for logits in (self.base, variant))
        plain = (p_log.exp() * (p_log - q_log)).sum(-1).numpy()
        careful = compare_logits(self.base, variant, self.targets).kl
        exact = self._exact(variant)
        assert np.abs(plain - exact).max() > 4 * np.abs(careful - exact).max()

    def test_a_shift_of_all_logits_is_no_difference(self):
        assert compare_logits(self.base, self.base + 2.0, self.targets).kl == pytest.approx(0, abs=8e-8)

    def test_far_apart_is_large_and_finite(self):
        base = torch.zeros(1, 50)
        base[0, 0] = 300.0
        scores = compare_logits(base, base.flip(-1), torch.tensor([0]))
        assert scores.kl[0] == pytest.approx(300.0)


class TestRestart:
    def test_goes_on_where_it_was_stopped(self, other: LoadedModel, tmp_path: Path):
        base, file = tiny_model("llama"), tmp_path / "parts.jsonl"
        whole = run(base, other, TEXT, Journal(), silent, _settings())

        class Stopped(Journal):
            def put(self, key: str, value: dict[str, Any]) -> None:
                super().put(key, value)
                if len(self) == 5:
                    raise Cancelled("stop")

        with pytest.raises(Cancelled):
            run(base, other, TEXT, Stopped(file), silent, _settings())
        with file.open("a") as torn:
            torn.write('{"key": "5", "val')
        rest = Journal(file)
        assert len(rest) == 5
        resumed = run(base, other, TEXT, rest, silent, _settings())
        assert len(rest) == len(Journal(file)) == len(TEXT.texts)
        assert resumed.metrics == whole.metrics
        for name, frame in whole.frames.items():
            assert frame.equals(resumed.frames[name])

    def test_a_finished_document_is_not_run_again(self, other: LoadedModel):
        base, journal = tiny_model("llama"), Journal()
        run(base, other, TEXT, journal, silent, _settings())
        forwards: list[Any] = []
        handle = other.model.register_forward_hook(lambda *_: forwards.append(1))
        try:
            run(base, other, TEXT, journal, silent, _settings())
        finally:
            handle.remove()
        assert forwards == []

    def test_parts_of_another_measurement_are_not_used(self, other: LoadedModel):
        base, journal = tiny_model("llama"), Journal()
        run(base, other, TEXT, journal, silent, _settings())
        run(base, other, TEXT, journal, silent, _settings(window=32, stride=8))
        run(base, base, TEXT, journal, silent, _settings())
        assert len(journal) == 3 * len(TEXT.texts)

    def test_progress_counts_windows_to_the_end(self, other: LoadedModel):
        told: list[tuple[float, float]] = []
        run(
            tiny_model("llama"),
            other,
            TEXT,
            Journal(),
            lambda done, total, _: told.append((done, total)),
            _settings(window=16, stride=8),
        )
        assert told == sorted(told)
        assert told[0][0] == 0
        assert told[-1][0] == told[-1][1]
        assert len(told) > 3 * len(TEXT.texts)


class TestRefusals:
    def test_another_tokenizer(self, tmp_path: Path):
        folder = tiny_folder("llama", tmp_path / "llama")
        shutil.copy(tiny_folder("bert", tmp_path / "bert") / "tokenizer.json", folder)
        with pytest.raises(BadInput, match="do not read the same tokens"):
            run(tiny_model("llama"), _opened(folder), TEXT, Journal(), silent, _settings())

    def test_logits_that_are_not_numbers(self, tmp_path: Path):
        broken = _opened(tiny_folder("llama", tmp_path))
        with torch.no_grad():
            broken.model.get_submodule(broken.anatomy.blocks[1].path).mlp.down_proj.weight[0, 0] = float(
                "nan"
            )
        with pytest.raises(
            CannotMeasure, match=r"^document 0 \('The capital .*the variant .* window of tokens 0 to"
        ):
            run(tiny_model("llama"), broken, TEXT, Journal(), silent, _settings())

    def test_calibration_text(self):
        base = tiny_model("llama")
        text = Documents("a", "calibration", TEXT.texts)
        with pytest.raises(BadInput, match="loaded for calibration"):
            run(base, base, text, Journal(), silent, _settings())

    def test_nothing_to_predict(self):
        base = tiny_model("llama")
        with pytest.raises(CannotMeasure, match="no document of two tokens or more"):
            run(base, base, Documents("a", "evaluation", ("a", "")), Journal(), silent, _settings())

    def test_a_short_document_is_left_out_and_said(self):
        base = tiny_model("llama")
        result = run(
            base, base, Documents("a", "evaluation", ("a", *TEXT.texts[:3])), Journal(), silent, _settings()
        )
        assert len(result.frames["documents"]) == 3
        assert any("1 documents are too short" in note for note in result.notes)
        assert any("no interval" in note for note in result.notes)
        assert {metric.low for metric in result.metrics if metric.name == "bits_per_byte"} == {None}

    def test_a_stride_without_context(self):
        with pytest.raises(ValueError, match="stride 64 must be smaller than window 64"):
            _settings(window=64, stride=64)

    def test_the_window_is_capped_by_the_context_length(self):
        base = tiny_model("gpt2")
        long = Documents("a", "evaluation", (" ".join(CORPUS) * 5,))
        result = run(base, base, long, Journal(), silent, _settings(window=4096, max_document_tokens=600))
        assert result.provenance.conditions["window"] == base.anatomy.context_length == 256
        assert result.frames["documents"]["tokens"].iloc[0] > 400
