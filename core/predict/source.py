"""The shape of whatever the user names: a variant or model by its files, a known model or a config in some format.

Files are read header by header; no weight is loaded. Shares of experts that a probe recorded in the catalog are used.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.errors import BadInput
from core.predict.config import of_config
from core.predict.model import Routing, Shape
from core.predict.published import config_of, formats, models
from core.types import ModelRef, Progress, silent

if TYPE_CHECKING:
    from core.catalog.store import Catalog

ROUTING = "expert_load"
"""The probe whose result has the share of choices of every expert."""


def named_shape(
    catalog: Catalog, model: str, format_: str | None = None, progress: Progress = silent
) -> Shape:
    """The shape of a model as the user names it.

    ``model``: one of ``published.models()``, a ``config.json``, or any model that can be opened; ``format_`` counts its
    config in one of ``published.formats()`` instead of its files. Raises ``BadInput``, ``CannotOpen``, ``WorkerDied``.
    """
    if format_ is not None and format_ not in formats():
        raise BadInput(f"no format is called {format_!r}; there are {', '.join(formats())}")
    config = _config(model, of_files=format_ is None)
    if config is not None:
        return of_config(model, config, formats()[format_ or "f16"])
    from core.models.checkpoint import fingerprint, read_config
    from core.models.open import local_folder
    from core.profile.shapes import shape_of

    ref = ModelRef.parse(model)
    folder = local_folder(ref, variant_folder=catalog.variant_folder, progress=progress)
    if format_ is not None:
        return of_config(model, read_config(folder), formats()[format_])
    shape = replace(shape_of(folder, progress), name=model)
    return routed(shape, recorded_routing(catalog, fingerprint(folder))) if shape.is_moe else shape


def variant_shape(catalog: Catalog, variant_id: str, progress: Progress = silent) -> Shape:
    """The shape of an entry of the catalog, its routing as recorded; raises ``BadInput``, ``CannotOpen``, ``WorkerDied``."""
    from core.entries import folder_of
    from core.profile.shapes import known_shape, shape_of

    variant = catalog.variant(variant_id)
    shape = known_shape(variant.fingerprint) or shape_of(
        folder_of(catalog, variant, progress=progress), progress
    )
    shape = replace(shape, name=variant.name)
    return routed(shape, recorded_routing(catalog, variant.fingerprint)) if shape.is_moe else shape


def recorded_routing(catalog: Catalog, fingerprint: str) -> Routing:
    """Layer → share of tokens that chose each expert, as the newest ``expert_load`` of these files counted them.

    A variant that was never probed takes its base's, if that has as many experts (``routed`` looks). Empty: no record.
    """
    from core.catalog.results import result_of

    entries = [variant for variant in catalog.variants() if variant.fingerprint == fingerprint]
    ids = dict.fromkeys([*(entry.id for entry in entries), *(entry.base_id for entry in entries)])
    for id_ in ids:
        for run in catalog.runs(id_):  # newest first
            if run.kind == "probe" and run.conditions.get("method") == ROUTING:
                frame = result_of(catalog, run.id).frames["main"]
                return {
                    int(str(layer)): rows.sort_values("expert")["load"].tolist()
                    for layer, rows in frame.groupby("layer")
                }
    return {}


def routed(shape: Shape, shares: Routing) -> Shape:
    """The shape with recorded shares of choices (they sum to 1 per layer); a layer with other experts stays uniform."""
    layers = tuple(
        replace(layer, chosen=tuple(layer.top_k * share for share in shares[index]))
        if layer.n_experts and len(shares.get(index, ())) == layer.n_experts
        else layer
        for index, layer in enumerate(shape.layers)
    )
    return replace(shape, layers=layers)


def _config(model: str, *, of_files: bool) -> dict[str, Any] | None:
    """The sizes of a known model, of a ``config.json``, or, where files do not matter, of a model on the hub."""
    if model in models():
        return config_of(model)
    path = Path(model).expanduser()
    if path.suffix == ".json":
        if not path.is_file():
            raise BadInput(
                f"{model} does not exist; give a config.json, a folder, or a name of `predict --list`"
            )
    elif not of_files and ModelRef.parse(model).kind == "hub":
        from core.hub import hub_snapshot

        ref = ModelRef.parse(model)
        path = (
            hub_snapshot(ref.source, kind="model", revision=ref.revision, wanted=["config.json"])
            / "config.json"
        )
    else:
        return None
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"{model}: its config is not JSON: {error}") from error
    if not isinstance(told, dict):
        raise BadInput(f"{model} is no config: give a JSON object with hidden_size and the like")
    return told
