"""Student and teacher side by side: CKA's known answers, heads that are found again, and losses that add up."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from core.errors import BadInput
from core.models.loaded import LoadedModel
from core.probes._alignment import Alignment, gram, hsic, own_hsic
from core.probes._token_kinds import banded, form_of, frequency_classes, repeated_classes
from core.probes.layer_alignment import LayerAlignmentSettings, layer_alignment
from core.probes.lost_tokens import LostTokensSettings, lost_tokens
from core.probes.matched_heads import MatchedHeadsSettings, matched_heads
from core.reshape.shallower import without_blocks
from core.types import Prompt, silent
from tests.compress.making import own_model
from tests.references import slow_alignment
from tests.tiny import D_MODEL, HEADS, LAYERS, tiny_model

PROMPT = Prompt("The capital of France is Paris, and Mary gave a drink to John")
SMALL = {"documents": 32, "tokens": 32}


def cka(x_ND: torch.Tensor, y_NE: torch.Tensor) -> float:
    k, m = gram(x_ND)[None], gram(y_NE)[None]
    return float(Alignment.of([(hsic(k, m), own_hsic(k), own_hsic(m))]).value_ST[0, 0])


def test_hsic_is_the_mean_over_four_tuples() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(9, width, generator=generator, dtype=torch.float64) for width in (5, 3))
    expected = slow_alignment.hsic(x.numpy(), y.numpy())
    assert hsic(gram(x)[None], gram(y)[None])[0, 0] == pytest.approx(expected, rel=1e-9)


def test_cka_is_one_under_rotation_and_scale_and_zero_for_strangers() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(200, 64, generator=generator), torch.randn(200, 96, generator=generator)
    turn, _ = torch.linalg.qr(torch.randn(64, 64, generator=generator))
    assert cka(x, x) == pytest.approx(1, abs=1e-6)
    assert cka(x, -7 * x @ turn + 3) == pytest.approx(1, abs=1e-4)
    assert abs(cka(x, y)) < 0.02
    centred = [z - z.mean(0) for z in (x, y)]
    inner = [
        float((a.T @ b).square().sum())
        for a, b in ((centred[0], centred[1]), (centred[0],) * 2, (centred[1],) * 2)
    ]
    assert inner[0] / (inner[1] * inner[2]) ** 0.5 > 0.2  # what the plain estimate says of the same strangers


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """The tiny llama without its middle block."""
    loaded = own_model("llama", tmp_path_factory.mktemp("cut"))
    model, _ = without_blocks(loaded, [1])
    loaded.become(model)
    return loaded


def test_a_student_without_a_block_is_the_teacher_up_to_the_cut(cut: LoadedModel) -> None:
    teacher = tiny_model("llama")
    result = layer_alignment(cut, teacher, PROMPT, silent, LayerAlignmentSettings(**SMALL))
    layers = result.frames["layers"]
    assert layers["taught_by"].tolist() == [0, 2, 3]
    assert layers["most_alike"].tolist()[:2] == [0, 1]
    assert layers["cka"][:2].to_numpy() == pytest.approx(1, abs=1e-5)
    assert layers["cka_taught"][1] < 0.999
    assert (layers["gain"] >= 0).all()
    assert layers["cka_ci95"].notna().all()
    assert result.provenance.exactness_gap < 1e-4
    assert len(result.frames["main"]) == LAYERS * (LAYERS + 1)


def test_another_architecture_is_compared_and_another_family_refused() -> None:
    result = layer_alignment(
        tiny_model("qwen3"),
        tiny_model("gemma2"),
        PROMPT,
        silent,
        LayerAlignmentSettings(**SMALL, vectors="raw"),
    )
    assert result.frames["main"]["cka"].between(-0.2, 1 + 1e-6).all()
    with pytest.raises(BadInput, match="one family"):
        layer_alignment(tiny_model("bert"), tiny_model("llama"), PROMPT, silent, LayerAlignmentSettings())


def test_every_head_finds_itself_wherever_it_was_moved_to(tmp_path: Path) -> None:
    """Heads in reverse order, with their outputs turned: the teacher's head is found by what it writes and by its pattern."""
    teacher = tiny_model("gpt_neox")
    student = own_model("gpt_neox", tmp_path)
    with torch.no_grad():
        for block in student.anatomy.blocks:
            fused = student.model.get_submodule(block.q)
            for name in ("weight", "bias"):
                heads = getattr(fused, name).view(HEADS, -1, *getattr(fused, name).shape[1:])
                heads.copy_(heads.flip(0).clone())
            o = student.model.get_submodule(block.o).weight
            o.copy_(o.view(D_MODEL, HEADS, -1).flip(1).reshape(D_MODEL, -1).clone())
    for by in ("pattern", "output"):
        result = matched_heads(student, teacher, PROMPT, silent, MatchedHeadsSettings(**SMALL, by=by))
        main = result.frames["main"]
        assert main["match"].tolist() == [
            f"L{a}H{HEADS - 1 - b}" for a, b in zip(main["layer"], main["head"], strict=True)
        ]
        assert main["similarity"].to_numpy() == pytest.approx(1, abs=1e-3)
        assert result.frames["lost"].empty
    assert (main["by_position"] < 0.999).any()


