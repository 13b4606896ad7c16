"""What the page tests share: a synthetic catalog of their own, and the app opened on one page of it."""

from __future__ import annotations

from pathlib import Path

from streamlit.testing.v1 import AppTest

from core.catalog.store import Catalog

ROOT = Path(__file__).resolve().parents[2]


def open_page(name: str, **query: str) -> AppTest:
    """The app on ``pages/{name}.py`` with these query parameters; fails on an exception in the page."""
    app = AppTest.from_file(str(ROOT / "app" / "main.py"), default_timeout=60)
    for key, value in query.items():
        app.query_params[key] = value
    app.run()
    app.switch_page(str(ROOT / "pages" / f"{name}.py")).run()
    return checked(app)


def checked(app: AppTest) -> AppTest:
    """The app, which has not raised."""
    assert not app.exception, app.exception
    return app


def new_catalog(folder: Path) -> Catalog:
    """An empty catalog at the place where the app looks when ``SLIMSCOPE_HOME`` is ``folder``."""
    return Catalog(f"sqlite:///{folder / 'catalog.sqlite'}")
