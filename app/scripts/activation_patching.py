"""Activation patching with plain transformers: one hooked forward pass per cell, residual stream, MLP or attention."""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
TEXT = "When Mary and John went to the store, John gave a drink to"
CORRUPTED = "When Mary and John went to the store, Mary gave a drink to"
NODE = "residual"
METRIC = "logit_difference"
TARGET = " Mary"
DISTRACTOR = " John"
DIRECTION = "denoising"

tokenizer = AutoTokenizer.from_pretrained(MODEL)
model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
layers = model.model.layers
assert NODE in ("residual", "attention_out", "mlp_out"), "this short script patches no single heads"
assert METRIC == "logit_difference", "this short script measures a logit difference"
clean, corrupted = (tokenizer(text, return_tensors="pt")["input_ids"] for text in (TEXT, CORRUPTED))
assert clean.shape == corrupted.shape, "both prompts must have as many tokens"


def token(text, logits):
    """The id of a word that is one token; of the top prediction where none is named."""
    return tokenizer(text, add_special_tokens=False)["input_ids"][0] if text else int(logits.argmax())


def module(layer):
    """Whose input (residual) or output is patched."""
    return {"residual": layer, "attention_out": layer.self_attn, "mlp_out": layer.mlp}[NODE]


def hooked(layer, change):
    """Let ``change`` see, and perhaps replace, this layer's node in every forward pass."""
    if NODE == "residual":
        return layer.register_forward_pre_hook(lambda m, args: (change(args[0]), *args[1:]))
    return module(layer).register_forward_hook(
        lambda m, args, out: (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)
    )


def run(ids):
    """Logits at the last position."""
    with torch.inference_mode():
        return model(ids, use_cache=False).logits[0, -1]


source, base = (clean, corrupted) if DIRECTION == "denoising" else (corrupted, clean)
states = []
hooks = [hooked(layer, lambda state: states.append(state.clone()) or state) for layer in layers]
run(source)
for hook in hooks:
    hook.remove()
logits = {"clean": run(clean), "corrupted": run(corrupted)}
good, bad = token(TARGET, logits["clean"]), token(DISTRACTOR, logits["corrupted"])
ends = {name: float(z[good] - z[bad]) for name, z in logits.items()}
print("clean", ends["clean"], "corrupted", ends["corrupted"])
for number, layer in enumerate(layers):
    for position in range(base.shape[1]):

        def write(state, number=number, position=position):
            """The source run's value at this cell."""
            state = state.clone()
            state[0, position] = states[number][0, position]
            return state

        hook = hooked(layer, write)
        z = run(base)
        hook.remove()
        recovered = (float(z[good] - z[bad]) - ends["corrupted"]) / (ends["clean"] - ends["corrupted"])
        print("layer", number, "position", position, "recovered", recovered)
