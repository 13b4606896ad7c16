"""The Devices page: predictions, the registry and one's own file, the track record, one's own devices, import."""

from __future__ import annotations

import json

import numpy as np
import pytest

from app import device_views
from app.components import import_panel
from core.devices.registry import devices, parsed, published, user_file
from core.jobs.queue import Queue
from core.predict.config import of_config
from core.predict.fits import fits_on
from core.predict.predict import Workload
from core.predict.published import config_of, formats
from core.predict.track_record import by_class, median_error, track_record
from tests.app.measured import recorded
from tests.app.tradeoff_app import checked, new_catalog, open_page

LLAMA = "named:llama-3-8b"


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("SLIMSCOPE_HOME", str(tmp_path))
    monkeypatch.delenv("SLIMSCOPE_CATALOG", raising=False)
    monkeypatch.setattr("app.engine.start_work", lambda: None)  # a test starts no daemon
    return tmp_path


def plain(text: str) -> str:
    return text.replace("\\", "")


def table(app, column: str):
    return next(element.value for element in app.dataframe if column in element.value)


def figures(app) -> dict[str, str]:
    return {metric.label: metric.value for metric in app.metric}


# --- fits on --------------------------------------------------------------------------------------------


def test_a_known_model_is_predicted_without_a_catalog(home):
    app = open_page("devices", variant=LLAMA, format="q4_k_m")
    shape = of_config("llama-3-8b", config_of("llama-3-8b"), formats()["q4_k_m"])
    fits = fits_on(shape, workload=Workload())
    assert figures(app)["Fits on"] == f"{fits['fits'].sum()} of {len(fits)}"
    shown = table(app, "decode_band")
    assert len(shown) == len(published())
    assert shown["decode"].dropna().is_monotonic_decreasing
    pi = shown.set_index("slug").loc["raspberry-pi-5-8gb"]
    assert pi["told"] == "modelled"
    assert pi["decode_band"].count("…") == 1
    assert any("Modelled, not measured" in plain(caption.value) for caption in app.caption)


def test_weights_too_big_is_told_apart_from_context_too_long(home):
    short = open_page("devices", variant=LLAMA, format="f16", context="128", prompt="64")
    long = open_page("devices", variant=LLAMA, format="f16", context="8192")
    before, after = (table(app, "decode_band").set_index("slug")["state"].map(tuple) for app in (short, long))
    assert (before[before == ("weights too big",)].index == after[after == ("weights too big",)].index).all()
    lost = set(before[before == ("fits",)].index) & set(after[after == ("context too long",)].index)
    assert lost == set(after[after == ("context too long",)].index) - set(
        before[before == ("context too long",)].index
    )
    small = table(open_page("devices", variant=LLAMA, format="f16", context="8192", kv="8"), "decode_band")
    assert (
        small.set_index("slug")["share"]
        .le(table(long, "decode_band").set_index("slug")["share"] + 1e-12)
        .all()
    )


def test_fits_table_is_the_prediction_in_units():
    shape = of_config("qwen3-0.6b", config_of("qwen3-0.6b"), formats()["q4_0"])
    fits = fits_on(shape, known={"raspberry-pi-5-8gb": published()["raspberry-pi-5-8gb"]})
    row, shown = fits.iloc[0], device_views.fits_table(fits).iloc[0]
    assert shown["state"] == ["fits"]
    assert shown["share"] == pytest.approx(row["needed_bytes"] / row["usable_bytes"])
    assert shown["decode"] == row["decode_tokens_per_s"]
    low, _, high = shown["decode_band"].partition(" … ")
    assert float(low) < shown["decode"] < float(high)
    assert device_views.counts(fits) == {"fits": 1, "context too long": 0, "weights too big": 0, "all": 1}


def test_a_variant_of_the_catalog_whose_shape_is_counted(home, monkeypatch):
    made = recorded(new_catalog(home), str(home / "tiny"))
    shape = of_config("tiny", config_of("qwen3-0.6b"), formats()["f16"])
    monkeypatch.setattr("app.components.fits_panel.known_shape", lambda mark: shape)
    monkeypatch.setattr("app.components.fits_panel.variant_shape", lambda catalog, id_: shape)
    app = open_page("devices", variant=made.variant.id)
    assert "Fits on" in figures(app)
    assert any("not counted yet" in plain(caption.value) for caption in app.caption), (
        "why nothing is scaled by own"
    )


# --- registry -------------------------------------------------------------------------------------------


def test_every_device_has_a_source_and_how_sure_it_is(home):
    shown = table(open_page("devices", part="registry"), "confidence")
    assert len(shown) == len(published())
    assert shown["source"].str.len().gt(0).all()
    assert set(shown["confidence"]) <= {"high", "medium", "low"}
    pi = shown.set_index("slug").loc["raspberry-pi-5-8gb"]
    assert pi["bandwidth"] == pytest.approx(17.1)
    assert np.isnan(shown.set_index("slug").loc["raspberry-pi-4-8gb", "fp16"])


def test_the_editors_example_is_a_device(home):
    assert list(parsed(device_views.EXAMPLE)) == ["my-pi"]


