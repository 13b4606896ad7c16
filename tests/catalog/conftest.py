from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from core.catalog.store import Catalog
from core.types import Variant
from tests.catalog.samples import base_of
from tests.databases import KINDS, fresh_url


@pytest.fixture(params=KINDS)
def url(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("SLIMSCOPE_HOME", str(tmp_path))
    with fresh_url(request.param, tmp_path) as fresh:
        yield fresh


@pytest.fixture
def catalog(url: str) -> Iterator[Catalog]:
    opened = Catalog(url)
    yield opened
    opened.close()


@pytest.fixture
def base(catalog: Catalog) -> Variant:
    return base_of(catalog)
