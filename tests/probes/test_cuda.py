"""Every probe gives on a GPU what it gives on the CPU; skipped where there is none."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from core.models.loaded import LoadedModel
from core.models.open import open_model
from core.registry import Method, methods
from core.types import ModelRef, Result
from tests.asking import ask, damage
from tests.tiny import tiny_folder

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
FAMILIES = ("llama", "gpt2", "gpt_neox", "gemma2", "olmoe", "bert", "vit")


@cache
def opened(family: str, device: str, folder: Path) -> LoadedModel:
    """A tiny model on a device."""
    return open_model(ModelRef(str(tiny_folder(family, folder / family)), device=device))


@cache
def damaged(family: str, device: str, folder: Path) -> LoadedModel:
    """A variant of it for probes that look at two models."""
    return damage(open_model(opened(family, device, folder).ref))


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cuda")


def run(m: Method, family: str, device: str, folder: Path) -> Result:
    return ask(m, opened(family, device, folder), lambda: damaged(family, device, folder))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("m", methods("probe").values(), ids=lambda m: m.id)
def test_a_probe_on_cuda_equals_the_cpu(m: Method, family: str, folder: Path) -> None:
    if opened(family, "cpu", folder).missing_needs(m.needs):
        pytest.skip(f"{m.id} does not claim {family}")
    if "artifact" in m.settings.model_fields:
        pytest.skip(f"{m.id} needs a trained artifact; its own tests train one")
    on_cpu, on_cuda = (run(m, family, device, folder) for device in ("cpu", "cuda"))
    assert on_cuda.provenance.device.startswith("cuda")
    for name, expected in on_cpu.frames.items():
        found = on_cuda.frames[name]
        assert found.shape == expected.shape, name
        if name == "ranked":
            continue  # near ties change places
        for column in expected.select_dtypes("floating"):
            np.testing.assert_allclose(
                found[column].to_numpy(float),
                expected[column].to_numpy(float),
                rtol=5e-3,
                atol=5e-4,
                err_msg=f"{name}.{column}",
            )
