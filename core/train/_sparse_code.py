"""A sparse autoencoder as a map: residual stream to at most k features and back; and a feature as a direction.

Legend: N rows (positions), D d_model, F features, K active features of a row.

Residuals are divided by ``scale`` before they are encoded, so that an entry is of unit size. Rows that are not
``readable`` (attention sinks, whose norm is many times that of the text) are no part of it: they stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from core.errors import BadInput
from core.lazy import torch
from core.train._trained import load

if TYPE_CHECKING:
    from torch import Tensor

    from core.models.loaded import LoadedModel
    from core.train._trained import Learned

METHOD = "sparse_autoencoder"


@dataclass(frozen=True)
class SparseCode:
    """z = TopK(ReLU((h / scale − b) · W_e + b_e)),  ĥ = (z · W_d + b) · scale."""

    encoder_DF: Tensor
    encoder_bias_F: Tensor
    decoder_FD: Tensor
    """Rows of unit norm."""
    bias_D: Tensor
    k: int
    scale: float
    largest_norm: float
    """Rows with a larger norm are not readable."""

    @classmethod
    def of(cls, learned: Learned) -> SparseCode:
        """From a stored artifact."""
        tensors, facts = learned.tensors, learned.facts
        return cls(
            tensors["encoder"],
            tensors["encoder_bias"],
            tensors["decoder"],
            tensors["bias"],
            facts["k"],
            facts["scale"],
            facts["largest_norm"],
        )

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What an artifact stores."""
        return {
            "encoder": self.encoder_DF,
            "encoder_bias": self.encoder_bias_F,
            "decoder": self.decoder_FD,
            "bias": self.bias_D,
        }

    def readable(self, residual_ND: Tensor) -> Tensor:
        """[N] bool; the caller leaves out a text's first position by itself."""
        within_N: Tensor = residual_ND.float().norm(dim=-1) <= self.largest_norm
        return within_N

    def before_top_k(self, residual_ND: Tensor) -> Tensor:
        """ReLU of all features [N, F]."""
        scaled_ND = residual_ND.to(self.bias_D.dtype) / self.scale
        return torch.relu((scaled_ND - self.bias_D) @ self.encoder_DF + self.encoder_bias_F)

    def encode(self, residual_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Values and ids of the active features, both [N, K], the strongest first; a value of 0 is not active."""
        values_NK, features_NK = self.before_top_k(residual_ND).topk(self.k)
        return values_NK, features_NK

    def decode(self, values_NK: Tensor, features_NK: Tensor) -> Tensor:
        """Residuals [N, D] from active features."""
        summed_ND = torch.nn.functional.embedding_bag(
            features_NK, self.decoder_FD, per_sample_weights=values_NK, mode="sum"
        )
        return (summed_ND + self.bias_D) * self.scale

    def reconstruct(self, residual_ND: Tensor) -> Tensor:
        """ĥ of every row, in the dtype it came in."""
        return self.decode(*self.encode(residual_ND)).to(residual_ND.dtype)


@dataclass(frozen=True)
class FeatureDirection:
    """A feature as a direction in the residual stream."""

    layer: int
    """The residual stream after this many blocks."""
    direction_D: Tensor
    """Unit norm."""
    typical_strength: float
    """Mean length that the feature adds to the residual stream where it is active in the training text."""


def feature_direction(learned: Learned, feature: int) -> FeatureDirection:
    """The direction a feature writes; raises ``BadInput`` for a feature that is not there or never active."""
    decoder_FD = learned.tensors["decoder"]
    if not 0 <= feature < len(decoder_FD):
        raise BadInput(
            f"there is no feature {feature}: the autoencoder has features 0 to {len(decoder_FD) - 1}"
        )
    table = learned.tables["features"]
    row = table.loc[table["feature"] == feature, ["density", "mean_activation"]].to_dict("records")[0]
    if row["density"] == 0:
        raise BadInput(
            f"feature {feature} was never active in the training text; choose one with a density above 0"
        )
    strength = float(row["mean_activation"]) * float(learned.facts["scale"])
    return FeatureDirection(int(learned.facts["layer"]), decoder_FD[feature], strength)


def direction_by_name(loaded: LoadedModel, name: str) -> FeatureDirection:
    """The direction that ``sae:ARTIFACT:FEATURE`` names; raises ``BadInput``."""
    kind, _, rest = name.partition(":")
    artifact, _, feature = rest.rpartition(":")
    if kind != "sae" or not artifact or not feature.isdecimal():
        raise BadInput(
            f"direction {name!r} is not understood; write sae:ARTIFACT:FEATURE, e.g. sae:0a1b2c3d:17"
        )
    return feature_direction(load(artifact, method=METHOD, loaded=loaded), int(feature))
