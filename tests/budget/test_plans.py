"""Plans for a budget, from sensitivities of a tiny model that were measured once and stored."""

from __future__ import annotations

import json

import pandas as pd
import pytest
from streamlit.testing.v1 import AppTest

from app import budget
from core.bench import probe_model
from core.budget.allocation import OverBudget
from core.budget.plans import Sensitivity, plans
from core.catalog.results import result_of
from core.catalog.store import Catalog
from core.errors import BadInput
from core.loop import register
from core.planning import document, newest_sensitivity, plan_model, summary
from core.recipe import Recipe
from core.types import Prompt
from tests.tiny import tiny_folder

ASKED = {"formats": "int2g32, int4g32, int8, float8", "samples": 2, "sample_tokens": 16}


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A catalog with one base and its measured sensitivities."""
    home = tmp_path_factory.mktemp("home")
    catalog = Catalog(f"sqlite:///{home / 'catalog.sqlite'}")
    model = str(tiny_folder("smollm", home / "model"))
    run = probe_model(catalog, model, "layer_sensitivity", Prompt(""), settings=ASKED)
    return home, catalog, model, run, Sensitivity.of(result_of(catalog, run.id))


def test_the_probe_is_stored_and_found_again(stored) -> None:
    _, catalog, model, run, table = stored
    assert newest_sensitivity(catalog, register(catalog, model).id).id == run.id
    assert newest_sensitivity(catalog, register(catalog, model).id, {"formats": "int4"}) is None
    assert run.conditions["notes"]
    assert {m.name for m in run.measurements} >= {"fisher_rank_correlation", "largest_loss"}
    assert result_of(catalog, run.id).provenance.exactness_gap == 0
    assert table.score == "exact"
    planned = plan_model(catalog, model, "6bpw")
    assert planned.run == run.id, "nothing is measured anew"
    first = json.loads(json.dumps(document(planned)))["plans"][0]
    assert Recipe.parse(first["recipe"]) == planned.plans[0].recipe
    assert summary(planned)[0]["MB"] == pytest.approx(first["bytes"] / 1e6)


def test_plans_keep_the_budget_and_are_recipes(stored) -> None:
    *_, table = stored
    budget_bytes = int(5 * table.parameters / 8)
    found = {plan.kind: plan for plan in plans(table, budget_bytes, tolerance="0.1")}
    assert next(iter(found)) == "quantize", "the cheapest to run comes first"
    quantize, prune = found["quantize"], found["prune and quantize"]
    assert quantize.bytes <= budget_bytes
    assert prune.bytes <= budget_bytes
    assert quantize.within == (quantize.loss <= 0.1)
    assert [step.method for step in prune.recipe.steps] == ["drop_layers", "mixed_precision"]
    least = int(table.drops.sort_values("loss")["layer"].iloc[0])
    assert prune.recipe.steps[0].settings["layers"] == str(least)
    assert prune.loss > float(table.drops["loss"].min())
    layers = {name.partition(".")[0] for name in prune.assignment} - {"embedding"}
    assert layers == {"0", "1"}, "what stays is numbered anew"
    assert Recipe.parse(quantize.recipe.model_dump(mode="json")) == quantize.recipe


def test_where_nothing_fits_a_student_is_named_and_no_recipe_invented(stored) -> None:
    *_, table = stored
    with pytest.raises(OverBudget) as caught:
        table.allocate(0)
    (plan, *_) = [p for p in plans(table, int(caught.value.minimum * 0.85)) if p.kind == "distil"]
    assert plan.recipe is None
    assert plan.loss is None
    assert "of the 3 layers" in plan.words
    with pytest.raises(OverBudget, match="the minimum is"):
        plans(table, 1000)


def test_a_pinned_layer_is_not_dropped(stored) -> None:
    *_, table = stored
    least = int(table.drops.sort_values("loss")["layer"].iloc[0])
    found = plans(table, int(6 * table.parameters / 8), pins={f"{least}.o": "int8"})
    prune = next(plan for plan in found if plan.kind == "prune and quantize")
    assert prune.recipe.steps[0].settings["layers"] != str(least)
    with pytest.raises(BadInput, match="there is no such group"):
        plans(table, 10**9, pins={"9.o": "int8"})


def test_a_click_sets_moves_and_takes_away_a_pin() -> None:
    assert budget.toggled({}, "0.o", "int4") == "0.o:int4"
    assert budget.toggled({"0.o": "int4"}, "0.o", "int8") == "0.o:int8"
    assert budget.toggled({"0.o": "int8"}, "0.o", "int8") == ""


def test_predicted_against_measured_is_drawn_with_its_intervals() -> None:
    points = pd.DataFrame({"parts": [1, 2], "predicted": [0.1, 0.2], "loss": [0.1, 0.3], "loss_low": [0.0, 0.2],
                           "loss_high": [0.2, 0.4]})  # fmt: skip
    layers = budget.predicted_chart(points, "nats/token").to_dict()["layer"]
    assert [layer["mark"]["type"] for layer in layers] == ["line", "rule", "point"]
    few = budget.predicted_chart(points.assign(loss_low=None, loss_high=None), "nats/token").to_dict()[
        "layer"
    ]
    assert [layer["mark"]["type"] for layer in few] == ["line", "point"]


def _panel(run_id: str) -> None:
    import streamlit as st

    from app import budget
    from app.components.budget_panel import spend
    from core.errors import BadInput

    def make(recipes) -> None:
        st.session_state["made"] = [recipe.canonical() for recipe in recipes]

    try:
        recipe = spend(run_id, budget.sensitivity(run_id), make=make, told=lambda recipe: "a second")
        st.markdown(recipe.canonical() if recipe else "none", help="recipe")
    except BadInput as error:
        st.error(str(error))


def test_the_panel_spends_a_budget_without_running_anything(stored, monkeypatch) -> None:
    home, _, _, run, _ = stored
    monkeypatch.setenv("SLIMSCOPE_HOME", str(home))
    monkeypatch.delenv("SLIMSCOPE_CATALOG", raising=False)
    app = AppTest.from_function(_panel, args=(run.id,), default_timeout=60).run()
    assert not app.exception, app.exception
    slider = app.slider(key="budget_mb")
    assert slider.min * 1e6 == pytest.approx(budget.budget_range(run.id, ()).smallest)
    first = {metric.label: metric.value for metric in app.metric}
    slider.set_value(slider.max).run()
    assert {metric.label: metric.value for metric in app.metric}["Expected loss"] != first["Expected loss"]
    app.text_input(key="budget_pins").set_value("0.o:int8").run()
    assert not app.exception, app.exception
    assert "0.o:int8" in app.markdown[-1].value
    app.button(key="make_prune_and_quantize").click().run()
    [made] = app.session_state["made"]
    assert "drop_layers" in made, "one click makes a plan"
    assert "0.o:int8" in made
    app.button(key="edit_prune_and_quantize").click().run()
    assert app.query_params["recipe"] == made
    assert app.query_params["write_as"] == "steps"
    app.slider(key="budget_mb").set_value(app.slider(key="budget_mb").min).run()
    told = " ".join(text.value for text in app.markdown)
    assert "Infeasible with these pins: the minimum is" in told
    assert app.slider(key="budget_mb").value == slider.min, "a pin does not move the budget"
    app.text_input(key="budget_pins").set_value("9.o:int8").run()
    assert "there is no such group" in app.error[0].value
