"""Steering: strength 0 changes nothing, what is added arrives, what is removed is gone, and the logits move as they must."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pandas as pd
import pytest
import torch

from core.capture import capture_residual
from core.errors import BadInput, SlimscopeError
from core.models.open import open_model
from core.probes._directions import mean_difference, separation, split_prompts
from core.probes._steered import add_vectors, continue_greedily, remove_directions
from core.probes._tokens import encode
from core.probes.steering import SteeringSettings, steering
from core.train._sparse_code import METHOD
from core.train._trained import Learned, bound_to
from core.types import Documents, ModelRef, Prompt, silent
from tests.tiny import DECODERS, MOE, tiny_folder, tiny_model

PROMPT = Prompt("The capital of France is")
LISTS = {
    "positives": "one two three|John gave a drink",
    "negatives": "the store and the text|print the index",
}
SETTINGS = SteeringSettings(**LISTS, layer=2, max_new_tokens=6)


def last_logits(loaded, n_rows=1, **options):
    ids = encode(loaded, PROMPT).inputs["input_ids"].expand(n_rows, -1)
    with torch.inference_mode():
        return loaded.model(ids, use_cache=False, **options).logits[:, -1]


def random_rows(loaded, n, seed=0):
    return torch.randn(n, loaded.anatomy.d_model, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("layer", [0, 1, 3])
@pytest.mark.parametrize("family", DECODERS)
def test_each_row_gets_its_own_vector_and_zero_gets_nothing(family, layer):
    """Identity 15: strength 0 is the identity, +v − v cancels; and the stream moves by exactly what was added."""
    loaded = tiny_model(family)
    vectors = torch.cat([torch.zeros(1, loaded.anatomy.d_model), random_rows(loaded, 2)])
    plain = last_logits(loaded, 3)
    with capture_residual(loaded) as before:
        last_logits(loaded, 3)
    with add_vectors(loaded, vectors, layer=layer):
        with capture_residual(loaded) as after:
            steered = last_logits(loaded, 3)
        with add_vectors(loaded, -vectors, layer=layer):
            cancelled = last_logits(loaded, 3)
    if (
        family in MOE
    ):  # experts multiply the rows of all texts that chose them at once: their order, so their rounding
        assert steered[0].numpy() == pytest.approx(plain[0].numpy(), abs=1e-4)
    else:
        assert torch.equal(steered[0], plain[0])
    assert (steered[1:] - plain[1:]).abs().amax(-1).min() > 1e-3
    assert cancelled.numpy() == pytest.approx(plain.numpy(), abs=2e-4)
    moved = list(after.values())[layer] - list(before.values())[layer]
    assert moved.numpy() == pytest.approx(vectors[:, None].expand_as(moved).numpy(), abs=1e-5)


@pytest.mark.parametrize("family", DECODERS)
def test_a_removed_direction_is_nowhere_in_the_stream(family):
    """Identity 15: ⟨x, r̂⟩ = 0 at every layer and position; a row of zeros is no steering.

    Bit for bit in a dense model; fused experts group the batch's rows, and another grouping rounds otherwise.
    """
    loaded = tiny_model(family)
    units = random_rows(loaded, 2)
    units = units / units.norm(dim=-1, keepdim=True)
    units[0] = 0
    plain = last_logits(loaded, 2)
    with remove_directions(loaded, units), capture_residual(loaded) as residual:
        removed = last_logits(loaded, 2)
    if loaded.anatomy.n_experts:
        torch.testing.assert_close(removed[0], plain[0], rtol=1e-4, atol=1e-4)
    else:
        assert torch.equal(removed[0], plain[0])
    assert (removed[1] - plain[1]).abs().max() > 1e-3
    for stream in residual.values():
        assert ((stream[1] @ units[1]).abs() / stream[1].norm(dim=-1)).max() < 1e-5


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_removing_a_direction_is_removing_it_from_the_weights(family, tmp_path):
    """Arditi et al. 2024: the projection at run time equals a model whose writing weights are orthogonal to it."""
    loaded = tiny_model(family)
    unit = random_rows(loaded, 1)[0]
    unit = unit / unit.norm()
    with remove_directions(loaded, unit[None]):
        ours = last_logits(loaded)
    edited = open_model(ModelRef(str(tiny_folder(family, tmp_path / family))))
    model, anatomy = edited.model, edited.anatomy
    project = torch.eye(len(unit)) - torch.outer(unit, unit)
    tables = [anatomy.embedding, *([anatomy.position_embedding] if anatomy.position_embedding else [])]
    untied = copy.deepcopy(model.get_submodule(anatomy.unembedding).weight)
    with torch.no_grad():
        for path in tables:
            weight = model.get_submodule(path).weight
            weight.copy_(weight @ project)
        for block in anatomy.blocks:
            for path in (block.o, block.down):
                module = model.get_submodule(path)
                is_conv1d = type(module).__name__ == "Conv1D"
                module.weight.copy_(module.weight @ project if is_conv1d else project @ module.weight)
                if module.bias is not None:
                    module.bias.copy_(project @ module.bias)
        model.get_submodule(anatomy.unembedding).weight = torch.nn.Parameter(untied, requires_grad=False)
    assert ours.numpy() == pytest.approx(last_logits(edited).numpy(), abs=1e-4)


@pytest.mark.parametrize(
    ("family", "dtype", "tolerance"),
    [
        ("llama", torch.float32, 1e-4),  # its norm rounds to float32 by itself, whatever the model's dtype
        ("qwen2", torch.float32, 1e-4),
        ("gpt2", torch.float32, 1e-4),
        ("gpt2", torch.float64, 1e-9),
    ],
)
def test_at_the_last_layer_the_logits_move_by_the_normed_vector(family, dtype, tolerance, tmp_path):
    """Identity 15: with the norm frozen, Δlogit = α (γ ⊙ (v − v̄) / σ) · W_U; the norm's own change is the rest."""
    loaded = open_model(ModelRef(str(tiny_folder(family, tmp_path / family))))
    loaded.model.to(dtype)
    anatomy, alpha = loaded.anatomy, 0.7
    vector = random_rows(loaded, 1)[0].to(dtype)
    norm = loaded.model.get_submodule(anatomy.final_norm)
    unembedding = loaded.model.get_submodule(anatomy.unembedding).weight
    with capture_residual(loaded) as residual:
        plain = last_logits(loaded)
    stream = residual["final"][0, -1]
    with add_vectors(loaded, alpha * vector[None], layer=anatomy.n_layers):
        steered = last_logits(loaded)
    is_layer_norm = isinstance(norm, torch.nn.LayerNorm)
    eps = norm.eps if is_layer_norm else norm.variance_epsilon

    def sigma(x):
        x = x - x.mean() if is_layer_norm else x
        return (x.square().mean() + eps).sqrt()

    moved = vector - vector.mean() if is_layer_norm else vector
    frozen = alpha * (norm.weight * moved / sigma(stream)) @ unembedding.T
    bias = norm.bias @ unembedding.T if is_layer_norm else 0
    expected = (plain[0] - bias + frozen) * (sigma(stream) / sigma(stream + alpha * vector)) + bias
    assert steered[0].numpy() == pytest.approx(expected.numpy(), abs=tolerance)


