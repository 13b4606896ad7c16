"""A student of another width: the projection starts where embeddings say, and is learned."""

from __future__ import annotations

import pytest
import torch

from core.distill.features.feature_match import feature_match
from core.distill.features.projection import projection
from core.distill.layer_map import LayerMap
from core.models.loaded import LoadedModel
from core.registry import get
from core.reshape.depth import evenly
from core.types import silent
from tests.compress.making import own_model
from tests.distill.features.pairs import batch, matched
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """Half of the dimensions, in equal steps."""
    loaded = own_model("smollm", tmp_path_factory.mktemp("narrow"))
    chosen = get("compress", "own_student")
    chosen.run(loaded, None, silent, chosen.parse({"layers": 2, "hidden": 64, "heads": 2}))
    return loaded


def test_it_starts_with_the_kept_dimensions_in_their_places(student: LoadedModel) -> None:
    found_TS = projection(student, tiny_model("smollm"))
    assert found_TS is not None
    assert found_TS.requires_grad
    assert found_TS.shape == (128, 64)
    kept = list(evenly(64, 128))
    assert torch.allclose(found_TS[kept], torch.eye(64), atol=1e-4)
    assert projection(tiny_model("llama"), tiny_model("smollm")) is None


@pytest.mark.parametrize("kind", ["squared", "cosine"])
def test_descent_on_it_alone_brings_the_loss_down(student: LoadedModel, kind: str) -> None:
    layers = LayerMap.even(2, 3)
    match = feature_match(student, tiny_model("smollm"), layers, hidden_weight=1.0, hidden_loss=kind)
    assert match is not None
    ((name, learned),) = match.named_parameters()
    assert name == "features.projection"
    optimizer = torch.optim.Adam([learned], lr=0.01)
    losses = []
    for _ in range(15):
        found = matched(match, batch())
        losses.append(found.loss.item())
        optimizer.zero_grad()
        found.loss.backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]


def test_relations_need_no_projection_at_another_width(student: LoadedModel) -> None:
    match = feature_match(
        student, tiny_model("smollm"), LayerMap.even(2, 3), relation_weight=1.0, relations="qq_kk_vv"
    )
    assert match is not None
    assert not match.named_parameters()
    assert 0 < matched(match, batch()).loss.item() < 100
