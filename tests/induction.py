"""A hand-built induction transformer inside stock GPT-2 maths, whose answers are known in closed form.

Two layers of two heads. Layer 0 head 0 copies the previous token's symbol; layer 1 head 0 looks for the position
whose copied symbol equals its own token, and writes that position's token as its prediction. Head 1 of both layers
is dead (zero weights, uniform attention). Each symbol is a pair ±1, so every LayerNorm's scale is a known
constant. On a start token and r + r, r distinct symbols, with sharpness β:

- weight of L0H0 at position p on p − 1: 1 / (1 + p · e^−β)
- prediction in the second half: always the true next token, its logit 2 / √(8/d + ε)
"""

from __future__ import annotations

import math
import random
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from core.models.anatomy_find import find_anatomy
from core.models.loaded import LoadedModel
from core.types import ModelRef, Prompt

SYMBOLS = 16
START = SYMBOLS
VOCAB = SYMBOLS + 1
CONTEXT = 25
HEADS = 2
EPSILON = 1e-5
# Where each code lives in the residual stream, a pair of coordinates per symbol or position.
TOKEN, POSITION = 0, 2 * VOCAB
PREVIOUS = POSITION + 2 * CONTEXT
OUTPUT = PREVIOUS + 2 * VOCAB
D = OUTPUT + 2 * VOCAB
D_HEAD = D // HEADS


@cache
def induction_model(beta: float) -> LoadedModel:
    """The model as a stock ``GPT2LMHeadModel`` with a whitespace tokenizer of the symbols ``a`` to ``p``."""
    config = transformers.GPT2Config(
        vocab_size=VOCAB,
        n_positions=CONTEXT,
        n_embd=D,
        n_layer=2,
        n_head=HEADS,
        layer_norm_epsilon=EPSILON,
        tie_word_embeddings=False,
    )
    model = transformers.GPT2LMHeadModel(config).eval().requires_grad_(False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if name.endswith(("ln_1.weight", "ln_2.weight", "ln_f.weight")) else 0.0)
        for symbol in range(VOCAB):
            _write_pair(model.transformer.wte.weight[symbol], TOKEN + 2 * symbol)
            _write_pair(model.lm_head.weight[symbol], OUTPUT + 2 * symbol)
        for position in range(CONTEXT):
            _write_pair(model.transformer.wpe.weight[position], POSITION + 2 * position)
        _wire_previous_token(model.transformer.h[0].attn, beta)
        _wire_induction(model.transformer.h[1].attn, beta)
    return LoadedModel(
        ModelRef("induction"), Path(), model, _tokenizer(), None, find_anatomy(model), f"induction-{beta}"
    )


def repeated_prompt(length: int, *, seed: int = 0) -> Prompt:
    """``length`` distinct symbols, twice; the tokenizer puts the start token before them."""
    symbols = random.Random(seed).sample([chr(ord("a") + n) for n in range(SYMBOLS)], length)
    return Prompt(" ".join(["@", *symbols, *symbols]))


def _write_pair(row: torch.Tensor, at: int) -> None:
    row[at], row[at + 1] = 1.0, -1.0


def _wire_previous_token(attention: Any, beta: float) -> None:
    """Query of position p matches the key of p − 1; the value moves TOKEN to PREVIOUS."""
    rms = math.sqrt(4 / D + EPSILON)  # token and position: four coordinates of ±1
    sharp = math.sqrt(beta * math.sqrt(D_HEAD))
    q, k, v = attention.c_attn.weight.split(D, dim=1)
    for position in range(CONTEXT):
        _read_pair(q[:, max(position - 1, 0)], POSITION + 2 * position, rms * sharp)
        _read_pair(k[:, position], POSITION + 2 * position, rms * sharp)
    for symbol in range(VOCAB):
        _read_pair(v[:, symbol], TOKEN + 2 * symbol, rms)
        _write_pair(attention.c_proj.weight[symbol], PREVIOUS + 2 * symbol)


def _wire_induction(attention: Any, beta: float) -> None:
    """Query of a token matches the key whose previous token it is; the value moves TOKEN to OUTPUT."""
    rms = math.sqrt(6 / D + EPSILON)  # token, position and previous token
    sharp = math.sqrt(beta * math.sqrt(D_HEAD))
    q, k, v = attention.c_attn.weight.split(D, dim=1)
    for symbol in range(VOCAB):
        _read_pair(q[:, symbol], TOKEN + 2 * symbol, rms * sharp)
        _read_pair(k[:, symbol], PREVIOUS + 2 * symbol, rms * sharp)
        _read_pair(v[:, symbol], TOKEN + 2 * symbol, rms)
        _write_pair(attention.c_proj.weight[symbol], OUTPUT + 2 * symbol)


def _read_pair(column: torch.Tensor, at: int, scale: float) -> None:
    """Make a column whose product with a normed stream that holds the pair at ``at`` is ``scale`` / rms."""
    column[at], column[at + 1] = 0.5 * scale, -0.5 * scale


def _tokenizer() -> Any:
    names = [chr(ord("a") + n) for n in range(SYMBOLS)]
    tokenizer = Tokenizer(models.WordLevel({**{name: n for n, name in enumerate(names)}, "@": START}, "@"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="@", bos_token="@")
