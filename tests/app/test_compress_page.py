from __future__ import annotations

import json

import pytest
from streamlit.testing.v1 import AppTest

from app import engine
from core.jobs.queue import Queue
from core.recipe import Recipe
from tests.app.tradeoff_app import ROOT, checked, new_catalog, open_page
from tests.tiny import tiny_folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    yield str(tiny_folder("llama", tmp_path_factory.mktemp("model")))
    engine.inspector().close()
    engine.inspector.clear()


@pytest.fixture
def queue(tmp_path, monkeypatch, model):
    monkeypatch.setenv("SLIMSCOPE_HOME", str(tmp_path))
    monkeypatch.delenv("SLIMSCOPE_CATALOG", raising=False)
    # A test starts no daemon: what the supervisor does with the queue has its own tests.
    monkeypatch.setattr("app.engine.start_work", lambda: None)
    catalog = new_catalog(tmp_path)
    # AppTest can only select what is listed, so the model is entered as a base (not yet measured).
    catalog.add_base(
        model, name="tiny", fingerprint="tiny", architecture="llama", family="decoder", parameters=1, nbytes=4,
        bits_per_weight=32.0, format="float32",
    )  # fmt: skip
    return Queue(catalog)


def oldest_first(queue: Queue):
    return queue.jobs()[::-1]


def test_one_click_on_a_preset_queues_the_whole_loop(queue, model):
    app = open_page("compress", model=model)
    app.button(key="make_int8").click().run()
    checked(app)
    jobs = oldest_first(queue)
    assert [job.kind for job in jobs] == ["compress", "evaluate", "profile", "evaluate", "profile"]
    made, evaluated, profiled, base_evaluated, base_profiled = jobs
    assert (evaluated.depends_on, profiled.depends_on) == (made.id, made.id)
    assert (base_evaluated.depends_on, base_profiled.depends_on) == (None, None)
    assert len({job.group_id for job in jobs}) == 1
    recipe = Recipe.of("rtn", bits=8, group_size="channel", scheme="symmetric")
    assert Recipe.parse(made.spec["recipe"]) == recipe
    assert base_evaluated.spec["recipe"] is None
    assert evaluated.spec["documents"] == {"source": "pydoc"}
    assert app.query_params["group"] == made.group_id
    titles = [text.value for text in app.markdown if "Compress ·" in text.value]
    assert len(titles) == 1, "the submitted job is shown at once"


def test_clicking_twice_queues_once(queue, model):
    app = open_page("compress", model=model)
    app.button(key="make_bf16").click().run()
    app.button(key="make_bf16").click().run()
    checked(app)
    assert len(queue.jobs()) == 5
    app.button(key="make_int4").click().run()
    kinds = [job.kind for job in oldest_first(queue)[5:]]
    assert kinds == ["compress", "evaluate", "profile"], "the base is already waiting to be measured"


def test_the_form_makes_the_recipe_and_the_tier_reaches_the_profile(queue, model):
    app = open_page("compress", model=model, profile_tier="rapid")
    app.selectbox(key="step0_bits").set_value(2).run()
    app.button(key="make_own").click().run()
    checked(app)
    made, _, profiled = oldest_first(queue)[:3]
    assert made.spec["recipe"]["steps"][0]["settings"]["bits"] == 2
    assert json.loads(app.query_params["recipe"]) == made.spec["recipe"], "the recipe is a link"
    assert profiled.spec["settings"] == {"tier": "rapid"}


def steps(app) -> list[str]:
    """Methods of the recipe that the address holds, in order."""
    return [step["method"] for step in json.loads(app.query_params["recipe"])["steps"]]


