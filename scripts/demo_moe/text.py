"""Tokens for ``demo:moe``: a byte-level BPE of the training text, one stream per domain, stratified batches.

Legend: B sequences of a batch, P positions.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from core.text.domains import documents_by_domain

VOCABULARY = 2048
END = "<|endoftext|>"
LEARN_BYTES = 1_000_000
"""The tokenizer learns from this much of each domain, so that no domain owns the vocabulary."""

Streams = dict[str, np.ndarray]
"""All tokens of a domain's documents, joined by the end token, as uint16, by domain."""


def make_tokenizer() -> Any:
    """A byte-level BPE of 2,048 tokens, digits one by one, learned on equal parts of the training text."""
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    learned.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    found = documents_by_domain(split="train", limit_bytes=LEARN_BYTES)
    learned.train_from_iterator((text for documents in found.values() for text in documents.texts), trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=learned, bos_token=END, eos_token=END, pad_token=END, model_max_length=512
    )


def training_streams(tokenizer: Any) -> Streams:
    """The whole training text, tokenized."""
    streams = {}
    for domain, documents in documents_by_domain(split="train").items():
        ids = tokenizer(list(documents.texts), verbose=False).input_ids
        streams[domain] = np.concatenate([np.array([*one, tokenizer.eos_token_id], np.uint16) for one in ids])
    return streams


def batch(streams: Streams, *, per_domain: int, length: int, seed: tuple[int, ...]) -> Tensor:
    """``per_domain`` windows of ``length`` + 1 tokens of every domain, places drawn by ``seed``: int64 [B, P + 1]."""
    rng = np.random.default_rng(seed)
    rows = []
    for stream in streams.values():
        for start in rng.integers(0, len(stream) - length - 1, per_domain):
            rows.append(stream[start : start + length + 1].astype(np.int64))
    return torch.from_numpy(np.stack(rows))


def held_out_windows(tokenizer: Any, *, windows: int, length: int) -> tuple[Tensor, list[str]]:
    """The first ``windows`` evaluation windows [B, P] of every domain, each within one document, and their domains."""
    rows, names = [], []
    for domain, documents in documents_by_domain().items():
        ids = (tokenizer(text, verbose=False).input_ids for text in documents.texts)
        long = [one[:length] for one in ids if len(one) >= length][:windows]
        rows += long
        names += [domain] * len(long)
    return torch.tensor(rows), names


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write the tokenizer's files."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
