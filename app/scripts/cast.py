"""A cast in plain torch: how far every parameter moves."""

import torch
from transformers import AutoModel

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
DTYPE = "bfloat16"

model = AutoModel.from_pretrained(MODEL, dtype=torch.float32)
for name, weight in model.named_parameters():
    moved = weight.detach().to(getattr(torch, DTYPE)).float() - weight.detach()
    print(f"{(moved.norm() / weight.detach().norm()).item():.6f} {name}")
