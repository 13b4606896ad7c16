"""What of a model decides its speed and memory: bytes that a step reads, numbers it keeps, multiplications it does.

Counted from a model's anatomy and the headers of its files, so that packed weights count as they are stored;
``core.predict.config`` counts a model that is not here. Knows no device and no time.

Legend: L layers, E experts of a layer, G key/value heads, K ``head_dim``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from core.types import Family

if TYPE_CHECKING:
    from core.models.anatomy import Anatomy
    from core.models.sizes import ModelCard

Routing = Mapping[int, Sequence[float]]
"""Layer → per expert, the share of tokens that chose it; a token chooses k, so they sum to k."""


@dataclass(frozen=True)
class Layer:
    """What one layer keeps per sequence, and its routed experts."""

    kept: int
    """Numbers kept per position: 2 · G · K with heads, the latent with latent attention."""
    window: int | None = None
    """Positions it keeps at most; None: all."""
    state: int = 0
    """Numbers it keeps however long the text (Mamba, linear attention)."""
    attends: int = 0
    """n_heads · K: every position of the cache costs 4 FLOP per such number."""
    n_experts: int = 0
    top_k: int = 0
    expert_bytes: float = 0.0
    expert_parameters: float = 0.0
    chosen: tuple[float, ...] | None = None
    """Per expert, the share of tokens that chose it, as recorded; None: uniform."""

    def positions(self, context: int) -> int:
        """Positions it keeps of a context."""
        return context if self.window is None else min(context, self.window)

    def touched(self, tokens: int) -> float:
        """Distinct experts that so many tokens choose, if each chooses by itself: Σ_e 1 − (1 − p_e)^tokens."""
        if self.n_experts == 0:
            return 0.0
        shares = self.chosen or (self.top_k / self.n_experts,) * self.n_experts
        return math.fsum(1 - (1 - min(share, 1.0)) ** tokens for share in shares)


@dataclass(frozen=True)
class Shape:
    """A model as a device meets it."""

    name: str
    family: Family
    weight_bytes: float
    """Of all weights, as they are held."""
    read_bytes: float
    """Of those that every token reads: all but routed experts and an input embedding of its own, read by the row."""
    parameters: float
    """Of all weights."""
    read_parameters: float
    """Of those behind ``read_bytes``: each is one multiply-add per token."""
    head_parameters: float
    """Of those, the unembedding's, which of a prompt only the last position passes."""
    layers: tuple[Layer, ...]
    d_model: int
    d_ff: int
    """Neurons of a dense MLP, or of all experts that one token passes."""
    vocab_size: int
    context_length: int
    counted: str
    """``stored``: file by file; ``share of parameters``; or ``config``: nothing but its sizes is known."""

    @property
    def is_moe(self) -> bool:
        """Whether any layer has routed experts."""
        return any(layer.n_experts for layer in self.layers)

    @property
    def active_parameters(self) -> float:
        """Multiply-adds of one token with weights."""
        return self.read_parameters + sum(layer.top_k * layer.expert_parameters for layer in self.layers)

    def weights_read(self, tokens: int = 1) -> float:
        """Bytes of weights that one step over so many tokens reads: each expert once that any of them chose."""
        return self.read_bytes + sum(layer.touched(tokens) * layer.expert_bytes for layer in self.layers)

    def kept_numbers(self, context: int) -> int:
        """Numbers kept of one sequence of ``context`` positions: keys and values, latents, states."""
        return sum(layer.kept * layer.positions(context) + layer.state for layer in self.layers)

    def attention_flops(self, context: int) -> float:
        """FLOP of one token's scores and weighted values over a cache of ``context`` positions."""
        return float(sum(4 * layer.attends * layer.positions(context) for layer in self.layers))

    def prefill_attention_flops(self, prompt: int) -> float:
        """FLOP of a whole prompt's attention, each position reading those before it: 4 · Σ_s min(s, window)."""
        total = 0.0
        for layer in self.layers:
            seen = layer.positions(prompt)
            pairs = seen * (seen + 1) / 2 + (prompt - seen) * seen
            total += 4 * layer.attends * pairs
        return total


