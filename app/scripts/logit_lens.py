"""Logit lens with plain transformers: the top tokens of every layer at every position."""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
TEXT = "The capital of France is"
TOP_K = 5

tokenizer = AutoTokenizer.from_pretrained(MODEL)
model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
inputs = tokenizer(TEXT, return_tensors="pt")
with torch.inference_mode():
    output = model(**inputs, output_hidden_states=True, use_cache=False)
    # transformers already applies the final norm to the last hidden state, so that one is not normed again.
    *early, last = output.hidden_states
    norm, unembed = model.base_model.norm, model.get_output_embeddings()
    logits_LPV = torch.stack([*(unembed(norm(h[0])) for h in early), unembed(last[0])])

log_p_LPV = logits_LPV.log_softmax(-1)
entropy_LP = -(log_p_LPV.exp() * log_p_LPV).sum(-1)
kl_LP = (log_p_LPV[-1].exp() * (log_p_LPV[-1] - log_p_LPV)).sum(-1)
top_p_LPK, top_id_LPK = log_p_LPV.exp().topk(TOP_K)
for layer in range(len(logits_LPV)):
    for position in range(logits_LPV.shape[1]):
        words = tokenizer.batch_decode(top_id_LPK[layer, position, :, None])
        numbers = f"{entropy_LP[layer, position]:.4f} {kl_LP[layer, position]:.4f}"
        print(layer, position, numbers, words, top_p_LPK[layer, position].tolist())
