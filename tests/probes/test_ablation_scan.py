"""The ablation scan against one hooked forward per component, closed-form answers, and identity 14."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from core.errors import BadInput, Cancelled
from core.models.loaded import LoadedModel
from core.models.open import open_model
from core.probes import _ablation as module
from core.probes._ablation import Component, Scored, ablate, heads, mlps
from core.probes._recording import record
from core.probes._replay import replay
from core.probes.ablation_scan import AblationScanSettings, ablation_scan
from core.types import ModelRef, Prompt, Result, silent
from tests.induction import induction_model, repeated_prompt
from tests.references.slow_ablation import ablated_logits, kl_by_hand, loss_by_hand, outputs_of
from tests.tiny import DECODERS, n_hooks, tiny_folder, tiny_model

PROMPT = Prompt("John gave Mary a drink, and John gave Mary a transformer")
SOME = [Component(0, 1), Component(1, 2), Component(2, 3), Component(0, None), Component(2, None)]


def scan(loaded: LoadedModel, prompt: Prompt = PROMPT, **settings: object) -> Result:
    return ablation_scan(loaded, prompt, silent, AblationScanSettings.model_validate(settings))


def row(result: Result, component: Component) -> pd.Series:
    return result.frames["main"].set_index("name").loc[component.name]


@pytest.mark.parametrize("ablation", ["zero", "mean"])
@pytest.mark.parametrize("family", DECODERS)
def test_every_effect_equals_a_whole_hooked_forward(family: str, ablation: str) -> None:
    loaded = tiny_model(family)
    result = scan(loaded, ablation=ablation)
    ids = loaded.tokenizer(PROMPT.text)["input_ids"]
    with torch.inference_mode():
        whole = loaded.model(torch.tensor([ids]), use_cache=False).logits[0].double()
    target = int(whole[-1].argmax())
    for component in SOME:
        value = outputs_of(loaded, ids, component.layer, component.head)
        value = (
            torch.zeros_like(value) if ablation == "zero" else value.mean(0, keepdim=True).expand_as(value)
        )
        ablated = ablated_logits(loaded, ids, component.layer, component.head, value)
        kl = kl_by_hand(whole, ablated)
        found = row(result, component)
        assert found["loss_increase"] == pytest.approx(
            loss_by_hand(ablated, ids) - loss_by_hand(whole, ids), abs=2e-5
        )
        assert found["kl_nats"] == pytest.approx(np.mean(kl), rel=1e-3, abs=2e-6)
        assert found["last_kl_nats"] == pytest.approx(kl[-1], rel=1e-3, abs=2e-6)
        assert found["logit_change"] == pytest.approx(
            float(ablated[-1, target] - whole[-1, target]), abs=1e-4
        )
    assert result.provenance.exactness_gap == pytest.approx(0, abs=2e-5)
    assert not result.frames["main"].isna().any().any()


def test_resample_puts_in_what_the_component_said_elsewhere() -> None:
    loaded = tiny_model("llama")
    ids = loaded.tokenizer(PROMPT.text)["input_ids"]
    result = scan(loaded, ablation="resample", seed=7)
    places = torch.randint(len(ids), (len(ids),), generator=torch.Generator().manual_seed(7 * 1_000_003))
    with torch.inference_mode():
        whole = loaded.model(torch.tensor([ids]), use_cache=False).logits[0].double()
    for component in SOME:
        value = outputs_of(loaded, ids, component.layer, component.head)[places]
        ablated = ablated_logits(loaded, ids, component.layer, component.head, value)
        assert row(result, component)["kl_nats"] == pytest.approx(
            np.mean(kl_by_hand(whole, ablated)), rel=1e-3
        )
    again = scan(loaded, ablation="resample", seed=7)
    assert again.frames["main"].equals(result.frames["main"])


def test_the_induction_model_has_the_closed_form_answers() -> None:
    """Logit difference 8.71697; without L0H0 −0.61, without L1H0 0; dead heads and MLPs change nothing."""
    *text, answer = repeated_prompt(12).text.split()
    result = scan(
        induction_model(40.0), Prompt(" ".join(text)), ablation="zero", target=answer, distractor=text[1]
    )
    base = {metric.name: metric.value for metric in result.metrics}["logit"]
    whole = 2 / math.sqrt(8 / 152 + 1e-5)
    assert base == pytest.approx(whole, rel=1e-5)
    change = result.frames["main"].set_index("name")["logit_change"]
    assert base + change["L0H0"] == pytest.approx(-0.61, abs=5e-3)
    assert base + change["L1H0"] == pytest.approx(0, abs=1e-5)
    for dead in ("L0H1", "L1H1", "L0 MLP", "L1 MLP"):
        assert change[dead] == pytest.approx(0, abs=1e-5)
        assert row(result, Component(int(dead[1]), 1 if "H" in dead else None))["kl_nats"] == pytest.approx(
            0, abs=1e-6
        )
    assert set(result.frame["name"].head(2)) == {"L0H0", "L1H0"}


def test_a_head_without_output_weights_has_no_effect(tmp_path: Path) -> None:
    loaded = open_model(ModelRef(str(tiny_folder("llama", tmp_path))))
    block, size = loaded.anatomy.blocks[1], loaded.anatomy.head_dim
    with torch.no_grad():
        loaded.model.get_submodule(block.o).weight[:, size : 2 * size] = 0
    for ablation in ("zero", "mean", "resample"):
        found = row(scan(loaded, ablation=ablation), Component(1, 1))
        assert found["kl_nats"] == pytest.approx(0, abs=1e-6)
        assert found["loss_increase"] == pytest.approx(0, abs=1e-6)


def test_the_mean_over_copies_of_one_text_is_the_text(tmp_path: Path) -> None:
    loaded = tiny_model("gpt2")
    ids = torch.tensor(loaded.tokenizer(PROMPT.text)["input_ids"])
    with torch.inference_mode():
        effects = ablate(
            loaded,
            [ids, ids, ids],
            [*heads(loaded.anatomy), *mlps(loaded.anatomy)],
            [Scored(slice(None))] * 3,
            mode="position_mean",
            seed=0,
            progress=silent,
        )
    assert effects.kl_CS == pytest.approx(np.zeros_like(effects.kl_CS), abs=2e-6)
    assert effects.nats_CS - effects.base_nats_S == pytest.approx(np.zeros_like(effects.kl_CS), abs=2e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "opt", "mixtral"])
def test_ablating_everything_leaves_the_embedding(family: str) -> None:
    """And the biases of the output projections, where a model has them."""
    loaded = tiny_model(family)
    anatomy = loaded.anatomy
    ids = torch.tensor(loaded.tokenizer(PROMPT.text)["input_ids"])
    ends: list[torch.Tensor] = []
    with torch.inference_mode():
        recording = record(loaded, {"input_ids": ids[None]})
        patches = [
            module._patch(loaded, component, None, 0, len(ids))
            for component in [*heads(anatomy), *mlps(anatomy)]
        ]
        replay(loaded, recording, [tuple(patches)], lambda numbers, start, end: ends.append(end[0]))
    expected = recording.at("residual", 0)
    for block in anatomy.blocks:
        bias = loaded.model.get_submodule(block.o).bias
        if bias is not None:
            expected = expected + bias
    assert torch.allclose(ends[0], expected, atol=1e-5)


def test_float64_equals_whole_forwards_to_rounding(tmp_path: Path) -> None:
    loaded = open_model(ModelRef(str(tiny_folder("gpt2", tmp_path))))
    loaded.model.double()
    ids = torch.tensor(loaded.tokenizer(PROMPT.text)["input_ids"])
    ends: list[torch.Tensor] = []
    for component in SOME:
        patch = module._patch(loaded, component, None, 0, len(ids))
        with torch.inference_mode():
            recording = record(loaded, {"input_ids": ids[None]})
            replay(loaded, recording, [(patch,)], lambda numbers, start, end: ends.append(end[0]))
            norm = loaded.model.get_submodule(loaded.anatomy.final_norm)
            replayed = loaded.model.get_submodule(loaded.anatomy.unembedding)(norm(ends[-1]))
        whole = ablated_logits(loaded, ids.tolist(), component.layer, component.head, patch.value)
        assert torch.allclose(replayed, whole, atol=1e-9)


def test_the_gap_sees_a_replay_that_ablates_another_head(monkeypatch: pytest.MonkeyPatch) -> None:
    real = module.replay

    def shifted(loaded: LoadedModel, base: Any, rows: Any, read: Any, **options: Any) -> None:
        real(loaded, base, [rows[(n + 1) % len(rows)] for n in range(len(rows))], read, **options)

    monkeypatch.setattr(module, "replay", shifted)
    assert scan(tiny_model("llama")).provenance.exactness_gap > 1e-2


def test_the_gap_sees_a_forward_without_its_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def idle(*args: Any, **options: Any) -> Iterator[None]:
        yield

    monkeypatch.setattr(module, "intervene", idle)
    assert scan(tiny_model("llama")).provenance.exactness_gap > 1e-2


@pytest.fixture
def documents(tmp_path: Path) -> str:
    file = tmp_path / "texts.jsonl"
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    lines = [" ".join(words[(k * n) % 10] for n in range(1, 160)) + f" paragraph {k}" for k in range(1, 40)]
    file.write_text("\n".join(json.dumps({"text": line}) for line in lines))
    return str(file)


@pytest.mark.parametrize("ablation", ["zero", "mean", "position_mean", "resample"])
def test_documents_give_an_interval(documents: str, ablation: str) -> None:
    loaded = tiny_model("llama")
    result = scan(loaded, documents=documents, n_documents=3, tokens=12, ablation=ablation)
    main = result.frames["main"]
    assert not main.isna().any().any()
    assert (main["kl_nats_ci95"] > 0).all()
    assert "logit_change" not in main
    assert result.metrics[0].n == 3 * 11
    assert result.provenance.exactness_gap == pytest.approx(0, abs=2e-5)
    assert result.provenance.conditions["texts"].startswith("3 documents")


def test_the_mean_is_over_all_documents(documents: str) -> None:
    loaded = tiny_model("llama")
    with torch.inference_mode():
        texts = [torch.tensor([5, 6, 7, 8]), torch.tensor([9, 10, 11])]
        pool = module._Pool.of(loaded, texts, "mean", 0, silent)
    expected = torch.cat([outputs_of(loaded, ids.tolist(), 1, 2) for ids in texts]).mean(0)
    assert torch.allclose(pool.value(Component(1, 2), 0, 4), expected.expand(4, -1), atol=1e-6)


def test_a_long_scan_can_be_cancelled_and_leaves_no_hook() -> None:
    loaded = tiny_model("llama")
    kernel = loaded.model.config._attn_implementation
    before = n_hooks(loaded.model)

    def stop(done: float, total: float, message: str) -> None:
        if done / total > 0.3:
            raise Cancelled("enough")

    with pytest.raises(Cancelled):
        ablation_scan(loaded, PROMPT, stop, AblationScanSettings())
    assert loaded.model.config._attn_implementation == kernel
    assert n_hooks(loaded.model) == before


@pytest.mark.parametrize(
    ("prompt", "settings", "said"),
    [
        (PROMPT, {"ablation": "position_mean"}, "is the prompt itself"),
        (Prompt("a"), {}, "takes 2 to 512"),
        (PROMPT, {"documents": "pydoc", "target": " a"}, "belong to a prompt"),
        (PROMPT, {"documents": "nowhere.txt"}, "nowhere.txt"),
        (PROMPT, {"target": "transformer that reads"}, "tokens"),
    ],
)
def test_bad_input_is_refused(prompt: Prompt, settings: dict[str, str], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        scan(tiny_model("llama"), prompt, **settings)
