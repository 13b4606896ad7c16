"""The inspector on real tiny models: same answers as in process, warm models, kept results."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import pytest

from core.errors import BadInput, BadSettings, CannotOpen, UnknownMethod
from core.inspector import Inspector, child
from core.inspector.child import WarmModels
from core.inspector.protocol import Answer, Failure, Request
from core.models.loaded import LoadedModel
from core.models.open import open_model
from core.registry import get
from core.types import ModelRef, Progress, Prompt, silent
from tests.tiny import tiny_folder

PROMPT = Prompt("The capital of France is Paris, and the capital of Italy")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelRef]:
    home = tmp_path_factory.mktemp("models")
    return {name: ModelRef(str(tiny_folder(name, home / name))) for name in ("llama", "bert", "gpt2")}


@pytest.fixture(scope="module")
def inspector(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Inspector]:
    inspector = Inspector(log_path=tmp_path_factory.mktemp("log") / "inspector.log")
    yield inspector
    inspector.close()


def test_open_describes_the_model(inspector: Inspector, folders: dict[str, ModelRef]) -> None:
    from core.models.sizes import model_card

    assert inspector.open(folders["llama"]).parameters == model_card(open_model(folders["llama"])).parameters
    assert str(folders["llama"]) in inspector.warm()


def test_a_probe_gives_what_it_gives_in_process(inspector: Inspector, folders: dict[str, ModelRef]) -> None:
    there = inspector.probe("logit_lens", folders["llama"], PROMPT, {"top_k": 3})
    method = get("probe", "logit_lens")
    here = method.run(open_model(folders["llama"]), PROMPT, silent, method.parse({"top_k": 3}))
    for name, frame in here.frames.items():
        pd.testing.assert_frame_equal(there.frames[name], frame, rtol=1e-4, atol=1e-5)
    assert there.provenance.settings == here.provenance.settings


def test_tokens_read_like_the_text(inspector: Inspector, folders: dict[str, ModelRef]) -> None:
    tokens = inspector.tokenize(folders["llama"], PROMPT.text)
    assert "".join(token.text for token in tokens) == PROMPT.text


def test_requests_are_checked_in_the_child(inspector: Inspector, folders: dict[str, ModelRef]) -> None:
    with pytest.raises(UnknownMethod, match="no_such_probe"):
        inspector.probe("no_such_probe", folders["llama"], PROMPT)
    with pytest.raises(BadSettings, match="top_k"):
        inspector.probe("logit_lens", folders["llama"], PROMPT, {"top_k": 0})
    with pytest.raises(BadInput, match=r"needs decoder, which .* \(encoder, bert\) does not offer"):
        inspector.probe("logit_lens", folders["bert"], PROMPT)
    with pytest.raises(CannotOpen):
        inspector.open(ModelRef("/no/such/folder"))


def test_a_result_too_large_for_a_page_is_refused(
    folders: dict[str, ModelRef], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child, "MAX_RESULT_BYTES", 1_000)
    calls = child.Calls(WarmModels(lambda ref, progress: open_model(ref), max_bytes=1))
    answers = [
        pickle.loads(child._respond(Request("tokenize", (folders["llama"], text)), calls, silent))
        for text in ("short", "long " * 500)
    ]
    assert isinstance(answers[0], Answer)
    assert isinstance(answers[1], Failure)
    assert answers[1].kind == "BadInput"
    assert "more than the 1,000 a page can take" in answers[1].message


def test_many_callers_are_served_one_after_another(
    inspector: Inspector, folders: dict[str, ModelRef]
) -> None:
    texts = [f"John gave {n} drinks to Mary" for n in range(12)]
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda text: inspector.tokenize(folders["gpt2"], text), texts))
    assert ["".join(token.text for token in tokens) for tokens in answers] == texts


def test_a_repeated_probe_is_answered_from_here(inspector: Inspector, folders: dict[str, ModelRef]) -> None:
    first = inspector.probe("residual_norms", folders["gpt2"], PROMPT)
    again = inspector.submit("probe", "residual_norms", folders["gpt2"], PROMPT, {})
    assert again.done
    assert again.result() is first
    assert not inspector.submit("probe", "residual_norms", folders["gpt2"], Prompt("Another text"), {}).done


def test_changed_files_are_another_model(inspector: Inspector, tmp_path: Path) -> None:
    ref = ModelRef(str(tiny_folder("llama", tmp_path / "model", seed=1)))
    before = inspector.probe("token_surprisal", ref, PROMPT)
    tiny_folder("llama", tmp_path / "model", seed=2)
    after = inspector.probe("token_surprisal", ref, PROMPT)
    assert before.frame["surprisal_bits"].iloc[-1] != after.frame["surprisal_bits"].iloc[-1]


class _CountingOpener:
    """The real opener, remembering what it opened."""

    def __init__(self) -> None:
        self.opened: list[ModelRef] = []

    def __call__(self, ref: ModelRef, progress: Progress) -> LoadedModel:
        self.opened.append(ref)
        return open_model(ref)


def test_the_least_recently_used_model_is_dropped_first(folders: dict[str, ModelRef]) -> None:
    llama, bert, gpt2 = folders.values()
    opener = _CountingOpener()
    sizes = {ref: open_model(ref).nbytes for ref in folders.values()}
    models = WarmModels(opener, max_bytes=sum(sizes.values()) - 1)
    for ref in (llama, bert, llama, gpt2):  # bert is the oldest when gpt2 makes it too much
        models.get(ref, silent)
    assert models.sources() == [str(llama), str(gpt2)]
    assert opener.opened == [llama, bert, gpt2]


def test_a_model_larger_than_the_limit_is_still_served(folders: dict[str, ModelRef]) -> None:
    models = WarmModels(_CountingOpener(), max_bytes=1)
    for ref in folders.values():
        models.get(ref, silent)
        assert models.sources() == [str(ref)]
