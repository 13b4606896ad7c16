"""A prompt as a game: its tokens (or words) are the players, a coalition is the prompt with the others occluded.

Legend: N players, B coalitions, P positions, D d_model, V vocabulary.

Every input attribution speaks of one number f(coalition): the target's logit or log-probability, or its difference to
a distractor, after the tokens in the coalition. What takes an occluded token's place is a choice and a setting:
nothing (the prompt gets shorter), the mean of all embeddings, or a neutral token. Special tokens a tokenizer adds are
no players: they always stay. It knows no attribution method.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from core.errors import BadInput
from core.lazy import torch
from core.probes._batching import in_batches
from core.probes._targets import Token, resolve_distractor, resolve_position, resolve_token
from core.probes._tokens import Encoded, encode
from core.registry import Settings
from core.types import Progress, Prompt, part_of, silent

if TYPE_CHECKING:
    from torch import Tensor

    from core.models.anatomy import Anatomy
    from core.models.loaded import LoadedModel

Occlusion = Literal["remove", "mean_embedding", "token"]
BATCH_BYTES = 128 << 20
"""A larger batch is no faster on a CPU: it leaves the caches."""


class InputSettings(Settings):
    """What is asked of the model, and how a token is taken out; shared by every input attribution."""

    target: str = Field(
        "", description="Token asked about, with its leading space; empty: the top prediction"
    )
    distractor: str = Field(
        "", description="Token to compare with (why the target rather than this?); empty: none"
    )
    metric: Literal["log_probability", "logit"] = Field(
        "log_probability",
        description="log_probability: natural log of the target's probability, in nats; logit: the model's raw "
        "number; with a distractor both are the same difference",
    )
    position: int = Field(
        -1, ge=-1, le=2047, description="Token position that predicts, from 0; −1 is the last"
    )
    unit: Literal["token", "word"] = Field("token", description="What is taken out at once")
    occlude_with: Occlusion = Field(
        "remove",
        description="remove: the prompt without the token; mean_embedding: the mean over the vocabulary in its "
        "place; token: a neutral token in its place",
    )
    neutral_token: str = Field(
        "", description="Used with occlude_with = token; empty: the tokenizer's padding or end token"
    )
    quality_orders: int = Field(
        8,
        ge=0,
        le=64,
        description="Random orders the ranking is compared with in the quality check; 0 skips it",
    )


@dataclass
class Game:
    """The players of one prompt and the value of every coalition, each computed once."""

    loaded: LoadedModel
    encoded: Encoded
    n_positions: int
    """P: tokens up to the one that predicts; later ones cannot matter."""
    players: tuple[tuple[int, ...], ...]
    """Positions of each player."""
    names: tuple[str, ...]
    target: Token
    distractor: Token | None
    metric: Literal["log_probability", "logit"]
    occlude_with: Occlusion
    replacement_D: Tensor | None
    """Embedding in an occluded token's place; None removes it."""
    empty_id: int | None
    """The one token that a prompt with everything removed is left with; None when special tokens stay."""
    logits_V: Tensor
    """What the model says to the whole prompt."""
    _known: dict[bytes, float] = field(default_factory=dict, repr=False)

    @property
    def n(self) -> int:
        """N."""
        return len(self.players)

    @property
    def n_known(self) -> int:
        """Prompt variations that were run."""
        return len(self._known)

    @property
    def unit(self) -> str:
        """Unit of f."""
        return "nats" if self.metric == "log_probability" and self.distractor is None else "logits"

    def read(self, logits_BV: Tensor) -> Tensor:
        """f from logits, in float64; differentiable. Only what is read is widened: the vocabulary is the bill."""
        target_B = logits_BV[..., self.target.id].double()
        if self.distractor is not None:
            return target_B - logits_BV[..., self.distractor.id].double()
        return target_B if self.metric == "logit" else target_B - logits_BV.double().logsumexp(-1)

    def values(self, coalitions_BN: np.ndarray, progress: Progress = silent) -> np.ndarray:
        """f of each coalition (rows of booleans: who is present), float64 [B]. Hold the model's lock."""
        keys = [np.packbits(row).tobytes() for row in coalitions_BN]
        new = {key: row for key, row in zip(keys, coalitions_BN, strict=True) if key not in self._known}
        lengths = {key: self._length(row) for key, row in new.items()}
        # One length at a time, so that no prompt is padded.
        order = sorted(new, key=lambda key: lengths[key])
        first = 0
        for length, group in itertools.groupby(order, key=lambda key: lengths[key]):
            rows = np.stack([new[key] for key in group])
            report = part_of(progress, first / len(order), (first + len(rows)) / len(order))
            for key, value in zip(
                order[first : first + len(rows)], self._run_all(rows, length, report), strict=True
            ):
                self._known[key] = value
            first += len(rows)
        return np.array([self._known[key] for key in keys])

    def value_of_all(self) -> float:
        """f of the whole prompt, straight from the model's own answer."""
        return float(self.read(self.logits_V))

    def ends(self) -> tuple[float, float]:
        """f(everything), f(nothing), both by way of coalitions."""
        whole, nothing = self.values(np.stack([np.ones(self.n, bool), np.zeros(self.n, bool)]))
        return float(whole), float(nothing)

    def embeddings(self) -> Tensor:
        """The prompt's input embeddings [P, D], before learned positions are added."""
        return self.embeddings_of(self.encoded.ids)

    def embeddings_of(self, ids: Sequence[int]) -> Tensor:
        """Input embeddings [P, D] of the first P of other ids."""
        ids_P = torch.tensor(ids[: self.n_positions], device=self.loaded.device)
        embedded_PD: Tensor = self.loaded.model.get_submodule(self.loaded.anatomy.embedding)(ids_P)
        return embedded_PD

    def occluded_embeddings(self, replacement_D: Tensor) -> Tensor:
        """The prompt's embeddings [P, D] with ``replacement_D`` in the place of every player."""
        return self._replace(np.zeros((1, self.n), bool), replacement_D)[0]

    def _run_all(self, coalitions_BN: np.ndarray, length: int, progress: Progress) -> list[float]:
        """Coalitions that give prompts of one length, in batches as large as memory allows."""
        device = self.loaded.device

        def run(start: int, stop: int) -> list[float]:
            progress(start, len(coalitions_BN), f"prompt variations of {length} tokens")
            return self._run(coalitions_BN[start:stop])

        batches = in_batches(
            len(coalitions_BN),
            run,
            bytes_each=row_bytes(self.loaded.anatomy, length),
            device=device,
            at_most_bytes=BATCH_BYTES if device == "cpu" else None,
        )
        return [value for batch in batches for value in batch]

    def _run(self, coalitions_BN: np.ndarray) -> list[float]:
        if self.replacement_D is None:
            kept = [self._kept_ids(row) for row in coalitions_BN]
            arguments = {"input_ids": torch.tensor(kept, device=self.loaded.device)}
        else:
            arguments = {"inputs_embeds": self._replace(coalitions_BN, self.replacement_D)}
        output = self.loaded.model(**arguments, use_cache=False, logits_to_keep=1)
        values: list[float] = self.read(output.logits[:, -1]).tolist()
        return values

    def _replace(self, coalitions_BN: np.ndarray, replacement_D: Tensor) -> Tensor:
        occluded = np.zeros((len(coalitions_BN), self.n_positions), bool)
        for player, positions in enumerate(self.players):
            occluded[:, positions] = ~coalitions_BN[:, player, None]
        mask_BP1 = torch.from_numpy(occluded).to(self.loaded.device)[..., None]
        return torch.where(mask_BP1, replacement_D, self.embeddings())

    def _kept_ids(self, present_N: np.ndarray) -> list[int]:
        gone = {p for player, there in zip(self.players, present_N, strict=True) if not there for p in player}
        kept = [self.encoded.ids[p] for p in range(self.n_positions) if p not in gone]
        if not kept:
            assert self.empty_id is not None
            kept = [self.empty_id]
        return kept

    def _length(self, present_N: np.ndarray) -> int:
        return len(self._kept_ids(present_N)) if self.replacement_D is None else self.n_positions


