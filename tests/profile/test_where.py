"""Where the time goes: span trees whose self times are known, two models joined, a trace, and real models looked at."""

from __future__ import annotations

import json
import math
import time
from importlib.util import find_spec

import numpy as np
import pandas as pd
import pytest
import torch

from core import cli
from core.catalog.queries import run_of
from core.catalog.results import result_of
from core.catalog.store import Catalog
from core.errors import BadInput, CannotMeasure
from core.profile.runtimes.torch_eager import TorchEager, TorchEagerSettings
from core.profile.where import look as looking
from core.profile.where.look import look, places_of, where_the_time_goes
from core.profile.where.onnx_notes import calls_of
from core.profile.where.spans import Span, nested
from core.profile.where.tables import (
    BETWEEN,
    Place,
    by_component,
    event_table,
    join_modules,
    module_table,
    operator_table,
)
from core.profile.where.torch_modules import timed, traced
from core.profile.where.trace import chrome_trace
from core.registry import get
from core.types import silent
from tests.profile import hand_roofs
from tests.tiny import tiny_folder, tiny_model

MS = 1_000_000
PLACES = {
    "": Place("Model", None, "other"),
    "a": Place("Block", 0, "other"),
    "a.x": Place("Linear", 0, "mlp"),
    "a.y": Place("Linear", 0, "attention"),
}
SETTINGS = TorchEagerSettings(prompt_tokens=16, new_tokens=4, threads=1, parity=False)


def module(path: str, start: float, end: float) -> Span:
    return Span(path, "module", round(start * MS), round(end * MS))


def operator(name: str, start: float, end: float) -> Span:
    return Span(name, "operator", round(start * MS), round(end * MS))


def tree(stretch: float = 1.0) -> list[Span]:
    """A model of 10 ms: block ``a`` 1–9, in it ``x`` 2–5 and ``y`` 5–8, in the order in which calls end."""
    spans = (("a.x", 2, 5), ("a.y", 5, 8), ("a", 1, 9), ("", 0, 10))
    return nested([module(path, start * stretch, end * stretch) for path, start, end in spans])


# --- spans and tables ----------------------------------------------------------------------------------


def test_self_times_are_exact():
    found = {span.name: span for span in tree()}
    assert {name: span.self_ns / MS for name, span in found.items()} == {"": 2, "a": 2, "a.x": 3, "a.y": 3}
    assert {name: span.depth for name, span in found.items()} == {"": 0, "a": 1, "a.x": 2, "a.y": 2}
    assert sum(span.self_ns for span in found.values()) == found[""].total_ns


def test_self_times_of_random_trees_add_up():
    random = np.random.default_rng(0)
    spans: list[Span] = []

    def grow(path: str, start: int, end: int, depth: int) -> None:
        spans.append(Span(path, "module", start, end))
        cuts = np.sort(random.choice(np.arange(start + 1, end), 4, replace=False)) if end - start > 50 else []
        if depth < 5 and len(cuts):
            grow(f"{path}.0", cuts[0], cuts[1], depth + 1)
            grow(f"{path}.1", cuts[2], cuts[3], depth + 1)

    grow("r", 0, 10**6, 0)
    random.shuffle(spans)  # type: ignore[arg-type]
    found = nested(spans)
    assert len(found) > 20
    assert sum(span.self_ns for span in found) == 10**6
    assert all(span.self_ns >= 0 and span.depth == span.name.count(".") for span in found)


def test_an_operator_knows_its_innermost_module():
    spans = nested([*tree(), operator("mm", 3, 4), operator("add", 8.25, 8.5), operator("inner", 3.25, 3.5)])
    found = {span.name: span for span in spans if span.category == "operator"}
    assert {name: span.module for name, span in found.items()} == {"mm": "a.x", "add": "a", "inner": "a.x"}
    assert found["mm"].self_ns == 0.75 * MS


def test_the_table_of_modules():
    table = module_table("decode", [tree(), tree(3.0), tree(2.0)], PLACES).set_index("module")
    assert table["total_ms"].to_dict() == {"": 20, "a": 16, "a.x": 6, "a.y": 6}, "medians over the steps"
    assert table["self_ms"].to_dict() == {"": 4, "a": 4, "a.x": 6, "a.y": 6}
    assert table["share"].sum() == pytest.approx(1)
    assert table.loc["a.x", ["layer", "component", "kind", "calls"]].tolist() == [0, "mlp", "Linear", 1]
    assert table["total_low_ms"].isna().all(), "three steps give no interval"
    many = module_table(
        "decode", [tree(1 + k / 10) for k in (3, 9, 0, 6, 10, 1, 8, 5, 2, 7, 4)], PLACES
    ).set_index("module")
    assert many.loc["", "total_low_ms"] < 15.0 < many.loc["", "total_high_ms"]
    parts = by_component(table.reset_index()).set_index("component")["self_ms"]
    assert parts.to_dict() == {"other": 8, "mlp": 6, "attention": 6}


