"""The feature browser against plain algebra, a planted feature, and everything it must refuse."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from core.errors import BadInput
from core.probes.sae_features import SaeFeaturesSettings, sae_features
from core.train._residuals import cut_text
from core.train._trained import Trained
from core.train.sparse_autoencoder import SparseAutoencoderSettings, sparse_autoencoder
from core.types import Documents, Prompt, Result, silent
from tests.tiny import CORPUS, DECODERS, tiny_model

TEXT = " ".join(CORPUS)
DOCUMENTS = Documents("corpus", "calibration", tuple(f"{n} {TEXT}" for n in range(6)))
PROMPT = Prompt("The capital of France is Paris, and Mary gave a drink to John")
SMALL = SparseAutoencoderSettings(
    layer=2, expansion=2, k=6, max_tokens=500, window=32, epochs=4, batch=64, loss_windows=1
)


@pytest.fixture(scope="module")
def trained() -> Trained:
    return sparse_autoencoder(tiny_model("llama"), DOCUMENTS, silent, SMALL)


@pytest.fixture(scope="module")
def artifact(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("sae") / "a"
    trained.save(folder)
    return str(folder)


def browse(artifact: str, *, prompt: Prompt = PROMPT, family: str = "llama", **settings: object) -> Result:
    chosen = {"artifact": artifact, "max_density": 1.0, "positions": 0, **settings}
    return sae_features(tiny_model(family), prompt, silent, SaeFeaturesSettings(**chosen))


def hidden(text: str, layer: int = 2) -> torch.Tensor:
    loaded = tiny_model("llama")
    ids = torch.tensor([loaded.tokenizer(text)["input_ids"]])
    with torch.inference_mode():
        return loaded.model(ids, output_hidden_states=True).hidden_states[layer][0].double()


def test_every_activation_is_the_plain_formula(trained: Trained, artifact: str):
    result = browse(artifact, features=100)
    weights = {name: tensor.double() for name, tensor in trained.tensors.items()}
    scaled = hidden(PROMPT.text) / trained.facts["scale"]
    pre = ((scaled - weights["bias"]) @ weights["encoder"] + weights["encoder_bias"]).relu()
    expected = {}
    for position in range(1, len(pre)):
        for feature in pre[position].topk(6).indices.tolist():
            expected[position, str(feature)] = float(pre[position, feature])
    shown = result.frames["map"]
    found = {
        (p, f): a for p, f, a in zip(shown["position"], shown["feature"], shown["activation"], strict=True)
    }
    assert found.keys() == expected.keys()
    assert [found[cell] for cell in expected] == pytest.approx(list(expected.values()), rel=1e-4)
    assert result.provenance.exactness_gap is not None
    assert result.provenance.exactness_gap < 1e-5


def test_l0_and_fvu_are_of_this_prompt(trained: Trained, artifact: str):
    metrics = {metric.name: metric.value for metric in browse(artifact).metrics}
    assert metrics["l0"] == 6
    rows = hidden(PROMPT.text)[1:]
    weights = {name: tensor.double() for name, tensor in trained.tensors.items()}
    pre = (
        (rows / trained.facts["scale"] - weights["bias"]) @ weights["encoder"] + weights["encoder_bias"]
    ).relu()
    kept = torch.zeros_like(pre).scatter_(1, pre.topk(6).indices, pre.topk(6).values)
    back = (kept @ weights["decoder"] + weights["bias"]) * trained.facts["scale"]
    fvu = float((rows - back).square().sum() / (rows - rows.mean(0)).square().sum())
    assert metrics["fvu"] == pytest.approx(fvu, rel=1e-4)


@pytest.mark.parametrize("family", DECODERS)
def test_pushes_are_what_the_direction_does_to_the_logits(family: str, tmp_path: Path):
    """A small step along the feature's direction before a frozen norm; checked by finite differences of our own."""
    loaded = tiny_model(family)
    settings = SMALL.model_copy(update={"max_tokens": 200, "epochs": 1.0})
    trained = sparse_autoencoder(loaded, DOCUMENTS, silent, settings)
    trained.save(tmp_path / "a")
    result = browse(str(tmp_path / "a"), family=family)
    pushes = result.frames["pushes"]
    feature = int(pushes["feature"].iloc[0])
    anatomy = loaded.anatomy
    norm = loaded.model.get_submodule(anatomy.final_norm)
    with torch.inference_mode():
        ids = torch.tensor([loaded.tokenizer(PROMPT.text)["input_ids"]])
        last = loaded.model(ids, output_hidden_states=True)
        stream = _before_norm(loaded, ids)[-1].double()
        step = trained.tensors["decoder"][feature].double() * trained.facts["scale"]
        centred = stream - stream.mean() if isinstance(norm, torch.nn.LayerNorm) else stream
        moved = step - step.mean() if isinstance(norm, torch.nn.LayerNorm) else step
        gain = norm.weight.double() + anatomy.norm_offset
        direction = gain * moved / centred.square().mean().sqrt()
        head = loaded.model.get_submodule(anatomy.unembedding).weight.double()
        push = head @ direction * anatomy.logit_scale
        push -= push.mean()
    assert last.logits.shape[-1] == len(push)
    for row in pushes.itertuples():
        assert row.push == pytest.approx(float(push[row.token_id]), rel=1e-3, abs=1e-5)
    top = pushes[pushes["side"] == "promoted"]["token_id"].tolist()
    assert top[0] == int(push.argmax())


