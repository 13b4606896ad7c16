import pytest
import torch

from core.errors import BadInput
from core.models.open import open_model
from core.probes import attribution_patching as module
from core.probes._node_gradients import node_gradients
from core.probes._patch_grid import open_grid
from core.probes._recording import record
from core.probes._replay import Patch, last_residuals
from core.probes.attribution_patching import AttributionPatchingSettings, attribution_patching
from core.registry import get
from core.types import ModelRef, Prompt, silent
from tests.induction import induction_model
from tests.tiny import DECODERS, tiny_folder, tiny_model

CLEAN = "a b c d e f g h i j k l m n o p q r"
CORRUPTED = "a b c d X f g h i j k l m n o p q X"
NODES = ("residual", "attention_out", "mlp_out", "z", "q", "k", "v")


def run(loaded, clean=CLEAN, **settings):
    parsed = AttributionPatchingSettings(
        **{"corrupted": CORRUPTED, "target": "a", "distractor": "z", **settings}
    )
    return attribution_patching(loaded, Prompt(clean), silent, parsed)


@pytest.fixture
def double(tmp_path):
    """A tiny model of a family in float64."""

    def make(family: str):
        loaded = open_model(ModelRef(str(tiny_folder(family, tmp_path / family))))
        loaded.model.double()
        return loaded

    return make


def difference(logits: torch.Tensor) -> torch.Tensor:
    return logits[:, 7] - logits[:, 11]


def replayed(loaded, base, node, layer, position, value, head) -> float:
    with torch.inference_mode():
        final = last_residuals(loaded, base, [(Patch(layer, node, position, value, head),)])
        normed = loaded.model.get_submodule(loaded.anatomy.final_norm)(final)
        logits = loaded.model.get_submodule(loaded.anatomy.unembedding)(normed)
        cap = loaded.anatomy.logit_softcap
        return float(difference(logits if cap is None else cap * torch.tanh(logits / cap)))


@pytest.mark.parametrize("node", NODES)
# RMSNorm computes in float32 whatever the model's dtype, which leaves noise of 1e-7: a larger step, a wider tolerance.
@pytest.mark.parametrize(
    ("family", "size", "tolerance"), [("gpt_neox", 1e-4, 1e-6), ("llama", 1e-2, 1e-2), ("gemma2", 1e-2, 1e-2)]
)
def test_gradients_are_central_differences_of_exact_patching(family, size, tolerance, node, double):
    loaded = double(family)
    inputs = {"input_ids": torch.tensor([loaded.tokenizer(CLEAN)["input_ids"]])}
    with torch.inference_mode():
        base = record(loaded, inputs, [node])
    gradients, _ = node_gradients(loaded, inputs, node, difference)
    generator = torch.Generator().manual_seed(1)
    for layer, position in ((0, 3), (1, 20), (2, base.n_tokens - 1)):
        here = base.at(node, layer, head=1)[position : position + 1]
        step = size * torch.randn(here.shape, generator=generator, dtype=torch.float64)
        ends = [replayed(loaded, base, node, layer, position, here + sign * step, 1) for sign in (1, -1)]
        gradient = gradients[layer] if gradients[layer].dim() == 2 else gradients[layer][:, 1]
        slope = float((gradient[position] * step[0]).sum())
        assert slope == pytest.approx((ends[0] - ends[1]) / 2, rel=tolerance, abs=tolerance * size)