@pytest.mark.parametrize("family", DECODERS)
def test_a_continuation_is_the_one_of_one_forward_per_token(family):
    """Identity 23: rows together with a cache, and each row alone without one, say the same."""
    loaded = tiny_model(family)
    vectors = torch.cat([torch.zeros(1, loaded.anatomy.d_model), random_rows(loaded, 2)])
    encoded = encode(loaded, PROMPT)
    with torch.inference_mode(), add_vectors(loaded, vectors, layer=2):
        said = continue_greedily(loaded, encoded, 3, max_new_tokens=5, progress=silent)
    for row in range(3):
        ids = list(encoded.ids)
        for step in range(5):
            with torch.inference_mode(), add_vectors(loaded, vectors[row : row + 1], layer=2):
                logits = loaded.model(torch.tensor([ids]), use_cache=False).logits[0, -1]
            if step == 0:
                assert said.logits_RV[row].numpy() == pytest.approx(
                    logits.float().numpy(), abs=1e-5 * float(logits.abs().max())
                )
            ids.append(int(logits.argmax()))
            if ids[-1] == 0:  # the end of text
                ids.pop()
                break
        assert said.ids[row] == ids[len(encoded.ids) :]


def test_the_direction_is_the_difference_of_the_means():
    loaded = tiny_model("llama")
    direction = mean_difference(loaded, **LISTS, layer=2, position="last", progress=silent)
    means = []
    for text in (LISTS["positives"], LISTS["negatives"]):
        rows = []
        for prompt in split_prompts(text):
            with torch.inference_mode(), capture_residual(loaded) as residual:
                loaded.model(encode(loaded, Prompt(prompt)).inputs["input_ids"])
            rows.append(list(residual.values())[2][0, -1])
        means.append(sum(rows) / len(rows))
    assert direction.vector_D.numpy() == pytest.approx((means[0] - means[1]).numpy(), abs=1e-5)
    assert float(direction.unit_D.norm()) == pytest.approx(1)


