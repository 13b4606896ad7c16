"""Own measurements and recorded routing, through a real catalog, real files and a real probe."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from core.calling import run_probe
from core.catalog.store import Catalog
from core.cli import main
from core.devices.registry import published
from core.errors import BadInput
from core.loop import register
from core.predict.anchors import anchor_of, observed
from core.predict.classes import efficiencies
from core.predict.fits import fits_on
from core.predict.predict import Workload
from core.predict.rate import step_seconds
from core.predict.source import named_shape, recorded_routing, variant_shape
from core.profile.roofline import steps_of
from core.profile.shapes import shape_of
from core.recording import record
from core.registry import get
from core.types import Measurement, Prompt, Run, silent
from tests.catalog.samples import run_of
from tests.tiny import tiny_folder, tiny_model

SLUG = "raspberry-pi-5-8gb"


@pytest.fixture
def catalog(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Catalog:
    monkeypatch.setenv("SLIMSCOPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SLIMSCOPE_CATALOG", f"sqlite:///{tmp_path / 'catalog.sqlite'}")
    return Catalog()


def on_board(run: Run, tpot_ms: float) -> Run:
    """A profile as a device's agent reports it."""
    return replace(
        run,
        kind="profile",
        conditions={
            "method": "llama_cpp", "dtype": "float32", "device": "cpu", "batch": 1, "prompt_tokens": 64,
            "new_tokens": 32, "depth": 64, "settings": {},
        },
        measurements=(Measurement(f"tpot_ms_llama_cpp_on_{SLUG}", tpot_ms, "ms", "lower", 30),),
    )  # fmt: skip


def test_a_measurement_on_a_device_scales_what_is_predicted_there(catalog: Catalog, tmp_path: Path):
    folder = tiny_folder("llama", tmp_path / "llama")
    variant = register(catalog, str(folder))
    shape = shape_of(folder)
    run = catalog.record_run(on_board(run_of(variant), 2.0))
    catalog.record_run(
        on_board(run_of(variant, minute=1, status="flagged"), 900.0)
    )  # of a busy machine: not taken
    ((_, step),) = steps_of(run, shape)
    (seen,) = observed(catalog)
    pace = efficiencies()["sbc_cpu"].pace(published()[SLUG])
    assert pace is not None
    expected = step_seconds(step.work.bytes, step.work.flops, len(shape.layers), pace)
    assert (seen.slug, seen.runtime, seen.phase) == (SLUG, "llama_cpp", "decode")
    assert seen.factor == pytest.approx(2e-3 / expected)
    anchor = anchor_of(published()[SLUG], shape, [seen])
    assert anchor is not None
    assert anchor.decode == seen.factor
    frame = fits_on(catalog, variant.id, workload=Workload(context=64)).set_index("slug")
    assert frame.index[frame["anchored"]].tolist() == [SLUG]
    assert variant.name in frame.loc[SLUG, "basis"]
    plain = fits_on(shape, workload=Workload(context=64), known=published()).set_index("slug")
    assert frame.loc[SLUG, "decode_tokens_per_s"] == pytest.approx(
        min(plain.loc[SLUG, "decode_tokens_per_s"] / seen.factor, 1e9)
    )
    with pytest.raises(BadInput, match="name the variant"):
        fits_on(catalog)


def test_recorded_routing_is_what_a_batch_reads(catalog: Catalog, tmp_path: Path):
    folder = tiny_folder("mixtral", tmp_path / "mixtral")
    loaded = tiny_model("mixtral")
    variant = register(catalog, str(folder))
    uniform = variant_shape(catalog, variant.id)
    assert not recorded_routing(catalog, variant.fingerprint)
    method = get("probe", "expert_load")
    settings = method.parse({"text": ""})
    result = run_probe(method, loaded, Prompt("one two three four five six seven"), silent, settings)
    record(catalog, "probe", variant.id, result, datetime.now(UTC))
    shape = variant_shape(catalog, variant.id)
    load = result.frames["main"]
    shares = load[load["layer"] == load["layer"].iloc[0]].sort_values("expert")["load"]
    assert shape.layers[0].chosen == pytest.approx(tuple(2 * shares))
    assert shape.weights_read(1) == pytest.approx(uniform.weights_read(1))
    assert shape.weights_read(3) < uniform.weights_read(3)
    assert named_shape(catalog, str(folder)).layers == shape.layers


def test_the_command_line(catalog: Catalog, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["predict", "llama-3-8b", "--format", "q4_k_m"]) == 0
    out = capsys.readouterr().out
    assert "Modelled, not measured" in out
    assert "weights too big" in out
    assert main(["predict", "llama-3-8b", "--device", SLUG, "--json"]) == 0
    assert '"fits": false' in capsys.readouterr().out  # 16 GB of weights
    assert main(["predict", "--list"]) == 0
    assert SLUG in capsys.readouterr().out
    assert main(["predict", "--track-record", "chip"]) == 0
    assert "median_error" in capsys.readouterr().out
    config = tmp_path / "config.json"
    config.write_text("{}")
    for wrong, said in (
        (["llama-3-8b", "--format", "q9"], "q4_k_m"),
        (["llama-3-8b", "--device", "raspberry-pi-5"], "close ones"),
        ([], "name a model"),
        ([str(config)], "hidden_size"),
    ):
        assert main(["predict", *wrong]) == 1
        assert said in capsys.readouterr().err
