"""Time the prompt and the decode steps of a model with transformers alone: medians and raw samples, no protocol."""

import os
import statistics
import time

import torch
from transformers import AutoModelForCausalLM

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
PROMPT = 256
STEPS = 32
THREADS = 0

torch.set_num_threads(THREADS or os.cpu_count() or 1)
model = AutoModelForCausalLM.from_pretrained(MODEL).eval()
tokens = torch.randint(0, model.config.vocab_size, (1, PROMPT), generator=torch.Generator().manual_seed(0))
prefill_ms, decode_ms = [], []
with torch.inference_mode():
    for _ in range(5):
        start = time.perf_counter()
        out = model(tokens, use_cache=True, logits_to_keep=1)
        prefill_ms.append((time.perf_counter() - start) * 1e3)
        for _ in range(STEPS):
            picked = out.logits[:, -1:].argmax(-1)
            start = time.perf_counter()
            out = model(picked, past_key_values=out.past_key_values, use_cache=True)
            decode_ms.append((time.perf_counter() - start) * 1e3)
print(f"prefill {statistics.median(prefill_ms[1:]):.2f} ms for {PROMPT} tokens")
print(f"decode {statistics.median(decode_ms[STEPS:]):.2f} ms per token, n = {len(decode_ms) - STEPS}")