def test_what_is_saved_is_laid_over_the_table(home):
    app = open_page("devices", part="registry")
    app.text_area(key="devices_yaml").set_value(device_views.EXAMPLE)
    app.button(key="devices_save").click().run()
    checked(app)
    assert any("saved: my-pi" in plain(text.value) for text in app.markdown)
    assert devices()["my-pi"].address == "lab-pi"
    assert table(app, "confidence")["slug"].iloc[0] == "my-pi", "one's own come first"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("my-pi:\n  like: raspberry-pi-99", "raspberry-pi-99"),
        ("my-pi:\n  like: raspberry-pi-5-8gb\n  ram_gib: -1", "ram_gib"),
        ("a: [", "not YAML"),
        ("my-pi:\n  like: raspberry-pi-5-8gb\n  transport: ssh", "address"),
        ("x: {like: raspberry-pi-5-8gb, address: '-oProxyCommand=evil', transport: ssh}", "address"),
    ],
)
def test_a_wrong_file_is_refused_whole(home, text, words):
    app = open_page("devices", part="registry")
    app.text_area(key="devices_yaml").set_value(f"good:\n  like: raspberry-pi-5-8gb\n{text}")
    app.button(key="devices_save").click().run()
    checked(app)
    said = [plain(line.value) for line in app.markdown]
    assert any("nothing was written" in line and words in line for line in said), said
    assert not user_file().exists()


def test_a_file_that_was_broken_by_hand_leaves_the_table_standing(home):
    user_file().write_text("nonsense: [")
    app = open_page("devices", part="registry")
    assert len(table(app, "confidence")) == len(published())
    assert any("not YAML" in plain(line.value) for line in app.markdown)


# --- track record ---------------------------------------------------------------------------------------


def test_the_track_record_is_shown_whole(home):
    app = open_page("devices", part="record")
    record = track_record()
    assert figures(app)["Median error of decode"] == f"{median_error(record):.1%}"
    assert len(table(app, "predicted")) == len(record)
    assert table(app, "predicted")["error"].abs().is_monotonic_decreasing, "no worse result is hidden below"
    assert table(app, "p90_error")["median_error"].tolist() == by_class(record)["median_error"].tolist()
    by_chip = open_page("devices", part="record", held="chip")
    assert figures(by_chip)["Median error of decode"] == f"{median_error(track_record(by='chip')):.1%}"


# --- one's own devices ----------------------------------------------------------------------------------


def test_without_an_own_device_the_page_says_where_to_add_one(home):
    assert any("No device of yours yet" in text.value for text in open_page("devices", part="own").markdown)


def test_checking_and_measuring_are_jobs(home):
    catalog = new_catalog(home)
    made = recorded(catalog, str(home / "tiny"))
    user_file().write_text(device_views.EXAMPLE)
    app = open_page("devices", part="own", variant=made.base.id)
    app.button(key="device_check").click().run()
    checked(app)
    app.button(key="device_profile").click().run()
    checked(app)
    measured, checking = Queue(catalog).jobs()
    assert (checking.kind, checking.spec) == (
        "device",
        {"model": "device:my-pi", "slug": "my-pi", "action": "check"},
    )
    assert measured.spec["variant"] == made.base.id
    assert measured.spec["settings"] == {"tier": "quick"}
    said = " ".join(plain(text.value) for text in app.markdown)
    assert "check my-pi" in said
    assert "profile tiny on my-pi" in said


def test_a_device_that_cannot_be_reached_says_so_in_its_jobs_words(home):
    """The task itself: system OpenSSH on an alias that leads nowhere; no hang, no stack trace."""
    from core.errors import CannotConnect
    from core.jobs.tasks import TASKS

    text = device_views.EXAMPLE.replace("lab-pi", "nobody@127.0.0.1")
    user_file().write_text(text.replace("127.0.0.1", "no-such-host.invalid"))
    with pytest.raises(CannotConnect):
        TASKS["device"]({"slug": "my-pi", "action": "check"}, None)


# --- import ---------------------------------------------------------------------------------------------

BENCH = [
    {
        "build_commit": "abc", "build_number": 1, "cpu_info": "A processor", "backends": "CPU", "model_filename": "m.gguf",
        "model_type": "llama 1B Q4_0", "model_size": 700_000_000, "model_n_params": 1_200_000_000, "n_batch": 2048,
        "n_threads": 4, "n_prompt": 0, "n_gen": 128, "n_depth": 0, "avg_ns": 1, "avg_ts": 12.5, "stddev_ts": 0.2,
        "samples_ts": [12.4, 12.5, 12.6],
    }
]  # fmt: skip


def test_a_foreign_report_comes_in_as_tier_d(home):
    app = open_page("devices", part="import")
    app.file_uploader(key="report").upload("bench.json", json.dumps(BENCH).encode(), "application/json").run()
    app.button(key="import_now").click().run()
    checked(app)
    assert any("badge D" in text.value for text in app.markdown), [plain(m.value) for m in app.markdown]
    shown = table(app, "protocol")
    assert shown["protocol"].str.startswith("imported").all()
    assert 12.5 in shown["value"].tolist()


def test_a_file_that_is_no_report_is_one_card(home):
    app = open_page("devices", part="import")
    app.file_uploader(key="report").upload("cat.json", b'{"a": 1}', "application/json").run()
    app.button(key="import_now").click().run()
    checked(app)
    assert any("none of the reports" in plain(text.value) for text in app.markdown)


def test_only_the_lines_of_our_own_files_are_taken_for_them():
    assert import_panel._is_ours(b'{"spec": {}}\n{"value": 1}')
    assert not import_panel._is_ours(json.dumps(BENCH).encode())
    assert not import_panel._is_ours(b"\xff\x00")


@pytest.mark.parametrize("part", ["fits", "registry", "record", "own", "import", "<img src=x>"])
def test_every_part_opens_on_an_empty_home(home, part):
    app = open_page("devices", part=part, device="<b>", variant="<b>", held="<b>", kv="<b>", of="<b>")
    assert app.title[0].value == "Devices"
