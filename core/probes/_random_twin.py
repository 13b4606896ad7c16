"""A model of the same shape with fresh random weights: what an architecture gives before any training.

It is the baseline of everything that is read from a model's vectors: random features of the input already carry much.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from core.lazy import torch

if TYPE_CHECKING:
    from core.models.loaded import LoadedModel


@contextmanager
def random_twin(loaded: LoadedModel, *, seed: int) -> Iterator[LoadedModel]:
    """The twin, initialised by transformers' own rule for this architecture; gone when the block ends.

    The global random state is left as it was. Weights are dense in the model's dtype even where the model's are
    packed: a random model has no quantizer to be faithful to.
    """
    config = copy.deepcopy(loaded.model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = type(loaded.model)(config)
    model.to(device=loaded.model.device, dtype=loaded.model.dtype).eval().requires_grad_(False)
    yield replace(loaded, model=model, packed={}, fingerprint=f"random-{seed} of {loaded.fingerprint}")
