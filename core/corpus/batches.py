"""From rows to batches of token ids: what the trainer, the losses and the teacher's cache see of the data.

Shapes: B rows of a batch, P positions of a row, T tokens of all data. A *text* is what attends to itself only: a
document, a piece of one, a conversation. A *row* is what the model is given at once: one text and padding
(``padded``), or several texts end to end (``packed``). Each position has the token that comes next as its target, or
``IGNORE``: at a text's last token, in padding, and before a token that is given and not learned (a prompt).

Token ids lie in one int32 array; a batch is cut from it when it is asked for. Knows no model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from core.corpus.encode import Encoded, TooLong, encode
from core.corpus.packing import Layout, best_fit, one_each
from core.corpus.rows import Kind, Rows
from core.corpus.splits import refuse_unseen
from core.lazy import torch
from core.types import Family, content_hash

if TYPE_CHECKING:
    from torch import Tensor

IGNORE = -100
"""The target of a position that nothing is learned at."""
Packing = Literal["packed", "padded"]


@dataclass(frozen=True)
class Batch:
    """Rows of token ids with everything that says what may see what, and what is learned where."""

    ids_BP: Tensor
    segments_BP: Tensor
    """0 = padding; 1, 2, … = number of the text within the row."""
    positions_BP: Tensor
    """Counts from 0 in each text; goes on in padding."""
    targets_BP: Tensor
    """The next token of the same text, or ``IGNORE``."""
    rows_B: Tensor
    """Numbers of the rows in ``TrainingData``; of scored pairs half as many, for each pair one."""
    labels_B: Tensor | None = None
    """Class of each row (int64), or score of each pair (float32); None where there is neither."""
    types_BP: Tensor | None = None
    """1 in the second text of a labelled pair, for models that tell the two apart; else None."""
    by_mask: bool = False
    """Whether a decoder must be given ``attention_mask``: it does not make its masks from positions."""

    @cached_property
    def n_targets(self) -> int:
        """Positions at which something is learned."""
        return int((self.targets_BP != IGNORE).sum())

    @cached_property
    def n_tokens(self) -> int:
        """Positions that are not padding."""
        return int((self.segments_BP > 0).sum())

    @property
    def content_hash(self) -> str:
        """SHA-256 of ids, texts, targets and labels, for naming a batch in an error."""
        whole = hashlib.sha256()
        for name in ("ids_BP", "segments_BP", "targets_BP", "labels_B"):
            if (tensor := getattr(self, name)) is not None:
                whole.update(tensor.cpu().numpy().tobytes())
        return whole.hexdigest()

    def inputs(self, family: Family, *, dtype: Any = None) -> dict[str, Any]:
        """What the model is called with.

        A decoder is told the positions only: transformers makes each layer's mask from where they begin again, sliding
        windows included, and needs none where they never do; padding lies behind everything that could see it. This
        holds without a cache only, so ``use_cache`` is off. An encoder is given a mask, of ``dtype`` (float32) where
        texts share rows; where none do it counts positions itself, since not all begin with 0 (RoBERTa: behind the
        number of its padding token).
        """
        if family == "decoder" and not self.by_mask:
            return {"input_ids": self.ids_BP, "position_ids": self.positions_BP, "use_cache": False}
        mask = self.attention_mask(dtype or torch.float32, causal=family == "decoder")
        given = {"input_ids": self.ids_BP, "attention_mask": mask}
        if family == "decoder":
            return {**given, "position_ids": self.positions_BP, "use_cache": False}
        if int(self.segments_BP.max()) > 1:
            given["position_ids"] = self.positions_BP
        return given if self.types_BP is None else {**given, "token_type_ids": self.types_BP}

    def attention_mask(self, dtype: Any, *, causal: bool = True) -> Tensor | None:
        """The same as one tensor, for what takes no positions; a model with sliding windows would lose them by it.

        None where one causal text fills every row; [B, P] of 1 and 0 where rows hold one text and padding; else
        [B, 1, P, P] of ``dtype`` to add to the scores, 0 where two positions see each other. Padding sees itself.
        """
        segments_BP = self.segments_BP
        if int(segments_BP.max()) <= 1:
            return None if causal and bool(segments_BP.all()) else (segments_BP > 0).long()
        seen_BPP = segments_BP[:, :, None] == segments_BP[:, None, :]
        if causal:
            seen_BPP = seen_BPP.tril()
        mask_BPP = torch.zeros(seen_BPP.shape, dtype=dtype, device=segments_BP.device)
        return mask_BPP.masked_fill(~seen_BPP, torch.finfo(dtype).min)[:, None]

    def to(self, device: Any) -> Batch:
        """The batch on another device."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {
            name: value.to(device) for name, value in values.items() if isinstance(value, torch.Tensor)
        }
        return replace(self, **moved)


