"""The block-by-block walk: it runs what the model runs, sees what the matrices see, and goes on where it was stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from core.calibrate import stage
from core.calibrate.matrices import matrices
from core.calibrate.walk import Collected, walk
from core.calibrate.windows import calibration_windows
from core.capture import capture, capture_residual
from core.errors import BadInput
from core.models.anatomy import Block
from core.models.loaded import LoadedModel
from core.numerics.integer import quantize
from core.numerics.schemes import IntegerScheme
from core.types import Documents, silent
from tests.compress.making import own_model
from tests.tiny import CORPUS, tiny_model

FAMILIES = (
    "mistral",
    "gpt2",
    "gpt_neox",
    "opt",
    "gemma2",
    "bert",
    "qwen2_moe",
    "gpt_oss",
    "deepseek_v3",
    "llama4",
)
"""Windows, Conv1D, parallel blocks, flattened MLPs, an encoder, and every way experts are called."""


@pytest.fixture(autouse=True)
def _two_windows_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "TOKENS_AT_ONCE", 96)


def some_windows(n: int = 5, length: int = 48) -> torch.Tensor:
    return torch.randint(1, 500, (n, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_and_matrices_read_what_they_read_in_the_whole_model(family: str) -> None:
    loaded, ids_BP = tiny_model(family), some_windows()
    found: dict[int, tuple[torch.Tensor, Collected]] = {}

    def look(block: Block, collected: Collected) -> None:
        found[block.index] = collected.stream_BPD.clone(), collected

    with torch.inference_mode():
        walk(
            loaded,
            ids_BP,
            look,
            collect=["gram", "mean_abs", "max_abs", "sum_squares"],
            progress=silent,
            scratch=None,
        )
        with capture_residual(loaded) as residual:
            loaded.model(input_ids=ids_BP)
    for block in loaded.anatomy.blocks:
        stream_BPD, collected = found[block.index]
        assert torch.allclose(stream_BPD, residual[block.path], atol=1e-4)
        dense = [m.module for m in matrices(loaded, block) if m.expert is None]
        with torch.inference_mode(), capture(loaded.model, dense, inputs=True) as fed:
            loaded.model(input_ids=ids_BP)
        for matrix in matrices(loaded, block):
            if matrix.expert is None:
                x_TI = fed[matrix.module].flatten(0, -2)
                inputs = collected.inputs[matrix.inputs]
                assert inputs.n == len(x_TI)
                assert torch.allclose(inputs.gram_II, x_TI.T @ x_TI, rtol=1e-3, atol=1e-2)
                assert torch.allclose(inputs.sum_squares_I, x_TI.square().sum(0), rtol=1e-3, atol=1e-3)
                assert torch.allclose(inputs.mean_abs_I, x_TI.abs().mean(0), rtol=1e-3, atol=1e-4)
                assert torch.allclose(inputs.max_abs_I, x_TI.abs().amax(0), rtol=1e-3, atol=1e-4)


def test_each_expert_has_the_statistics_of_its_own_tokens() -> None:
    loaded, ids_BP = tiny_model("mixtral"), some_windows()
    block = loaded.anatomy.blocks[1]
    found: dict[int, Collected] = {}
    with torch.inference_mode():
        walk(
            loaded,
            ids_BP,
            lambda b, c: found.update({b.index: c}),
            collect=["gram"],
            progress=silent,
            scratch=None,
        )
        with (
            capture(loaded.model, [str(block.experts)], inputs=True) as hidden,
            capture(loaded.model, [str(block.experts)], inputs=True, item=1) as chosen,
        ):
            loaded.model(input_ids=ids_BP)
    hidden_TD, chosen_TK = hidden[str(block.experts)], chosen[str(block.experts)]
    experts = loaded.model.get_submodule(str(block.experts))
    for matrix in matrices(loaded, block):
        if matrix.expert is None:
            continue
        x_TI = hidden_TD[(chosen_TK == matrix.expert).any(1)]
        if "down" in matrix.name:
            gate, up = (x_TI @ experts.gate_up_proj[matrix.expert].T).chunk(2, -1)
            x_TI = torch.nn.functional.silu(gate) * up
        inputs = found[1].inputs[matrix.inputs]
        assert inputs.n == len(x_TI) > 0
        assert torch.allclose(inputs.gram_II, x_TI.T @ x_TI, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("family", ["gpt2", "mixtral", "gpt_oss"])
def test_a_matrix_is_read_and_written_as_outputs_by_inputs(family: str, tmp_path: Path) -> None:
    loaded = own_model(family, tmp_path)
    for matrix in matrices(loaded, loaded.anatomy.blocks[0]):
        before = loaded.model.get_parameter(matrix.name).detach().clone()
        weight_OI = matrix.read()
        assert tuple(weight_OI.shape) == matrix.shape
        matrix.write(2 * weight_OI)
        assert torch.equal(matrix.read(), 2 * weight_OI)
        changed = loaded.model.get_parameter(matrix.name) != before
        assert int(changed.sum()) == int((weight_OI != 0).sum())  # its own values, and no other's


class _Stopped(Exception):
    pass


def _rounding(loaded: LoadedModel, stop_at: int | None = None) -> Any:
    """A change that rounds one matrix into ``packed``, scales the others, and may be stopped before a block."""

    def change(block: Block, collected: Collected) -> dict[str, float]:
        if block.index == stop_at:
            raise _Stopped
        first, *others = [m for m in matrices(loaded, block) if m.expert is None]
        loaded.packed[first.module] = quantize(
            loaded.model.get_parameter(first.name), IntegerScheme(3, 32, False)
        )
        first.write(loaded.packed[first.module].dequantize())
        for matrix in others:
            scale = collected.inputs[matrix.inputs].mean_abs_I.mean()
            matrix.write(matrix.read() * (1 + scale / 100))
        return {"scale": float(collected.stream_BPD.abs().mean())}

    return change


@pytest.mark.parametrize("feed", ["changed", "original"])
def test_a_stopped_walk_goes_on_to_the_same_bits(feed: Any, tmp_path: Path) -> None:
    whole, stopped = (own_model("mixtral", tmp_path / name) for name in ("whole", "stopped"))
    ids_BP = some_windows()

    def go(loaded: LoadedModel, stop_at: int | None, scratch: Path | None) -> list[Any]:
        with torch.inference_mode():
            return walk(
                loaded, ids_BP, _rounding(loaded, stop_at), collect=["mean_abs"], progress=silent, scratch=scratch,
                feed=feed,
            )  # fmt: skip

    reports = go(whole, None, None)
    with pytest.raises(_Stopped):
        go(stopped, 2, tmp_path / "scratch")
    begun_anew = own_model("mixtral", tmp_path / "stopped")
    calls: list[int] = []
    change = _rounding(begun_anew)

    def counted(block: Block, collected: Collected) -> Any:
        calls.append(block.index)
        return change(block, collected)

    with torch.inference_mode():
        again = walk(
            begun_anew,
            ids_BP,
            counted,
            collect=["mean_abs"],
            progress=silent,
            scratch=tmp_path / "scratch",
            feed=feed,
        )
    assert calls == [2]
    assert again == reports
    for (name, ours), theirs in zip(
        begun_anew.model.named_parameters(), whole.model.parameters(), strict=True
    ):
        assert torch.equal(ours, theirs), name
    assert begun_anew.packed.keys() == whole.packed.keys()
    for module, packed in whole.packed.items():
        assert torch.equal(begun_anew.packed[module].codes, packed.codes)  # type: ignore[union-attr]
        assert begun_anew.packed[module].scheme == packed.scheme  # type: ignore[union-attr]


def test_other_text_begins_anew(tmp_path: Path) -> None:
    loaded = own_model("smollm", tmp_path)
    with torch.inference_mode():
        for seed, expected in ((0, 3), (0, 0), (1, 3)):
            ids_BP = torch.randint(1, 500, (2, 16), generator=torch.Generator().manual_seed(seed))
            calls: list[int] = []
            walk(loaded, ids_BP, lambda b, c, calls=calls: calls.append(b.index), collect=[], progress=silent,
                 scratch=tmp_path / "scratch")  # fmt: skip
            assert len(calls) == expected


def test_windows_are_real_text_of_one_length_in_their_tokenizers_frame() -> None:
    bert, text = tiny_model("bert"), Documents("corpus", "calibration", CORPUS * 30)
    windows_BP = calibration_windows(bert, text, samples=9, sample_tokens=32, seed=1)
    special = bert.tokenizer.all_special_ids  # type: ignore[union-attr]
    assert windows_BP.shape == (9, 32)
    assert (windows_BP[:, 0] == special[special.index(bert.tokenizer.cls_token_id)]).all()  # type: ignore[union-attr]
    assert (windows_BP[:, -1] == bert.tokenizer.sep_token_id).all()  # type: ignore[union-attr]
    assert not torch.isin(windows_BP, torch.tensor([bert.tokenizer.pad_token_id])).any()  # type: ignore[union-attr]
    assert torch.equal(windows_BP, calibration_windows(bert, text, samples=9, sample_tokens=32, seed=1))
    assert not torch.equal(windows_BP, calibration_windows(bert, text, samples=9, sample_tokens=32, seed=2))
    llama = tiny_model("llama")
    assert calibration_windows(llama, text, samples=8, sample_tokens=9999, seed=0).shape[1] == 256


def test_text_that_is_too_short_says_how_much_it_takes() -> None:
    with pytest.raises(
        BadInput, match=r"corpus gives \d+ calibration tokens, and 8 windows of 256 take 2,048"
    ):
        calibration_windows(
            tiny_model("llama"),
            Documents("corpus", "calibration", CORPUS),
            samples=128,
            sample_tokens=512,
            seed=0,
        )


def test_a_walk_in_bfloat16_reads_nearly_the_same_and_adds_up_in_float32() -> None:
    ids_BP = some_windows()
    grams = {}
    for precision in ("float32", "bfloat16"):
        loaded, seen = tiny_model("llama"), {}
        with torch.inference_mode():
            walk(
                loaded, ids_BP, lambda b, c, seen=seen: seen.update({b.index: c.inputs}), collect=["gram"],
                progress=silent, scratch=None, precision=precision,
            )  # fmt: skip
        grams[precision] = [inputs.gram_II for inputs in seen[1].values()]
    for exact_II, rounded_II in zip(*grams.values(), strict=True):
        assert rounded_II.dtype == torch.float32
        assert 0 < (rounded_II - exact_II).norm() / exact_II.norm() < 0.02
