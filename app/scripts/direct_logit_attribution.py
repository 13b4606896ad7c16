"""Direct logit attribution with plain transformers, for Llama-like models: what each head and MLP adds to a logit."""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
TEXT = "The capital of France is"
TARGET = " Paris"
DISTRACTOR = ""
POSITION = -1

tokenizer = AutoTokenizer.from_pretrained(MODEL)
model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
layers, norm, head = model.model.layers, model.model.norm, model.get_output_embeddings()
kept = {}


def keep(name, tensor):
    """One position of a hooked tensor."""
    kept[name] = tensor[0, POSITION].double()


for index, layer in enumerate(layers):
    layer.self_attn.o_proj.register_forward_pre_hook(lambda m, args, i=index: keep(("z", i), args[0]))
    layer.mlp.register_forward_hook(lambda m, args, out, i=index: keep(("mlp", i), out))
layers[0].register_forward_pre_hook(lambda m, args: keep("embedding", args[0]))
layers[-1].register_forward_hook(lambda m, args, out: keep("final", out))
with torch.inference_mode():
    logits = model(**tokenizer(TEXT, return_tensors="pt"), use_cache=False).logits[0, POSITION].double()
    # The one direction that every part is read along: the unembedding's row through the norm, its scale frozen.
    target = tokenizer(TARGET, add_special_tokens=False)["input_ids"][0] if TARGET else int(logits.argmax())
    row_D, logit = head.weight[target].double(), logits[target]
    if DISTRACTOR:
        distractor = tokenizer(DISTRACTOR, add_special_tokens=False)["input_ids"][0]
        row_D, logit = row_D - head.weight[distractor].double(), logit - logits[distractor]
    sigma = (kept["final"].square().mean() + norm.variance_epsilon).sqrt()
    direction_D = row_D * norm.weight.double() / sigma

    parts = {"token embedding": float(kept["embedding"] @ direction_D)}
    for index, layer in enumerate(layers):
        read_HK = (layer.self_attn.o_proj.weight.T.double() @ direction_D).view(
            model.config.num_attention_heads, -1
        )
        heads_H = (kept["z", index].view_as(read_HK) * read_HK).sum(-1)
        parts |= {f"L{index}H{number}": float(value) for number, value in enumerate(heads_H)}
        parts[f"MLP {index}"] = float(kept["mlp", index] @ direction_D)

for name, value in sorted(parts.items(), key=lambda item: -abs(item[1])):
    print(f"{value:+.6f} {name}")
print(f"{sum(parts.values()):+.6f} sum of all parts; the model's logit is {float(logit):+.6f}")