def test_prompts_lie_where_the_means_of_the_others_put_them():
    """Two clouds at ±1 on the first axis; the third prompt of the first list stands on the wrong side."""
    rows = torch.tensor([[1.0, 0], [1, 1], [-1, 2], [-1, 0], [-1, 1], [-1, 2]])
    table = separation(list("abcdef"), rows, 3)
    assert table["is_right"].tolist() == [True, True, False, True, True, True]
    assert table["side"].iloc[2] == pytest.approx(-1), "the others' means are at 1 and -1"
    assert table["list"].tolist() == ["positive"] * 3 + ["negative"] * 3
    assert separation(list("abc"), rows[1:4], 1).empty, (
        "a prompt alone in its list has nothing to be compared with"
    )


@pytest.mark.parametrize("mode", ["add", "ablate"])
@pytest.mark.parametrize("family", DECODERS)
def test_the_probe_in_every_family(family, mode):
    loaded = tiny_model(family)
    result = steering(loaded, PROMPT, silent, SETTINGS.model_copy(update={"mode": mode}))
    assert result.provenance.exactness_gap == pytest.approx(0, abs=1e-4)
    main = result.frame
    assert main["kl_nats"].iloc[0] == pytest.approx(0, abs=1e-6)
    assert main.select_dtypes("number").notna().all(axis=None)
    assert main["way"].iloc[0] == "unsteered"
    before, after = result.frames["tokens"]["p_before"], result.frames["tokens"]["p_after"]
    assert result.frames["tokens"]["p_change"].to_numpy() == pytest.approx(
        (after - before).to_numpy(), abs=1e-6
    )
    assert not any(
        module._forward_hooks or module._forward_pre_hooks for module in _plain_modules(loaded.model)
    )


def _plain_modules(model):
    """Without those that transformers itself may hook."""
    return [module for name, module in model.named_modules() if name.endswith(("self_attn", "mlp", "attn"))]


