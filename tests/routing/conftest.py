"""Copies of tiny models that a test may change."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from core.models.loaded import LoadedModel
from core.models.open import open_model
from core.types import Dtype, ModelRef
from tests.tiny import tiny_folder


@pytest.fixture
def own_copy(tmp_path: Path) -> Callable[..., LoadedModel]:
    """Open a tiny model of a family for this test alone."""

    def opened(family: str, *, dtype: Dtype = "float32", seed: int = 0) -> LoadedModel:
        folder = tmp_path / f"{family}-{seed}"
        return open_model(ModelRef(str(tiny_folder(family, folder, seed=seed)), dtype=dtype))

    return opened