@dataclass(frozen=True, eq=False)
class TrainingData:
    """All rows as token ids; ``batch`` cuts any of them out."""

    name: str
    kind: Kind
    window: int
    packing: Packing
    classes: tuple[str, ...]
    """What the numbers of ``Batch.labels_B`` stand for; empty where there are no labels."""
    pad_id: int
    encoded: Encoded
    layout: Layout
    labels_R: NDArray[Any] | None
    by_mask: bool = False
    """See ``Batch.by_mask``; ``core.corpus.fitting`` sets it."""

    @property
    def n_rows(self) -> int:
        """Rows a batch can be made of; of scored pairs, pairs."""
        return self.layout.n_rows

    @property
    def n_tokens(self) -> int:
        """Tokens of all rows, padding not counted."""
        return len(self.encoded.ids_T)

    @cached_property
    def n_targets(self) -> int:
        """Tokens that are learned."""
        return int(self.encoded.learned_T.sum())

    @property
    def n_cut(self) -> int:
        """Rows of the source of which the end is lost."""
        return self.encoded.n_cut

    @cached_property
    def fingerprint(self) -> str:
        """Content hash of all rows, in order: token ids, what is learned, labels."""
        return content_hash([self.row_hash(row) for row in range(self.n_rows)])

    def row_hash(self, row: int) -> str:
        """SHA-256 of one row: its texts' ids, what is learned of them, its label."""
        whole = hashlib.sha256()
        for span in self._spans(row):
            ids = self.encoded.ids_T[span]
            whole.update(
                np.int64(len(ids)).tobytes() + ids.tobytes() + self.encoded.learned_T[span].tobytes()
            )
        if self.labels_R is not None:
            whole.update(self.labels_R[row].tobytes())
        return whole.hexdigest()

    def sources(self, row: int) -> tuple[int, ...]:
        """Numbers of the source's rows that a row holds something of."""
        return tuple(dict.fromkeys(self.encoded.row_S[self.layout.texts(row)].tolist()))

    def length(self, row: int) -> int:
        """Tokens of a row, padding not counted."""
        return sum(span.stop - span.start for span in self._spans(row))

    def _spans(self, row: int) -> list[slice]:
        bounds = self.encoded.bounds_S1
        return [slice(int(bounds[text]), int(bounds[text + 1])) for text in self.layout.texts(row)]

    def batch(self, indices: Sequence[int]) -> Batch:
        """The rows of these numbers, as long as the longest of them.

        Of n scored pairs the batch has 2n rows: first texts, then second texts in the same order.
        """
        spans = [self._spans(int(row)) for row in indices]
        if self.kind == "pairs":
            spans = [[pair[side]] for side in (0, 1) for pair in spans]
        length = max(sum(span.stop - span.start for span in row) for row in spans)
        ids = np.full((len(spans), length), self.pad_id, dtype=np.int64)
        targets = np.full_like(ids, IGNORE)
        segments, positions, types = np.zeros_like(ids), np.zeros_like(ids), np.zeros_like(ids)
        for b, row in enumerate(spans):
            at = start = 0
            for number, span in enumerate(row, start=1):
                start, at = at, at + span.stop - span.start
                here, text = slice(start, at), self.encoded.ids_T[span]
                ids[b, here], segments[b, here] = text, number
                targets[b, start : at - 1] = np.where(self.encoded.learned_T[span][1:], text[1:], IGNORE)
                positions[b, here] = np.arange(at - start)
                if self.encoded.types_T is not None:
                    types[b, here] = self.encoded.types_T[span]
            positions[b, at:] = np.arange(at - start, length - start)
        labels = None if self.labels_R is None else self.labels_R[np.asarray(indices)]
        return Batch(
            ids_BP=torch.from_numpy(ids),
            segments_BP=torch.from_numpy(segments),
            positions_BP=torch.from_numpy(positions),
            targets_BP=torch.from_numpy(targets),
            rows_B=torch.as_tensor(list(indices), dtype=torch.int64),
            labels_B=None if labels is None else torch.from_numpy(labels),
            types_BP=None if self.encoded.types_T is None else torch.from_numpy(types),
            by_mask=self.by_mask,
        )


def tokenized(
    rows: Rows,
    tokenizer: Any,
    *,
    window: int,
    packing: Packing = "packed",
    classes: Sequence[str] | None = None,
    too_long: TooLong = "refuse",
) -> TrainingData:
    """Rows as token ids in rows of at most ``window`` tokens; labelled rows and pairs are always ``padded``.

    ``classes`` are those of the training rows, for held-out ones (``BadInput`` for a label that is not among them).
    Documents longer than the window go on in another text; any other row that is longer is refused, or with
    ``too_long="cut"`` loses its end (``TrainingData.n_cut``).
    """
    encoded = encode(rows, tokenizer, window=window, too_long=too_long)
    given = rows.kind in ("labelled", "pairs")
    n_texts = len(encoded.row_S)
    if given or packing == "padded":
        layout = one_each(n_texts, texts_per_row=2 if rows.kind == "pairs" else 1)
    else:
        layout = best_fit(np.diff(encoded.bounds_S1), window=window)
    known = tuple(rows.classes if classes is None else classes)
    pads = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return TrainingData(
        name=rows.name,
        kind=rows.kind,
        window=window,
        packing="padded" if given else packing,
        classes=known,
        pad_id=next(id_ for id_ in pads if id_ is not None),
        encoded=encoded,
        layout=layout,
        labels_R=_labels(rows, known),
    )


def order(n: int, epoch: int, seed: int) -> NDArray[np.int64]:
    """In which order the ``n`` rows are read in this epoch; the same on every machine and with every numpy."""
    # The raw stream of a bit generator is fixed by its algorithm; that of Generator.permutation is not.
    draws = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(n)
    return np.argsort(draws, kind="stable")


def _labels(rows: Rows, classes: tuple[str, ...]) -> NDArray[Any] | None:
    if rows.kind == "pairs":
        return np.array([row.score for row in rows.rows], dtype=np.float32)
    if rows.kind != "labelled":
        return None
    refuse_unseen(rows, classes)
    number = {label: index for index, label in enumerate(classes)}
    return np.array([number[row.label] for row in rows.rows], dtype=np.int64)
