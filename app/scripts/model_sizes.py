"""Parameters and bytes with plain transformers; a tied tensor is counted once."""

from collections import Counter

import torch
from transformers import AutoConfig, AutoModel

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"

model = AutoModel.from_pretrained(MODEL, dtype=torch.float32)
parameters = Counter()
for name, tensor in model.named_parameters():
    parameters[".".join(part for part in name.split(".") if not part.isdigit())] += tensor.numel()
for name, n in parameters.most_common():
    print(f"{n:14,d} {4 * n:14,d} bytes  {name}")

config = AutoConfig.from_pretrained(MODEL)
kv_heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
print("KV cache bytes per token in float32:", 2 * 4 * config.num_hidden_layers * kv_heads * head_dim)
