"""Pages through AppTest: the real app on a catalog of its own, with a real inspector on a tiny random model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

MAIN = Path(__file__).resolve().parents[2] / "app" / "main.py"
Opened = Callable[..., AppTest]


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory) -> Path:
    from tests.tiny import tiny_folder

    return tiny_folder("llama", tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory) -> Path:
    from tests.tiny import tiny_folder

    return tiny_folder("bert", tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_vit(tmp_path_factory) -> Path:
    from tests.tiny import tiny_folder

    return tiny_folder("vit", tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_moe(tmp_path_factory) -> Path:
    from tests.tiny import tiny_folder

    return tiny_folder("olmoe", tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_moe_other(tmp_path_factory) -> Path:
    """The tiny mixture of experts with other weights."""
    from tests.tiny import tiny_folder

    return tiny_folder("olmoe", tmp_path_factory.mktemp("tiny"), seed=1)


@pytest.fixture(scope="session")
def tiny_other(tmp_path_factory) -> Path:
    """The tiny llama with other weights."""
    from tests.tiny import tiny_folder

    return tiny_folder("llama", tmp_path_factory.mktemp("tiny"), seed=1)


@pytest.fixture(scope="module")
def opened(tmp_path_factory) -> Iterator[Opened]:
    """Open a page by its file name with a query; waits until the inspector has answered."""
    from app import engine

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLIMSCOPE_HOME", str(tmp_path_factory.mktemp("home")))
        patch.delenv("SLIMSCOPE_CATALOG", raising=False)
        patch.setenv("STREAMLIT_CLIENT_SHOW_ERROR_DETAILS", "full")
        patch.setattr("app.components.waiting.INLINE_WAIT_S", 60.0)
        patch.setattr("app.components.waiting.PATIENCE_S", 60.0)

        def run(page: str, **query: str) -> AppTest:
            app = AppTest.from_file(str(MAIN), default_timeout=90)
            for name, value in query.items():
                app.query_params[name] = value
            app.run()
            if page != "home":
                app.switch_page(f"../pages/{page}.py").run()
            assert not app.exception, app.exception
            return app

        yield run
        engine.inspector().close()
        engine.inspector.clear()
        engine._open.clear()
        engine._probes.clear()
