"""Norms of the residual stream with plain transformers: before every block, and after the last one."""

import torch
from transformers import AutoModel, AutoTokenizer

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
TEXT = "The capital of France is"

tokenizer = AutoTokenizer.from_pretrained(MODEL)
model = AutoModel.from_pretrained(MODEL, dtype=torch.float32).eval()
inputs = tokenizer(TEXT, return_tensors="pt")
kept = []
# The last hidden state is already normed, so the stream after the last block is taken by a hook on the norm.
hook = model.norm.register_forward_pre_hook(lambda module, args: kept.append(args[0]))
with torch.inference_mode():
    *early, _ = model(**inputs, output_hidden_states=True, use_cache=False).hidden_states
hook.remove()
residual_LPD = torch.cat([*early, *kept])
print("norm", residual_LPD.norm(dim=-1))
print("cosine to previous", torch.cosine_similarity(residual_LPD[1:], residual_LPD[:-1], dim=-1))