def _before_norm(loaded, ids: torch.Tensor) -> torch.Tensor:
    found = []
    norm = loaded.model.get_submodule(loaded.anatomy.final_norm)
    handle = norm.register_forward_pre_hook(lambda module, args: found.append(args[0][0]))
    loaded.model(ids)
    handle.remove()
    return found[0]


def test_the_chosen_feature_has_its_snippets(trained: Trained, artifact: str):
    result = browse(artifact, feature=-1)
    strongest = int(result.frame["feature"].iloc[0])
    stored = trained.tables["snippets"]
    stored = stored[stored["feature"] == strongest]
    assert result.frames["snippets"]["activation"].tolist() == stored["activation"].tolist()
    line = result.frames["snippets"]["snippet"].iloc[0]
    first = stored.iloc[0]
    assert f"⟦{first['tokens'][first['peak']]}⟧" in line
    around = result.frames["snippet_tokens"].query("rank == 1 and offset == 0")
    assert around["activation"].iloc[0] == pytest.approx(first["activation"])
    parts = cut_text(tiny_model("llama"), DOCUMENTS, window=SMALL.window, max_tokens=SMALL.max_tokens)
    assert first["document"] in {window.document for window in (*parts.training, *parts.held_out)}


def test_dense_features_can_be_left_out(artifact: str):
    dense = browse(artifact).frame["density"].max()
    with pytest.raises(BadInput, match="raise max_density"):
        browse(artifact, max_density=1e-9)
    fewer = browse(artifact, max_density=dense * 0.99).frame
    assert fewer["density"].max() < dense


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"feature": 100_000}, "there is no feature 100000"),
        ({"prompt": Prompt("a")}, "single token"),
        ({"artifact": ""}, "slimscope train sparse_autoencoder"),
        ({"family": "gpt2"}, "is another model"),
    ],
)
def test_what_cannot_be_shown_is_refused(artifact: str, settings: dict[str, object], message: str):
    with pytest.raises(BadInput, match=message):
        browse(**{"artifact": artifact, **settings})


def test_a_prompt_of_sinks_is_refused(trained: Trained, tmp_path: Path):
    trained.save(tmp_path / "a")
    facts = json.loads((tmp_path / "a" / "facts.json").read_text())
    (tmp_path / "a" / "facts.json").write_text(json.dumps({**facts, "largest_norm": 1e-6}))
    with pytest.raises(BadInput, match="attention sink"):
        browse(str(tmp_path / "a"))


def test_no_number_is_missing(artifact: str):
    result = browse(artifact)
    for name, frame in result.frames.items():
        numbers = frame.select_dtypes("number")
        assert np.isfinite(numbers.to_numpy()).all(), name
        assert len(frame) <= 10_000
