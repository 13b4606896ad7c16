"""The command line, end to end on a tiny model: every command, one JSON document, one-line errors."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from core import cli
from core.registry import PACKAGES, methods
from tests.tiny import tiny_folder


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(tiny_folder("smollm", tmp_path_factory.mktemp("tiny") / "smollm"))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """One home for the module: what a command made, the next one finds."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLIMSCOPE_HOME", str(folder / "data"))
        patch.setenv("SLIMSCOPE_CACHE", str(folder / "cache"))
        patch.delenv("SLIMSCOPE_CATALOG", raising=False)
        yield folder


@pytest.fixture
def ask(home, capfd):
    """Run a command with ``--json`` and return the document; it must be all there is on stdout."""

    def run(*arguments: str):
        code = cli.main([*arguments, "--json"])
        out, err = capfd.readouterr()
        assert code == 0, err
        return json.loads(out)

    return run


@pytest.fixture
def fail(home, capfd):
    """Run a command that must fail, and return its one line."""

    def run(*arguments: str) -> str:
        code = cli.main([*arguments, "--json"])
        out, err = capfd.readouterr()
        lines = [line for line in err.splitlines() if line.startswith("slimscope:")]
        assert (code, out, len(lines)) == (1, "", 1), err
        return lines[0]

    return run


def test_methods_lists_id_kind_title_needs_and_schema(ask):
    found = ask("methods")
    assert {(m["kind"], m["id"]) for m in found} == {
        (kind, id_) for kind in PACKAGES for id_ in methods(kind)
    }
    assert all({"title", "needs", "settings"} <= set(m) for m in found)
    assert {m["kind"] for m in ask("methods", "--kind", "probe")} == {"probe"}


def test_open_says_what_the_model_is(ask, model):
    card = ask("open", model)
    assert card["fingerprint"]


def test_probe_prints_frames_and_metrics(ask, model):
    result = ask("probe", "logit_lens", "--model", model, "--text", "one two three", "--set", "top_k=3")
    assert result["provenance"]["settings"]["top_k"] == 3
    assert result["provenance"]["exactness_gap"] == 0
    assert result["frames"]["main"]


def test_a_dry_run_tells_the_cost_and_computes_nothing(ask, model):
    told = ask("probe", "logit_lens", "--model", model, "--text", "one two three", "--dry-run")
    assert told["forwards"] >= 1
    assert told["seconds"] > 0
    assert told["n_tokens"] >= 3
    assert "frames" not in told


def test_probe_takes_a_pair_and_an_image(ask, tmp_path):
    encoder, vision = (str(tiny_folder(name, tmp_path / name)) for name in ("bert", "vit"))
    pair = ask("probe", "residual_norms", "--model", encoder, "--text", "one two", "--second", "three")
    alone = ask("probe", "residual_norms", "--model", encoder, "--text", "one two")
    assert len(pair["frames"]["main"]) > len(alone["frames"]["main"])
    seen = ask("probe", "attention_rollout", "--model", vision, "--image", "digits:3")
    assert all(seen["frames"].values())
    assert all(picture.startswith("iVBOR") for picture in seen["images"].values()), "PNG in base64"


def test_training_ends_in_an_artifact_that_is_found_again(ask, home, tmp_path):
    from core.catalog.queries import trained
    from core.catalog.results import result_of
    from core.catalog.store import Catalog

    model = str(tiny_folder("llama", tmp_path / "llama"))
    small = ("max_tokens=2000", "positions=64", "held_out_positions=32", "epochs=1")
    run = ask("train", "tuned_lens", "--model", model, *(part for s in small for part in ("--set", s)))
    assert run["kind"] == "train"
    catalog = Catalog()
    artifact = run["conditions"]["artifact"]
    assert (catalog.artifact_folder(artifact) / "weights.safetensors").is_file()
    base = catalog.variant(run["variant_id"]).base_id
    assert [found.conditions["artifact"] for found in trained(catalog, base)] == [artifact]
    assert run["conditions"]["facts"]["method"] == "tuned_lens"
    assert result_of(catalog, run["id"]).frames


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("recipe") / "recipe.json"
    file.write_text(json.dumps({"steps": [{"method": "rtn", "settings": {"bits": 4, "group_size": "32"}}]}))
    return str(file)


