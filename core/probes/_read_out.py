"""The one number of a model's answer that a gradient is taken of: a logit, a difference, or a sentence's similarity.

Covers image classifiers, language models and sentence encoders. Legend: P positions, V vocabulary or classes, D d_model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from core.errors import BadInput, SlimscopeError
from core.images.classes import refuse_without_classes
from core.models.embed import embed
from core.probes._relevance import Input, encode_any, read_weights
from core.probes._targets import resolve_distractor, resolve_token
from core.types import Prompt

if TYPE_CHECKING:
    from torch import Tensor

    from core.models.loaded import LoadedModel


@dataclass
class ReadOut:
    """Where the answer is read and what it is compared with."""

    loaded: LoadedModel
    read_P: Tensor
    """Weight of each position in the read-out; one position, or all for a mean."""
    read_from: str
    other_D: Tensor | None
    """Unit sentence vector of the second text; None where there is none."""
    explained: str = "the model's answer"
    unit: str = "logits"

    def score(self, output: Any, target: str, distractor: str) -> Tensor:
        """The number, from what the model put out; also says in ``explained`` what it is."""
        if self.loaded.family == "encoder" and self.loaded.anatomy.unembedding is None:
            return self._similarity(output.last_hidden_state[0], target, distractor)
        whole = self.loaded.family in ("vision", "classifier")  # one answer, whatever position is asked
        logits_V = output.logits[0] if whole else self._at_position(output.logits[0])
        logits_V = logits_V.float()
        if not logits_V.isfinite().all():
            raise SlimscopeError("the logits are not finite (NaN or infinity); open the model in float32")
        wanted = resolve_token(self.loaded, target, logits_V=logits_V)
        other = resolve_distractor(self.loaded, distractor, wanted)
        self.explained = repr(wanted.text) if other is None else f"{wanted.text!r} − {other.text!r}"
        score: Tensor = logits_V[wanted.id] if other is None else logits_V[wanted.id] - logits_V[other.id]
        return score

    def _at_position(self, logits_PV: Tensor) -> Tensor:
        if int((self.read_P > 0).sum()) != 1:
            raise BadInput("this encoder answers at a [MASK] token: put one into the text, or set position")
        row: Tensor = logits_PV[int(self.read_P.argmax())]
        return row

    def _similarity(self, token_PD: Tensor, target: str, distractor: str) -> Tensor:
        if target or distractor:
            raise BadInput(
                f"{self.loaded.ref} has no head that names tokens or classes: leave target and distractor empty, "
                "and give a second text to explain how similar the two are"
            )
        pooled_D = self.read_P @ token_PD.float()
        if self.other_D is None:
            self.explained, self.unit = "the length of the sentence vector", "length"
            length: Tensor = pooled_D.norm()
            return length
        self.explained, self.unit = "the cosine with the second text", "cosine"
        cosine: Tensor = pooled_D @ self.other_D / pooled_D.norm()
        return cosine


def read_out(loaded: LoadedModel, prompt: Prompt, position: int) -> tuple[Input, ReadOut]:
    """Encode the prompt and find its read-out; raises ``BadInput`` for a prompt this model cannot take."""
    if loaded.family == "vision":
        refuse_without_classes(loaded)
    pair = loaded.family == "encoder" and loaded.anatomy.unembedding is None and prompt.second is not None
    encoded = encode_any(loaded, Prompt(prompt.text) if pair else prompt)
    read_P, read_from = read_weights(loaded, encoded, position)
    other_D = None
    if pair:
        if not (prompt.second or "").strip():
            raise BadInput("the second text is empty; type it, or leave it out")
        inferred_D = embed(loaded, [str(prompt.second)])[0]
        other_D = inferred_D.clone().to(loaded.model.device)  # autograd takes no tensor of inference mode
    return encoded, ReadOut(loaded, read_P, read_from, other_D)
