"""Dropping blocks: what the scores say of blocks that do nothing, what reloads, what is refused."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from core.capture import capture, capture_residual
from core.compress import drop_layers
from core.errors import BadInput, CannotCompress
from core.intervene import intervene
from core.models.loaded import LoadedModel
from core.models.open import open_model
from core.models.sizes import component_sizes
from core.models.weights import input_first
from core.registry import get
from core.reshape.depth import block_influence, evenly, greedy, losses
from core.reshape.shallower import without_blocks
from core.types import Documents, ModelRef, Result, silent
from tests.compress.making import own_model, save
from tests.compress.reloading import reloads
from tests.references import slow_pruning
from tests.tiny import CORPUS, FAMILIES, HEADLESS, SHIMMED, tiny_folder, tiny_model

TEXT = Documents("corpus", "calibration", CORPUS * 4)
SMALL: dict[str, Any] = {"samples": 8, "sample_tokens": 32, "count": 1}
IDS = torch.randint(512, (3, 24), generator=torch.Generator().manual_seed(5))


def dropped(loaded: LoadedModel, **settings: Any) -> Result:
    chosen = get("compress", "drop_layers")
    result: Result = chosen.run(loaded, TEXT, silent, chosen.parse({**SMALL, **settings}))
    return result


def made_identity(loaded: LoadedModel, layer: int) -> None:
    """A block that writes nothing: its projections to the stream are zero."""
    block = loaded.anatomy.blocks[layer]
    for path in (block.o, block.down):
        module = loaded.model.get_submodule(str(path))
        input_first(module).zero_()
        if module.bias is not None:
            module.bias.data.zero_()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_block_that_does_nothing_has_no_influence_and_its_removal_changes_nothing(
    family: str, tmp_path: Path
) -> None:
    loaded = own_model(family, tmp_path)
    made_identity(loaded, 1)
    with torch.inference_mode():
        before = loaded.model(IDS).logits
        result = dropped(loaded)
        after = loaded.model(IDS).logits
    layers = result.frames["layers"].set_index("layer")
    assert abs(layers.loc[1, "score"]) < 1e-6
    assert (layers.loc[[0, 2], "score"] > 1e-3).all()
    assert layers["status"].tolist() == ["kept", "dropped", "kept"]
    assert torch.equal(before, after)
    assert result.provenance.exactness_gap == 0


def test_influence_is_the_slow_one_and_two_for_a_block_that_turns_the_stream_round() -> None:
    loaded = tiny_model("llama")
    path = loaded.anatomy.blocks[1].path
    with torch.inference_mode():
        found_BL = block_influence(loaded, IDS, silent)
        for window, ids in enumerate(IDS):
            with capture_residual(loaded) as stream:
                loaded.model(ids[None])
            states = [state[0].double().numpy() for state in stream.values()]
            slow = [slow_pruning.block_influence(b, a) for b, a in pairwise(states)]
            assert np.allclose(found_BL[window], slow, atol=1e-9)
        with (
            capture(loaded.model, [path], inputs=True) as read,
            intervene(loaded.model, [path], lambda path, _: -read[path]),
        ):
            turned_BL = block_influence(loaded, IDS, silent)
    assert np.allclose(turned_BL[:, 1], 2)


def test_greedy_drops_what_the_loss_of_really_shorter_models_says() -> None:
    loaded = tiny_model("gemma2")
    with torch.inference_mode():
        found = greedy(loaded, IDS, [0, 1, 2], 2, silent)
        real = {}
        for gone in ((0,), (1,), (2,), (0, 1), (0, 2), (1, 2)):
            model, _ = without_blocks(loaded, gone)
            logits = model(IDS).logits[:, :-1].float()
            nats = torch.nn.functional.cross_entropy(
                logits.transpose(1, 2), IDS[:, 1:], reduction="none"
            ).mean(1)
            real[gone] = nats.double().numpy()
        assert np.allclose(found.base_B, losses(loaded, IDS, ()))
    first = min(range(3), key=lambda layer: real[layer,].mean())
    second = min(
        (pair for pair in real if len(pair) == 2 and first in pair), key=lambda pair: real[pair].mean()
    )
    assert found.order[0] == first
    assert set(found.order) == set(second)
    assert np.allclose(found.after_NB, [real[first,], real[second]], atol=1e-4)
    assert np.allclose(
        found.first_L, [float((real[layer,] - found.base_B).mean()) for layer in range(3)], atol=1e-4
    )


ALIKE = ("smollm", "mistral", "qwen3", "mixtral", "olmoe", "granitemoe")
"""Families whose blocks are laid out like another's here."""


