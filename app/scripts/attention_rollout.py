"""Attention rollout with plain transformers: one weight per token or patch, read at one position."""

import numpy as np
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

MODEL = "sentence-transformers/all-MiniLM-L6-v2"
TEXT = "The cat sat on the mat because it was tired."
IMAGE = None
RESIDUAL_SHARE = 0.5
POSITION = -1  # -1: class token of a picture, mean of all tokens of an encoder, last token of a decoder

model = AutoModel.from_pretrained(MODEL, dtype=torch.float32, attn_implementation="eager").eval()
if IMAGE is None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    inputs = tokenizer(TEXT, return_tensors="pt")
    names = tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])
else:
    if IMAGE.startswith("digits:"):
        from sklearn.datasets import load_digits

        grey = load_digits().images[int(IMAGE.removeprefix("digits:"))]
        picture = Image.fromarray(np.rint(grey * 255 / 16).astype(np.uint8)).convert("RGB")
    else:
        picture = Image.open(IMAGE).convert("RGB")
    inputs = AutoImageProcessor.from_pretrained(MODEL)(images=picture, return_tensors="pt")
    names = None
with torch.inference_mode():
    patterns = model(**inputs, output_attentions=True).attentions
eye = torch.eye(patterns[0].shape[-1])
rollout = eye
for pattern in patterns:
    mixing = (1 - RESIDUAL_SHARE) * pattern[0].mean(0) + RESIDUAL_SHARE * eye
    rollout = mixing @ rollout
if POSITION >= 0:
    weights = rollout[POSITION]
elif IMAGE is not None:
    weights = rollout[0]
elif model.config.model_type in ("bert", "roberta", "mpnet"):
    weights = rollout.mean(0)
else:
    weights = rollout[-1]
for position, weight in enumerate(weights.tolist()):
    print(position, f"{weight:.6f}", names[position] if names else "")
