"""Ablation of every head and MLP with plain hooks, one whole forward pass each; for models with Llama's module names."""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
TEXT = "When Mary and John went to the store, John gave a drink to"
ABLATION = "mean"
DOCUMENTS = ""
assert not DOCUMENTS, "this script scans one text; put a document into TEXT"
assert ABLATION in ("zero", "mean"), "this script knows zero and mean"

tokenizer = AutoTokenizer.from_pretrained(MODEL)
model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
layers, config = model.model.layers, model.config
size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def read(hooked=None, hook=None):
    """Log probabilities of the model, with one hook in place."""
    handle = hooked.register_forward_pre_hook(hook) if hooked is not None else None
    with torch.inference_mode():
        log_p = model(ids).logits[0].log_softmax(-1)
    if handle is not None:
        handle.remove()
    return log_p


def instead(output):
    """What an ablated component puts out."""
    return torch.zeros_like(output) if ABLATION == "zero" else output.mean(1, keepdim=True).expand_as(output)


def without_head(head):
    """Replace one head's weighted values before the output projection."""

    def hook(module, args):
        z = args[0].clone()
        span = slice(head * size, (head + 1) * size)
        z[..., span] = instead(args[0][..., span])
        return (z,)

    return hook


whole = read()
loss = -whole[:-1].gather(-1, ids[0, 1:, None]).mean()
for number, layer in enumerate(layers):
    for name in [*range(config.num_attention_heads), "MLP"]:
        if name == "MLP":
            handle = layer.mlp.register_forward_hook(lambda module, args, output: instead(output))
            ablated = read()
            handle.remove()
        else:
            ablated = read(layer.self_attn.o_proj, without_head(name))
        added = -ablated[:-1].gather(-1, ids[0, 1:, None]).mean() - loss
        kl = (whole.exp() * (whole - ablated)).sum(-1).mean()
        print(number, name, f"{added:.6f} {kl:.6f}")
