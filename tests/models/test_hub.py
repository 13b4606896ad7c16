"""Hub models from a cache laid out as huggingface_hub lays it out; the network is never touched."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import tiny_folder

OPEN = """
from core.errors import SlimscopeError
from core.models.open import open_model
from core.types import ModelRef
import sys
try:
    loaded = open_model(ModelRef.parse(sys.argv[1]))
    print("OPEN", loaded.anatomy.architecture, loaded.folder.name)
except SlimscopeError as error:
    print("REFUSED", error)
"""


def open_offline(source: str, cache: Path) -> str:
    """Open in a fresh process: huggingface_hub reads its environment once, at import."""
    env = {**os.environ, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", OPEN, source], env=env, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hub")
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = root / "models--tests--tiny-llama"
    tiny_folder("llama", repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    return root


@pytest.mark.slow
def test_a_cached_model_opens_offline(cache: Path) -> None:
    assert open_offline("tests/tiny-llama", cache).startswith("OPEN LlamaForCausalLM 0123456789abcdef")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "tests/no-such-model",
            "tests/no-such-model is not in the local hub cache and the hub cannot be reached",
        ),
        ("tests/tiny-llama@v9", "tests/tiny-llama@v9 is not in the local hub cache"),
        ("no such/model!", "is neither a folder here nor a hub id"),
    ],
)
def test_what_is_not_there_is_one_sentence(source: str, message: str, cache: Path) -> None:
    said = open_offline(source, cache)
    assert said.startswith("REFUSED")
    assert message in said
    assert "\n" not in said
