"""A byte-level BPE tokenizer in GGUF's words; refuses, by name, what GGUF readers would split otherwise.

GGUF does not store how text is cut before merging, only the name of a rule that every reader has built in
(``tokenizer.ggml.pre``). So a rule is mapped where it equals one of these exactly, and never guessed.
"""

from __future__ import annotations

import json
from typing import Any

from core.errors import CannotExport

QWEN2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {QWEN2: "qwen2", LLAMA3: "llama-bpe"}
NOT_NORMALIZED = "This tokenizer composes Unicode (NFC) before it cuts text; GGUF readers do not, so decomposed accents become other tokens."
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""llama.cpp's token types."""


def write_tokenizer(writer: Any, tokenizer: Any, vocab_size: int) -> str:
    """Add tokens, types, merges, rule, special ids and chat template; a note on what readers do otherwise, or nothing.

    Raises ``CannotExport``.
    """
    if tokenizer is None:
        raise CannotExport(
            "this model has no tokenizer, and a GGUF file must hold one; add its files or export safetensors"
        )
    if not getattr(tokenizer, "is_fast", False):
        raise CannotExport(
            f"{type(tokenizer).__name__} has no tokenizer.json to read the merges from; export safetensors instead"
        )
    written = json.loads(tokenizer.backend_tokenizer.to_str())
    model, normalizer = written["model"], (written["normalizer"] or {}).get("type")
    if model["type"] != "BPE" or model.get("byte_fallback") or normalizer not in (None, "NFC"):
        raise CannotExport(
            f"a {model['type']} tokenizer with normalizer {normalizer} is not byte-level BPE, the one kind that is mapped "
            "exactly; export safetensors instead"
        )
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_rule(written["pre_tokenizer"]))
    tokens, types = _tokens(tokenizer, written, vocab_size)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in model["merges"]])
    ids = {"bos": writer.add_bos_token_id, "eos": writer.add_eos_token_id, "unk": writer.add_unk_token_id,
           "pad": writer.add_pad_token_id}  # fmt: skip
    for name, add in ids.items():
        if (id_ := getattr(tokenizer, f"{name}_token_id")) is not None:
            add(id_)
    writer.add_add_bos_token(tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id])
    writer.add_add_space_prefix(False)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)
    return NOT_NORMALIZED if normalizer else ""


def _rule(pre_tokenizer: dict[str, Any] | None) -> str:
    """The name of the rule by which text is cut into words before merging."""
    steps = [] if pre_tokenizer is None else pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    kinds = [step["type"] for step in steps]
    if any(step.get("add_prefix_space") for step in steps):
        kinds = ["a space before the text"]
    if kinds == ["ByteLevel"] and steps[0]["use_regex"]:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"] and steps[1]["use_regex"]:
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and not steps[1]["use_regex"]:
        pattern = steps[0]["pattern"].get("Regex")
        if pattern in SPLITS and steps[0]["behavior"] == "Isolated" and not steps[0]["invert"]:
            return SPLITS[pattern]
    raise CannotExport(
        f"this tokenizer cuts text by {' + '.join(kinds) or 'no rule'}, which equals none of the rules that GGUF names "
        f"and that are mapped here (gpt-2, smollm, {', '.join(SPLITS.values())}); a guess would split words otherwise. "
        "Export safetensors instead"
    )


def _tokens(tokenizer: Any, written: dict[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    """Every id's token and type, up to the model's vocabulary: rows beyond the tokenizer's are unused."""
    by_id = {id_: token for token, id_ in tokenizer.get_vocab().items()}
    if max(by_id) >= vocab_size:
        raise CannotExport(
            f"the tokenizer has id {max(by_id)} but the model only {vocab_size} tokens; this pair does not belong together"
        )
    special = {each["id"]: each["special"] for each in written["added_tokens"]}
    tokens = [by_id.get(i, f"[PAD{i}]") for i in range(vocab_size)]
    kinds = [
        UNUSED if i not in by_id else CONTROL if special.get(i) else USER_DEFINED if i in special else NORMAL
        for i in range(vocab_size)
    ]
    return tokens, kinds
