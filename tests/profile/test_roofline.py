"""What a step has to do, counted by hand from a tiny model's files, and measured phases under known roofs."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from safetensors.torch import load_file

from core import cli
from core.catalog.records import new_id
from core.catalog.store import Catalog
from core.errors import BadInput, CannotOpen
from core.loop import register
from core.models.sizes import model_card
from core.predict.model import of_card
from core.profile import shapes
from core.profile.bottleneck import verdicts
from core.profile.environment import environment
from core.profile.roofline import matrix_rate, placed, roof_line, roofline
from core.profile.runtimes.torch_eager import TorchEagerSettings
from core.profile.shapes import known_shape, shape_of, skeleton_shape
from core.profile.work import Step, number_bytes, work_of
from core.types import Measurement, Run, Variant
from tests.profile import hand_roofs
from tests.profile.hand_roofs import BANDWIDTH, BFLOAT16, FLOAT32, INT8
from tests.tiny import D_MODEL, HEADS, KV_HEADS, LAYERS, tiny_folder, tiny_model

ROOFS = hand_roofs.hand_roofs()
HEAD = D_MODEL // HEADS


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SLIMSCOPE_CACHE", str(tmp_path / "cache"))


# --- work ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "smollm", "gpt2", "bert", "vit", "mixtral", "qwen3_moe"])
def test_a_model_without_weights_has_the_shape_of_the_open_one(family):
    loaded = tiny_model(family)
    bare, whole = skeleton_shape(loaded.folder), of_card(model_card(loaded))
    assert bare.weight_bytes == pytest.approx(whole.weight_bytes)  # shares are summed in another order
    assert bare.read_bytes == pytest.approx(whole.read_bytes)
    assert bare == replace(
        whole, name=loaded.folder.name, weight_bytes=bare.weight_bytes, read_bytes=bare.read_bytes
    )


def test_a_decode_step_by_hand(tmp_path):
    folder = tiny_folder("llama", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    read = [tensor for name, tensor in tensors.items() if "embed_tokens" not in name]
    work = work_of(skeleton_shape(folder), "decode", 100, 3, kv_bytes=4.0)
    assert work.weight_bytes == sum(tensor.nbytes for tensor in read), (
        "an untied embedding is read by the row"
    )
    assert work.weights == sum(tensor.numel() for tensor in read)
    assert work.kv_bytes == 3 * 100 * LAYERS * 2 * KV_HEADS * HEAD * 4
    products = 2 * sum(tensor.numel() for tensor in read)
    assert work.flops == 3 * (products + 4 * LAYERS * HEADS * HEAD * 100)
    assert work.intensity == work.flops / (work.weight_bytes + work.kv_bytes)


def test_a_prompt_by_hand(tmp_path):
    folder = tiny_folder("llama", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    head = tensors["lm_head.weight"].numel()
    layers = sum(tensor.numel() for tensor in tensors.values()) - 2 * head
    work = work_of(skeleton_shape(folder), "prefill", 64, 2)
    attention = 4 * LAYERS * HEADS * HEAD * 64 * 65 / 2
    assert work.flops == pytest.approx(2 * (64 * 2 * layers + 2 * head + attention))
    assert work.weight_bytes == 4 * (layers + head), "read once, however long the prompt"


def test_a_window_bounds_the_cache_and_experts_are_read_when_chosen(tmp_path):
    windowed = skeleton_shape(tiny_folder("mistral", tmp_path / "a"))
    assert work_of(windowed, "decode", 200, 1).kv_bytes == work_of(windowed, "decode", 32, 1).kv_bytes
    sparse = skeleton_shape(tiny_folder("mixtral", tmp_path / "b"))
    one, many = work_of(sparse, "decode", 8, 1), work_of(sparse, "prefill", 64, 1)
    expert = sparse.layers[0].expert_bytes
    assert many.weight_bytes - one.weight_bytes == pytest.approx(LAYERS * 2 * expert), "all four, not two"


def test_an_encoder_multiplies_with_no_embedding(tmp_path):
    shape = skeleton_shape(tiny_folder("bert", tmp_path))
    work = work_of(shape, "forward", 10, 1)
    assert work.kv_bytes == 0
    assert work.weights < shape.parameters - 512 * D_MODEL + 1


def test_weights_are_counted_as_the_runtime_holds_them(tmp_path):
    shape = skeleton_shape(tiny_folder("llama", tmp_path))
    stored = work_of(shape, "decode", 8, 1)
    alike = work_of(shape, "decode", 8, 1, held_bytes=1.01 * shape.weight_bytes)
    half = work_of(shape, "decode", 8, 1, held_bytes=shape.weight_bytes / 2)
    assert (stored.counted, alike.counted, half.counted) == ("as stored", "as held", "as held")
    assert alike.weight_bytes == stored.weight_bytes
    assert half.weight_bytes == pytest.approx(stored.weight_bytes / 2)
    assert half.stored_bytes == stored.weight_bytes


def test_a_number_of_a_cache():
    assert number_bytes("model", "bfloat16") == 2
    assert number_bytes("f32", "bfloat16") == 4
    assert number_bytes("q8_0", "int8") == 34 / 32
    assert number_bytes("something else", "no dtype") == 2


@pytest.mark.slow
def test_shapes_are_counted_once_and_kept(tmp_path):
    folder = tiny_folder("smollm", tmp_path / "model")
    shape = shape_of(folder)
    assert shape == skeleton_shape(folder)
    kept = list((tmp_path / "cache" / "shapes").iterdir())
    stamp = kept[0].stat().st_mtime_ns
    assert shape_of(folder) == shape
    assert [file.stat().st_mtime_ns for file in kept] == [stamp]
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text('{"architectures": ["NobodyForCausalLM"], "model_type": "llama"}')
    (broken / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(CannotOpen, match="cannot build"):
        shape_of(broken)


# --- roofs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", ["decode", "prefill"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("factor", [1.0, 1.7, 40.0])
def test_the_identities_of_a_placed_step(tmp_path, phase, dtype, factor):
    work = work_of(skeleton_shape(tiny_folder("llama", tmp_path)), phase, 200, 4)
    rate = matrix_rate(ROOFS, dtype)
    floor = max(work.bytes / BANDWIDTH, work.flops / rate)
    row = placed(Step(phase, factor * floor, work, dtype, "x", LAYERS), ROOFS)
    assert row["share_of_roof"] == pytest.approx(1 / factor), "a step at the floor reaches the roof"
    assert row["share_of_roof"] == pytest.approx(max(row["share_of_bandwidth"], row["share_of_matrix_rate"]))
    assert row["attained_flops_per_s"] <= row["roof_flops_per_s"] * (1 + 1e-9)
    assert row["attained_flops_per_s"] == pytest.approx(row["attained_bytes_per_s"] * row["intensity"])
    larger = "memory" if row["share_of_bandwidth"] >= row["share_of_matrix_rate"] else "compute"
    assert row["bound"] == larger


def test_no_dtype_is_held_against_a_roof_that_it_could_pass():
    assert matrix_rate(ROOFS, "float32") == FLOAT32
    assert matrix_rate(ROOFS, "bfloat16") == BFLOAT16
    assert matrix_rate(ROOFS, "q8_0") == INT8


def test_the_line():
    line = roof_line(ROOFS, "float32")
    ridge = FLOAT32 / BANDWIDTH
    assert line["flops_per_s"].max() == FLOAT32
    memory = line[line["bound"] == "memory"]
    assert (memory["flops_per_s"] / memory["intensity"]).to_numpy() == pytest.approx(BANDWIDTH)
    assert (line.loc[line["bound"] == "compute", "flops_per_s"] == FLOAT32).all()
    assert line["intensity"].is_monotonic_increasing
    assert (abs(line["intensity"] / ridge - 1) < 1e-12).any(), "the ridge itself is drawn"


# --- from a catalog ------------------------------------------------------------------------------------


@pytest.fixture
def base(tmp_path, monkeypatch) -> tuple[Catalog, Variant]:
    monkeypatch.setenv("SLIMSCOPE_HOME", str(tmp_path / "home"))
    catalog = Catalog(f"sqlite:///{tmp_path / 'catalog.db'}")
    folder = tiny_folder("llama", tmp_path / "model")
    variant = register(catalog, str(folder))
    mark = variant.fingerprint
    monkeypatch.setattr(shapes, "ask", lambda *_, **__: [shapes.asdict(skeleton_shape(folder))])
    assert shapes.shapes_of({mark: folder})[mark] == known_shape(mark)
    return catalog, variant


def profiled(
    catalog: Catalog,
    variant: Variant,
    *,
    ms: float,
    day: int = 1,
    flags: tuple[str, ...] = (),
    **changed: object,
) -> Run:
    """Enter a profile of this machine with a decode step of so many milliseconds."""
    facts = environment("cpu")
    settings = TorchEagerSettings(prompt_tokens=64, new_tokens=32, **changed)
    now = datetime(2026, 11, day, tzinfo=UTC)
    held = Measurement("weights_memory_bytes", variant.bytes, "bytes", "lower")
    times = (
        Measurement("ttft_ms", 4 * ms, "ms", "lower"),
        Measurement("tpot_ms", ms, "ms", "lower", 20, 0.9 * ms, 1.1 * ms),
    )
    conditions = {
        "method": "torch_eager",
        "settings": settings.model_dump(mode="json"),
        "dtype": "float32",
        "device": "cpu",
        "batch": 1,
        "prompt_tokens": 64,
        "new_tokens": 32,
        "depth": 64,
        "kv_cache": "model",
        "environment": facts,
    }
    run = Run(
        id=new_id(), kind="profile", variant_id=variant.id, status="flagged" if flags else "valid", flags=flags,
        protocol="p", conditions=conditions, environment=facts["hash"], started_at=now,
        ended_at=now + timedelta(seconds=9), measurements=(held, *times),
    )  # fmt: skip
    return catalog.record_run(run, environment=facts)


def test_a_row_for_each_phase_of_each_runtime_and_setting(base):
    catalog, variant = base
    profiled(catalog, variant, ms=1.0, day=1)
    profiled(
        catalog, variant, ms=2.0, day=2, tier="full"
    )  # another effort, the same question: the newer counts
    profiled(
        catalog, variant, ms=9.0, day=3, flags=("contention",)
    )  # newer but disturbed: a valid one counts
    profiled(catalog, variant, ms=5.0, day=1, threads=1)
    rows = roofline(catalog, variant.id, ROOFS).set_index(["settings", "phase"]).sort_index()
    assert len(rows) == 4
    decode = rows.loc[("prompt_tokens=64", "decode")]
    assert decode["seconds"] == 0.002
    assert (decode["low"], decode["high"]) == (pytest.approx(0.0018), pytest.approx(0.0022))
    work = work_of(known_shape(variant.fingerprint), "decode", 64 + 16, 1)
    assert decode["weight_bytes"] == work.weight_bytes
    assert decode["kv_bytes"] == work.kv_bytes
    assert decode["share_of_bandwidth"] == pytest.approx(work.bytes / 0.002 / BANDWIDTH)
    assert not decode["flagged"]
    assert (rows.xs("decode", level="phase")["seconds"].tolist()) == [0.002, 0.005]
    found = verdicts(catalog, variant.id, ROOFS)
    assert len(found) == 4
    assert set(found["cause"]) == {"overhead"}
    assert (found["gain"] > 1).all()


def test_runs_of_other_machines_stay_away(base):
    catalog, variant = base
    run = profiled(catalog, variant, ms=1.0)
    elsewhere = {**run.conditions["environment"], "host": {"cpu": "another"}}
    catalog.record_run(
        replace(run, id=new_id(), conditions={**run.conditions, "environment": elsewhere, "batch": 7})
    )
    assert set(roofline(catalog, variant.id, ROOFS)["run"]) == {run.id}


def test_nothing_measured_and_nothing_known(base):
    catalog, variant = base
    empty = roofline(catalog, variant.id, ROOFS)
    assert empty.empty
    assert {"share_of_bandwidth", "counted"} <= set(empty.columns)
    with pytest.raises(BadInput):
        roofline(catalog, "nobody", ROOFS)


def test_the_command_line_shows_every_phase_under_its_roof(base, monkeypatch, capsys, tmp_path):
    catalog, variant = base
    hand_roofs.keep()
    profiled(catalog, variant, ms=1.0)
    monkeypatch.setenv("SLIMSCOPE_CATALOG", f"sqlite:///{tmp_path / 'catalog.db'}")
    assert cli.main(["roofline", f"variant:{variant.id}", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["phase"] for row in rows] == ["prefill", "decode"]
    assert all(0 < row["share_of_roof"] < 1 and row["action"] for row in rows)
    assert cli.main(["roofline", f"variant:{variant.id}"]) == 0
    assert "10.0 GB/s, 100 GFLOP/s" in capsys.readouterr().out
