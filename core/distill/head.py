"""The last step of a decoder: its unembedding with bias, scale and softcap, as one object that losses can take apart.

Legend: N positions, D d_model, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from core.errors import CannotCompress
from core.lazy import torch
from core.models.loaded import LoadedModel
from core.models.readout import finish_logits

if TYPE_CHECKING:
    from torch import Tensor

    from core.models.anatomy import Anatomy


@dataclass(frozen=True, eq=False)
class Head:
    """Reads final hidden states (behind the final norm) as logits."""

    module: Any
    anatomy: Anatomy
    vocabulary: int
    """Logits beyond it are cut off: padding of the embedding table that the other model does not have."""

    @property
    def is_plain(self) -> bool:
        """Whether it is one matrix product, which a loss may take apart: no adapter, no hook, no forward of its own."""
        return (
            isinstance(self.module, torch.nn.Linear)
            and type(self.module).forward is torch.nn.Linear.forward
            and "forward" not in vars(self.module)
            and not self.module._forward_hooks
            and not self.module._forward_pre_hooks
        )

    @property
    def weight_VD(self) -> Tensor:
        """The unembedding, which may be the embedding too."""
        weight_VD: Tensor = self.module.weight
        return weight_VD if self.vocabulary == len(weight_VD) else weight_VD[: self.vocabulary]

    @property
    def bias_V(self) -> Tensor | None:
        """Added to the product, where the model has one."""
        bias_V: Tensor | None = self.module.bias
        return bias_V if bias_V is None or self.vocabulary == len(bias_V) else bias_V[: self.vocabulary]

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Logits [N, V] as the model itself gives them."""
        return finish_logits(self.anatomy, self.module(hidden_ND))[..., : self.vocabulary]


def head_of(loaded: LoadedModel, *, vocabulary: int | None = None) -> Head:
    """The head of a decoder; raises ``CannotCompress`` for a model that predicts no tokens."""
    path = loaded.anatomy.unembedding
    if path is None or loaded.family != "decoder":
        raise CannotCompress(
            f"{loaded.ref} predicts no next token: it has no distribution to teach or to learn; "
            "take a decoder, e.g. demo:smollm2"
        )
    module = loaded.model.get_submodule(path)
    return Head(module, loaded.anatomy, vocabulary or len(module.weight))