def test_halving_the_perturbation_quarters_the_error(double):
    loaded = double("gpt_neox")
    inputs = {"input_ids": torch.tensor([loaded.tokenizer(CLEAN)["input_ids"]])}
    with torch.inference_mode():
        base = record(loaded, inputs)
    gradients, value = node_gradients(loaded, inputs, "residual", difference)
    here = base.at("residual", 1)[5:6]
    direction = torch.randn(here.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    errors = []
    for size in (1e-2, 5e-3, 2.5e-3):
        exact = replayed(loaded, base, "residual", 1, 5, here + size * direction, 0)
        errors.append(exact - value - size * float((gradients[1][5] * direction[0]).sum()))
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(4, rel=0.1)


def test_the_estimate_is_exact_where_the_metric_is_linear(double):
    loaded = double("llama")
    loaded.model.model.norm = torch.nn.Identity()
    result = run(loaded, node="mlp_out")
    last = result.frames["verified"].query("layer == 2")
    assert len(last) > 0
    assert last["effect"].tolist() == pytest.approx(last["exact_effect"].tolist(), abs=1e-9)
    others = result.frames["verified"].query("layer == 0")
    assert (others["effect"] - others["exact_effect"]).abs().max() > 1e-3


@pytest.mark.parametrize("family", DECODERS)
def test_every_family_gives_an_estimate_with_its_check(family):
    result = run(tiny_model(family), node="head")
    assert result.provenance.exactness_gap < 1e-4
    assert result.frames["main"]["effect"].notna().all()
    assert result.frames["main"]["effect"].abs().max() > 1e-3
    assert len(result.frames["verified"]) == min(32, len(result.frames["main"]))


def test_the_induction_head_is_found_and_dead_heads_are_zero():
    result = run(
        induction_model(40.0), "@ a b c d e a b c d", corrupted="@ a b c d f a b c d", node="head", target="e",
        distractor="f",
    )  # fmt: skip
    effect = result.frames["main"].set_index(["layer", "head"])["effect"]
    exact = result.frames["verified"].set_index(["layer", "head"])["exact_effect"]
    assert exact[1, 0] == pytest.approx(1.0, abs=1e-5)
    assert effect[1, 0] > 0.5
    assert effect[0, 1] == effect[1, 1] == 0


def test_the_verified_cells_hold_the_largest_and_a_sample_of_the_others():
    result = run(tiny_model("llama"), verify=8, sample=8)
    verified = result.frames["verified"]
    assert verified["drawn"].tolist() == ["largest estimates"] * 8 + ["sample"] * 8
    largest = result.frames["main"]["effect"].abs().nlargest(8)
    assert verified["effect"].abs().head(8).tolist() == pytest.approx(largest.tolist())
    pearson = result.metrics[0].value
    assert pearson == pytest.approx(verified["effect"].corr(verified["exact_effect"]))
    spearman = result.metrics[1].value
    assert spearman == pytest.approx(verified["effect"].rank().corr(verified["exact_effect"].rank()))


def test_a_gradient_of_the_wrong_sign_is_flagged(monkeypatch):
    make = module.node_gradients
    monkeypatch.setattr(
        module, "node_gradients", lambda *args: (tuple(-g for g in make(*args)[0]), make(*args)[1])
    )
    result = run(tiny_model("llama"))
    assert result.flags
    assert result.metrics[0].value < 0


def test_noising_by_kl_is_refused():
    with pytest.raises(BadInput, match="gradient 0"):
        run(tiny_model("llama"), metric="kl", direction="noising")


def test_the_whole_grid_takes_at_most_six_forwards(monkeypatch):
    """Counted: two recorded runs, one forward and one backward (two) for the gradient."""
    loaded = tiny_model("llama")
    forwards = []
    handle = loaded.model.register_forward_hook(lambda *_: forwards.append(1))
    settings = AttributionPatchingSettings(corrupted=CORRUPTED, target="a", distractor="z")
    with torch.inference_mode():
        grid = open_grid(loaded, Prompt(CLEAN), settings)
    module._estimate(grid)
    handle.remove()
    assert len(forwards) + 2 <= 6


@pytest.mark.slow
def test_smollm2_estimates_correlate_with_exact_patching():
    loaded = open_model(ModelRef("demo:smollm2"))
    method = get("probe", "attribution_patching")
    for example in method.examples:
        result = method.run(loaded, example.prompt, silent, method.parse(dict(example.settings)))
        assert result.metrics[0].value > 0.9
        assert result.metrics[1].value > 0.9