def test_a_module_that_is_called_twice_counts_twice():
    spans = nested([module("", 0, 10), module("a", 1, 3), module("a", 4, 5)])
    row = module_table("decode", [spans], PLACES).set_index("module").loc["a"]
    assert (row["calls"], row["total_ms"]) == (2, 3)


def test_the_table_of_operators():
    spans = nested([*tree(), operator("mm", 2, 4), operator("mm", 4.5, 5), operator("mm", 5, 6)])
    table = operator_table("decode", spans, PLACES).set_index(["module", "operator"])
    assert table.loc[("a.x", "mm"), ["calls", "traced_ms"]].tolist() == [2, 2.5]
    assert table.loc[("a.y", "mm"), "component"] == "attention"
    assert table.loc[("a.x", BETWEEN), "traced_ms"] == pytest.approx(0.5)
    assert table["traced_ms"].sum() == pytest.approx(10)
    assert table["share"].sum() == pytest.approx(1)


def test_two_models_are_joined_by_path_and_a_removed_layer_counts_whole():
    a = module_table("decode", [tree()], PLACES)
    shorter = [span for span in tree() if span.name != "a.y"]
    b = module_table("decode", [nested(shorter)], PLACES)
    joined = join_modules(a, b).set_index("module")
    gone = joined.loc["a.y"]
    assert gone["only_in"] == "a"
    assert gone["difference_ms"] == -3
    assert math.isnan(gone["self_b_ms"])
    assert gone["kind_b"] == ""
    assert joined.loc["a.x", ["difference_ms", "ratio", "only_in"]].tolist() == [0, 1, ""]
    assert joined.loc["a", "difference_ms"] == 3, (
        "what the removed one took is its parent's here, by construction"
    )
    assert joined["difference_ms"].sum() == pytest.approx(b["self_ms"].sum() - a["self_ms"].sum())
    turned = join_modules(b, a).set_index("module")
    assert turned.loc["a.y", "only_in"] == "b"
    assert (turned["difference_ms"] == -joined["difference_ms"].reindex(turned.index)).all()


def test_the_trace_is_what_chrome_reads():
    events = pd.concat([event_table("prefill", tree()), event_table("decode", tree(2.0))])
    document = json.loads(chrome_trace({"original": events, "variant «4 bits»": events}))
    spans = [event for event in document["traceEvents"] if event["ph"] == "X"]
    names = {event["pid"]: event["args"]["name"] for event in document["traceEvents"] if event["ph"] == "M"}
    assert list(names.values()) == [
        *("prefill original", "decode original", "prefill variant «4 bits»", "decode variant «4 bits»")
    ]
    assert len(spans) == 16
    decode = {event["name"]: event for event in spans if event["pid"] == 1}
    assert (decode["a.x"]["ts"], decode["a.x"]["dur"]) == (4000, 6000)
    assert decode["(whole model)"]["dur"] == 20000
    for process in names:
        mine = [event for event in spans if event["pid"] == process]
        assert min(event["ts"] for event in mine) == 0
        whole = max(event["dur"] for event in mine)
        assert all(event["ts"] + event["dur"] <= whole for event in mine)


# --- real models ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "bert"])
def test_looking_leaves_the_model_as_it_was_bit_for_bit(family):
    model = tiny_model(family).model
    ids = torch.arange(12)[None]
    own = next(iter(model.children()))
    kept = own.forward
    own.forward = lambda *args, **kwargs: kept(*args, **kwargs)  # as compressed-tensors leaves its modules
    mine = own.forward
    try:
        with torch.inference_mode():
            before = model(input_ids=ids)[0]
            with timed(model) as spans:
                during = model(input_ids=ids)[0]
            with traced(model) as noted:
                profiled = model(input_ids=ids)[0]
            after = model(input_ids=ids)[0]
        assert own.forward is mine
    finally:
        del own.forward
    for answer in (during, profiled, after):
        assert torch.equal(before, answer)
    assert not [name for name, part in model.named_modules() if "forward" in part.__dict__]
    found = nested(spans)
    assert found[0].name == ""
    assert sum(span.self_ns for span in found) == found[0].total_ns
    called = {span.name for span in found}
    assert {span.name for span in noted if span.category == "module"} == called
    assert any("mm" in span.name for span in noted if span.category == "operator")
    assert called <= set(places_of(model))


def test_a_model_that_fails_is_put_back_too():
    model = tiny_model("llama").model
    with pytest.raises(RuntimeError), timed(model):
        raise RuntimeError
    assert not [name for name, part in model.named_modules() if "forward" in part.__dict__]


@pytest.mark.parametrize("slow", ["model.layers.1.mlp.act_fn", "model.layers.2.self_attn.o_proj"])
def test_the_slow_module_is_the_top_row(tmp_path, monkeypatch, slow):
    monkeypatch.setattr(looking, "REPEATS", 6)
    runtime = TorchEager(SETTINGS)
    load = runtime.load

    def load_and_slow_down() -> None:
        load()
        part = runtime.model.get_submodule(slow)
        forward = part.forward

        def late(*args: object) -> object:
            time.sleep(0.02)
            return forward(*args)

        part.forward = late

    monkeypatch.setattr(runtime, "load", load_and_slow_down)
    said = look(runtime, tiny_folder("llama", tmp_path), SETTINGS, silent)
    modules = pd.DataFrame(said["frames"]["modules"]["data"], columns=said["frames"]["modules"]["columns"])
    for phase, rows in modules.groupby("phase"):
        top = rows.sort_values("self_ms", ascending=False).iloc[0]
        assert top["module"] == slow, phase
        assert top["self_ms"] >= 20
        whole = rows.set_index("module").loc[""]
        assert top["total_ms"] <= whole["total_ms"]
    assert set(modules["phase"]) == {"prefill", "decode"}