def test_kl_and_surprisal_are_those_of_their_definitions():
    loaded = tiny_model("llama")
    main = steering(loaded, PROMPT, silent, SETTINGS).frame
    direction = mean_difference(loaded, **LISTS, layer=2, position="last", progress=silent)
    p = last_logits(loaded)[0].double().log_softmax(-1)
    for row in main.iloc[1:-1].itertuples():
        with add_vectors(loaded, row.strength * direction.vector_D[None], layer=2):
            q = last_logits(loaded)[0].double().log_softmax(-1)
        assert row.kl_nats == pytest.approx(float((p.exp() * (p - q)).sum()), abs=1e-4)
    encoded = encode(loaded, PROMPT)
    with torch.inference_mode():
        new = continue_greedily(loaded, encoded, 1, max_new_tokens=6, progress=silent).ids[0]
        ids = [*encoded.ids, *new]
        logits = loaded.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    costs = [-float(logits[p - 1, ids[p]]) for p in range(len(encoded.ids), len(ids))]
    assert main["surprisal_nats"].iloc[0] == pytest.approx(sum(costs) / len(costs), abs=1e-4)


def _feature_artifact(loaded, folder: Path, layer: int) -> Learned:
    documents = Documents("none", "calibration", ("text",))
    facts = bound_to(
        loaded, documents, method=METHOD, settings=SETTINGS, layer=layer, k=1, scale=2.0, largest_norm=1e9
    )
    d = loaded.anatomy.d_model
    tensors = {
        "encoder": torch.eye(d),
        "encoder_bias": torch.zeros(d),
        "decoder": torch.eye(d),
        "bias": torch.zeros(d),
    }
    features = pd.DataFrame(
        {"feature": range(d), "density": [0.5] * d, "mean_activation": [1.5] * d, "max_activation": [3.0] * d}
    )
    learned = Learned(tensors=tensors, facts=facts, tables={"features": features})
    learned.save(folder)
    return learned


def test_a_feature_of_a_sparse_autoencoder_is_a_direction(tmp_path):
    """Strength 1 adds the feature at its usual size, after the layer it was trained on."""
    loaded = tiny_model("llama")
    _feature_artifact(loaded, tmp_path / "sae", layer=1)
    settings = SteeringSettings(direction=f"sae:{tmp_path / 'sae'}:5", strength=2.0, max_new_tokens=3)
    result = steering(loaded, PROMPT, silent, settings)
    vector = torch.zeros(1, loaded.anatomy.d_model)
    vector[0, 5] = 1.5 * 2.0
    with add_vectors(loaded, 2.0 * vector, layer=1):
        q = last_logits(loaded)[0].log_softmax(-1)
    p = last_logits(loaded)[0].log_softmax(-1)
    assert result.frame["kl_nats"].iloc[2] == pytest.approx(float((p.exp() * (p - q)).sum()), abs=1e-4)
    assert result.provenance.conditions["layer"] == 1
    with pytest.raises(BadInput, match="another model"):
        steering(tiny_model("gpt2"), PROMPT, silent, settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"positives": " | "}, "no positive prompt"),
        ({"negatives": LISTS["positives"]}, "same mean"),
        ({"layer": 9}, "layer 9 does not exist"),
        ({"max_new_tokens": 256}, "do not fit"),
        ({"direction": "sae:nonsense"}, "sae:ARTIFACT:FEATURE"),
    ],
)
def test_what_cannot_be_steered_is_refused(settings, message):
    with pytest.raises(BadInput, match=message):
        steering(tiny_model("llama"), PROMPT, silent, SETTINGS.model_copy(update=settings))


def test_a_strength_that_breaks_the_numbers_is_refused(tmp_path):
    loaded = open_model(ModelRef(str(tiny_folder("llama", tmp_path))))
    with torch.no_grad():
        loaded.model.get_submodule(loaded.anatomy.unembedding).weight[3, 3] = math.inf
    with pytest.raises(SlimscopeError, match="not finite"):
        steering(loaded, PROMPT, silent, SETTINGS)


def test_a_stop_leaves_no_hook():
    loaded = tiny_model("llama")
    plain = last_logits(loaded)

    def stop(done, total, message):
        if message.startswith("token 3"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        steering(loaded, PROMPT, stop, SETTINGS)
    assert torch.equal(last_logits(loaded), plain)
