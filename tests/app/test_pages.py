from __future__ import annotations

import json
import shutil

import pytest

from app.questions import page_of
from core.registry import methods


def plain(text: str) -> str:
    return text.replace("\\", "")


def test_home_offers_every_demo_and_says_what_is_missing(opened):
    app = opened("home")
    assert app.title[0].value == "What do you want to look at?"
    assert {plain(header.value) for header in app.header} >= {"SmolLM2-135M-Instruct", "all-MiniLM-L6-v2"}
    assert any("No variants yet" in said.value for said in app.markdown)
    assert app.selectbox(key="model").value == "demo:smollm2"


def test_one_click_on_home_goes_to_that_model(opened, monkeypatch):
    monkeypatch.setattr("app.components.waiting.INLINE_WAIT_S", 0.0)
    app = opened("home")
    app.button(key="minilm_model").click().run()
    assert app.session_state["model"] == "demo:minilm"


def test_model_shows_bytes_by_component(opened, tiny_llama):
    app = opened("model", model=str(tiny_llama))
    assert "parameters in" in app.title[0].value
    assert [metric.label for metric in app.metric][:4] == ["Weights", "Layers", "Heads", "Vocabulary"]
    assert [plain(header.value) for header in app.header] == [
        *("Where the bytes are", "Every module", "What it would weigh", "KV cache")
    ]
    modules = app.dataframe[0].value
    assert modules["parameters"].sum() > 0
    assert modules["share"].sum() == pytest.approx(1)


def test_the_cache_doubles_with_the_context(opened, tiny_llama):
    app = opened("model", model=str(tiny_llama), context="10", cache="float32")
    small = next(metric.value for metric in app.metric if metric.label == "At 10 tokens")
    app.slider(key="context").set_value(20).run()
    large = next(metric.value for metric in app.metric if metric.label == "At 20 tokens")
    assert float(large.split()[0]) == pytest.approx(2 * float(small.split()[0]), rel=0.01)


@pytest.mark.parametrize("id_", methods("probe"))
def test_every_probe_is_drawn(
    opened, tiny_llama, tiny_bert, tiny_vit, tiny_moe, tiny_moe_other, tiny_other, id_
):
    """On a tiny model of a family it is for: a result, or one refusal in words; never an exception."""
    probe = methods("probe")[id_]
    model = tiny_bert if "encoder" in probe.needs else tiny_vit if "vision" in probe.needs else tiny_llama
    other = tiny_other
    if "moe" in probe.needs:
        model, other = tiny_moe, tiny_moe_other
    query = {"reference": str(other)} if probe.takes_reference else {}
    app = opened(page_of(probe), model=str(model), probe=id_, text="one two three one two", **query)
    assert app.selectbox(key="probe").value == id_
    if any(button.key == "probe_now" for button in app.button):
        app.button(key="probe_now").click().run()
        assert not app.exception, app.exception
    assert plain(app.title[0].value).startswith(probe.title)
    drawn = any("float32" in plain(caption.value) for caption in app.caption)
    refused = any(
        title in said.value for said in app.markdown for title in ("That did not work", "One more input")
    )
    assert drawn or refused, [plain(said.value) for said in app.markdown]


def test_a_link_opens_the_cell_it_names(opened, tiny_llama):
    app = opened("inspect", model=str(tiny_llama), text="one two three", cell="1~2")
    assert any(plain(header.value).startswith("Layer 1, position 2") for header in app.header)


@pytest.mark.parametrize("cell", ["99~0", "nonsense", "~", "<img>~0"])
def test_a_link_to_no_cell_is_ignored(opened, tiny_llama, cell):
    app = opened("inspect", model=str(tiny_llama), text="one two three", cell=cell)
    assert "One cell" in [header.value for header in app.header]


def test_the_colour_of_a_map_is_in_the_address(opened, tiny_llama):
    app = opened("inspect", model=str(tiny_llama), text="one two", logit_lens_map0_colour="kl_to_final_nats")
    assert any("KL" in header.value for header in app.header)


def test_an_encoder_says_which_probes_it_misses(opened, tiny_bert):
    app = opened("inspect", model=str(tiny_bert), text="one two")
    assert any("Logit lens needs a decoder." in plain(c.value) for c in app.caption)
    assert "Logit lens" not in app.selectbox(key="probe").options


def test_reproduce_names_model_text_and_changed_settings(opened, tiny_llama):
    app = opened("inspect", model=str(tiny_llama), text="it's", logit_lens_top_k="3")
    command, script = (block.value for block in app.code)
    assert f"slimscope probe logit_lens --model {tiny_llama}" in command
    assert "top_k=3" in command
    assert "TOP_K = 3" in script
    assert f"MODEL = {str(tiny_llama)!r}" in script


@pytest.mark.parametrize(
    ("model", "words"),
    [("/nowhere/at/all", "/nowhere/at/all"), ("demo:gpt9", "demo:smollm2"), ("variant:beef", "beef")],
)
@pytest.mark.parametrize("page", ["model", "inspect"])
def test_what_cannot_be_opened_is_one_card_with_one_sentence(opened, page, model, words):
    app = opened(page, model=model)
    assert any(words in plain(said.value) for said in app.markdown)


def test_broken_files_are_one_card_that_says_what_is_wrong(opened, tiny_llama, tmp_path):
    corrupt = shutil.copytree(tiny_llama, tmp_path / "corrupt")
    for file in corrupt.glob("*.safetensors"):
        file.write_bytes(b"\x00" * 64)
    unknown = shutil.copytree(tiny_llama, tmp_path / "unknown")
    config = json.loads((unknown / "config.json").read_text())
    (unknown / "config.json").write_text(json.dumps(config | {"model_type": "martian"}))
    truncated = tmp_path / "cut.gguf"
    truncated.write_bytes(b"GGUF\x03\x00\x00\x00")
    for source, words in ((corrupt, "safetensors"), (unknown, "martian"), (truncated, "cut.gguf")):
        app = opened("model", model=str(source))
        said = [plain(said.value) for said in app.markdown]
        assert any("cannot be opened" in line or "not understood" in line for line in said), said
        assert any(words in line for line in said), said
        assert not any("Traceback" in line for line in said)


def test_an_empty_prompt_is_refused_in_a_sentence(opened, tiny_llama):
    app = opened("inspect", model=str(tiny_llama), text=" ")
    assert any("prompt" in plain(said.value).lower() for said in app.markdown), [
        m.value for m in app.markdown
    ]


def test_a_missing_input_is_asked_for_and_is_no_failure(opened, tiny_llama):
    app = opened("inspect", model=str(tiny_llama), probe="activation_patching", text="one two three")
    said = [plain(line.value) for line in app.markdown]
    assert any("One more input" in line for line in said), said
    assert any("corrupted" in line for line in said), said
    assert not any("That did not work" in line for line in said)


@pytest.mark.parametrize(("family", "words"), [("mixtral", "experts,"), ("gemma2", "sliding window")])
def test_model_tells_experts_and_windows(opened, tmp_path, family, words):
    from tests.tiny import tiny_folder

    app = opened("model", model=str(tiny_folder(family, tmp_path)))
    assert any(words in plain(caption.value) for caption in app.caption), [c.value for c in app.caption]


def test_hostile_names_stay_text(opened):
    hostile = "![x](http://evil.example/x.png)"
    app = opened("model", model=hostile)
    for said in [*app.markdown, *app.title, *app.caption]:
        assert hostile not in said.value
