"""Round to nearest in plain torch: how far every linear weight moves, scales stored in float16."""

import torch
from transformers import AutoModel

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
BITS = 8
GROUP_SIZE = "channel"
SCHEME = "symmetric"

model = AutoModel.from_pretrained(MODEL, dtype=torch.float32)
low, high = -(2 ** (BITS - 1)), 2 ** (BITS - 1) - 1
for name, module in model.named_modules():
    if not isinstance(module, torch.nn.Linear):
        continue
    weight = module.weight.detach()
    grouped = weight.reshape(len(weight), -1, weight.shape[1] if GROUP_SIZE == "channel" else int(GROUP_SIZE))
    smallest, largest = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
    if SCHEME == "symmetric":
        scale = torch.maximum(-smallest, largest) / ((2**BITS - 1) / 2)
        zero = torch.zeros_like(scale)
    else:
        scale = (largest.clamp(min=0) - smallest.clamp(max=0)) / (2**BITS - 1)
    scale = scale.masked_fill(scale == 0, 1).half()
    if SCHEME == "affine":
        zero = (low - smallest.clamp(max=0) / scale.float()).clamp(low, high).round()
    codes = (grouped / scale.float() + zero).clamp(low, high).round()
    rounded = ((codes - zero).half() * scale).float()
    print(f"{((rounded - grouped).norm() / grouped.norm()).item():.6f} {name}")