def test_the_loop_from_the_command_line(ask, model, recipe_file):
    made = ask("compress", "rtn", "--model", model, "--set", "bits=4", "--set", "group_size=32")
    assert made["proven"]
    assert made["proof"]["max_logit_difference"] == 0
    assert made["reused"] is False

    again = ask("compress", "rtn", "--model", model, "--set", "bits=4", "--set", "group_size=32")
    assert (again["variant"], again["reused"]) == (made["variant"], True), (
        "the same recipe is the same variant"
    )

    ran = ask("run", recipe_file, "--model", model, "--with-base", "--profile-set", "prompt_tokens=64")
    assert ran["variant"] == made["variant"], "a recipe file and --set mean the same"
    assert [run["kind"] for run in ran["runs"]] == ["evaluate", "profile"] * 2

    rows = {row["variant"]: row for row in ask("compare")}
    small, base = rows[made["variant"]], rows[made["base"]]
    for column in ("kl", "bits_per_byte", "prefill_tokens_per_s", "decode_tokens_per_s", "peak_memory_bytes"):
        assert small[column] is not None, column
        assert base[column] is not None, column
    assert base["kl"] == 0
    assert small["kl"] > 0
    assert small["kl_low"] <= small["kl"] <= small["kl_high"]
    assert small["bytes"] == made["bytes"] < base["bytes"]
    assert small["proven"]
    assert {row["on_front"] for row in rows.values()} <= {True, False}

    assert ask("evaluate", made["open"])["variant_id"] == made["variant"]
    assert ask("profile", made["open"], "--tier", "rapid", "--set", "prompt_tokens=64")["kind"] == "profile"
    assert ask("open", made["open"])["fingerprint"]


def test_quality_is_measured_in_the_dtype_the_artifact_declares(ask, model):
    cast = ask("compress", "cast", "--model", model, "--set", "dtype=bfloat16")
    conditions = ask("evaluate", cast["open"], "--set", "max_documents=2")["conditions"]
    assert (conditions["dtype"], conditions["base_dtype"]) == ("bfloat16", "float32")


def test_an_encoder_goes_round_the_loop_too(ask, tmp_path):
    encoder = str(tiny_folder("bert", tmp_path / "bert"))
    made = ask("compress", "rtn", "--model", encoder, "--set", "bits=8", "--set", "group_size=channel")
    run = ask("evaluate", made["open"], "--set", "max_documents=2")
    measured = {m["name"]: m["value"] for m in run["measurements"]}
    assert 0.9 < measured["cosine_agreement"] < 1


def test_distil_says_its_recipe_and_data_what_it_holds(ask, model):
    recipe = ask("distil", model, "--layers", "2", "--data", "pydoc", "--set", "max_tokens=512", "--dry-run")
    cut, training = recipe["steps"]
    assert (cut["method"], cut["settings"]["count"]) == ("drop_layers", 1)
    assert (training["method"], training["settings"]["max_tokens"]) == ("distil", 512)
    assert ask("data", "pydoc", "--model", model)["frames"]["lengths"]


def test_compare_of_an_empty_catalog_is_an_empty_list(ask, tmp_path):
    assert ask("compare", "--catalog", str(tmp_path / "other.sqlite")) == []


def test_jobs_of_an_empty_queue(ask):
    assert ask("jobs") == []


def test_doctor_finds_no_problem_here(ask):
    assert [check for check in ask("doctor") if check["state"] == "problem"] == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("open", "./no-such-folder"), "no-such-folder"),
        (("open", "demo:gpt5"), "smollm2"),
        (("open", "variant:zzz"), "no variant is called 'zzz'"),
        (("probe", "logit_lense", "--model", "demo:smollm2"), "logit_lens"),
        (("probe", "logit_lens", "--model", "demo:smollm2", "--set", "top_k=0"), "top_k"),
        (("probe", "logit_lens", "--model", "demo:smollm2", "--set", "topk"), "--set key=value"),
        (("train", "tuned_lense", "--model", "demo:smollm2"), "tuned_lens"),
        (("compress", "rtn", "--model", "demo:smollm2", "--set", "bits=9"), "bits"),
        (("run", "none.json", "--model", "demo:smollm2"), "none.json"),
        (("compare", "--base", "nobody"), "no base 'nobody'"),
        (("jobs", "cancel", "nobody"), "nobody"),
        (("jobs", "cancel"), "needs a job id"),
        (("distil", "demo:smollm2", "--template", "third"), "half, two_thirds"),
        (("data", "no-such-rows"), "no-such-rows"),
        (("open", "demo:smollm2", "--catalog", "mysql+nothing://x"), "mysql"),
    ],
)
def test_a_wrong_input_is_one_line_with_the_next_move(fail, arguments, words):
    assert words in fail(*arguments)


def test_an_unreadable_command_line_exits_2():
    done = subprocess.run(
        [sys.executable, "-m", "core.cli", "compres"], check=False, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