def test_steps_are_added_ordered_duplicated_and_removed_without_dragging(queue, model):
    app = open_page("compress", model=model)
    assert app.button(key="step_remove_0").disabled, "the only step stays"
    app.button(key="add_cast_0").click().run()
    assert steps(app) == ["rtn", "cast"]
    assert any("will be refused" in text.value for text in app.markdown), "a cast after a quantizing step"
    app.button(key="step_up_1").click().run()
    assert steps(app) == ["cast", "rtn"]
    assert not any("will be refused" in text.value for text in app.markdown)
    assert app.button(key="step_up_2").disabled
    app.button(key="step_duplicate_2").click().run()
    assert steps(app) == ["cast", "cast", "rtn"]
    app.button(key="step_remove_3").click().run()
    app.button(key="make_own").click().run()
    checked(app)
    assert [s["method"] for s in oldest_first(queue)[0].spec["recipe"]["steps"]] == ["cast", "rtn"]


def test_json_and_steps_are_two_faces_of_one_recipe(queue, model):
    app = open_page("compress", model=model)
    app.segmented_control(key="write_as").set_value("json").run()
    written = json.dumps({"steps": [{"method": "rtn", "settings": {"bits": 3}}, {"method": "magnitude"}]})
    app.text_area(key="recipe_text0").set_value(written).run()
    app.segmented_control(key="write_as").set_value("steps").run()
    checked(app)
    assert app.selectbox(key="step1_bits").value == 3
    app.selectbox(key="step1_bits").set_value(5).run()
    app.segmented_control(key="write_as").set_value("json").run()
    shown = json.loads(app.text_area(key="recipe_text1").value)
    assert [step["method"] for step in shown["steps"]] == ["rtn", "magnitude"]
    assert shown["steps"][0]["settings"]["bits"] == 5


def test_a_sweep_queues_every_combination_in_one_group(queue, model):
    app = open_page("compress", model=model)
    for _ in range(40):
        if engine.open_model(model).ticket.succeeded:
            break
        engine.open_model(model).ticket.result(timeout=60)
    app.session_state["sweep"] = True
    app.run()
    app.session_state["sweep_rtn_bits_values"] = ["3", "8"]
    app.selectbox(key="sweep_rtn_1").set_value("group_size").run()
    app.session_state["sweep_rtn_group_size_values"] = ["32", "64"]
    app.run()
    checked(app)
    app.button(key="make_sweep").click().run()
    checked(app)
    made = [job for job in oldest_first(queue) if job.kind == "compress"]
    swept = [job.spec["recipe"]["steps"][0]["settings"] for job in made]
    assert [(s["bits"], s["group_size"]) for s in swept] == [(3, "32"), (3, "64"), (8, "32"), (8, "64")]
    assert len({job.group_id for job in queue.jobs()}) == 1
    assert len(queue.jobs()) == 4 * 3 + 2, "the base is measured once"


def test_a_recipe_in_the_address_is_made_as_it_is(queue, model):
    written = json.dumps({"steps": [{"method": "cast", "settings": {"dtype": "float16"}}]})
    app = open_page("compress", model=model, recipe=written)
    app.button(key="make_own").click().run()
    checked(app)
    assert oldest_first(queue)[0].spec["recipe"]["steps"][0]["settings"]["dtype"] == "float16"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "This is not JSON"),
        ('{"steps": []}', "recipe: steps"),
        ('{"steps": [{"method": "rtn", "settings": {"bits": 9}}]}', "bits = 9"),
        ('{"steps": [{"method": "magic"}]}', "no compress method is called 'magic'"),
    ],
)
def test_a_wrong_recipe_is_one_sentence_and_no_button(queue, model, text, said):
    app = open_page("compress", model=model, recipe=text)
    shown = " ".join(element.value for element in app.markdown).replace("\\", "")
    assert said in shown
    assert app.button(key="make_own").disabled


def test_a_missing_model_is_one_card(queue):
    app = AppTest.from_file(str(ROOT / "pages" / "compress.py"), default_timeout=60)
    app.session_state["model"] = "/nowhere/at/all"
    for _ in range(30):
        app.run()
        shown = " ".join(text.value for text in checked(app).markdown).replace("\\", "")
        if "cannot be opened" in shown:
            break
    assert "/nowhere/at/all" in shown
