"""Cosine similarity of two texts, split into its tokens, with plain transformers (mean pooling)."""

import torch
from transformers import AutoModel, AutoTokenizer

MODEL = "sentence-transformers/all-MiniLM-L6-v2"
TEXT = "The bank raised its interest rates."
SECOND = "We sat on the bank of the river."

tokenizer = AutoTokenizer.from_pretrained(MODEL)
model = AutoModel.from_pretrained(MODEL, dtype=torch.float32).eval()


def unit_shares(inputs):
    """Each token's share of the unit sentence vector [tokens, d_model]; tokens masked out have none."""
    with torch.inference_mode():
        vectors = model(**inputs).last_hidden_state[0].double()
    vectors = vectors * inputs["attention_mask"][0, :, None]
    return vectors / vectors.sum(0).norm()


sides = [tokenizer(text, return_tensors="pt") for text in (TEXT, SECOND)]
first, second = map(unit_shares, sides)
cosine = float((first @ second.T).sum())
print("cosine", f"{cosine:.6f}")
for inputs, mine, other in ((sides[0], first, second), (sides[1], second, first)):
    contributions = mine @ other.sum(0)
    for position, token in enumerate(tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])):
        masked = {name: values.clone() for name, values in inputs.items()}
        masked["attention_mask"][0, position] = 0
        without = float(unit_shares(masked).sum(0) @ other.sum(0))
        print(position, f"{contributions[position]:.6f} {cosine - without:.6f}", token)
