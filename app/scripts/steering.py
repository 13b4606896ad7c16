"""Steering with plain transformers: add a difference of means after one layer, or keep it out of every layer."""

import re

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
TEXT = "I went to the new restaurant last night, and the food was"
POSITIVES = "The film was terrible|The day was horrible|The meal was disgusting"
NEGATIVES = "The film was wonderful|The day was amazing|The meal was delicious"
DIRECTION = ""
POSITION = "last"
MODE = "add"
STRENGTH = 1.0
LAYER = 20
MAX_NEW_TOKENS = 30

tokenizer = AutoTokenizer.from_pretrained(MODEL)
model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
layers = model.model.layers
assert not DIRECTION, "a sparse autoencoder's feature is read by Slimscope: see its command line"
assert POSITION == "last", "this short script reads the prompts' last token"
n_blocks = LAYER if LAYER >= 0 else len(layers) // 2
assert n_blocks, (
    "after 0 blocks the direction would go into the embedding, which this short script leaves alone"
)


def last_token_D(text):
    """The residual stream at the text's last token, after ``n_blocks`` blocks."""
    kept = []
    hook = layers[n_blocks - 1].register_forward_hook(lambda module, args, output: kept.append(output))
    with torch.inference_mode():
        model(**tokenizer(text, return_tensors="pt"), use_cache=False)
    hook.remove()
    return kept[0][0, -1]


def mean_D(prompts):
    """The mean over prompts that are separated by bars or new lines."""
    return torch.stack([last_token_D(p.strip()) for p in re.split(r"[\n|]", prompts) if p.strip()]).mean(0)


vector_D = mean_D(POSITIVES) - mean_D(NEGATIVES)
unit_D = vector_D / vector_D.norm()


def without(x):
    """The part of x that is orthogonal to the direction."""
    return x - (x @ unit_D)[..., None] * unit_D


def say(strength):
    """The next token's log-probabilities and a greedy continuation, steered."""
    hooks = []
    if MODE == "add":
        hooks.append(
            layers[n_blocks - 1].register_forward_hook(lambda m, args, out: out + strength * vector_D)
        )
    elif strength:
        hooks.append(model.model.embed_tokens.register_forward_hook(lambda m, args, out: without(out)))
        for layer in layers:
            for module in (layer.self_attn.o_proj, layer.mlp.down_proj):
                hooks.append(module.register_forward_hook(lambda m, args, out: without(out)))
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    log_p, n_prompt = None, ids.shape[1]
    with torch.inference_mode():
        for _ in range(MAX_NEW_TOKENS):
            logits = model(ids, use_cache=False).logits[0, -1]
            log_p = logits.log_softmax(-1) if log_p is None else log_p
            if logits.argmax() == tokenizer.eos_token_id:
                break
            ids = torch.cat([ids, logits.argmax().view(1, 1)], 1)
    for hook in hooks:
        hook.remove()
    return log_p, tokenizer.decode(ids[0, n_prompt:])


before, plain = say(0.0)
after, steered = say(STRENGTH if MODE == "add" else 1.0)
print("unsteered", repr(plain))
print("steered", repr(steered))
print("KL(unsteered || steered)", float((before.exp() * (before - after)).sum()))
