"""The reload proof passes for what was saved, and fails, leaving nothing, for anything else."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

from core.compress import _pipeline
from core.compress._pipeline import compress
from core.errors import Cancelled, ProofFailed
from core.recipe import Recipe
from core.saving import fresh_load, proof
from core.saving.proof import expect, prove
from core.types import silent
from tests.compress.making import apply, own_model, save
from tests.tiny import PACKABLE

INT4 = Recipe.of("rtn", bits=4)


def flip_byte(path: Path, tensor: str) -> None:
    """Invert one bit in the middle of a tensor's bytes."""
    raw = bytearray(path.read_bytes())
    length = int.from_bytes(raw[:8], "little")
    begin, end = json.loads(raw[8 : 8 + length])[tensor]["data_offsets"]
    raw[8 + length + (begin + end) // 2] ^= 1
    path.write_bytes(raw)


def test_a_variant_is_proved_from_recipe_to_disk(tmp_path: Path) -> None:
    loaded = own_model("smollm", tmp_path)
    seen: list[float] = []
    made = compress(
        loaded, INT4, None, tmp_path / "variant", lambda done, total, message: seen.append(done / total)
    )
    proof = made.proof
    assert proof.passed
    assert (proof.max_logit_difference, proof.differing_parameters, proof.ties_kept) == (0.0, 0, True)
    assert proof.real_bytes == pytest.approx(proof.predicted_bytes, rel=0.02)
    assert proof.share_parameters > 0.99
    assert proof.loader == "AutoModelForCausalLM.from_pretrained(folder)"
    assert seen == sorted(seen)
    written = json.loads((tmp_path / "variant/slimscope.json").read_text())
    assert written["proof"]["passed"] is True
    assert Recipe.read(tmp_path / "variant/recipe.json") == INT4
    values = {m.name: m.value for m in made.result.metrics}
    assert values["bits_per_weight"] == made.saved.bytes * 8 / made.saved.parameters
    assert {m.name for m in proof.as_result().metrics} >= {
        "max_logit_difference",
        "real_bytes",
        "share_parameters",
    }


@pytest.mark.slow
@pytest.mark.parametrize("family", PACKABLE)
def test_every_family_is_proved(family: str, tmp_path: Path) -> None:
    steps = [{"method": "cast"}, {"method": "rtn", "settings": {"bits": 8, "group_size": "64"}}]
    made = compress(
        own_model(family, tmp_path), Recipe.parse({"steps": steps}), None, tmp_path / "variant", silent
    )
    assert made.proof.passed
    assert made.proof.max_logit_difference == 0
    assert made.proof.dtype == "bfloat16"
    # Cast touched everything, whatever rtn left.
    assert made.proof.share_parameters == 1.0


@pytest.mark.slow
@pytest.mark.parametrize(
    "tensor", ["model.layers.1.mlp.up_proj.weight_packed", "model.embed_tokens.weight", "model.norm.weight"]
)
def test_one_flipped_bit_in_the_file_fails_the_proof(tensor: str, tmp_path: Path) -> None:
    loaded = own_model("llama", tmp_path)
    saved = save(loaded, apply(loaded, "rtn", bits=4), tmp_path / "variant")
    expected = expect(loaded)
    flip_byte(tmp_path / "variant/model.safetensors", tensor)
    proof = prove(saved, loaded=loaded, expected=expected, progress=silent)
    assert not proof.passed
    assert proof.differing_parameters == 1
    assert tensor.removesuffix("_packed") in proof.failure


@pytest.mark.slow
def test_a_failed_proof_removes_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(saved, **rest):  # type: ignore[no-untyped-def]
        config = saved.folder / "config.json"
        config.write_text(config.read_text().replace('"num_hidden_layers": 3', '"num_hidden_layers": 2'))
        return prove(saved, **rest)

    monkeypatch.setattr(_pipeline, "prove", spoil)
    with pytest.raises(ProofFailed, match=r"tensors are unexpected after the reload.*files were removed"):
        compress(own_model("llama", tmp_path), INT4, None, tmp_path / "out/variant", silent)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_killed_process_is_said_to_be_out_of_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dying = tmp_path / "dying.py"
    dying.write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    monkeypatch.setattr(proof.fresh_load, "__file__", str(dying))
    with pytest.raises(ProofFailed, match="killed, most likely for memory"):
        compress(own_model("llama", tmp_path), INT4, None, tmp_path / "out/variant", silent)
    assert list((tmp_path / "out").iterdir()) == []


def test_cancelling_ends_the_fresh_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waiting = tmp_path / "waiting.py"
    waiting.write_text(
        f"import os, time\nopen({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\ntime.sleep(60)\n"
    )
    monkeypatch.setattr(proof.fresh_load, "__file__", str(waiting))

    def stop_once_it_runs(done: float, total: float, message: str) -> None:
        if (tmp_path / "pid").exists() and (tmp_path / "pid").read_text():
            raise Cancelled("stop")

    with pytest.raises(Cancelled):
        compress(own_model("llama", tmp_path), INT4, None, tmp_path / "out/variant", stop_once_it_runs)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), signal.SIG_DFL)
    assert list((tmp_path / "out").iterdir()) == []


def test_the_fresh_loader_imports_nothing_of_ours(tmp_path: Path) -> None:
    script = (
        "import runpy, sys\n"
        f"runpy.run_path({fresh_load.__file__!r}, run_name='loaded')\n"
        "import torch, transformers\n"
        "assert not [m for m in sys.modules if m.split('.')[0] in ('core', 'app')]\n"
    )
    subprocess.run([sys.executable, "-I", "-c", script], check=True, cwd=tmp_path, timeout=120)


def test_experts_are_stored_one_by_one(tmp_path: Path) -> None:
    loaded = own_model("mixtral", tmp_path)
    save(loaded, apply(loaded, "rtn", bits=4), tmp_path / "variant")
    with safe_open(tmp_path / "variant/model.safetensors", "pt") as file:
        names = set(file.keys())
    assert any(".experts.3.w2.weight_packed" in name for name in names)
    assert not any("gate_up_proj" in name for name in names)


@pytest.mark.parametrize(
    "family", ["bert_classifier", pytest.param("llama_classifier", marks=pytest.mark.slow)]
)
def test_a_text_classifier_is_proved(family: str, tmp_path: Path) -> None:
    made = compress(own_model(family, tmp_path), INT4, None, tmp_path / "variant", silent)
    assert made.proof.passed
    assert made.proof.loader == "AutoModelForSequenceClassification.from_pretrained(folder)"
    head = made.result.frame.query("component == 'head'")
    assert not head["touched"].any(), "a classifier's few rows are kept"
