"""What a head writes for each token it may look at, with plain transformers; for models with Llama's module names."""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
TEXT = "When Mary and John went to the store, John gave a drink to Mary. When Mary and John"
LAYER = 18
HEAD = 6
QUERY = -1

tokenizer = AutoTokenizer.from_pretrained(MODEL)
model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32, attn_implementation="eager").eval()
attention = model.model.layers[LAYER].self_attn
size, ids = attention.head_dim, tokenizer(TEXT, return_tensors="pt")["input_ids"]
seen = {}
attention.v_proj.register_forward_hook(lambda module, args, output: seen.update(v=output[0]))
model.model.norm.register_forward_hook(lambda module, args, output: seen.update(end=args[0][0]))
with torch.inference_mode():
    pattern_HQK = model(ids, output_attentions=True).attentions[LAYER][0]

    group = HEAD // attention.num_key_value_groups
    value_PK = seen["v"][:, group * size : (group + 1) * size]
    written_PD = value_PK @ attention.o_proj.weight[:, HEAD * size : (HEAD + 1) * size].T
    end_D, norm = seen["end"][QUERY], model.model.norm
    sigma = (end_D.square().mean() + norm.variance_epsilon).sqrt()
    logits_PV = written_PD * norm.weight / sigma @ model.lm_head.weight.T
    logits_PV -= logits_PV.mean(-1, keepdim=True)

weight_K = pattern_HQK[HEAD, QUERY]
for position in weight_K.argsort(descending=True).tolist():
    own = logits_PV[position, ids[0, position]]
    rank = 1 + int((logits_PV[position] > own).sum())
    best = int(logits_PV[position].argmax())
    print(position, f"{weight_K[position]:.6f} {logits_PV[position, best]:.6f} {own:.6f}", rank, end=" ")
    print(repr(tokenizer.decode(ids[0, position])), "->", repr(tokenizer.decode(best)))