@pytest.mark.parametrize(
    "family",
    [pytest.param(f, marks=[pytest.mark.slow] * (f in ALIKE)) for f in (*FAMILIES, *HEADLESS, *SHIMMED)],
)
def test_a_shallower_model_reloads_in_every_family_or_is_refused(family: str, tmp_path: Path) -> None:
    loaded = own_model(family, tmp_path)
    n_parameters = sum(p.numel() for p in loaded.model.parameters())
    gone = sum(p.numel() for p in loaded.model.get_submodule(loaded.anatomy.blocks[1].path).parameters())
    if family == "jamba":
        with pytest.raises(CannotCompress, match="whole periods of that pattern"):
            dropped(loaded, criterion="listed", layers="1")
        assert loaded.anatomy.n_layers == 3
        return
    windows = loaded.anatomy.windows
    result = dropped(loaded, criterion="listed", layers="1")
    assert result.provenance.exactness_gap == 0
    assert loaded.anatomy.n_layers == 2
    assert loaded.anatomy.windows == (windows[0], windows[2])
    touched = {metric.name: metric.value for metric in result.metrics}["share_of_parameters_touched"]
    assert touched == pytest.approx(gone / n_parameters)
    save(loaded, result, tmp_path / "variant")
    reloads(loaded, tmp_path / "variant")


def test_a_student_keeps_blocks_evenly_or_both_ends() -> None:
    assert evenly(6, 12) == (0, 2, 4, 7, 9, 11)  # what DistilBERT's own script takes of BERT
    assert evenly(3, 6) == (0, 2, 5)
    assert evenly(30, 30) == tuple(range(30))
    anatomy = replace(tiny_model("llama").anatomy, blocks=tiny_model("llama").anatomy.blocks * 4)  # 12 blocks
    parse = get("compress", "drop_layers").parse
    gone = {
        c: drop_layers.named_blocks(anatomy, parse({"criterion": c, "count": 7})) for c in ("even", "ends")
    }
    assert gone["even"] == [1, 2, 4, 5, 7, 9, 10]  # 0, 2.75, 5.5, 8.25, 11 stay
    assert gone["ends"] == [3, 4, 5, 6, 7, 8, 9]  # of 5 that stay, 3 are lower ones


@pytest.mark.parametrize("criterion", ["even", "ends"])
def test_dropping_by_place_reads_no_text(criterion: str, tmp_path: Path) -> None:
    loaded = own_model("llama", tmp_path)
    chosen = get("compress", "drop_layers")
    result = chosen.run(loaded, None, silent, chosen.parse({"criterion": criterion, "count": 1}))
    assert result.provenance.conditions["kept"] == [0, 2]
    assert not result.provenance.inputs


def test_prediction_counts_the_blocks_that_stay() -> None:
    for family, settings in (("gpt2", {"count": 1}), ("deepseek_v3", {"criterion": "even", "count": 1})):
        loaded = tiny_model(family)
        chosen = get("compress", "drop_layers")
        assert chosen.left is not None
        left = chosen.left(loaded.anatomy, chosen.parse(settings))
        sizes = component_sizes(loaded).groupby("component")["parameters"].sum()
        expected = sum(n * left.get(str(component), 1.0) for component, n in sizes.items())
        with torch.inference_mode():
            model, _ = without_blocks(loaded, [1])
        assert expected == pytest.approx(sum(p.numel() for p in model.parameters()), rel=0.002)


def test_what_does_not_apply_is_refused_with_the_choices(tmp_path: Path) -> None:
    loaded = tiny_model("llama")
    for settings, message in (
        ({"count": 2}, "choose at most 1"),
        ({"count": 3, "keep_ends": False}, "choose at most 2"),
        ({"criterion": "listed", "layers": "0"}, "keep_ends=false"),
        ({"criterion": "listed", "layers": "seven"}, "numbers from 0 to 2"),
        ({"criterion": "listed"}, "numbers from 0 to 2"),
    ):
        with pytest.raises(BadInput, match=message):
            dropped(loaded, **settings)
    with pytest.raises(CannotCompress, match="choose even, ends, last, listed or random"):
        dropped(tiny_model("vit"))
    with pytest.raises(CannotCompress, match="choose block_influence"):
        dropped(tiny_model("bert"), criterion="loss")
    folder = tiny_folder("gpt2", tmp_path / "scaled")
    config = transformers.AutoConfig.from_pretrained(folder)
    config.scale_attn_by_inverse_layer_idx = True
    config.save_pretrained(folder)
    by_place = open_model(ModelRef(str(folder)))
    with pytest.raises(CannotCompress, match=r"attn\.scaling=.* and no config key says otherwise"):
        dropped(by_place, criterion="listed", layers="1")
    assert by_place.anatomy.n_layers == 3