def build_game(loaded: LoadedModel, prompt: Prompt, settings: InputSettings) -> Game:
    """Read the prompt and the target; one forward pass. Hold the lock, inside ``inference_mode``.

    Raises ``BadInput`` for a prompt, target or neutral token that cannot be used.
    """
    encoded = encode(loaded, prompt)
    n_positions = resolve_position(settings.position, encoded.n_tokens) + 1
    keep = encoded.n_tokens - n_positions + 1
    output = loaded.model(**encoded.inputs, use_cache=False, logits_to_keep=keep)
    logits_V = output.logits[0, -keep].clone()
    target = resolve_token(loaded, settings.target, logits_V=logits_V)
    own = [p for p in range(n_positions) if encoded.n_bytes[p]]
    players = group_words(encoded.texts, own) if settings.unit == "word" else tuple((p,) for p in own)
    return Game(
        loaded=loaded,
        encoded=encoded,
        n_positions=n_positions,
        players=players,
        names=tuple("".join(encoded.texts[p] for p in player) for player in players),
        target=target,
        distractor=resolve_distractor(loaded, settings.distractor, target),
        metric=settings.metric,
        occlude_with=settings.occlude_with,
        replacement_D=_replacement(loaded, settings),
        empty_id=_empty_id(loaded, settings, n_positions, players),
        logits_V=logits_V,
    )


