"""A decoder as one traced graph with its key/value cache as inputs and outputs: what graph runtimes are made from.

Legend: ``B`` sequences, ``P`` tokens read now, ``C`` tokens in the cache, ``H`` key/value heads, ``D`` head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from core.errors import CannotMeasure
from core.lazy import torch, transformers
from core.models.loaded import LoadedModel
from core.models.quiet import quiet, without_chatter


@dataclass(frozen=True)
class CachedGraph:
    """``program(input_ids [B, P], past)`` gives logits of the last position [B, 1, vocabulary] and the grown cache.

    ``past`` is a list of a pair per layer: keys and values [B, H, C, D]. ``B``, ``P`` and ``C`` are open, ``C`` may be 0.
    """

    program: Any
    """A ``torch.export.ExportedProgram``."""
    cache_shapes: tuple[tuple[int, int], ...]
    """H and D of every cached tensor, in the order keys and values of layer 0, of layer 1, …"""


def cached_graph(loaded: LoadedModel, *, runtime: str) -> CachedGraph:
    """Trace a decoder with its cache.

    Raises ``CannotMeasure`` where its cache is more than keys and values, or where it does not trace.
    """
    past = [(layer.keys, layer.values) for layer in small_cache(loaded, runtime).layers]
    ids_BP = torch.randint(0, loaded.anatomy.vocab_size, (2, 3))
    free = torch.export.Dim.DYNAMIC
    pair = ({0: free, 2: free}, {0: free, 2: free})
    shapes = {"input_ids": {0: free, 1: free}, "past": [pair] * len(past)}
    try:
        with quiet(), without_chatter(), torch.no_grad():
            program = torch.export.export(
                _step_class()(loaded.model), (ids_BP, past), dynamic_shapes=shapes, strict=False
            )
    except Exception as error:  # the tracer raises whatever the model's code does under it
        said = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise CannotMeasure(
            f"{loaded.anatomy.architecture} cannot be traced with its cache, which {runtime} needs ({said[:160]}); "
            "measure it in torch_eager"
        ) from error
    flat = [tensor for layer in past for tensor in layer]
    return CachedGraph(program, tuple((int(t.shape[1]), int(t.shape[3])) for t in flat))


def small_cache(loaded: LoadedModel, runtime: str, *, sequences: int = 2) -> Any:
    """The model's own cache after a few tokens; raises ``CannotMeasure`` where it is more than keys and values."""
    ids_BP = torch.randint(0, loaded.anatomy.vocab_size, (sequences, 5))
    with torch.no_grad():
        cache = loaded.model(input_ids=ids_BP, use_cache=True).past_key_values
    layers = getattr(cache, "layers", [])
    if not layers or any(getattr(layer, "keys", None) is None or layer.keys.ndim != 4 for layer in layers):
        raise CannotMeasure(
            f"{loaded.anatomy.architecture} keeps something else than keys and values, which {runtime} cannot hold; "
            "measure it in torch_eager"
        )
    return cache


def _step_class() -> Any:
    """Made when it is needed: its base class is torch's."""

    class Step(torch.nn.Module):
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any, past: list[tuple[Any, Any]]) -> Any:
            cache = transformers.DynamicCache()
            for keys, values in past:
                # Begun with what is there: an empty start would be one more tensor to join, of another rank.
                layer = transformers.cache_utils.DynamicLayer()  # type: ignore[no-untyped-call]
                layer.lazy_initialization(keys, values)
                layer.keys, layer.values = keys, values
                cache.layers.append(layer)
            output = self.model(input_ids=input_ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            return output.logits, [(layer.keys, layer.values) for layer in output.past_key_values.layers]

    return Step
