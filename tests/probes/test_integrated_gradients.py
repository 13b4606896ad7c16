"""Completeness, symmetry and invariance of the gradient attributions on tiny models, and Captum as second opinion."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from core.errors import BadInput, CannotMeasure
from core.models.anatomy_find import find_anatomy
from core.models.loaded import LoadedModel
from core.probes._input_game import build_game
from core.probes._input_gradient import Points, StraightPath
from core.probes.input_x_gradient import InputXGradientSettings, input_x_gradient
from core.probes.integrated_gradients import IntegratedGradientsSettings, integrated_gradients
from core.probes.occlusion import OcclusionSettings, occlusion
from core.types import Prompt, Result, silent
from tests.tiny import DECODERS, MOE, n_hooks, tiny_model

PROMPT = Prompt("The capital of France is")
OTHER = "The capital of Italy is"


def run(loaded: LoadedModel, prompt: Prompt = PROMPT, **given: Any) -> Result:
    return integrated_gradients(
        loaded,
        prompt,
        silent,
        IntegratedGradientsSettings(**{"quality_orders": 0, "target": " the", **given}),
    )


def gradient(loaded: LoadedModel, prompt: Prompt = PROMPT, **given: Any) -> Result:
    settings = InputXGradientSettings(**{"quality_orders": 0, "target": " the", **given})
    return input_x_gradient(loaded, prompt, silent, settings)


def scores(result: Result) -> np.ndarray:
    return result.frames["tokens"]["score"].to_numpy()


def metric(result: Result, name: str) -> float:
    return next(m.value for m in result.metrics if m.name == name)


def in_float64(loaded: LoadedModel) -> LoadedModel:
    model = copy.deepcopy(loaded.model).double()
    if loaded.anatomy.n_experts:
        model.set_experts_implementation("eager")
    return dataclasses.replace(loaded, model=model)


@pytest.mark.parametrize("family", [family for family in DECODERS if family not in MOE])
def test_it_converges_and_says_so_or_flags(family: str) -> None:
    result = run(tiny_model(family), baseline="mean_embedding", steps=400, tolerance=0.005)
    gap, delta = metric(result, "completeness_gap"), metric(result, "path_difference")
    assert scores(result).sum() - delta == pytest.approx(gap, abs=1e-9)
    assert (metric(result, "missed_share") > 0.05) == (result.flags == ("not_converged",))
    assert abs(gap) <= 0.02 * abs(delta) or result.flags


def test_a_path_that_ends_where_it_starts_gives_zero() -> None:
    result = run(tiny_model("llama"), corrupted=PROMPT.text)
    assert (scores(result) == 0).all()
    assert not result.flags


def test_unchanged_tokens_of_a_counterfactual_get_exactly_nothing() -> None:
    loaded = tiny_model("llama")
    a, b = (loaded.tokenizer(text)["input_ids"] for text in ("one two three", "one five three"))
    if len(a) != len(b):
        pytest.skip("the tokenizer cut these words unevenly")
    found = scores(run(loaded, Prompt("one two three"), corrupted="one five three"))
    same = np.array([x == y for x, y in zip(a, b, strict=True)])
    assert (found[same] == 0).all()
    assert (found[~same] != 0).all()


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_path_at_any_layer_adds_up_in_float64(layer: int) -> None:
    loaded = in_float64(tiny_model("gpt2"))
    result = run(loaded, start_layer=layer, baseline="mean_embedding", quadrature="gauss_legendre", steps=200)
    assert result.provenance.exactness_gap < 1e-6
    assert metric(result, "path_difference") == pytest.approx(
        metric(run(loaded, start_layer=0, baseline="mean_embedding", steps=16), "path_difference"), abs=1e-9
    )


def test_the_gradient_agrees_with_central_differences() -> None:
    for family in ("llama", "gpt2", "gemma2", "olmoe"):
        loaded = in_float64(tiny_model(family))
        result = gradient(loaded)
        # RMS norms and rotary angles work in float32 even in a float64 model: that is the difference's noise.
        assert result.provenance.exactness_gap < 2e-3, family


def test_three_methods_agree_where_the_model_is_linear() -> None:
    """Mean over positions, then a matrix: IG in one step = input × gradient = occlusion by zero, all closed form."""
    torch.manual_seed(0)
    rows_VD, out_VD = torch.randn(12, 6).double(), torch.randn(12, 6).double()

    class Linear(torch.nn.Module):
        dtype, device = torch.float64, torch.device("cpu")

        def forward(self, inputs_embeds: torch.Tensor, **_: Any) -> Any:
            from transformers.modeling_outputs import CausalLMOutput

            return CausalLMOutput(logits=(inputs_embeds.mean(1) @ out_VD.T)[:, None])

    loaded: Any = dataclasses.replace(tiny_model("llama"), model=Linear())
    ids = [3, 1, 4]
    game = dataclasses.replace(
        _game(metric="logit"),
        loaded=loaded,
        n_positions=3,
        players=((0,), (1,), (2,)),
        names=("a", "b", "c"),
        replacement_D=torch.zeros(6, dtype=torch.float64),
    )
    game.embeddings_of = lambda _: rows_VD[ids]  # type: ignore[method-assign]
    target = game.target.id % 12
    game = dataclasses.replace(game, target=dataclasses.replace(game.target, id=target))
    game.embeddings_of = lambda _: rows_VD[ids]  # type: ignore[method-assign]
    expected = (rows_VD[ids] @ out_VD[target] / 3).numpy()
    points = Points(game, 0)
    _, slope_1PD = points.value_and_gradient(rows_VD[ids][None])
    assert (rows_VD[ids] * slope_1PD[0]).sum(-1).numpy() == pytest.approx(expected)
    path = StraightPath(game, points, torch.zeros(3, 6).double(), rows_VD[ids])
    _, share_SP = path.evaluate(np.array([0.37]))
    assert share_SP[0] == pytest.approx(expected)
    without_N = game.values(~np.eye(3, dtype=bool))
    assert game.ends()[0] - without_N == pytest.approx(expected)


def _game(**given: Any) -> Any:
    with torch.no_grad():
        return build_game(
            tiny_model("llama"), PROMPT, IntegratedGradientsSettings(**{"target": " the", **given})
        )


def test_fused_and_separate_projections_give_the_same() -> None:
    """Implementation invariance: gate and up as one matrix and a split compute the same f."""

    class Fused(torch.nn.Module):
        def __init__(self, mlp: Any) -> None:
            super().__init__()
            self.both = torch.nn.Linear(128, 512, bias=False)
            self.both.weight.data = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
            self.down, self.act = mlp.down_proj, mlp.act_fn

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            gate, up = self.both(x).chunk(2, -1)
            return self.down(self.act(gate) * up)

    loaded = in_float64(tiny_model("llama"))
    plain = scores(run(loaded, steps=32, quadrature="gauss_legendre"))
    for layer in loaded.model.model.layers:
        layer.mlp = Fused(layer.mlp).requires_grad_(False)
    assert scores(run(loaded, steps=32, quadrature="gauss_legendre")) == pytest.approx(plain, abs=1e-6)


def _without_order() -> LoadedModel:
    """GPT-2 whose positions are all alike and whose last token alone asks: earlier tokens are symmetric."""
    loaded = in_float64(tiny_model("gpt2"))
    loaded.model.transformer.wpe.weight.data[:] = loaded.model.transformer.wpe.weight.data[0].clone()
    for block in loaded.model.transformer.h[1:]:
        block.attn.c_proj.weight.data.zero_()
        block.attn.c_proj.bias.data.zero_()
    return loaded


def test_symmetric_tokens_share_alike_and_an_ignored_one_gets_nothing() -> None:
    loaded = _without_order()
    ids = loaded.tokenizer("one one is")["input_ids"]
    assert len(ids) >= 3
    found = scores(run(loaded, Prompt("aaaa is"), steps=32))
    assert found[0] == pytest.approx(found[1], abs=1e-9), "the same token twice, seen by one symmetric layer"
    deaf = in_float64(tiny_model("gpt2"))
    for block in deaf.model.transformer.h:
        block.attn.c_proj.weight.data.zero_()
    alone = scores(run(deaf, steps=32))
    assert (alone[:-1] == 0).all(), "without attention only the last token reaches the answer"
    assert alone[-1] != 0


def test_a_head_that_reads_another_group_changes_the_attribution() -> None:
    """Sabotage: shifting the key/value heads by one is seen."""
    loaded = in_float64(tiny_model("llama"))
    plain = scores(run(loaded, steps=16, quadrature="gauss_legendre"))
    loaded.model.model.layers[1].self_attn.v_proj.register_forward_hook(
        lambda module, args, output: output.roll(32, dims=-1)
    )
    assert np.abs(scores(run(loaded, steps=16, quadrature="gauss_legendre")) - plain).max() > 1e-2


def test_a_gap_above_five_percent_is_flagged_and_said() -> None:
    result = run(tiny_model("llama"), baseline="zero", quadrature="gauss_legendre", steps=1)
    assert result.flags == ("not_converged",)
    assert any("do not read these numbers" in note for note in result.notes)


def test_prompts_of_other_length_are_refused_with_their_tokens() -> None:
    with pytest.raises(BadInput, match=r"counterfactual prompt has \d+ tokens \(.*\|.*\), the prompt \d+"):
        run(tiny_model("llama"), corrupted="one two")
    with pytest.raises(BadInput, match="start_layer 3 does not exist"):
        run(tiny_model("llama"), start_layer=3)


def test_a_kernel_without_backward_is_refused() -> None:
    loaded = in_float64(tiny_model("llama"))
    loaded.model.model.layers[0].mlp.up_proj.register_forward_hook(lambda m, a, out: out.detach())
    for method in (run, gradient):
        with pytest.raises(CannotMeasure, match=r"mlp\.up_proj"):
            method(loaded)
    occlusion(loaded, PROMPT, silent, OcclusionSettings(quality_orders=0))


def test_bfloat16_has_no_path() -> None:
    loaded = tiny_model("llama")
    rounded = dataclasses.replace(loaded, model=copy.deepcopy(loaded.model).bfloat16())
    with pytest.raises(CannotMeasure, match="finer steps than bfloat16"):
        run(rounded)
    occlusion(rounded, PROMPT, silent, OcclusionSettings(quality_orders=0))


def test_no_gradient_and_no_hook_is_left_behind() -> None:
    loaded = in_float64(tiny_model("gemma2"))
    before = n_hooks(loaded.model)
    run(loaded, start_layer=1, steps=8)
    assert all(p.grad is None and not p.requires_grad for p in loaded.model.parameters())
    assert n_hooks(loaded.model) == before
    assert find_anatomy(loaded.model) == loaded.anatomy


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_equal_to_captum_at_equal_steps_and_baseline(family: str) -> None:
    captum = pytest.importorskip("captum.attr")
    loaded = tiny_model(family)
    ours = run(loaded, baseline="zero", quadrature="gauss_legendre", steps=20)
    target = ours.provenance.conditions["target_id"]
    embedding = loaded.model.get_submodule(loaded.anatomy.embedding)
    ids = torch.tensor([loaded.tokenizer(PROMPT.text)["input_ids"]])

    def forward(x: torch.Tensor) -> torch.Tensor:
        return loaded.model(inputs_embeds=x, use_cache=False).logits[:, -1].log_softmax(-1)[:, target]

    x = embedding(ids).detach()
    theirs, delta = captum.IntegratedGradients(forward).attribute(
        x, torch.zeros_like(x), n_steps=20, method="gausslegendre", return_convergence_delta=True
    )
    assert scores(ours) == pytest.approx(theirs.sum(-1)[0].detach().numpy(), abs=1e-5)
    assert metric(ours, "completeness_gap") == pytest.approx(float(delta), abs=1e-4), "and both miss as much"