def test_heads_of_a_dropped_layer_have_no_heir(cut: LoadedModel) -> None:
    settings = MatchedHeadsSettings(**SMALL, threshold=0.99)
    result = matched_heads(cut, tiny_model("llama"), PROMPT, silent, settings)
    lost = result.frames["lost"]
    assert set(lost["layer"]) >= {1}
    assert not (lost["layer"] == 0).any()
    shares = result.frames["teacher"].groupby("layer")["write_share"].sum()
    assert shares.to_numpy() == pytest.approx(1)


def test_a_model_against_itself_lost_nothing() -> None:
    loaded = tiny_model("llama")
    result = lost_tokens(loaded, loaded, PROMPT, silent, LostTokensSettings(**SMALL))
    assert (result.frames["main"]["lost_nats"] == 0).all()
    assert result.metrics[0].value == 0


def test_losses_of_classes_add_up_and_are_the_models_own(cut: LoadedModel) -> None:
    teacher = tiny_model("llama")
    result = lost_tokens(cut, teacher, PROMPT, silent, LostTokensSettings(text=""))
    ids = torch.tensor([teacher.tokenizer(PROMPT.text)["input_ids"]])
    with torch.inference_mode():
        nats = [
            torch.nn.functional.cross_entropy(model.model(ids).logits[0, :-1], ids[0, 1:], reduction="none")
            for model in (cut, teacher)
        ]
    tokens = result.frames["tokens"].sort_values("position")
    np.testing.assert_allclose(tokens["lost_nats"], nats[0] - nats[1], atol=1e-5)
    assert result.provenance.exactness_gap < 1e-9
    sums = result.frames["main"].groupby("kind")["share_of_tokens"].sum()
    assert sums.to_numpy() == pytest.approx(1)
    assert result.frames["main"]["low"].isna().all(), "one document has no interval"


def test_kinds_of_tokens() -> None:
    assert repeated_classes([5, 6, 7, 5, 6, 9, 7]) == [
        *("new", "new", "seen before", "after the same token", "new", "seen before")
    ]
    assert frequency_classes([[1] * 5 + [2] * 3, [3, 4]]) == {
        1: "common",
        2: "middling",
        3: "rare",
        4: "rare",
    }
    pairs = [
        (" word", "a"),
        ("ly", " word"),
        ("Begin", "\n"),
        ("##ing", "go"),
        ("12", " "),
        (");", "x"),
        ("\n", "."),
        ("→", " "),
    ]
    forms = [
        "word",
        "word, continued",
        "word",
        "word, continued",
        "number",
        "punctuation",
        "space",
        "other sign",
    ]
    assert [form_of(*pair) for pair in pairs] == forms
    assert banded([0.05, 0.1, 2, 9], (0.1, 1, 4)) == ["under 0.1", "0.1–1", "1–4", "4 and more"]
