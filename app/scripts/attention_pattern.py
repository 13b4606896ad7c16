"""Attention patterns with plain transformers: scores of all heads, and one head's map."""

import torch
from transformers import AutoModel, AutoTokenizer

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
TEXT = "The capital of France is"
LAYER = 0
HEAD = 0

tokenizer = AutoTokenizer.from_pretrained(MODEL)
model = AutoModel.from_pretrained(MODEL, dtype=torch.float32, attn_implementation="eager").eval()
inputs = tokenizer(TEXT, return_tensors="pt")
with torch.inference_mode():
    pattern_LHQK = torch.cat(model(**inputs, output_attentions=True).attentions)

entropy_LH = -torch.xlogy(pattern_LHQK, pattern_LHQK).sum(-1).mean(-1)
previous_LH = pattern_LHQK.diagonal(-1, 2, 3).mean(-1)
first_LH = pattern_LHQK[:, :, 1:, 0].mean(-1)
for layer, head in torch.cartesian_prod(*map(torch.arange, entropy_LH.shape)).tolist():
    scores = [f"{score[layer, head]:.4f}" for score in (entropy_LH, previous_LH, first_LH)]
    print(layer, head, "entropy, previous token, first token:", *scores)
print(pattern_LHQK[LAYER, HEAD])
