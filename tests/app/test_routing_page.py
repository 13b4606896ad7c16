"""The Routing page: what a mixture is made of, the ways on from it, and what it says of a dense model."""

from __future__ import annotations

import json

from core.registry import methods


def plain(text: str) -> str:
    return text.replace("\\", "")


def links(app) -> dict[str, str]:
    """Label → query of every page link."""
    return {plain(link.proto.label): link.proto.query_string for link in app.get("page_link")}


def test_a_mixture_is_described_and_its_load_is_drawn(opened, tiny_moe):
    app = opened("routing", model=str(tiny_moe), text="one two three")
    config = json.loads((tiny_moe / "config.json").read_text())
    shown = {metric.label: metric.value for metric in app.metric}
    assert shown["Experts"] == f"{config['num_experts']} × {config['num_hidden_layers']}"
    assert plain(app.title[0].value).startswith(methods("probe")["expert_load"].title)


def test_active_parameters_are_counted(opened, tiny_moe):
    """All but the experts that a token does not meet: by hand from the config."""
    from safetensors import safe_open

    config = json.loads((tiny_moe / "config.json").read_text())
    total = routed = 0
    with safe_open(tiny_moe / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118 (not a dict)
            numbers = file.get_tensor(name).numel()
            total += numbers
            routed += numbers if ".experts." in name else 0
    share = config["num_experts_per_tok"] / config["num_experts"]
    active = total - routed * (1 - share)
    app = opened("routing", model=str(tiny_moe), text="one two three")
    metric = next(metric for metric in app.metric if metric.label == "Active parameters")
    assert f"({active / total:.0%})" in metric.delta


def test_every_method_that_compresses_by_routing_is_one_click_away(opened, tiny_moe):
    app = opened("routing", model=str(tiny_moe), text="one two three")
    titles = {m.title for m in methods("compress").values() if "moe" in m.needs}
    assert titles
    assert titles <= set(links(app))


def test_a_dense_model_is_told_so_and_offered_experts(opened, tiny_llama):
    app = opened("routing", model=str(tiny_llama))
    assert plain(app.title[0].value).endswith("is dense")
    assert any("no experts" in plain(said.value) for said in app.markdown)
    titles = {m.title for m in methods("compress").values() if "dense" in m.needs}
    assert titles
    assert titles <= set(links(app))
    app.button(key="open_demo_moe").click().run()
    assert app.session_state["model"] == "demo:moe"


def test_a_link_to_an_expert_probe_leads_here(opened, tiny_moe):
    app = opened("inspect", model=str(tiny_moe), probe="expert_load", text="one two three")
    assert app.selectbox(key="probe").value == "expert_load"
    assert any(metric.label == "Experts" for metric in app.metric)