def group_words(texts: Sequence[str], positions: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Positions of the tokens of each word: one begins where a token begins with white space, or follows some."""
    words: list[list[int]] = []
    for position in positions:
        before = texts[words[-1][-1]] if words else " "
        if texts[position][:1].isspace() or before[-1:].isspace():
            words.append([position])
        else:
            words[-1].append(position)
    return tuple(tuple(word) for word in words)


def mean_embedding(loaded: LoadedModel) -> Tensor:
    """Mean of all embedding rows as the model feeds them, [D]."""
    weight_VD = loaded.model.get_submodule(loaded.anatomy.embedding).weight
    mean_D: Tensor = weight_VD.mean(0, dtype=torch.float64).to(weight_VD.dtype)
    return mean_D * loaded.anatomy.embedding_scale


def neutral_embedding(loaded: LoadedModel, settings: InputSettings) -> Tensor:
    """Embedding [D] of the neutral token that was named, else of the tokenizer's padding or end token."""
    if settings.neutral_token:
        id_ = resolve_token(loaded, settings.neutral_token, role="neutral_token").id
    else:
        id_ = _special_id(loaded, "pad_token_id", "eos_token_id", "bos_token_id")
    ids = torch.tensor([id_], device=loaded.device)
    row_D: Tensor = loaded.model.get_submodule(loaded.anatomy.embedding)(ids)[0]
    return row_D


def row_bytes(anatomy: Anatomy, n_positions: int) -> float:
    """Memory of one prompt in a batch, forward only: a layer's largest tensors, and one row of logits."""
    width = 8 * anatomy.d_model + 4 * anatomy.d_ff * max(1, anatomy.experts_per_token)
    return 4.0 * (n_positions * (width + 2 * anatomy.n_heads * n_positions) + 4 * anatomy.vocab_size)


def _replacement(loaded: LoadedModel, settings: InputSettings) -> Tensor | None:
    if settings.occlude_with == "remove":
        return None
    if settings.occlude_with == "mean_embedding":
        return mean_embedding(loaded)
    return neutral_embedding(loaded, settings)


def _empty_id(
    loaded: LoadedModel, settings: InputSettings, n_positions: int, players: tuple[tuple[int, ...], ...]
) -> int | None:
    """What stays of a prompt whose every token is removed: a model needs at least one."""
    if settings.occlude_with != "remove" or sum(map(len, players)) < n_positions:
        return None
    return _special_id(loaded, "bos_token_id", "eos_token_id", "pad_token_id")


def _special_id(loaded: LoadedModel, *names: str) -> int:
    tokenizer: Any = loaded.tokenizer
    found = [id_ for name in names if (id_ := getattr(tokenizer, name)) is not None]
    if not found:
        raise BadInput(
            "this tokenizer has no padding, start or end token to stand for a missing one; "
            "set occlude_with to mean_embedding, or to token with a neutral_token"
        )
    return int(found[0])