def test_the_notes_of_onnx_runtime_become_spans(tmp_path):
    def event(name: str, start: int, took: int, **args: str) -> dict[str, object]:
        return {"cat": "Node" if args else "Session", "name": name, "ts": start, "dur": took, "args": args}

    events = [
        event("model_loading_uri", 0, 90),
        event("m_kernel_time", 210, 40, op_name="MatMul"),
        event("m_fence_before", 205, 1, op_name="MatMul"),
        event("model_run", 100, 50),
        event("a_kernel_time", 110, 20, op_name="Add"),
        event("m_kernel_time", 130, 15, op_name="MatMul"),
        event("model_run", 200, 100),
    ]
    (tmp_path / "calls.json").write_text(json.dumps(events))
    first, second = (nested(call) for call in calls_of(tmp_path / "calls.json"))
    assert [(span.name, span.self_ns) for span in first] == [
        ("", 15_000),
        ("Add", 20_000),
        ("MatMul", 15_000),
    ]
    assert [(span.name, span.self_ns) for span in second] == [("", 60_000), ("MatMul", 40_000)]


@pytest.mark.slow
@pytest.mark.rotating
@pytest.mark.skipif(find_spec("onnxruntime") is None, reason="onnxruntime is not installed")
def test_a_graph_tells_its_operators_itself(tmp_path, monkeypatch):
    for name in ("HOME", "CACHE"):
        monkeypatch.setenv(f"SLIMSCOPE_{name}", str(tmp_path / name))
    asked = get("profile", "onnx_runtime").parse({"prompt_tokens": 16, "new_tokens": 4, "threads": 1})
    found = where_the_time_goes(tiny_folder("llama", tmp_path / "model"), "onnx_runtime", silent, asked)
    assert found.frames["modules"].empty
    operators = found.frames["operators"]
    assert set(operators["phase"]) == {"prefill", "decode"}
    assert {"MatMul", BETWEEN} <= set(operators["operator"])
    assert operators.groupby("phase")["share"].sum().to_numpy() == pytest.approx(1)
    json.loads(chrome_trace({"graph": found.frames["events"]}))
    assert not list(tmp_path.rglob("calls*.json"))


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(BadInput, match=r"holds no config\.json"):
        where_the_time_goes(tmp_path, "torch_eager", silent, SETTINGS)


def test_a_runtime_that_cannot_tell_is_refused(tmp_path):
    folder = tiny_folder("llama", tmp_path)
    request = {"runtime": "llama_cpp", "folder": str(folder), "files": str(folder), "settings": {}}
    with pytest.raises(CannotMeasure, match="torch_eager"):
        looking.answer(request, silent)


@pytest.mark.slow
@pytest.mark.rotating
def test_the_command_line_looks_at_two_models_and_keeps_what_it_saw(tmp_path, monkeypatch, capsys):
    for name in ("HOME", "CACHE"):
        monkeypatch.setenv(f"SLIMSCOPE_{name}", str(tmp_path / name))
    monkeypatch.setenv("SLIMSCOPE_CATALOG", f"sqlite:///{tmp_path / 'catalog.db'}")
    hand_roofs.keep()
    one, other = (
        tiny_folder("llama", tmp_path / name, seed=seed) for seed, name in enumerate(("one", "other"))
    )
    asked = ["where", str(one), "--against", str(other), "--trace", str(tmp_path / "t.json"), "--json"]
    asked += [part for pair in ("threads=1", "prompt_tokens=16", "new_tokens=4") for part in ("--set", pair)]
    assert cli.main(asked) == 0
    said = json.loads(capsys.readouterr().out)
    assert {row["only_in"] for row in said["joined"]} == {""}
    assert {row["phase"] for row in said["joined"]} == {"prefill", "decode"}
    assert {verdict["phase"] for verdict in said["verdicts"]} == {"prefill", "decode"}
    assert all(verdict["cause"] == "overhead" for verdict in said["verdicts"]), (
        "a tiny model is calls and nothing else"
    )
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    assert len({event["pid"] for event in events}) == 4
    catalog = Catalog()
    run = run_of(catalog, said["run"])
    assert (run.kind, run.conditions["method"]) == ("probe", "where_the_time_goes")
    kept = result_of(catalog, run.id)
    assert list(kept.frames) == ["modules", "operators", "events", "components"]
    assert len(kept.frames["modules"]) == len(said["modules"])
    assert kept.metrics == (), "a look is no timing"
    assert said["against"]["variant"] != said["variant"]
