"""Sensitivity of weight groups: reruns from a later block against whole runs, and the Fisher score's known answers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from core.budget.formats import read_formats
from core.budget.groups import FileSizes, fits, weight_groups
from core.budget.reruns import Reruns, equal_windows
from core.budget.sensitivity import changed, fisher_score, gradients_of, rank_correlation, table
from core.errors import BadInput
from core.numerics.sizes import file_bytes
from core.saving.layout import file_entries
from core.types import Documents, silent
from tests.references.slow_sensitivity import fisher_form, kl_of_change
from tests.tiny import CORPUS, tiny_model

TEXT = Documents("corpus", "calibration", tuple(" ".join(CORPUS[i:] + CORPUS[:i]) * 2 for i in range(4)) * 2)
FORMATS = read_formats("int2g32, int4g32, int8, keep")


def windows(family: str) -> torch.Tensor:
    return equal_windows(tiny_model(family), TEXT, samples=8, sample_tokens=24)


@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
def test_a_rerun_from_a_later_block_is_a_whole_run(family: str) -> None:
    loaded, ids_WP = tiny_model(family), windows(family)
    reruns = Reruns(loaded, ids_WP)
    assert reruns.loss_W(0).max() == reruns.loss_W(2).max() == reruns.loss_W(3).max() == 0
    for group in (g for g in weight_groups(loaded) if g.layer in (None, 2)):
        names = [target.name for target in group.targets]
        with changed(loaded, group, FORMATS["int2g32"]) as change:
            begin = 2 if group.layer == 2 else 0 if group.part == "embedding" else 3
            found_W = reruns.loss_W(begin)
            new = dict(change.after)
        np.testing.assert_allclose(found_W, kl_of_change(loaded, ids_WP, names, new), rtol=2e-4, atol=2e-7)
    assert reruns.loss_W(0).max() == 0, "every weight was put back"


def test_leaving_out_a_block_is_skipping_it() -> None:
    loaded, ids_WP = tiny_model("smollm"), windows("smollm")
    block = loaded.model.get_submodule(loaded.anatomy.blocks[1].path)
    reruns = Reruns(loaded, ids_WP)
    found_W = reruns.loss_without_W(1)
    o, down = (loaded.anatomy.blocks[1].o, loaded.anatomy.blocks[1].down)
    nothing = {
        f"{path}.weight": torch.zeros_like(loaded.model.get_parameter(f"{path}.weight")) for path in (o, down)
    }
    np.testing.assert_allclose(found_W, kl_of_change(loaded, ids_WP, list(nothing), nothing), rtol=2e-4)
    assert "forward" not in vars(block)


def test_the_table_of_a_decoder() -> None:
    loaded, ids_WP = tiny_model("smollm"), windows("smollm")
    groups = weight_groups(loaded)
    assert [g.name for g in groups[:5]] == ["embedding", "0.qkv", "0.o", "0.gate_up", "0.down"]
    scored = gradients_of(loaded, groups, ids_WP, silent)
    found = table(
        loaded,
        groups,
        lambda group: FORMATS,
        reruns=Reruns(loaded, ids_WP),
        gradients=scored,
        progress=silent,
    )
    kept = found[found["format"] == "keep"]
    assert (kept[["loss", "loss_low", "loss_high", "fisher", "first_order"]] == 0).all(axis=None)
    changed_ = found[found["format"] != "keep"]
    assert (changed_["loss"] > 0).all()
    assert (changed_["loss_low"] <= changed_["loss"]).all()
    assert (changed_["loss"] <= changed_["loss_high"]).all()
    for _, rows in changed_.groupby("group"):
        assert rows["loss"].is_monotonic_decreasing
        assert rows["bytes"].is_monotonic_increasing
    assert rank_correlation(found, "loss", "fisher") > 0.98
    # Not only the order: for small errors the score is the loss, in the same nats.
    fine = changed_[changed_["format"] == "int8"]
    assert fine["fisher"].sum() == pytest.approx(fine["loss"].sum(), rel=0.3)
    # Sum of the parts and what is fixed is the whole file, exactly so far as a header's digits go.
    whole = int(kept["bytes"].sum()) + FileSizes(loaded, groups).fixed
    assert whole == file_bytes(file_entries(loaded))


def test_an_encoder_is_scored_by_its_vectors() -> None:
    loaded, ids_WP = tiny_model("bert"), windows("bert")
    groups = weight_groups(loaded)[1:5]
    scored = gradients_of(loaded, groups, ids_WP, silent)
    found = table(
        loaded,
        groups,
        lambda group: FORMATS,
        reruns=Reruns(loaded, ids_WP),
        gradients=scored,
        progress=silent,
    )
    assert rank_correlation(found, "loss", "fisher") > 0.8
    assert found["first_order"].isna().all()


def test_the_sampled_fisher_score_is_the_exact_diagonal_form() -> None:
    """Labels are drawn; over many windows the score must come to the sum over the whole vocabulary."""
    loaded, ids_WP = tiny_model("smollm"), windows("smollm")[:1, :4]
    (group,) = (g for g in weight_groups(loaded) if g.name == "2.o")
    name = group.targets[0].name
    delta = torch.full_like(loaded.model.get_parameter(name), 1e-2)
    exact = fisher_form(loaded, ids_WP[0], name, delta)
    many = gradients_of(loaded, [group], ids_WP.expand(100, -1), silent)
    assert fisher_score(many.squared[name], delta, many.n) == pytest.approx(exact, rel=0.3)


def test_fisher_grows_with_the_square_and_is_zero_without_gradient() -> None:
    squared, delta = torch.rand(8, 8), torch.randn(8, 8)
    once = fisher_score(squared, delta, 5)
    assert fisher_score(squared, 2 * delta, 5) == pytest.approx(4 * once, rel=1e-6)
    assert fisher_score(torch.zeros(8, 8), delta, 5) == 0


def test_too_little_text_says_how_much_is_needed() -> None:
    with pytest.raises(BadInput, match="0 documents of 24 tokens or more, and at least 2 are needed"):
        equal_windows(
            tiny_model("smollm"), Documents("short", "calibration", ("one two",)), samples=8, sample_tokens=24
        )


@pytest.mark.parametrize(("family", "kinds"), [
    ("gpt2", {"table", "matrix"}), ("mixtral", {"table", "linear", "experts"}), ("gpt_oss", {"table", "linear", "fused"}),
])  # fmt: skip
def test_groups_know_how_they_can_be_stored(family: str, kinds: set[str]) -> None:
    groups = weight_groups(tiny_model(family))
    assert {group.kind for group in groups} == kinds
    shapes = {name: tuple(p.shape) for name, p in tiny_model(family).model.named_parameters()}
    packable = {g.kind for g in groups if fits(g, FORMATS["int8"], shapes)}
    assert packable == kinds - {"fused"}
