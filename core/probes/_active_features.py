"""What a prompt turns on in a sparse autoencoder: one forward pass, encoded at every readable position.

Legend: P positions, K active features of a position, F features, N readable positions, D d_model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from core.capture import capture
from core.errors import BadInput
from core.lazy import torch
from core.probes._norm_fold import FrozenNorm, freeze
from core.probes._tokens import Encoded
from core.train._sparse_code import SparseCode
from core.train._trained import Learned

if TYPE_CHECKING:
    from torch import Tensor

    from core.models.loaded import LoadedModel


@dataclass(frozen=True)
class LayerRead:
    """One forward pass: the layer's residuals, and the final norm frozen at the last position."""

    residual_PD: Tensor
    norm: FrozenNorm


def read_layer(loaded: LoadedModel, encoded: Encoded, layer: int) -> LayerRead:
    """Run the model once, and keep what a feature's reading needs."""
    model, anatomy = loaded.model, loaded.anatomy
    path = anatomy.blocks[layer - 1].path
    assert anatomy.final_norm is not None
    with (
        capture(model, [path]) as stream,
        capture(model, [anatomy.final_norm], inputs=True) as fed,
        capture(model, [anatomy.final_norm]) as given,
    ):
        model(**encoded.inputs, use_cache=False, logits_to_keep=1)
    norm = freeze(
        model.get_submodule(anatomy.final_norm),
        anatomy.final_norm,
        offset=anatomy.norm_offset,
        fed_D=fed[anatomy.final_norm][0, -1],
        output_D=given[anatomy.final_norm][0, -1],
    )
    return LayerRead(stream[path][0].float(), norm)


@dataclass(frozen=True)
class ActiveFeatures:
    """What the prompt's positions turn on. Arrays over all positions; those not encoded are 0."""

    encoded: Encoded
    values_PK: np.ndarray
    features_PK: np.ndarray
    n_readable: int
    fvu: float
    gap: float

    @classmethod
    def of(cls, read: LayerRead, code: SparseCode, encoded: Encoded) -> ActiveFeatures:
        """Encode the readable positions, and hold the sparse sum against the dense one."""
        readable_P = code.readable(read.residual_PD)
        readable_P[0] = False
        if not readable_P.any():
            raise BadInput(
                "every position of this prompt is an attention sink and is not encoded; type a longer text"
            )
        values_PK, features_PK = code.encode(read.residual_PD)
        values_PK = values_PK * readable_P[:, None]
        rows_ND = read.residual_PD[readable_P]
        sparse_ND = code.decode(values_PK[readable_P], features_PK[readable_P])
        dense_NF = torch.zeros(len(rows_ND), len(code.decoder_FD), device=rows_ND.device)
        dense_NF.scatter_(1, features_PK[readable_P], values_PK[readable_P])
        dense_ND = (dense_NF @ code.decoder_FD + code.bias_D) * code.scale
        spread = (rows_ND - rows_ND.mean(0)).square().sum() if len(rows_ND) > 1 else rows_ND.square().sum()
        return cls(
            encoded,
            values_PK.cpu().numpy(),
            features_PK.cpu().numpy(),
            int(readable_P.sum()),
            float((rows_ND - sparse_ND).square().sum() / spread),
            float((sparse_ND - dense_ND).abs().max() / dense_ND.abs().max()),
        )

    @property
    def l0(self) -> float:
        """Mean number of active features per encoded position."""
        return float((self.values_PK > 0).sum() / self.n_readable)

    def activation(self, feature: int) -> np.ndarray:
        """One feature at every position."""
        found: np.ndarray = np.where(self.features_PK == feature, self.values_PK, 0).sum(-1)
        return found

    def strongest(self, learned: Learned, *, n: int, max_density: float) -> list[int]:
        """Features active here that are not too dense and were met in training, the strongest first."""
        density = learned.tables["features"].set_index("feature")["density"]
        ids, values = self.features_PK.ravel(), self.values_PK.ravel()
        best = pd.Series(values).groupby(ids).max()
        known = density.reindex(best.index)
        best = best[(best > 0) & (known > 0) & (known <= max_density)]
        if best.empty:
            raise BadInput(
                f"no feature with a density of at most {max_density} is active here; raise max_density"
            )
        return [int(feature) for feature in best.nlargest(n).index]

    def map(self, shown: list[int], start: int) -> pd.DataFrame:
        """One row per shown feature and position where it is active."""
        parts = [self.strip(feature, start).assign(feature=str(feature)) for feature in shown]
        return pd.concat(parts, ignore_index=True).query("activation > 0").reset_index(drop=True)

    def strip(self, feature: int, start: int) -> pd.DataFrame:
        """One feature along the prompt."""
        positions = np.arange(start, self.encoded.n_tokens)
        return pd.DataFrame(
            {
                "position": positions,
                "token": self.encoded.texts[start:],
                "activation": self.activation(feature)[start:],
            }
        )