# --- from a model that is open -------------------------------------------------------------------------


def of_card(card: ModelCard, *, routing: Routing | None = None) -> Shape:
    """The shape of an open model or variant; ``routing`` are recorded shares of its experts, if there are any."""
    sums = card.components.groupby("component")["parameters"].sum()
    counts = {str(component): float(n) for component, n in sums.items()}
    return of_anatomy(card.source, card.anatomy, counts, Path(card.folder), routing=routing)


def of_anatomy(
    name: str, anatomy: Anatomy, counts: Mapping[str, float], folder: Path, *, routing: Routing | None = None
) -> Shape:
    """The shape of a model from its anatomy, its parameters by component, and the weight files in ``folder``."""
    nbytes, counted = stored_bytes(anatomy, counts, folder)
    apart = not anatomy.tied and anatomy.family != "vision"  # a patch projection multiplies
    looked_up = ("experts", "embedding") if apart else ("experts",)
    moe = [block.index for block in anatomy.blocks if block.is_moe]
    per_expert = max(1, len(moe) * anatomy.n_experts)
    layers = tuple(
        Layer(
            kept=0 if block.mixer == "mamba" else block.latent or 2 * anatomy.n_kv_heads * anatomy.head_dim,
            window=window,
            state=block.state,
            attends=0 if block.mixer == "mamba" else anatomy.n_heads * anatomy.head_dim,
            n_experts=anatomy.n_experts if block.is_moe else 0,
            top_k=anatomy.experts_per_token if block.is_moe else 0,
            expert_bytes=nbytes.get("experts", 0.0) / per_expert if block.is_moe else 0.0,
            expert_parameters=counts.get("experts", 0.0) / per_expert if block.is_moe else 0.0,
            chosen=_chosen(routing, block.index) if block.is_moe else None,
        )
        for block, window in zip(anatomy.blocks, anatomy.windows, strict=True)
    )
    return Shape(
        name=name,
        family=anatomy.family,
        weight_bytes=sum(nbytes.values()),
        read_bytes=sum(n for component, n in nbytes.items() if component not in looked_up),
        parameters=sum(counts.values()),
        read_parameters=sum(n for component, n in counts.items() if component not in looked_up),
        head_parameters=_head_parameters(counts, anatomy),
        layers=layers,
        d_model=anatomy.d_model,
        d_ff=anatomy.d_ff * max(1, anatomy.experts_per_token),
        vocab_size=anatomy.vocab_size,
        context_length=anatomy.context_length,
        counted=counted,
    )


def stored_bytes(anatomy: Anatomy, counts: Mapping[str, float], folder: Path) -> tuple[dict[str, float], str]:
    """Component → bytes in the weight files, and how they were counted.

    A tensor belongs to the component its name says. Files whose names are not those of the open model's modules are
    counted by each component's share of the parameters.
    """
    from core.models.checkpoint import stored_tensors, weight_files
    from core.models.sizes import component_of

    found: dict[str, float] = {}
    files = weight_files(folder)
    for name, tensor in stored_tensors(files).items():
        component = component_of(anatomy, name)
        found[component] = found.get(component, 0.0) + tensor.nbytes
    if set(found) == {component for component, n in counts.items() if n}:
        return found, "stored"
    whole, file_bytes = sum(counts.values()), sum(file.stat().st_size for file in files)
    return {component: file_bytes * n / whole for component, n in counts.items()}, "share of parameters"


def _head_parameters(counts: Mapping[str, float], anatomy: Anatomy) -> float:
    if anatomy.family != "decoder":
        return 0.0
    return counts.get("embedding" if anatomy.tied else "head", 0.0)


def _chosen(routing: Routing | None, layer: int) -> tuple[float, ...] | None:
    return None if routing is None or layer not in routing else tuple(routing[layer])
