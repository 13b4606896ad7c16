"""What training leaves behind: tensors, tables and the facts that say which model they belong to.

A trained instrument reads one model's residual stream. On another model it would give plausible numbers that mean
nothing, so every one carries what it is bound to, and ``load`` refuses it where that does not match. Knows nothing
of how anything is trained.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from core.errors import BadInput
from core.lazy import torch
from core.types import Result, canonical_json, looks_local

if TYPE_CHECKING:
    from torch import Tensor

    from core.models.loaded import LoadedModel
    from core.registry import Settings
    from core.types import Documents

WEIGHTS = "weights.safetensors"
FACTS = "facts.json"
VERSION = 1
_HASH = re.compile(r"[0-9a-f]{8,64}")
_HASHED_AT_ONCE = 4 << 20


@dataclass(frozen=True, kw_only=True)
class Learned:
    """A trained instrument."""

    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any]
    """JSON. ``method``, ``base_fingerprint``, ``unembedding`` … (see ``bound_to``), and what the method adds."""
    tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    """What was seen in training and is shown later, e.g. the snippets that activate a feature."""

    def save(self, folder: Path) -> None:
        """Write ``weights.safetensors``, ``facts.json`` and one Parquet file per table; ``folder`` must be empty."""
        import safetensors.torch

        folder.mkdir(parents=True, exist_ok=True)
        assert not any(folder.iterdir()), f"{folder} is not empty"
        tensors = {name: tensor.contiguous().cpu() for name, tensor in self.tensors.items()}
        safetensors.torch.save_file(tensors, folder / WEIGHTS)
        (folder / FACTS).write_text(canonical_json(dict(self.facts)), encoding="utf-8")
        for name, table in self.tables.items():
            table.to_parquet(folder / f"{name}.parquet", compression="zstd")


@dataclass(frozen=True, kw_only=True)
class Trained(Learned):
    """What a training method returns: the instrument, and how its training went."""

    result: Result


def bound_to(
    loaded: LoadedModel, documents: Documents, *, method: str, settings: Settings, **more: Any
) -> dict[str, Any]:
    """The facts that every trained instrument carries; ``more`` is what its method adds."""
    return {
        "version": VERSION,
        "method": method,
        "settings": settings.model_dump(mode="json"),
        "base": str(loaded.ref),
        "base_fingerprint": loaded.fingerprint,
        "model_type": loaded.anatomy.model_type,
        "n_layers": loaded.anatomy.n_layers,
        "d_model": loaded.anatomy.d_model,
        "unembedding": unembedding_hash(loaded),
        "dtype": loaded.dtype,
        "documents": {"name": documents.name, "split": documents.split, "hash": documents.fingerprint},
        **more,
    }


def load(artifact: str, *, method: str, loaded: LoadedModel, same_unembedding: bool = False) -> Learned:
    """Read a trained instrument for use on ``loaded``, its tensors on the model's device.

    ``artifact`` is a folder, or the hash (its first 8 digits suffice) of an artifact in the catalog. It fits the
    model that it was trained on, and a variant that ``slimscope.json`` says was made from that model (``lineage``).
    With ``same_unembedding`` a variant's unembedding must also be untouched. Raises ``BadInput`` for one that is
    missing, damaged, of another method, or made for another model.
    """
    if not artifact.strip():
        raise BadInput(
            f"no trained {method} was chosen; train one on this model (slimscope train {method} --model "
            f"{loaded.ref}), then give its artifact's hash"
        )
    folder = find_folder(artifact.strip())
    facts = read_facts(folder)
    if facts["method"] != method:
        raise BadInput(
            f"{artifact} holds a trained {facts['method']}, not a {method}; choose another artifact"
        )
    _refuse_other_model(facts, loaded, artifact)
    if same_unembedding and facts["unembedding"] != unembedding_hash(loaded):
        raise BadInput(
            f"artifact {artifact} was trained to be read by the unembedding of {facts['base']}, and {loaded.ref} has "
            f"another final norm or unembedding; train a {method} on {loaded.ref}"
        )
    import safetensors.torch

    try:
        tensors = safetensors.torch.load_file(folder / WEIGHTS, device=loaded.device)
        tables = {path.stem: pd.read_parquet(path) for path in sorted(folder.glob("*.parquet"))}
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise BadInput(f"the files of {artifact} are damaged ({error}); train it again") from None
    return Learned(tensors=tensors, facts=facts, tables=tables)


def find_folder(artifact: str) -> Path:
    """The folder of an artifact given as a folder, a hash, or the first 8 or more digits of one."""
    if looks_local(artifact):
        return Path(artifact).expanduser()
    if not _HASH.fullmatch(artifact):
        raise BadInput(
            f"artifact {artifact!r} is neither a folder nor a hash; give at least its first 8 hex digits"
        )
    from core.catalog.store import Catalog

    found = sorted(Catalog(read_only=True).artifacts.root.glob(f"{artifact}*"))
    if len(found) != 1:
        what = "is not in the catalog; train it again" if not found else "is ambiguous; give more digits"
        raise BadInput(f"artifact {artifact} {what}")
    return found[0]


def read_facts(folder: Path) -> dict[str, Any]:
    """What a trained instrument says of itself, without reading its tensors; raises ``BadInput``."""
    try:
        facts: dict[str, Any] = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise BadInput(
            f"{folder} holds nothing trained: its {FACTS} is missing or damaged; train it again"
        ) from None
    if facts.get("version") != VERSION:
        raise BadInput(f"{folder} was trained by another version of Slimscope; train it again")
    return facts


def lineage(loaded: LoadedModel) -> tuple[str, ...]:
    """Fingerprints of the model itself and, for a variant, of the model that it was made from."""
    file = loaded.folder / "slimscope.json"
    if not file.is_file():
        return (loaded.fingerprint,)
    made_from = json.loads(file.read_text(encoding="utf-8"))["base"]["fingerprint"]
    return (loaded.fingerprint, made_from)


def unembedding_hash(loaded: LoadedModel) -> str:
    """Content hash of what turns a residual into logits: final norm, head and unembedding; empty without a head.

    Values are hashed as bfloat16, so that a model is the same in float32 and in bfloat16.
    """
    anatomy = loaded.anatomy
    if anatomy.unembedding is None:
        return ""
    digest = hashlib.sha256(canonical_json([anatomy.logit_scale, anatomy.logit_softcap]).encode())
    for path in (anatomy.final_norm, anatomy.head_transform, anatomy.unembedding):
        if path is None:
            continue
        for name, tensor in sorted(loaded.model.get_submodule(path).state_dict().items()):
            digest.update(canonical_json([path, name, list(tensor.shape)]).encode())
            for part in tensor.flatten().split(_HASHED_AT_ONCE):
                rounded = part.to(torch.bfloat16) if part.is_floating_point() else part
                digest.update(rounded.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _refuse_other_model(facts: Mapping[str, Any], loaded: LoadedModel, artifact: str) -> None:
    if facts["base_fingerprint"] in lineage(loaded):
        return
    raise BadInput(
        f"artifact {artifact} was trained on {facts['base']} (fingerprint {facts['base_fingerprint'][:12]}, "
        f"{facts['n_layers']} layers of width {facts['d_model']}); {loaded.ref} is another model (fingerprint "
        f"{loaded.fingerprint[:12]}, {loaded.anatomy.n_layers} layers of width {loaded.anatomy.d_model}), where its "
        f"numbers would mean nothing; train one on {loaded.ref}"
    )
