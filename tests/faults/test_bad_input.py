"""Bad input on the command line: exit code 1 and one line that says what was wrong, what is allowed, what to do."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from core import cli
from core.catalog.store import Catalog
from tests.tiny import tiny_folder

Refusal = Callable[..., str]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A healthy model; each test damages a copy."""
    return tiny_folder("smollm", tmp_path_factory.mktemp("whole") / "smollm")


@pytest.fixture
def model(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Refusal:
    """Run a command that must fail; returns its one line, after checking that there is nothing else."""
    monkeypatch.setenv("SLIMSCOPE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SLIMSCOPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SLIMSCOPE_CATALOG", raising=False)

    def run(*arguments: str) -> str:
        capfd.readouterr()  # what making the model said
        code = cli.main([*arguments, "--json"])
        out, err = capfd.readouterr()
        assert code == 1, err
        assert out == "", "stdout belongs to the answer"
        lines = err.splitlines()
        assert len(lines) == 1, err
        assert lines[0].startswith("slimscope: ")
        return lines[0]

    return run


def assert_says(line: str, *parts: str) -> None:
    for part in parts:
        assert part in line, line


# --- models -------------------------------------------------------------------------------------------


def test_a_missing_folder(refused: Refusal, tmp_path: Path) -> None:
    line = refused("open", str(tmp_path / "nowhere"))
    assert_says(
        line, f"{tmp_path / 'nowhere'} does not exist", "give an existing folder, a .gguf file or a hub id"
    )


def test_a_safetensors_file_with_a_damaged_header(refused: Refusal, model: Path) -> None:
    weights = model / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[8] ^= 0xFF  # the header's first brace
    weights.write_bytes(data)
    assert_says(refused("open", str(model)), str(weights), "its header is damaged", "fetch it again")


@pytest.mark.parametrize("kept", [0, 7, 100, -1], ids=["empty", "no length", "no header", "one byte less"])
def test_a_safetensors_file_cut_short(refused: Refusal, model: Path, kept: int) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:kept])
    assert_says(refused("open", str(model)), str(weights), "fetch it again")


def test_a_gguf_file_cut_short(refused: Refusal, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF" + (3).to_bytes(4, "little") + (200).to_bytes(8, "little"))
    assert_says(refused("open", str(file)), str(file), "cut short", "fetch it again")


def test_a_file_that_is_no_gguf(refused: Refusal, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"PK\x03\x04")
    assert_says(refused("open", str(file)), "is not a GGUF file", "give another file")


@pytest.mark.parametrize("model_type", ["llama", "foo"])
def test_an_unknown_architecture(refused: Refusal, model: Path, model_type: str) -> None:
    config = json.loads((model / "config.json").read_text())
    config |= {"architectures": ["FooForCausalLM"], "model_type": model_type}
    (model / "config.json").write_text(json.dumps(config))
    line = refused("open", str(model))
    assert_says(line, str(model), "FooForCausalLM, which transformers", "open another model")


def test_a_config_that_is_not_json(refused: Refusal, model: Path) -> None:
    (model / "config.json").write_text("{")
    assert_says(refused("open", str(model)), "config.json cannot be read as JSON", "fetch the file again")


def test_a_group_size_that_does_not_divide(refused: Refusal, tmp_path: Path) -> None:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=512,
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "odd")
    line = refused("compress", "rtn", "--model", str(tmp_path / "odd"), "--set", "group_size=64")
    assert_says(line, "model.", "96", "64", "32", "channel")


def test_an_unknown_hub_id_offline(refused: Refusal, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    line = refused("open", "nobody/nothing-at-all")
    assert_says(line, "nobody/nothing-at-all is not in the local hub cache", "go online once")


def test_an_unknown_variant(refused: Refusal) -> None:
    for command in ("open", "evaluate", "profile"):
        assert_says(
            refused(command, "variant:abc"), "no variant is called 'abc'", "slimscope compare lists them"
        )


# --- text ---------------------------------------------------------------------------------------------


def test_an_empty_text_file(refused: Refusal, model: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    line = refused("evaluate", str(model), "--documents", str(tmp_path / "empty.txt"))
    assert_says(line, "empty.txt is empty", "give a file with text in it")


def test_a_text_file_that_is_not_utf8(refused: Refusal, model: Path, tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 200)
    line = refused("evaluate", str(model), "--documents", str(tmp_path / "latin.txt"))
    assert_says(line, "latin.txt is not UTF-8: byte 0xe9 at offset 3", "save it as UTF-8")


def test_a_text_that_does_not_exist(refused: Refusal, model: Path, tmp_path: Path) -> None:
    line = refused("evaluate", str(model), "--documents", str(tmp_path / "none.txt"))
    assert_says(line, "none.txt does not exist", "check the path")


# --- recipes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{steps", "is not JSON"),
        ("[]", "a recipe looks like"),
        ('{"steps": []}', "a recipe looks like"),
        ('{"steps": [{"method": "rtm"}]}', "rtn"),
        ('{"steps": [{"method": "rtn", "settings": {"bits": 9}}]}', "bits"),
        ("caf\xe9", "is not JSON"),
    ],
)
def test_a_recipe_file_that_is_none(refused: Refusal, tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "recipe.json").write_bytes(text.encode("latin-1"))
    line = refused("run", str(tmp_path / "recipe.json"), "--model", "demo:smollm2")
    assert_says(line, "recipe.json", words)


# --- catalogs -----------------------------------------------------------------------------------------


def test_a_catalog_that_is_a_folder(refused: Refusal, tmp_path: Path) -> None:
    line = refused("compare", "--catalog", str(tmp_path))
    assert_says(line, f"{tmp_path} is a folder", "give the path of a SQLite file")


def test_a_catalog_that_is_not_sqlite(refused: Refusal, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("not a database\n" * 100)
    line = refused("compare", "--catalog", str(tmp_path / "notes.txt"))
    assert_says(line, "notes.txt", "not a database", "give the path of a catalog")
    assert (tmp_path / "notes.txt").read_text() == "not a database\n" * 100, "it is left as it was"


def test_a_catalog_of_another_program(refused: Refusal, tmp_path: Path) -> None:
    file = tmp_path / "other.sqlite"
    with sqlite3.connect(file) as other:
        other.execute("CREATE TABLE run (id INTEGER)")
    line = refused("compare", "--catalog", str(file))
    assert_says(line, "other.sqlite", "table run already exists", "give the path of a catalog")
    with sqlite3.connect(file) as other:
        assert [row[0] for row in other.execute("SELECT name FROM sqlite_master")] == ["run"], (
            "nothing was added"
        )


def test_a_catalog_newer_than_the_code(refused: Refusal, tmp_path: Path) -> None:
    file = tmp_path / "newer.sqlite"
    Catalog(f"sqlite:///{file}").close()
    with sqlite3.connect(file) as newer:
        newer.execute("UPDATE alembic_version SET version_num = '9999'")
    line = refused("compare", "--catalog", str(file))
    assert_says(line, "9999, newer than this Slimscope knows", "update Slimscope", "another catalog")


def test_a_home_that_cannot_be(refused: Refusal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SLIMSCOPE_HOME", str(tmp_path / "file"))
    assert_says(refused("compare"), str(tmp_path / "file"), "SLIMSCOPE_HOME")
