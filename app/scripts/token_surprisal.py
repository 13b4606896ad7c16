"""Token surprisal with plain transformers: bits per token, and bits per byte of the text."""

import math

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
TEXT = "The capital of France is"

tokenizer = AutoTokenizer.from_pretrained(MODEL)
model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
inputs = tokenizer(TEXT, return_tensors="pt", return_offsets_mapping=True)
offsets = inputs.pop("offset_mapping")[0].tolist()
ids = inputs["input_ids"][0]
with torch.inference_mode():
    log_p_PV = model(**inputs, use_cache=False).logits[0, :-1].log_softmax(-1)

bits = (-log_p_PV[torch.arange(len(ids) - 1), ids[1:]] / math.log(2)).tolist()
n_bytes = sum(len(TEXT[start:end].encode()) for start, end in offsets[1:])
for token, bit in zip(tokenizer.convert_ids_to_tokens(ids[1:]), bits, strict=True):
    print(f"{bit:8.4f} {token}")
print("bits per byte", sum(bits) / n_bytes, "perplexity", 2 ** (sum(bits) / len(bits)))
