from __future__ import annotations

import json

import pytest

from core.catalog.queries import tradeoff_frame
from core.jobs.queue import Queue
from core.tradeoff import pareto_front, usable
from tests.app.tradeoff_app import checked, new_catalog, open_page
from tests.synthetic import add_base, fill


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("synthetic")
    fill(new_catalog(folder), 26)
    return folder


@pytest.fixture
def frame(home, monkeypatch):
    monkeypatch.setenv("SLIMSCOPE_HOME", str(home))
    monkeypatch.delenv("SLIMSCOPE_CATALOG", raising=False)
    catalog = new_catalog(home)
    return tradeoff_frame(catalog, catalog.variants()[0].base_id)


def table(app):
    return next(element.value for element in app.dataframe if "bits_per_weight" in element.value)


def test_empty_catalog_offers_to_make_a_variant(tmp_path, monkeypatch):
    monkeypatch.setenv("SLIMSCOPE_HOME", str(tmp_path))
    app = open_page("tradeoffs")
    assert any("No variant yet" in text.value for text in app.markdown)
    assert not app.metric


def test_a_base_alone_is_an_empty_state_too(tmp_path, monkeypatch):
    monkeypatch.setenv("SLIMSCOPE_HOME", str(tmp_path))
    add_base(new_catalog(tmp_path))
    assert any("No variant yet" in text.value for text in open_page("tradeoffs").markdown)


def test_figures_are_those_of_the_catalog(frame):
    app = open_page("tradeoffs")
    front = pareto_front(frame, "bytes", "kl", eligible=usable(frame))
    shown = {metric.label: metric.value for metric in app.metric}
    assert shown["On the front"] == f"{front.on_front.sum()} of {front.judged.sum()}"
    kept = frame[usable(frame) & frame["recipe"].notna() & (frame["kl"] <= 0.05)]
    assert shown["Smallest, KL ≤ 0.05"] == f"{kept['bytes'].min() / 1e6:.3g} MB"


def test_axes_and_tolerance_come_from_the_address(frame):
    app = open_page("tradeoffs", x="decode_tokens_per_s", y="top1_agreement", tolerance="0.5")
    assert "Top-1 agreement against decode" in [header.value for header in app.header]
    assert any(metric.label == "Smallest, KL ≤ 0.5" for metric in app.metric)


def test_a_variant_in_the_address_opens_its_panel_and_evidence(frame):
    row = frame[frame["proven"] & frame["kl"].notna() & frame["recipe"].notna()].iloc[0]
    app = open_page("tradeoffs", variant=row["variant"])
    assert any("the evidence" in header.value for header in app.header)
    captions = " ".join(caption.value for caption in app.caption)
    assert "Reloaded in a fresh process, largest logit difference 0." in captions
    measured = next(element.value for element in app.dataframe if "conditions" in element.value)
    assert (measured["measurement"] == "Decode tokens per s").sum() == 2, "the repeat is listed as well"
    assert measured["conditions"].str.contains("threads 2").all()


def test_an_export_is_queued_by_one_click_and_its_job_is_seen(frame, home, monkeypatch):
    started = []
    monkeypatch.setattr("app.engine.start_work", lambda: started.append(True))
    variant = frame[frame["recipe"].notna()].iloc[0]["variant"]
    app = open_page("tradeoffs", variant=variant)
    app.button(key="export_go").click().run()
    checked(app)
    [job] = [job for job in Queue(new_catalog(home)).jobs() if job.kind == "export"]
    assert job.spec["model"].endswith(variant)
    assert started, "nobody else starts the work"
    told = " ".join(text.value for text in app.markdown)
    assert "Export · GGUF" in told


@pytest.mark.parametrize("part", ["Recipe and lineage", "Reload proof", "Layers", "Reproduce"])
def test_every_tab_of_the_evidence_opens(frame, part):
    variant = frame[frame["recipe"].notna()].iloc[0]["variant"]
    app = open_page("tradeoffs", variant=variant, evidence=part)
    if part == "Recipe and lineage":
        assert any(json.loads(code.value).get("steps") for code in app.code if code.language == "json")
    if part == "Reproduce":
        assert any("AutoModelForCausalLM" in code.value for code in app.code)
        assert any("slimscope run recipe.json" in code.value for code in app.code)


def test_an_unknown_variant_in_the_address_is_nothing_picked(frame):
    app = open_page("tradeoffs", variant="nonsense", brush="a,b", base="nonsense")
    assert "Variant" in [header.value for header in app.header]


def test_unproven_is_marked_and_never_on_the_front(frame):
    unproven = frame[~frame["proven"]].iloc[0]["variant"]
    app = open_page("tradeoffs", variant=unproven)
    assert any("no reload proof" in text.value for text in app.markdown)
    shown = table(app).set_index("variant")
    assert shown.loc[unproven, "state"] == ["unproven"]
    spec = json.loads(app.get("vega_lite_chart")[0].proto.spec)
    assert "layer" in spec


def test_limits_filter_and_name_the_closest_miss(frame):
    app = open_page("tradeoffs", limits="≤ 1 MB and ≥ 1 tok/s")
    said = " ".join(text.value for text in app.markdown).replace("\\", "")
    assert "No variant keeps every limit. Closest is" in said
    assert "over 1 MB" in said
    app.button(key="show_closest").click().run()
    assert any("the evidence" in header.value for header in checked(app).header)


def test_an_unreadable_limit_is_one_sentence_and_the_page_goes_on(frame):
    app = open_page("tradeoffs", limits="small ![x](http://evil.example/x.png)")
    said = [text.value for text in app.markdown if "cannot be read" in text.value]
    assert len(said) == 1
    assert "![" not in said[0], "typed text reaches Markdown escaped"
    assert app.metric


def test_front_only_and_brush_choose_the_rows(frame):
    front = pareto_front(frame, "bytes", "kl", eligible=usable(frame)).on_front
    assert len(table(open_page("tradeoffs", only="true"))) == front.sum()
    inside = frame["bytes"].between(60e6, 90e6) & frame["kl"].between(0.001, 0.1)
    assert len(table(open_page("tradeoffs", brush="60,90,0.001,0.1"))) == inside.sum()
